"""The SO-101 follower arm: six STS3215 servos on one bus.

Nothing moves before `enable`, `enable` never makes the arm jump, every goal passes the MotionShaper, and
leaving the context switches all servos off. No EPROM register is ever written. This is no safety-rated stop:
the stop is the power switch.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bus import FeetechBus
from .calibration import JOINT_NAMES as JOINT_NAMES
from .calibration import Calibration
from .errors import ArmError, BusError, DeviceError
from .frames import BROADCAST_ID
from .inspection import ERROR_ADVICE, IDS, inspect, joint_label
from .motion import Emitted, MotionCounts, MotionLimits, MotionShaper
from .sts3215 import NO_LOAD_TICKS_PER_S, Register, error_names
from .units import Units, to_values

# The servo's own profile stays above the host's speed limit, so that it bounds a fault and not the motion.
ACCELERATION = 254
SPEED_HEADROOM = 1.5
# 0.1 % of stall torque, live in SRAM. The gripper must not crush what it holds.
TORQUE_LIMITS = (1000, 1000, 1000, 1000, 1000, 500)
JUMP_TICKS = 20
JUMP_WINDOW_S = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JointState:
    """One reading of all joints.

    position: [6] float64 robot units. raw: ticks. errors: ERROR byte of each servo. time_s: monotonic, of the
    request.
    """

    position: NDArray[np.float64]
    raw: tuple[int, ...]
    errors: tuple[int, ...]
    time_s: float


@dataclass(frozen=True)
class ReleaseResult:
    """`unconfirmed`: joints that may still be energised, with the reason for each."""

    unconfirmed: dict[str, str]


class SO101:
    """The arm on `port`, in `units`, within `limits`; `rate_hz` is how often `send` will be called.

    Methods raise ArmError for refusals, BusError for servos that do not answer, BusLost when the port is
    gone.
    """

    def __init__(
        self,
        port: str,
        calibration: Calibration,
        units: Units,
        limits: MotionLimits | None = None,
        rate_hz: float = 30.0,
    ) -> None:
        if not isinstance(units, Units):
            raise ArmError(f"units is {units!r}, expected {' or '.join(map(str, Units))}.")
        limits = limits or MotionLimits()
        self.bus = FeetechBus(port)
        self.calibration = calibration
        self.units = units
        self._shaper = MotionShaper(calibration, units, limits, rate_hz)
        self._goal_velocities = np.minimum(
            NO_LOAD_TICKS_PER_S, np.ceil(SPEED_HEADROOM * limits.ticks_per_s(calibration))
        ).astype(int)
        self._connected = False
        self._enabled = False

    def __enter__(self) -> SO101:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            result = self.release()
        finally:
            self.close()
        if result.unconfirmed:
            message = _unconfirmed_message(result)
            if error is None:
                raise ArmError(message)
            # The error under way says more; it must not be replaced.
            log.error(message)

    @property
    def enabled(self) -> bool:
        """Whether the servos hold the arm and `send` moves it."""
        return self._enabled

    @property
    def counts(self) -> MotionCounts:
        """MotionCounts since `enable`."""
        return self._shaper.counts

    def connect(self) -> tuple[str, ...]:
        """Open the bus and check the arm without writing anything; returns warnings.

        ArmError lists every finding that forbids to go on; the port is closed again then.
        """
        self.bus.open()
        try:
            findings = inspect(self.bus, self.calibration)
            if findings.problems:
                # The warnings too: that motors are on already matters most when the run does not start.
                listing = "\n  ".join((*findings.problems, *findings.warnings))
                raise ArmError(f"the arm on {self.bus.path} is refused, nothing was written:\n  {listing}")
        except BaseException:
            self.bus.close()
            raise
        self._connected = True
        return findings.warnings

    def read(self) -> JointState:
        """Position of all joints in one request; BusError names the joints that did not answer."""
        time_s = time.monotonic()
        blocks = self.bus.sync_read(IDS, Register.PRESENT_POSITION)
        missing = [joint_label(servo_id) for servo_id in IDS if servo_id not in blocks]
        if missing:
            found = ", ".join(map(joint_label, blocks)) or "none"
            raise BusError(
                f"no answer from {', '.join(missing)} on {self.bus.path} (found: {found}). "
                "Check the cable before the first one missing, and the power."
            )
        raw = [blocks[servo_id].values[Register.PRESENT_POSITION] for servo_id in IDS]
        errors = tuple(blocks[servo_id].error for servo_id in IDS)
        position = to_values(np.array(raw, np.int64), self.calibration, self.units)
        return JointState(position, tuple(raw), errors, time_s)

    def enable(self) -> None:
        """Energise the arm where it stands, one servo at a time. On any failure everything is off again."""
        if not self._connected:
            raise ArmError("enable() before connect(). Connect first: it checks the arm.")
        if self._enabled:
            return
        try:
            goals = [self._energise(servo_id) for servo_id in IDS]
        except BaseException:
            result = self.release()
            if result.unconfirmed:
                log.error(_unconfirmed_message(result))
            raise
        self._shaper.start(goals, time.monotonic())
        self._enabled = True

    def send(self, target: ArrayLike) -> Emitted:
        """Move towards `target`, [6] robot units; returns what was really sent.

        A target that is not six finite numbers does not raise: the last goal is sent again.
        """
        self._require_enabled("send")
        return self._emit(self._shaper.shape(target, time.monotonic()))

    def hold(self) -> Emitted:
        """Send the last goal again."""
        self._require_enabled("hold")
        return self._emit(self._shaper.hold())

    def release(self) -> ReleaseResult:
        """Switch every servo off and verify it. May be called again; never skips a servo because of another.

        Does not raise for servos or a port that fail: what could not be confirmed is in the result.
        """
        self._enabled = False
        if not self.bus.is_open:
            return ReleaseResult({})
        interrupt: BaseException | None = None
        unconfirmed: dict[str, str] = {}
        # Broadcast first: it reaches all servos at once and needs no answer.
        for servo_id in (BROADCAST_ID, *IDS):
            reason = ""
            try:
                self._switch_off(servo_id)
            except DeviceError as error:
                reason = str(error)
            except BaseException as error:
                # Ctrl-C waits until the last servo has been tried.
                interrupt, reason = error, "interrupted"
            if reason and servo_id in IDS:
                unconfirmed[joint_label(servo_id)] = reason
        if interrupt is not None:
            raise interrupt
        return ReleaseResult(unconfirmed)

    def close(self) -> None:
        """Release the arm if it is energised, and close the port. May be called again."""
        try:
            if self._enabled:
                self.release()
        finally:
            self._connected = False
            self.bus.close()

    def _emit(self, emitted: Emitted) -> Emitted:
        self.bus.sync_write(Register.GOAL_POSITION, dict(zip(IDS, emitted.raw, strict=True)))
        return emitted

    def _require_enabled(self, action: str) -> None:
        if not self._enabled:
            raise ArmError(f"{action}() while the arm is not energised. Call enable() first.")

    def _energise(self, servo_id: int) -> int:
        """Set up one servo, give it its own position as goal, switch it on. Returns that goal, raw ticks."""
        bus, index, label = self.bus, servo_id - 1, joint_label(servo_id)
        for register, value in (
            (Register.ACCELERATION, ACCELERATION),
            (Register.GOAL_VELOCITY, int(self._goal_velocities[index])),
            (Register.TORQUE_LIMIT, TORQUE_LIMITS[index]),
        ):
            bus.write(servo_id, register, value)
        present = bus.read(servo_id, Register.PRESENT_POSITION).value
        bus.write(servo_id, Register.GOAL_POSITION, present)
        goal = bus.read(servo_id, Register.GOAL_POSITION).value
        if goal != present:
            raise ArmError(
                f"{label} holds the goal {goal}, expected its position {present}: it would jump. "
                "Power the arm off and on."
            )
        error = bus.write(servo_id, Register.TORQUE_ENABLE, 1)
        if error:
            raise ArmError(f"{label} reports {', '.join(error_names(error))} when switched on. {ERROR_ADVICE}")
        until = time.monotonic() + JUMP_WINDOW_S
        while time.monotonic() < until:
            moved = bus.read(servo_id, Register.PRESENT_POSITION).value - present
            if abs(moved) > JUMP_TICKS:
                raise ArmError(
                    f"{label} moved {moved} ticks when switched on, expected at most {JUMP_TICKS}. "
                    "Rest the arm, keep hands off, and look for a wrong calibration."
                )
            time.sleep(JUMP_WINDOW_S / 5)
        return goal

    def _switch_off(self, servo_id: int) -> None:
        if servo_id == BROADCAST_ID:
            self.bus.broadcast_torque_off()
            return
        if self.bus.read(servo_id, Register.TORQUE_ENABLE).value == 0:
            return
        self.bus.write(servo_id, Register.TORQUE_ENABLE, 0)
        left = self.bus.read(servo_id, Register.TORQUE_ENABLE).value
        if left:
            raise ArmError(f"Torque_Enable still reads {left} after it was set to 0")


def _unconfirmed_message(result: ReleaseResult) -> str:
    listing = "\n  ".join(f"{name}: {reason}" for name, reason in result.unconfirmed.items())
    return f"these servos may still be energised. Switch the arm's power off.\n  {listing}"
