"""The [limits] section of robot.toml: bounds of goals, and of what the servos may report.

The defaults are starting values for an unloaded SO-101; they are not measured. If a servo's own
register is stricter (temperature, voltage, current), the register counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ArmError
from ..bus.sts3215 import ENCODER_MAX, NO_LOAD_TICKS_PER_S
from .calibration import JOINT_NAMES, Calibration

JOINTS = len(JOINT_NAMES)
TICKS_PER_DEG = ENCODER_MAX / 360
# The servo's own top speed without load (3400 step/s). A higher limit has no effect.
TOP_SPEED_DEG_S = NO_LOAD_TICKS_PER_S / TICKS_PER_DEG


def _within(low: float, high: float, default: float, not_above: str = "") -> Any:
    """A field from `low` to `high`, and not above another one."""
    return field(default=default, metadata={"bounds": (low, high), "not_above": not_above})


@dataclass(frozen=True)
class Limits:
    """Checked on construction: ArmError lists all problems.

    Degrees are for the five body joints. Percent of its range is for the gripper.
    """

    speed_deg_s: float = _within(1, TOP_SPEED_DEG_S, 90.0)
    gripper_speed_pct_s: float = _within(1, 500, 200.0)
    accel_deg_s2: float = _within(0, 10_000, 0.0)  # 0: no limit
    first_move_speed_deg_s: float = _within(1, TOP_SPEED_DEG_S, 30.0, "speed_deg_s")
    first_move_gripper_pct_s: float = _within(1, 500, 60.0, "gripper_speed_pct_s")
    # The first move is over when every joint is this close
    ramp_threshold_deg: float = _within(1, 30, 5.0)
    jump_deg: float = _within(1, 360, 60.0)  # between one target and the next
    # How far a goal may lead the joint, which bounds the torque. Below 5 degrees, a joint that
    # gravity pulls off its goal would count as blocked.
    lead_deg: float = _within(5, 45, 15.0)
    gripper_lead_pct: float = _within(1, 100, 25.0)
    # Distance from both ends of the calibrated range. The smallest range has 100 ticks.
    margin_ticks: int = _within(0, 45, 10)
    action_max_age_s: float = _within(0.05, 1, 0.25)  # after the time an action was meant for
    torque_pct: float = _within(5, 100, 100.0)
    gripper_torque_pct: float = _within(5, 100, 50.0)
    temperature_warn_c: float = _within(20, 80, 55.0, "temperature_stop_c")
    temperature_stop_c: float = _within(20, 80, 65.0)
    voltage_drop_v: float = _within(0.5, 20, 2.0)  # within 0.2 s
    current_warn_pct: float = _within(1, 100, 50.0)  # of the servo's protection current
    load_warn_pct: float = _within(1, 100, 60.0, "load_stop_pct")
    load_stop_pct: float = _within(1, 100, 80.0)
    following_warn_deg: float = _within(1, 90, 10.0, "following_stop_deg")
    following_stop_deg: float = _within(1, 90, 25.0)

    def __post_init__(self) -> None:
        problems, wrong = [], set()
        for limit in fields(self):
            value, (low, high) = getattr(self, limit.name), limit.metadata["bounds"]
            whole = limit.name == "margin_ticks"
            fits = not isinstance(value, bool) and isinstance(value, int if whole else (int, float))
            if not (fits and low <= value <= high):
                wrong.add(limit.name)
                kind = "an integer" if whole else "a number"
                problems.append(
                    f"{limit.name} is {value!r}, expected {kind} from {low:g} to {high:g}"
                )
        problems += [
            f"{name} ({getattr(self, name):g}) is above {other} ({getattr(self, other):g})"
            for name, other in [(limit.name, limit.metadata["not_above"]) for limit in fields(self)]
            if other and not {name, other} & wrong and getattr(self, name) > getattr(self, other)
        ]
        if problems:
            raise ArmError(f"limits cannot be used: {'; '.join(problems)}.")

    def ticks(
        self, calibration: Calibration, body_deg: float, gripper_pct: float
    ) -> NDArray[np.float64]:
        """[6] raw ticks: degrees for the body joints, % of its calibrated range for the gripper."""
        gripper = calibration.joints[-1]
        span = gripper.range_max - gripper.range_min
        return np.array(
            [body_deg * TICKS_PER_DEG] * (JOINTS - 1) + [gripper_pct / 100 * span], np.float64
        )

    def ticks_per_s(
        self, calibration: Calibration, first_move: bool = False
    ) -> NDArray[np.float64]:
        """[6] raw ticks per second, the speed limit of each joint."""
        if first_move:
            return self.ticks(
                calibration, self.first_move_speed_deg_s, self.first_move_gripper_pct_s
            )
        return self.ticks(calibration, self.speed_deg_s, self.gripper_speed_pct_s)
