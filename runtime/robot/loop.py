"""The control loop: observe, ask, act, at a fixed rate. It never waits for the policy.

    run    actions of the queue are sent, one a tick; while there is none the arm holds
    stop   latched: the arm holds until the operator resumes; without an operator, or at Ctrl-C, the run ends
    park   the arm goes back to where it lay, then the run ends

What a target may do to the arm (range, speed, first move) is the arm's own business: the loop sends targets, is told
what was really sent, and is told when the arm wants to stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import SafetyStop
from . import chunks
from .chunks import ChunkQueue
from .inference import Chunk, InferenceThread, Observation

if TYPE_CHECKING:  # who runs the loop hands it the devices
    from ...devices.arm.motion import Emitted
    from ...devices.arm.so101 import SO101
    from ...devices.arm.telemetry import JointState
    from ...devices.cameras.camera_watch import CameraWatch
    from .keys import Operator

CAMERA_FAULT_S = 2.0  # a camera without a usable picture for this long ends the run
BAD_CHUNKS, BAD_CHUNKS_S = (
    3,
    10.0,
)  # so many non-finite chunks in a row, or within this time, end the run
AGAIN_S = 0.75  # a key held down repeats itself sooner; later, the stop key was pressed again


@dataclass
class Counts:
    """What happened, in ticks unless said."""

    ticks: int = 0
    acted: int = 0
    held: int = 0  # no action was there
    starved: int = 0  # of them: after the first action, outside stops
    rejected: int = 0  # actions the arm would not follow
    missed: int = 0  # ticks that never ran because an earlier one took too long
    unanswered: int = 0  # a joint did not answer
    blind: int = 0  # a camera had no usable picture
    bad_chunks: int = 0  # chunks that held a NaN or an infinity
    late_chunks: int = 0  # chunks thrown away because they took far too long
    stops: int = 0


@dataclass
class Log:
    """Everything the summary is made of."""

    counts: Counts = field(default_factory=Counts)
    chunks: list[Chunk] = field(default_factory=list)  # their pictures left out
    seams_deg: list[float] = field(default_factory=list)  # first step of a new chunk, as executed
    gaps_deg: list[float] = field(
        default_factory=list
    )  # how far two chunks disagree where they join
    period_error_ms: list[float] = field(default_factory=list)  # start to start, against the period
    late_ms: list[float] = field(default_factory=list)  # start of each tick after its due time
    busy_ms: list[float] = field(default_factory=list)  # work in each tick
    read_ms: list[float] = field(default_factory=list)
    capture_ms: list[float] = field(default_factory=list)  # taking the cameras' newest pictures
    picture_age_ms: list[float] = field(
        default_factory=list
    )  # since its capture, of the oldest of a tick
    write_ms: list[float] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)  # actions left
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tick:
    """Shown to `watch` after every tick. doing: run, hold, stop, park."""

    elapsed_s: float  # since the first action; 0 before
    doing: str
    state: JointState
    emitted: Emitted
    queued: int
    seam_deg: float | None
    events: tuple[str, ...]
    log: Log


@dataclass(frozen=True)
class Rig:
    """What a run is made of. faults: what the arm raises when it cannot be used; asked_to_end: whether a first Ctrl-C
    has come; patience_s: how long a chunk may take; degrees_per_unit: [dof]."""

    arm: SO101
    cameras: CameraWatch
    inference: InferenceThread
    queue: ChunkQueue
    faults: tuple[type[Exception], ...]
    keys: Operator
    say: Callable[[str], None]
    asked_to_end: Callable[[], bool]
    watch: Callable[[Tick], None] = lambda _: None
    answered: Callable[[Chunk], None] = lambda _: None
    patience_s: float = 60.0
    degrees_per_unit: Any = 1.0


class ControlLoop:
    """Runs one arm until `seconds` after the first action, or until somebody ends it."""

    def __init__(self, rig: Rig, *, fps: float, seconds: float | None) -> None:
        self.rig, self.period_s, self.log = rig, 1 / fps, Log()
        self.seconds = math.inf if seconds is None else seconds
        self._first_action_s: float | None = None
        self._asked_s = self._forgot_s = 0.0
        self._usable_s: dict[str, float] = {}  # when each camera last had a usable picture
        self._bad_s: list[float] = []
        self._bad_in_a_row = 0
        self._stop_key_s: float | None = None  # when it was last seen, during this stop
        self._stopping = self._parking = self._interrupted = False
        self.parked = False
        self._outcome: BaseException | None = None  # raised once the arm is parked
        self._seam_deg: float | None = None
        self._events: list[str] = []

    def run(self) -> Log:
        """-> what happened, with the arm parked. Raises SafetyStop when arm, cameras or policy fail for longer than
        can be bridged (parked where the arm itself is well), KeyboardInterrupt after a first Ctrl-C (parked too, but
        not out of a stop: then nothing moves any more)."""
        due = last = time.monotonic()
        while True:
            now = time.monotonic()
            if now < due:
                time.sleep(due - now)
            start = time.monotonic()
            self.log.late_ms.append(1e3 * (start - due))
            if self.log.counts.ticks:
                self.log.period_error_ms.append(1e3 * abs(start - last - self.period_s))
            last = start
            if self._tick(start):
                self.parked = True
                if self._outcome is not None:
                    raise self._outcome
                return self.log
            self.log.busy_ms.append(1e3 * (time.monotonic() - start))
            due += self.period_s
            behind = int((time.monotonic() - due) / self.period_s)
            if behind > 0:  # never catch up in a burst
                due += behind * self.period_s
                self.log.counts.missed += behind

    def _tick(self, now: float) -> bool:
        """One period; whether the run is over."""
        rig = self.rig
        self._seam_deg, self._events = None, []
        if rig.asked_to_end() and not self._interrupted:
            self._interrupted = True
            if self._stopping:
                raise KeyboardInterrupt
            if not self._parking:
                self._park(KeyboardInterrupt())
        elif self._elapsed_s(now) >= self.seconds and not self._parking and not self._stopping:
            self._park(None)
        try:
            state = self._timed(self.log.read_ms, rig.arm.read)
        except rig.faults as e:
            raise SafetyStop(f"the arm cannot be read: {e}") from e
        self.log.counts.unanswered += any(state.missed)
        images: dict[str, NDArray[np.uint8]] = {}
        if not self._parking:
            try:
                images = self._look(now)
                if not self._stopping:
                    self._collect(now)
            except SafetyStop as e:
                self._park(e)
        self._obey(rig.keys.keys(), now)
        self._heed_stop()
        try:
            done, emitted, doing = self._timed(self.log.write_ms, lambda: self._act(now))
        except rig.faults as e:
            raise SafetyStop(f"the arm cannot be commanded: {e}") from e
        if not self._parking and not self._stopping:
            self._ask(images, state, now)
        for text in (*rig.arm.new_warnings(), *rig.cameras.warnings()):
            self.log.warnings.append(text)
            self._event(f"warning: {text}")
        self.log.counts.ticks += 1
        self.log.queued.append(len(rig.queue))
        seam, events = self._seam_deg, tuple(self._events)
        rig.watch(
            Tick(
                self._elapsed_s(now), doing, state, emitted, len(rig.queue), seam, events, self.log
            )
        )
        return bool(done)

    def _elapsed_s(self, now: float) -> float:
        """Since the first action; 0 before."""
        return 0.0 if self._first_action_s is None else now - self._first_action_s

    def _look(self, now: float) -> dict[str, NDArray[np.uint8]]:
        """The pictures the policy may see. A camera that gave none for too long ends the run, whatever the policy is
        doing; not during a stop, when somebody may be mending it."""
        views = self._timed(self.log.capture_ms, self.rig.cameras.look)
        for name, view in views.items():
            if not view.problem or self._stopping:
                self._usable_s[name] = now
            elif now - self._usable_s.setdefault(name, now) > CAMERA_FAULT_S:
                raise SafetyStop(
                    f"camera '{name}' has had no usable picture for {CAMERA_FAULT_S:g} s: {view.problem}"
                )
        if any(view.problem for view in views.values()):
            self.log.counts.blind += 1
            return {}
        self.log.picture_age_ms.append(
            1e3 * (time.monotonic() - min(view.time_s for view in views.values()))
        )
        return {name: view.image for name, view in views.items()}

    def _collect(self, now: float) -> None:
        inference, queue, counts = self.rig.inference, self.rig.queue, self.log.counts
        try:
            chunk = inference.poll()
        except (Exception, SystemExit) as e:  # whatever it is, the arm itself is well
            raise SafetyStop(f"the policy failed: {e}") from e
        if chunk is None:
            if inference.busy and now - self._asked_s > self.rig.patience_s:
                raise SafetyStop(f"the policy has not answered for {self.rig.patience_s:.0f} s")
            return
        if chunk.observation.time_s < self._forgot_s:
            return  # it answers a question about a world before the stop
        age_s = (
            now - chunk.observation.time_s
        )  # more than its latency where the loop itself was held up
        late = queue.latency.is_late(age_s)
        queue.latency.add(chunk.latency_s)
        if not np.isfinite(chunk.actions).all():
            counts.bad_chunks += 1
            self._event("chunk is not finite")
            self._bad_s = [t for t in self._bad_s if now - t <= BAD_CHUNKS_S] + [now]
            self._bad_in_a_row += 1
            if max(len(self._bad_s), self._bad_in_a_row) >= BAD_CHUNKS:
                raise SafetyStop(f"the policy gave {BAD_CHUNKS} chunks that are not finite")
            return
        self._bad_in_a_row = 0
        self.rig.answered(chunk)
        self.log.chunks.append(replace(chunk, observation=replace(chunk.observation, images={})))
        if late:
            counts.late_chunks += 1
            self._event(f"chunk thrown away: it came after {age_s:.2f} s")
            return
        seam = queue.join(chunk.actions, chunk.observation.ask, now)
        if seam is not None:
            gap, step = (
                chunks.degrees(x, self.rig.degrees_per_unit) for x in (seam.gap, seam.step)
            )
            self._seam_deg = step
            self.log.seams_deg.append(step)
            self.log.gaps_deg.append(gap)

    def _obey(self, keys: Sequence[str], now: float) -> None:
        arm = self.rig.arm
        for key in keys:
            if key == "stop":
                last, self._stop_key_s = self._stop_key_s, now
                if arm.stopped and last is not None and now - last > AGAIN_S:
                    raise SafetyStop("the operator switched the motors off", at_once=True)
                arm.stop("the operator pressed stop")
            elif self._stopping:
                try:
                    arm.resume()
                except self.rig.faults as e:
                    if key == "quit":
                        raise SafetyStop(str(e)) from e
                    self._event(f"{e}")
                    continue
                self._stopping, self._stop_key_s = False, None
                if self._parking or key == "quit":
                    self._park(self._outcome)
                else:
                    self._event("going on, slowly at first")
            elif key == "quit" and not self._parking:
                self._park(None)

    def _heed_stop(self) -> None:
        """Enter the latched stop when the arm asks for it. Nobody there to end it: it ends the run."""
        reason = self.rig.arm.stopped
        if not reason:
            return
        self.log.counts.stops += not self._stopping
        if not self.rig.keys.present:
            raise SafetyStop(reason)
        if not self._stopping:
            self._stopping = True
            self._forget()
            self._event(
                f"STOPPED: {reason}. The arm holds; r goes on, q parks, Ctrl-C or space again switches the motors off"
            )

    def _act(self, now: float) -> tuple[bool, Emitted, str]:
        """-> (whether the run is over, what was sent, what the arm is doing)."""
        arm, queue, counts = self.rig.arm, self.rig.queue, self.log.counts
        if self._stopping:
            return False, arm.hold(), "stop"
        if self._parking:
            arrived, emitted = arm.park()
            return arrived, emitted, "park"
        action = queue.next
        if action is None:
            counts.held += 1
            counts.starved += self._first_action_s is not None
            return False, arm.hold(), "hold"
        emitted = arm.send(action.values, action.due_s)
        if emitted.stale:
            self._forget()  # the rest is as old: ask anew
        elif emitted.ramping:
            queue.wait()  # the whole schedule waits until the arm is where the chunk begins
        else:
            queue.done(followed=not emitted.rejected)
        if emitted.rejected:
            counts.rejected += 1
            self._event(f"rejected: {emitted.rejected}", aloud=counts.rejected == 1)
        counts.acted += 1
        if self._first_action_s is None:
            self._first_action_s = now
        return False, emitted, "run"

    def _ask(self, images: Mapping[str, NDArray[np.uint8]], state: JointState, now: float) -> None:
        """Ask for a chunk when it is time, on usable pictures and joints that answered only."""
        if (
            self.rig.inference.busy
            or not self.rig.queue.wants_chunk
            or not images
            or any(state.missed)
        ):
            return
        self._asked_s = now
        self.rig.inference.request(
            Observation(images, state.position, self.rig.queue.ask(), time.monotonic())
        )

    def _park(self, outcome: BaseException | None) -> None:
        """End the run: the arm goes back first."""
        self._outcome, self._parking = outcome, True
        why = f": {outcome}" if isinstance(outcome, SafetyStop) else ""
        self._event(f"parking the arm, {self.rig.arm.begin_park():.1f} s{why}")

    def _forget(self) -> None:
        """Drop what is left of the chunk, and the one being computed."""
        self.rig.queue.clear()
        self._forgot_s = time.monotonic()

    def _event(self, text: str, *, aloud: bool = True) -> None:
        self._events.append(text)
        if aloud:
            self.rig.say(text)

    def _timed(self, into: list[float], call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        into.append(1e3 * (time.perf_counter() - start))
        return result
