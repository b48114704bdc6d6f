"""The SO-101 follower arm: six STS3215 servos on one bus.

Nothing moves before `enable`, and `enable` never makes the arm jump. Every goal passes the
MotionShaper, every reading passes the Monitors. Leaving the context switches all servos off. A stop
that the monitors find is latched: the arm holds until `resume`. This module writes no EPROM
register. It is no safety-rated stop: that is the power switch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...core.errors import ArmError, DeviceError, listed
from ..bus.bus import FeetechBus
from ..bus.sts3215 import NO_LOAD_TICKS_PER_S, STREAMED, Register
from . import power
from .calibration import IDS, Calibration, joint_label
from .inspection import inspect
from .limits import JOINTS, Limits
from .monitors import STOPPING_BITS, Monitors
from .motion import Emitted, MotionCounts, MotionShaper
from .park import Park
from .power import ReleaseResult
from .telemetry import JointState, Telemetry
from .units import Units, to_values

# The servo's own profile is above the host's speed limit: it bounds a fault, not the motion.
ACCELERATION = 254
SPEED_HEADROOM = 1.5
# Torque_Limit of a servo that reports overload, overheat or overcurrent, 0.1 %.
UNLOADED_TORQUE = 200
TORQUE_CHECK_S = 0.5
RESTARTED = "torque went off by itself (restarted?). Check supply and cable"
# With a slow bus (a servo that answers after 5 ms), the rate falls, but no answer is lost.
REPLY_MARGIN_S = 0.015
JUMPS_LIMIT = 15
PARK_SETTLE_S = 2.0

log = logging.getLogger(__name__)


class SO101:
    """The arm on `port`, in `units`, within `limits`.

    rate_hz: how often `read` and `send` will be called. motors_off: never energise and never write
    a goal; `send` returns what it would have sent to an arm that follows. beat: called at each
    exchange with the arm, for a watchdog; its exception ends the run.

    Methods raise ArmError for refusals, BusError for servos that do not answer, BusLost when the
    port is gone.
    """

    def __init__(
        self,
        port: str,
        calibration: Calibration,
        units: Units,
        limits: Limits | None = None,
        rate_hz: float = 30.0,
        *,
        motors_off: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self.bus = FeetechBus(port, reply_margin_s=REPLY_MARGIN_S)
        self.calibration, self.units, self.motors_off = calibration, units, motors_off
        self.beat: Callable[[], None] = lambda: None
        self.stopped = ""  # why the arm holds until `resume`
        self._shaper = MotionShaper(calibration, units, self.limits, rate_hz)
        self._telemetry = Telemetry(self.bus, calibration, units)
        self._unloaded: set[int] = set()
        self._monitors: Monitors | None = None
        speed = np.ceil(SPEED_HEADROOM * self.limits.ticks_per_s(calibration))
        self._goal_velocities = np.minimum(NO_LOAD_TICKS_PER_S, speed).astype(int)
        percent = [self.limits.torque_pct] * (JOINTS - 1) + [self.limits.gripper_torque_pct]
        self.torque_limits = {i: round(10 * p) for i, p in zip(IDS, percent, strict=True)}
        self._torque_now = dict(self.torque_limits)
        # Time for repeated reads: half of a period. The rest of the tick needs the other half.
        self._budget_s = 0.5 / rate_hz
        self._state: JointState | None = None
        self._rest: NDArray[np.float64] | None = (
            None  # where it lay when it was switched on; None: it was on
        )
        self._park: Park | None = None
        self._warnings: list[str] = []
        self._torque_seen_s = 0.0
        self._enabled = self._was_on = self._touched = False

    def __enter__(self) -> SO101:
        self.connect()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            result = self.release()
        finally:
            self.bus.close()
        if result.unconfirmed:
            if error is None:
                raise ArmError(result.message)
            # Raise the first error: it says more than the result.
            log.error(result.message)

    @property
    def counts(self) -> MotionCounts:
        """MotionCounts since `enable`."""
        return self._shaper.counts

    @property
    def anomalies(self) -> dict[str, int]:
        """Errors on the line since `connect`, {name: count}, without zeros."""
        return dict(+self.bus.counters)

    def connect(self) -> tuple[str, ...]:
        """Open the bus and check the arm without a write. Returns warnings.

        ArmError lists every problem; then the port is closed again.
        """
        self.bus.open()
        try:
            findings = inspect(self.bus, self.calibration)
            if findings.problems:
                # Show the warnings too: that motors are on matters most when the run does not
                # start.
                head = f"the arm on {self.bus.path} is refused, nothing was written:"
                raise ArmError(listed(head, findings.problems + findings.warnings))
            self._monitors = Monitors(self.limits, findings.values)
        except BaseException:
            self.bus.close()
            raise
        self._was_on = any(values[Register.TORQUE_ENABLE] for values in findings.values.values())
        return findings.warnings

    def read(self) -> JointState:
        """Read all joints in one request and check them.

        A stop is then in `stopped`, a warning in `new_warnings`. BusError names joints that have
        never answered. Later it is raised only for an unusable line.
        """
        assert self._monitors is not None, "connect() comes first"
        self.beat()
        state = self._state = self._telemetry.read(self._budget_s)
        driven = self._enabled and not self.motors_off
        verdict = self._monitors.check(state, np.rint(self._shaper.goal) if driven else None)
        self._warnings += verdict.warnings
        if driven:
            for joint in verdict.ease:
                self._shaper.ease(joint, state.raw)
            self.stop(*verdict.stops)
            self._unload([joint for joint in verdict.unload if joint not in self._unloaded])
            if state.time_s - self._torque_seen_s >= TORQUE_CHECK_S:
                self._torque_seen_s = state.time_s
                for servo_id in self._telemetry.powered_off(self._budget_s):
                    self.stop(f"{joint_label(servo_id)}: {RESTARTED}")
        else:
            self._warnings += verdict.stops  # nothing to stop, but to be told
        return state

    def new_warnings(self) -> list[str]:
        """Warnings since the last call."""
        found, self._warnings = self._warnings, []
        return found

    def enable(self, *, far: bool = False) -> None:
        """Energise the arm where it is, one servo at a time. After a failure, everything is off
        again.

        far: the first target can be further away than `jump_deg`.
        """
        if not self.bus.is_open:
            raise ArmError("enable() before connect(). Connect first: it checks the arm.")
        if self._enabled:
            return
        if self.motors_off:
            goals = [int(raw) for raw in self.read().raw]
        else:
            self._touched = True
            try:
                goals = [
                    power.switch_on(self.bus, i, int(v), self.torque_limits[i], self.beat)
                    for i, v in zip(IDS, self._goal_velocities, strict=True)
                ]
            except BaseException:
                self.release()
                raise
        self._forget_stop()
        self._torque_seen_s = time.monotonic()
        self._shaper.start(goals, self._torque_seen_s, far=far)
        self._rest = None if self._was_on or self.motors_off else np.array(goals, np.float64)
        self._enabled = True
        self.read()

    def send(self, target: ArrayLike, due_s: float | None = None) -> Emitted:
        """Move towards `target`, [6] robot units. Returns what was sent.

        due_s: the time the target was meant for, monotonic; None is now. A target that cannot be
        used does not raise: the last goal is sent again. The same applies during a stop.
        """
        state = self._require_enabled("send")
        if self.stopped:
            return self.hold()
        emitted = self._shaper.shape(target, self._present(state), time.monotonic(), due_s)
        if self._shaper.jumps_in_a_row >= JUMPS_LIMIT:
            self.stop(f"{JUMPS_LIMIT} targets in a row: {emitted.rejected}")
        return self._emit(emitted)

    def hold(self) -> Emitted:
        """Send the last goal again."""
        state = self._require_enabled("hold")
        return self._emit(self._shaper.hold(self._present(state), time.monotonic()))

    def resume(self) -> None:
        """Follow again after a stop, slowly at first.

        ArmError if a servo is off: it is never switched on again in the same run.
        """
        self._require_enabled("resume")
        if not self.motors_off and (off := self._telemetry.powered_off()):
            raise ArmError(
                f"cannot resume: {', '.join(map(joint_label, off))} is off. Start again."
            )
        if not self.motors_off:
            self.bus.sync_write(Register.TORQUE_LIMIT, self.torque_limits)
        self._forget_stop()
        self._telemetry.trust()
        self._shaper.resume()

    def begin_park(self) -> float:
        """Start the move back to where the arm was switched on. Returns its duration in seconds."""
        self._require_enabled("begin_park")
        start, now = self._shaper.goal.copy(), time.monotonic()
        self._shaper.redirect()
        rest = start if self._rest is None else self._rest
        self._park = Park(start, rest, now, self.limits.ticks_per_s(self.calibration))
        return self._park.duration_s

    def park(self) -> tuple[bool, Emitted]:
        """One step of the move. Returns whether the arm has arrived, and what was sent."""
        assert self._park is not None, "begin_park() comes first"
        if self.stopped:
            return False, self.hold()
        now = time.monotonic()
        goal = np.rint(self._park.goal(now)).astype(np.int64)
        emitted = self.send(to_values(goal, self.calibration, self.units))
        over_s = now - self._park.end_s
        return over_s >= 0 and (not any(emitted.slewed) or over_s > PARK_SETTLE_S), emitted

    def release(self, *, soft: bool = False) -> ReleaseResult:
        """Switch every servo off and verify it. Can be called again.

        soft: lower the torque over 0.4 s first, so that the arm sinks instead of falling. Does not
        raise for servos or a port that fail: the result lists them.
        """
        was_enabled, self._enabled = self._enabled, False
        if not self.bus.is_open or not self._touched:
            return ReleaseResult({})  # an arm found energised stays as it was found
        try:
            if soft and was_enabled:
                with suppress(DeviceError):  # what follows tells what is left
                    power.sink(self.bus, self._torque_now, self.torque_limits, self.beat)
        finally:
            result = power.switch_off(self.bus)
        return result

    def stop(self, *reasons: str) -> None:
        """Hold from now on, until `resume`."""
        news = [reason for reason in reasons if reason not in self.stopped]
        if news and self.stopped:
            self._warnings.append(f"and now {'; '.join(news)}")
        self.stopped = "; ".join(filter(None, (self.stopped, *news)))

    def _forget_stop(self) -> None:
        assert self._monitors is not None, "connect() comes first"
        self._monitors.reset()
        self._unloaded.clear()
        self._torque_now, self.stopped = dict(self.torque_limits), ""

    def _unload(self, joints: list[int]) -> None:
        """Unload `joints`, also those that are found later during the stop."""
        if not joints:
            return
        assert self._state is not None
        self._unloaded.update(joints)
        for joint in joints:
            self._shaper.unload(joint, self._state.raw)
        weak = {IDS[j]: UNLOADED_TORQUE for j in joints if self._state.errors[j] & STOPPING_BITS}
        if weak:
            self._torque_now |= weak
            self.bus.sync_write(Register.TORQUE_LIMIT, weak)
        # Send it now: the caller may end the run without another tick.
        self.hold()

    def _present(self, state: JointState) -> NDArray[np.float64]:
        """The position of the joints, for the lead. Without motors: the goal."""
        return self._shaper.goal if self.motors_off else state.raw.astype(np.float64)

    def _emit(self, emitted: Emitted) -> Emitted:
        if not self.motors_off:
            self.beat()
            acceleration = power.RAMP_ACCELERATION if emitted.ramping else ACCELERATION
            goals = zip(IDS, emitted.raw, self._goal_velocities, strict=True)
            self.bus.sync_write_block(
                {
                    i: dict(zip(STREAMED, (acceleration, goal, 0, int(speed)), strict=True))
                    for i, goal, speed in goals
                }
            )
        return emitted

    def _require_enabled(self, action: str) -> JointState:
        if not self._enabled or self._state is None:
            raise ArmError(f"{action}() while the arm is not energised. Call enable() first.")
        return self._state
