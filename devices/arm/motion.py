"""From a target to the goal that may reach the servos. Time and position are arguments.

    1 six finite numbers      2 not older than action_max_age_s      3 robot units to raw ticks
    4 the calibrated range    5 a jump from the last target: rejected
    6 speed, against the last goal    7 acceleration, if limited     8 lead over the joint itself

A target that is rejected is not approached: the last goal stays. Two consecutive goals of a joint
never differ by more than speed x dt (and a tick of rounding). No goal lies further outside the
range than the one before. After a start or a pause, the first target is approached at the
first-move speed (`ramping`) until every joint is close to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .calibration import JOINT_NAMES, Calibration
from .limits import JOINTS, TICKS_PER_DEG, Limits
from .units import ENDS, Units, to_raw, to_values

# Far outside any range, but small enough that the conversion to ticks cannot overflow.
LARGEST_VALUE = 1e6
# One step covers this time at most, even in a slow loop: a servo jumps to a goal that is far away.
MAX_DT_S = 0.1
# Gripper tolerance beside ramp_threshold_deg, % of its range.
RAMP_THRESHOLD_PCT = 10.0
# Lead of a joint that presses against something.
EASED_LEAD_TICKS = 20

Ticks = NDArray[np.float64]
Flags = NDArray[np.bool_]
NONE = (False,) * JOINTS


@dataclass(frozen=True)
class Emitted:
    """The goals that go to the servos.

    raw: ticks. position: the same goals, [6] float64 robot units. rejected: why the target was not
    used, "" if it was. stale: it was too old. clipped, slewed, slowed, led: joints that range,
    speed, acceleration or lead changed. ramping: the first-move speed applies.
    """

    raw: tuple[int, ...]
    position: NDArray[np.float64]
    rejected: str = ""
    clipped: tuple[bool, ...] = NONE
    slewed: tuple[bool, ...] = NONE
    slowed: tuple[bool, ...] = NONE
    led: tuple[bool, ...] = NONE
    ramping: bool = False
    stale: bool = False


@dataclass
class MotionCounts:
    """How many targets each step changed, since `start`.

    limited: accepted targets that any step changed while the arm was not ramping.
    """

    accepted: int = 0
    malformed: int = 0
    stale: int = 0
    clipped: int = 0
    jumped: int = 0
    slewed: int = 0
    slowed: int = 0
    led: int = 0
    ramped: int = 0
    limited: int = 0


class MotionShaper:
    """Turns targets in robot units into raw goals. rate_hz: how often it is called.

    dt is the time between two calls, at most two periods and 0.1 s: a pause never becomes a jump.
    """

    def __init__(
        self, calibration: Calibration, units: Units, limits: Limits, rate_hz: float
    ) -> None:
        self._calibration, self._units, self._limits = calibration, units, limits
        self._max_dt_s = min(2 / rate_hz, MAX_DT_S)
        self._pause_s = max(limits.action_max_age_s, 2 / rate_hz)
        self._low = (
            np.array([j.range_min for j in calibration.joints], np.int64) + limits.margin_ticks
        )
        self._high = (
            np.array([j.range_max for j in calibration.joints], np.int64) - limits.margin_ticks
        )
        # Outside these values, the conversion itself clamps.
        self._smallest, self._largest = np.array(
            [ENDS.get(s, (-math.inf, math.inf)) for s in units.scales]
        ).T
        self._speed = limits.ticks_per_s(calibration)
        self._first_speed = limits.ticks_per_s(calibration, first_move=True)
        self._accel = limits.accel_deg_s2 * TICKS_PER_DEG or math.inf
        self._lead = limits.ticks(calibration, limits.lead_deg, limits.gripper_lead_pct)
        self._close = limits.ticks(calibration, limits.ramp_threshold_deg, RAMP_THRESHOLD_PCT)
        # A gripper can open or close within one target.
        self._jump = limits.ticks(calibration, limits.jump_deg, math.inf)
        # The exact goal before rounding: for a small dt, a step can be a fraction of a tick.
        self.goal: Ticks = np.zeros(JOINTS)  # the last one emitted, [6] raw ticks
        self._velocity: Ticks = np.zeros(JOINTS)
        self._accepted: Ticks | None = None
        self._accepted_s = self._time_s = 0.0
        self._ramping = True
        self._gripper_led = False
        self._eased: dict[int, float] = {}
        self.jumps_in_a_row = 0
        self.counts = MotionCounts()

    def start(self, goal_raw: ArrayLike, time_s: float, *, far: bool = False) -> None:
        """Start at the goal that the servos hold, [6] raw ticks. The next target is approached
        slowly.

        far: the next target can be further away than a jump.
        """
        self.counts = MotionCounts()
        self.goal, self._velocity = np.array(goal_raw, np.float64), np.zeros(JOINTS)
        self._time_s = time_s
        self.resume()
        if far:
            self.redirect()

    def resume(self) -> None:
        """After a stop: every joint follows again.

        The next target is approached slowly. It must be no further than a jump from the held goal.
        """
        self._eased, self._ramping, self.jumps_in_a_row = {}, True, 0
        self._accepted = self.goal.copy()

    def redirect(self) -> None:
        """The next target can be anywhere: it is not a jump."""
        self._accepted = None

    def unload(self, joint: int, present_raw: ArrayLike) -> None:
        """The goal of `joint` (0 to 5) becomes its position, so it does not push.

        This goal can be further away than a step. It is set once: set again and again, it would let
        a loaded joint sink.
        """
        self.goal[joint] = np.asarray(present_raw)[joint]

    def ease(self, joint: int, present_raw: ArrayLike) -> None:
        """`joint` presses against something: press lightly until a target leads away from it."""
        self._eased[joint] = float(np.sign(self.goal[joint] - np.asarray(present_raw)[joint]))

    def shape(
        self, target: ArrayLike, present_raw: ArrayLike, time_s: float, due_s: float | None = None
    ) -> Emitted:
        """The goal to emit at `time_s` for `target`, [6] robot units.

        present_raw: the joints, [6] ticks. due_s: the time the target was meant for; None is now.
        All times are monotonic seconds.
        """
        try:
            values = _checked(target)
        except (TypeError, ValueError) as problem:
            self.counts.malformed += 1
            return self.hold(present_raw, time_s, f"no target: {problem}")
        age_s = 0.0 if due_s is None else time_s - due_s
        if age_s > self._limits.action_max_age_s:
            self.counts.stale += 1
            return replace(
                self.hold(present_raw, time_s, f"target is {age_s:.2f} s old"), stale=True
            )
        wanted = to_raw(
            np.clip(values, -LARGEST_VALUE, LARGEST_VALUE), self._calibration, self._units
        )
        aim = np.clip(wanted, self._low, self._high).astype(np.float64)
        if self._accepted is not None and (jump := np.abs(aim - self._accepted) > self._jump).any():
            self.counts.jumped += 1
            self.jumps_in_a_row += 1
            names = ", ".join(np.array(JOINT_NAMES)[jump])
            return self.hold(
                present_raw,
                time_s,
                f"target jumps by more than {self._limits.jump_deg:g} deg: {names}",
            )
        self.jumps_in_a_row = 0
        paused = time_s - self._accepted_s > self._pause_s
        far = np.abs(aim - self.goal) > self._close
        far[-1] &= not self._gripper_led  # a gripper that holds something never arrives
        self._ramping = (self._ramping or paused) and bool(far.any())
        self._accepted, self._accepted_s = aim, time_s
        clipped = (aim != wanted) | (values < self._smallest) | (values > self._largest)
        return self._step(aim, present_raw, time_s, clipped)

    def hold(self, present_raw: ArrayLike, time_s: float, reason: str = "") -> Emitted:
        """The last goal again, led back if the joint has been pushed away from it."""
        return self._step(
            self.goal, present_raw, time_s, np.zeros(JOINTS, np.bool_), reason, holding=True
        )

    def _step(
        self,
        aim: Ticks,
        present_raw: ArrayLike,
        time_s: float,
        clipped: Flags,
        why: str = "",
        holding: bool = False,
    ) -> Emitted:
        last, present = self.goal, np.asarray(present_raw, np.float64)
        dt_s = min(max(time_s - self._time_s, 0.0), self._max_dt_s)
        self._time_s = time_s
        ramping = self._ramping and not holding
        reach = (self._first_speed if ramping else self._speed) * dt_s
        slewed_to = last + np.clip(aim - last, -reach, reach)
        low, high = np.minimum(self._low, last), np.maximum(self._high, last)
        goal = slewed_to if holding or dt_s == 0 else self._limit_acceleration(aim, slewed_to, dt_s)
        # A joint can be pushed out of its range. Its goal cannot.
        leading = np.clip(self._lead_back(goal, present), low, high)
        # Speed limits the lead: a joint that was pushed far is led back in many steps.
        bounded = np.clip(leading, last - reach, last + reach)
        self._velocity = (bounded - last) / dt_s if dt_s else self._velocity
        self.goal = bounded
        slewed, slowed, led = slewed_to != aim, goal != slewed_to, leading != goal
        self._gripper_led = bool(led[-1])
        counts = self.counts
        if not holding:
            counts.accepted += 1
            for name, hit in (
                ("clipped", clipped),
                ("slewed", slewed),
                ("slowed", slowed),
                ("led", led),
            ):
                setattr(counts, name, getattr(counts, name) + bool(hit.any()))
            counts.ramped += ramping
            counts.limited += bool((clipped | slewed | slowed | led).any()) and not ramping
        raw = np.rint(bounded).astype(np.int64)
        values = to_values(raw, self._calibration, self._units)
        clip, slew, slow, lead = (tuple(hit.tolist()) for hit in (clipped, slewed, slowed, led))
        return Emitted(tuple(raw.tolist()), values, why, clip, slew, slow, lead, ramping)

    def _limit_acceleration(self, aim: Ticks, slewed_to: Ticks, dt_s: float) -> Ticks:
        if self._accel == math.inf:
            return slewed_to
        change, left = self._accel * dt_s, np.abs(aim - self.goal)
        # Slow enough to stop at the aim in steps of dt: v dt + (v - change) dt + ... = left.
        twice = 2 * self._accel * left
        fastest = np.minimum(twice / (np.sqrt(change**2 / 4 + twice) + change / 2), left / dt_s)
        velocity = np.clip(
            (slewed_to - self.goal) / dt_s, self._velocity - change, self._velocity + change
        )
        return np.asarray(self.goal + np.clip(velocity, -fastest, fastest) * dt_s, np.float64)

    def _lead_back(self, goal: Ticks, present: Ticks) -> Ticks:
        result = np.clip(goal, present - self._lead, present + self._lead)
        for joint, sign in list(self._eased.items()):
            if sign * (goal[joint] - present[joint]) <= 0:
                del self._eased[joint]
            else:
                result[joint] = present[joint] + sign * min(
                    EASED_LEAD_TICKS, abs(goal[joint] - present[joint])
                )
        return np.asarray(result, np.float64)


def _checked(target: ArrayLike) -> NDArray[np.float64]:
    """The target as [6] float64. ValueError or TypeError if it is no target."""
    array = np.asarray(target)
    if array.dtype.kind not in "fiu" or array.shape != (JOINTS,):
        raise ValueError(f"{array.dtype} {list(array.shape)}, expected {JOINTS} numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"not finite for {', '.join(np.array(JOINT_NAMES)[~np.isfinite(array)])}")
    return array.astype(np.float64)
