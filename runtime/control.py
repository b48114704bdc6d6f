"""The control loop: observe, ask, act, at a fixed rate. It never waits for the policy.

A chunk is executed row by row; when its rows are used up the arm holds, the policy is asked about what the cameras
and joints show then, and the answer is executed from its first row. What a target may do to the arm (range, speed,
first move) is the arm's own business: the loop sends targets and is told what was really sent.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import SafetyStop, SmolVLAError
from .inference import Chunk, InferenceThread, Observation

STALE_FRAME_S = 0.5  # older frames are not shown to the policy
CAMERA_FAULT_S = 2.0  # a camera without a fresh frame for this long ends the run
LOST_READS = 5  # consecutive failed reads that end the run
BAD_CHUNKS = 3  # consecutive non-finite chunks that end the run


class Frame(Protocol):
    """An image and when it was taken."""

    @property
    def image(self) -> NDArray[np.uint8]: ...
    @property
    def time_s(self) -> float: ...


class JointState(Protocol):
    """One reading of the joints, in robot units."""

    @property
    def position(self) -> NDArray[np.float64]: ...


class Arm(Protocol):
    """What the loop needs of an arm; each raises one of the loop's `faults` when it fails."""

    def read(self) -> JointState: ...
    def send(self, target: NDArray[np.floating], /) -> object:
        """Step towards `target`, [dof] in robot units."""

    def hold(self) -> object:
        """Send the last goal again."""


@dataclass
class Counts:
    """What happened, in ticks unless said."""

    ticks: int = 0
    acted: int = 0
    held: int = 0  # no action was there
    missed: int = 0  # ticks that never ran because an earlier one took too long
    failed_reads: int = 0
    stale_frames: int = 0
    bad_chunks: int = 0  # chunks that held a NaN or an infinity


@dataclass(frozen=True)
class Tick:
    """Shown to `watch` after every tick."""

    elapsed_s: float  # since the first action; 0 before
    position: NDArray[np.float64]
    queued: int
    counts: Counts


@dataclass
class Log:
    """Everything the summary is made of."""

    counts: Counts = field(default_factory=Counts)
    chunks: list[Chunk] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)  # start of each tick after its due time
    busy_ms: list[float] = field(default_factory=list)  # work in each tick


class ControlLoop:
    """Runs one arm until `seconds` after the first action, or until interrupted."""

    def __init__(
        self,
        arm: Arm,
        frames: Mapping[str, Callable[[], Frame]],
        inference: InferenceThread,
        *,
        fps: float,
        rows: int,
        seconds: float | None,
        faults: tuple[type[Exception], ...],
        patience_s: float = 60.0,
        watch: Callable[[Tick], None] = lambda _: None,
    ) -> None:
        """frames: camera name -> its latest frame. rows: how many rows of a chunk are executed. faults: what arm and
        cameras raise when they fail; one failed read is bridged, more end the run with SafetyStop. patience_s: how
        long a chunk may take."""
        self.arm, self.frames, self.inference = arm, frames, inference
        self.period_s, self.rows, self.seconds, self.faults = 1 / fps, rows, seconds, faults
        self.patience_s, self.watch, self.log = patience_s, watch, Log()
        self._queue: deque[NDArray[np.float32]] = deque()
        self._position: NDArray[np.float64] | None = None
        self._lost_reads = self._bad_chunks = 0
        self._asked_s = 0.0
        self._images: dict[str, NDArray[np.uint8]] = {}  # the frames of this tick that are fresh

    def run(self) -> Log:
        """-> what happened. Raises SafetyStop when arm, cameras or policy fail for longer than can be bridged."""
        due = time.monotonic()
        first_action: float | None = None
        while True:
            now = time.monotonic()
            if now < due:
                time.sleep(due - now)
            start = time.monotonic()
            if first_action is not None and self.seconds is not None and start - first_action >= self.seconds:
                return self.log
            self.log.late_ms.append(1e3 * (start - due))
            self._read()
            self._look()
            self._collect()
            if self._act() and first_action is None:
                first_action = start
            self._ask()
            self.log.counts.ticks += 1
            self.log.busy_ms.append(1e3 * (time.monotonic() - start))
            elapsed = 0.0 if first_action is None else time.monotonic() - first_action
            if self._position is not None:
                self.watch(Tick(elapsed, self._position, len(self._queue), self.log.counts))
            due += self.period_s
            behind = int((time.monotonic() - due) / self.period_s)
            if behind > 0:  # never catch up in a burst
                due += behind * self.period_s
                self.log.counts.missed += behind

    def _read(self) -> None:
        try:
            self._position = self.arm.read().position
            self._lost_reads = 0
        except self.faults as e:
            self._lost_reads += 1
            self.log.counts.failed_reads += 1
            if self._lost_reads >= LOST_READS or self._position is None:
                raise SafetyStop(f"the arm cannot be read ({self._lost_reads} times in a row): {e}") from e

    def _look(self) -> None:
        """Take the fresh frames; a camera that gave none for too long ends the run, whatever the policy is doing."""
        self._images = {}
        for name, latest in self.frames.items():
            try:
                frame = latest()
            except self.faults as e:
                raise SafetyStop(f"a camera failed: {e}") from e
            age_s = time.monotonic() - frame.time_s
            if age_s > CAMERA_FAULT_S:
                raise SafetyStop(f"camera '{name}' gave no new frame for {age_s:.1f} s")
            if age_s <= STALE_FRAME_S:
                self._images[name] = frame.image
        self.log.counts.stale_frames += len(self._images) < len(self.frames)

    def _collect(self) -> None:
        try:
            chunk = self.inference.poll()
        except SmolVLAError as e:
            raise SafetyStop(f"the policy failed: {e}") from e
        if chunk is None:
            if self.inference.busy and time.monotonic() - self._asked_s > self.patience_s:
                raise SafetyStop(f"the policy has not answered for {self.patience_s:.0f} s")
            return
        if not np.isfinite(chunk.actions).all():
            self._bad_chunks += 1
            self.log.counts.bad_chunks += 1
            if self._bad_chunks >= BAD_CHUNKS:
                raise SafetyStop(f"the policy gave {BAD_CHUNKS} chunks in a row that are not finite")
            return
        self._bad_chunks = 0
        self.log.chunks.append(chunk)
        self._queue.extend(chunk.actions[: self.rows])

    def _act(self) -> bool:
        """Send the next action, or hold; whether there was one."""
        try:
            if not self._queue:
                self.arm.hold()
                self.log.counts.held += 1
                return False
            self.arm.send(self._queue.popleft())
        except self.faults as e:
            raise SafetyStop(f"the arm cannot be commanded: {e}") from e
        self.log.counts.acted += 1
        return True

    def _ask(self) -> None:
        """Ask for a chunk once the queue is empty, on fresh frames only."""
        if self._queue or self.inference.busy or self._lost_reads or self._position is None:
            return
        if len(self._images) == len(self.frames):
            self._asked_s = time.monotonic()
            self.inference.request(Observation(self._images, self._position))
