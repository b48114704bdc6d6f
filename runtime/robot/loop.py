"""The control loop: observe, ask, act, at a fixed rate. It never waits for the policy.

run_state.py has the states. What a target may do to the arm (range, speed, first move) is checked
by the arm: the loop sends targets, learns what was really sent, and learns when the arm must stop.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ...core.errors import DeviceError, SafetyStop
from ...devices.arm.motion import Emitted
from ...devices.arm.so101 import SO101
from ...devices.arm.telemetry import JointState
from ...devices.cameras.camera_watch import CameraWatch
from . import chunks
from .camera_monitor import CameraMonitor, Images
from .chunk_judge import ChunkJudge
from .chunks import ChunkQueue
from .inference import ActionChunk, ChunkRequest, InferenceThread
from .keys import Key, Operator
from .run_state import Phase, RunState
from .run_statistics import Distribution, RunStatistics

T = TypeVar("T")
AGAIN_S = 0.75  # a held key repeats sooner than this; later, the stop key was pressed again


@dataclass(frozen=True)
class Tick:
    """What one tick did, for `LoopParts.watch`. doing: run, hold, stop, park."""

    elapsed_s: float  # since the first action; 0 before
    doing: str
    state: JointState
    emitted: Emitted
    queued: int  # actions left
    missed: int  # ticks so far
    late_ms: float
    read_ms: float
    write_ms: float
    seam_deg: float | None = None
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoopParts:
    """What the loop works with.

    say: prints a line and returns at once. interrupted: whether a first Ctrl-C has come. watch:
    gets every tick. answered: gets every finite chunk. patience_s: how long a chunk may take.
    degrees_per_unit: [dof], 0 for a joint without degrees.
    """

    arm: SO101
    cameras: CameraWatch
    inference: InferenceThread
    queue: ChunkQueue
    operator: Operator
    say: Callable[[str], None]
    interrupted: Callable[[], bool]
    watch: Callable[[Tick], None] = lambda _: None
    answered: Callable[[ActionChunk], None] = lambda _: None
    patience_s: float = 60.0
    degrees_per_unit: ArrayLike = 1.0


class ControlLoop:
    """Runs one arm until `seconds` after the first action, or until somebody ends it."""

    def __init__(
        self,
        parts: LoopParts,
        *,
        fps: float,
        seconds: float | None,
        statistics: RunStatistics | None = None,
    ) -> None:
        self.parts, self.period_s = parts, 1 / fps
        self.seconds = math.inf if seconds is None else seconds
        self.statistics = statistics or RunStatistics()
        self.state = RunState()
        self._cameras = CameraMonitor(parts.cameras, self.statistics)
        self._judge = ChunkJudge(parts.queue.latency, self.statistics.counts)
        self._first_action_s: float | None = None
        self._requested_s = 0.0
        self._forgot_s = 0.0  # answers to older observations are not executed
        self._stop_key_s: float | None = None  # when it was last pressed, during this stop
        self._interrupt_seen = False
        self._seam_deg: float | None = None  # of this tick
        self._events: list[str] = []  # of this tick

    @property
    def parked(self) -> bool:
        return self.state.phase is Phase.DONE

    def run(self) -> RunStatistics:
        """-> what happened, with the arm parked.

        Raises SafetyStop when arm, cameras or policy fail for too long (parked where the arm
        works), KeyboardInterrupt after a first Ctrl-C (parked too, but not during a stop: then
        nothing moves).
        """
        statistics = self.statistics
        due = last = time.monotonic()
        while True:
            now = time.monotonic()
            if now < due:
                time.sleep(due - now)
            start = time.monotonic()
            late_ms = 1e3 * (start - due)
            statistics.late_ms.add(late_ms)
            if statistics.counts.ticks:
                statistics.period_error_ms.add(1e3 * abs(start - last - self.period_s))
            last = start
            self._tick(start, late_ms)
            if self.parked:
                if self.state.outcome is not None:
                    raise self.state.outcome
                return statistics
            statistics.busy_ms.add(1e3 * (time.monotonic() - start))
            due += self.period_s
            behind = int((time.monotonic() - due) / self.period_s)
            if behind > 0:  # never catch up in a burst
                due += behind * self.period_s
                statistics.counts.missed += behind

    def _tick(self, now: float, late_ms: float) -> None:
        parts, statistics = self.parts, self.statistics
        self._seam_deg, self._events = None, []
        self._check_end(now)
        try:
            state, read_ms = _timed(statistics.read_ms, parts.arm.read)
        except DeviceError as e:
            raise SafetyStop(f"the arm cannot be read: {e}") from e
        if any(state.missed):
            statistics.counts.unanswered += 1
        images = self._observe(now)
        pressed = parts.operator.keys()  # apart: ruff takes `.keys()` in a loop for a dict's
        for key in pressed:
            self._obey(key, now)
        self._check_stop()
        try:
            (emitted, doing), write_ms = _timed(statistics.write_ms, lambda: self._act(now))
        except DeviceError as e:
            raise SafetyStop(f"the arm cannot be commanded: {e}") from e
        if self.state.phase is Phase.RUN:
            self._ask(images, state, now)
        for text in (*parts.arm.new_warnings(), *parts.cameras.warnings()):
            statistics.warn(text)
            self._event(f"warning: {text}")
        statistics.counts.ticks += 1
        queued = len(parts.queue)
        statistics.queued.add(queued)
        parts.watch(
            Tick(
                elapsed_s=self._elapsed_s(now),
                doing=doing,
                state=state,
                emitted=emitted,
                queued=queued,
                missed=statistics.counts.missed,
                late_ms=late_ms,
                read_ms=read_ms,
                write_ms=write_ms,
                seam_deg=self._seam_deg,
                events=tuple(self._events),
            )
        )

    def _elapsed_s(self, now: float) -> float:
        """Since the first action; 0 before."""
        return 0.0 if self._first_action_s is None else now - self._first_action_s

    def _check_end(self, now: float) -> None:
        """A first Ctrl-C parks, or ends a stop without any motion; so does the end of the time."""
        phase = self.state.phase
        if self.parts.interrupted() and not self._interrupt_seen:
            self._interrupt_seen = True
            if phase is Phase.STOP:
                raise KeyboardInterrupt
            if phase is Phase.RUN:
                self._park(KeyboardInterrupt())
        elif phase is Phase.RUN and self._elapsed_s(now) >= self.seconds:
            self._park(None)

    def _observe(self, now: float) -> Images:
        """Pictures and a new chunk. Where cameras or policy fail, the arm is parked: it works."""
        if self.state.ending:
            return {}
        stopped = self.state.phase is Phase.STOP
        try:
            images = self._cameras.look(now, patient=stopped)
            if not stopped:
                self._collect(now)
        except SafetyStop as e:
            self._park(e)
            return {}
        return images

    def _collect(self, now: float) -> None:
        """Put a new chunk into the queue. Raises SafetyStop where the policy failed."""
        inference, queue, statistics = self.parts.inference, self.parts.queue, self.statistics
        try:
            chunk = inference.poll()
        except (Exception, SystemExit) as e:
            raise SafetyStop(f"the policy failed: {e}") from e
        if chunk is None:
            if inference.busy and now - self._requested_s > self.parts.patience_s:
                raise SafetyStop(f"the policy has not answered for {self.parts.patience_s:.0f} s")
            return
        if chunk.request.time_s < self._forgot_s:
            return
        late = self._judge.is_late(chunk, now)
        if not self._judge.is_finite(chunk, now):
            self._event("chunk is not finite")
            return
        self.parts.answered(chunk)
        statistics.chunk_ms.add(1e3 * chunk.latency_s)
        statistics.preprocess_ms.add(chunk.timing.preprocess_ms)
        statistics.prefix_ms.add(chunk.timing.prefix_ms)
        statistics.denoise_ms.add(chunk.timing.denoise_ms)
        if late:
            statistics.counts.late_chunks += 1
            self._event(f"chunk thrown away: it came after {now - chunk.request.time_s:.2f} s")
            return
        seam = queue.join(chunk.actions, chunk.request.continuation, now)
        if seam is not None:
            per_unit = np.asarray(self.parts.degrees_per_unit)
            self._seam_deg = chunks.degrees(seam.step, per_unit)
            statistics.seams_deg.add(self._seam_deg)
            statistics.gaps_deg.add(chunks.degrees(seam.gap, per_unit))

    def _obey(self, key: Key, now: float) -> None:
        arm, state = self.parts.arm, self.state
        if key == "stop":
            last, self._stop_key_s = self._stop_key_s, now
            if arm.stopped and last is not None and now - last > AGAIN_S:
                raise SafetyStop("the operator switched the motors off", at_once=True)
            arm.stop("the operator pressed stop")
        elif state.phase is Phase.STOP:
            try:
                arm.resume()
            except DeviceError as e:
                if key == "quit":
                    raise SafetyStop(str(e)) from e
                self._event(f"{e}")
                return
            self._stop_key_s = None
            if state.ending or key == "quit":
                self._park(state.outcome)
            else:
                state.resume()
                self._event("going on, slowly at first")
        elif key == "quit" and state.phase is Phase.RUN:
            self._park(None)

    def _check_stop(self) -> None:
        """Enter the latched stop when the arm requires it. Without an operator the run ends."""
        reason = self.parts.arm.stopped
        if not reason:
            return
        entered = self.state.phase is not Phase.STOP
        if entered:
            self.statistics.counts.stops += 1
        if not self.parts.operator.present:
            raise SafetyStop(reason)
        if entered:
            self.state.stop()
            self._forget()
            self._event(
                f"STOPPED: {reason}. The arm holds; r goes on, q parks, "
                "Ctrl-C or space again switches the motors off"
            )

    def _act(self, now: float) -> tuple[Emitted, str]:
        """-> what was sent, and what the arm is doing."""
        arm, queue, counts = self.parts.arm, self.parts.queue, self.statistics.counts
        if self.state.phase is Phase.STOP:
            return arm.hold(), "stop"
        if self.state.phase is Phase.PARK:
            arrived, emitted = arm.park()
            if arrived:
                self.state.arrived()
            return emitted, "park"
        action = queue.next
        if action is None:
            counts.held += 1
            if self._first_action_s is not None:
                counts.starved += 1
            return arm.hold(), "hold"
        emitted = arm.send(action.values, action.due_s)
        if emitted.stale:
            self._forget()  # the rest is as old: request a new chunk
        elif emitted.ramping:
            queue.wait()  # until the arm is where the chunk begins
        else:
            queue.done(followed=not emitted.rejected)
        if emitted.rejected:
            counts.rejected += 1
            self._event(f"rejected: {emitted.rejected}", aloud=counts.rejected == 1)
        counts.acted += 1
        if self._first_action_s is None:
            self._first_action_s = now
        return emitted, "run"

    def _ask(self, images: Images, state: JointState, now: float) -> None:
        """Request a chunk when it is time, with usable pictures and where every joint answered."""
        inference, queue = self.parts.inference, self.parts.queue
        if inference.busy or not queue.wants_chunk or not images or any(state.missed):
            return
        self._requested_s = now
        inference.request(
            ChunkRequest(images, state.position, queue.continuation(), time.monotonic())
        )

    def _park(self, outcome: BaseException | None) -> None:
        """End the run: first the arm goes back."""
        self.state.park(outcome)
        why = f": {outcome}" if isinstance(outcome, SafetyStop) else ""
        self._event(f"parking the arm, {self.parts.arm.begin_park():.1f} s{why}")

    def _forget(self) -> None:
        """Drop the rest of the chunk, and the one being computed."""
        self.parts.queue.clear()
        self._forgot_s = time.monotonic()

    def _event(self, text: str, *, aloud: bool = True) -> None:
        self._events.append(text)
        if aloud:
            self.parts.say(text)


def _timed(into: Distribution, call: Callable[[], T]) -> tuple[T, float]:
    """-> the result, and milliseconds, which are added to `into`."""
    start = time.perf_counter()
    result = call()
    took_ms = 1e3 * (time.perf_counter() - start)
    into.add(took_ms)
    return result, took_ms
