"""What a target becomes before it may reach the servos. No clock, no port: time is an argument.

Steps, in order: shape and finiteness, units to raw ticks, the calibrated range, the speed limit against the
last goal that was really emitted. Until the first target has been reached the slow first-move speed holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .calibration import JOINT_NAMES, Calibration
from .errors import ArmError
from .sts3215 import ENCODER_MAX, NO_LOAD_TICKS_PER_S
from .units import Scale, Units, to_raw, to_values

JOINTS = len(JOINT_NAMES)
# Far outside any range, yet small enough that the conversion to ticks cannot overflow.
LARGEST_VALUE = 1e6
TICKS_PER_DEG = ENCODER_MAX / 360
# A step never covers more time than this, however slow the loop: a goal far away is a jump to the servo.
MAX_DT_S = 0.1
# The servo's own top speed without load (3400 step/s); a higher limit would limit nothing.
TOP_SPEED_DEG_S = NO_LOAD_TICKS_PER_S / TICKS_PER_DEG
TOP_GRIPPER_PCT_S = 500.0


@dataclass(frozen=True)
class MotionLimits:
    """Limits of every goal that is emitted. Checked on construction: ArmError lists all problems.

    Speeds are deg/s for the five body joints and % of its range per second for the gripper. `margin_ticks`
    keeps goals off both ends of the calibrated range. The defaults are starting values, not measured ones.
    """

    speed_deg_s: float = 90.0
    gripper_speed_pct_s: float = 200.0
    first_move_speed_deg_s: float = 30.0
    first_move_gripper_pct_s: float = 60.0
    margin_ticks: int = 10

    def __post_init__(self) -> None:
        problems = [
            f"{field.name} is {value}, expected a finite number above 0"
            for field in fields(self)
            if field.name != "margin_ticks" and not (math.isfinite(value := getattr(self, field.name)) and value > 0)
        ]
        if type(self.margin_ticks) is not int or not 0 <= self.margin_ticks <= 45:
            # Twice the margin must leave some of the smallest range a calibration may have (100 ticks).
            problems.append(f"margin_ticks is {self.margin_ticks}, expected an integer from 0 to 45")
        for name, top in (("speed_deg_s", TOP_SPEED_DEG_S), ("gripper_speed_pct_s", TOP_GRIPPER_PCT_S)):
            if getattr(self, name) > top:
                problems.append(f"{name} is {getattr(self, name)}, expected at most {top:.0f}")
        if not problems and self.first_move_speed_deg_s > self.speed_deg_s:
            problems.append("first_move_speed_deg_s is above speed_deg_s, expected the slower of the two")
        if not problems and self.first_move_gripper_pct_s > self.gripper_speed_pct_s:
            problems.append("first_move_gripper_pct_s is above gripper_speed_pct_s, expected the slower")
        if problems:
            raise ArmError(f"motion limits cannot be used: {'; '.join(problems)}.")

    def ticks_per_s(self, calibration: Calibration, first_move: bool = False) -> NDArray[np.float64]:
        """[6] float64 speed of each joint in raw ticks per second."""
        gripper = calibration.joints[-1]
        body_deg_s = self.first_move_speed_deg_s if first_move else self.speed_deg_s
        gripper_pct_s = self.first_move_gripper_pct_s if first_move else self.gripper_speed_pct_s
        gripper_ticks_s = gripper_pct_s / 100 * (gripper.range_max - gripper.range_min)
        return np.array([body_deg_s * TICKS_PER_DEG] * (JOINTS - 1) + [gripper_ticks_s], np.float64)


@dataclass(frozen=True)
class Emitted:
    """What really goes to the servos.

    raw: goal ticks per joint. position: the same goals, [6] float64 robot units. rejected: why the target was
    not used ("" when it was); the last goal is emitted again. clipped, slewed: joints the range or the speed
    limit changed. first_move: the slow speed held.
    """

    raw: tuple[int, ...]
    position: NDArray[np.float64]
    rejected: str = ""
    clipped: tuple[bool, ...] = (False,) * JOINTS
    slewed: tuple[bool, ...] = (False,) * JOINTS
    first_move: bool = False


@dataclass
class MotionCounts:
    """How many targets each step bit on, since `start`."""

    accepted: int = 0
    rejected: int = 0
    clipped: int = 0
    slewed: int = 0


class MotionShaper:
    """Turns targets in robot units into raw goals.

    Two consecutive goals of a joint never differ by more than speed x dt, to within one tick of rounding; dt
    is the time between the calls, at most two periods of `rate_hz` and 0.1 s: a pause never turns into a jump.
    """

    def __init__(self, calibration: Calibration, units: Units, limits: MotionLimits, rate_hz: float) -> None:
        if not (math.isfinite(rate_hz) and rate_hz > 0):
            raise ArmError(f"rate_hz is {rate_hz}, expected a finite number above 0.")
        self._calibration = calibration
        self._units = units
        self._max_dt_s = min(2 / rate_hz, MAX_DT_S)
        self._low = np.array([j.range_min for j in calibration.joints], np.int64) + limits.margin_ticks
        self._high = np.array([j.range_max for j in calibration.joints], np.int64) - limits.margin_ticks
        self._speed = limits.ticks_per_s(calibration)
        self._first_speed = limits.ticks_per_s(calibration, first_move=True)
        # The exact goal behind the rounded one: at small dt a step may be a fraction of a tick.
        self._goal: NDArray[np.float64] | None = None
        self._time_s = 0.0
        self._first_move = True
        self.counts = MotionCounts()

    def start(self, goal_raw: ArrayLike, time_s: float) -> None:
        """Begin at the goal the servos hold, [6] raw ticks; the next target is approached slowly."""
        goal = np.asarray(goal_raw, np.float64)
        assert goal.shape == (JOINTS,), f"a start goal has {JOINTS} joints, not shape {goal.shape}"
        self._goal = goal
        self._time_s = time_s
        self._first_move = True
        self.counts = MotionCounts()

    def shape(self, target: ArrayLike, time_s: float) -> Emitted:
        """The goal to emit at `time_s` (monotonic) for `target`, [6] robot units; a bad target is held."""
        last = self._started()
        values, problem = _checked(target)
        if problem:
            self.counts.rejected += 1
            return self.hold(problem)
        wanted = to_raw(np.clip(values, -LARGEST_VALUE, LARGEST_VALUE), self._calibration, self._units)
        aim = np.clip(wanted, self._low, self._high)
        clipped = (aim != wanted) | self._outside_scale(values)

        dt_s = min(max(time_s - self._time_s, 0.0), self._max_dt_s)
        self._time_s = time_s
        first_move = self._first_move
        reach = (self._first_speed if first_move else self._speed) * dt_s
        step = np.clip(aim - last, -reach, reach)
        slewed = step != aim - last
        self._goal = last + step
        self._first_move = first_move and bool(slewed.any())

        self.counts.accepted += 1
        self.counts.clipped += bool(clipped.any())
        self.counts.slewed += bool(slewed.any())
        return self._emitted("", clipped, slewed, first_move)

    def hold(self, reason: str = "") -> Emitted:
        """The last goal again. The time stands still: the next step is no larger for the pause."""
        self._started()
        nothing = np.zeros(JOINTS, np.bool_)
        return self._emitted(reason, nothing, nothing, self._first_move)

    def _emitted(
        self, rejected: str, clipped: NDArray[np.bool_], slewed: NDArray[np.bool_], first_move: bool
    ) -> Emitted:
        raw = np.rint(self._started()).astype(np.int64)
        return Emitted(
            raw=tuple(raw.tolist()),
            position=to_values(raw, self._calibration, self._units),
            rejected=rejected,
            clipped=tuple(clipped.tolist()),
            slewed=tuple(slewed.tolist()),
            first_move=first_move,
        )

    def _started(self) -> NDArray[np.float64]:
        assert self._goal is not None, "start() comes before shape() and hold()"
        return self._goal

    def _outside_scale(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Joints whose conversion itself has clamped the value, [6] bool."""
        low = {Scale.DEGREES: -math.inf, Scale.RANGE_M100_100: -100.0, Scale.RANGE_0_100: 0.0}
        high = {Scale.DEGREES: math.inf, Scale.RANGE_M100_100: 100.0, Scale.RANGE_0_100: 100.0}
        scales = self._units.scales
        outside = [not low[s] <= v <= high[s] for s, v in zip(scales, values, strict=True)]
        return np.array(outside, np.bool_)


def _checked(target: ArrayLike) -> tuple[NDArray[np.float64], str]:
    """The target as [6] float64, or the reason why it is none."""
    nothing = np.zeros(0)
    try:
        array = np.asarray(target)
    except (TypeError, ValueError):
        return nothing, f"target is not an array of {JOINTS} numbers"
    if array.dtype.kind not in "fiu":
        return nothing, f"target is {array.dtype}, expected {JOINTS} numbers"
    if array.shape != (JOINTS,):
        return nothing, f"target has shape {list(array.shape)}, expected [{JOINTS}]"
    if not np.isfinite(array).all():
        names = [name for name, value in zip(JOINT_NAMES, array, strict=True) if not np.isfinite(value)]
        return nothing, f"target is not finite for {', '.join(names)}"
    return array.astype(np.float64), ""
