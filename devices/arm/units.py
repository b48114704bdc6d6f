"""Raw servo ticks to robot units and back, bit for bit as LeRobot does it.

Source: lerobot 0.4.4 `MotorsBus._normalize` and `_unnormalize`, with the same order of the float
operations.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from ..bus.sts3215 import ENCODER_MAX
from .calibration import Calibration, JointCalibration


class Scale(Enum):
    """What the number of one joint means."""

    DEGREES = "degrees"
    RANGE_M100_100 = "range_m100_100"
    RANGE_0_100 = "range_0_100"


# Values at the ends of the calibrated range. Degrees are measured from its middle.
ENDS = {Scale.RANGE_M100_100: (-100.0, 100.0), Scale.RANGE_0_100: (0.0, 100.0)}


class Units(Enum):
    """What the numbers of a robot mean. No checkpoint records it, so there is no default."""

    DEGREES = "degrees"
    RANGE_M100_100 = "range_m100_100"

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Scale of each joint: the five body joints share one, the gripper is always 0 to 100."""
        return (Scale(self.value),) * 5 + (Scale.RANGE_0_100,)


def raw_to_value(raw: int, joint: JointCalibration, scale: Scale) -> float:
    """Value of a raw position. Degrees are measured from the middle of the range, unclamped."""
    low, high = joint.range_min, joint.range_max
    if scale is Scale.DEGREES:
        return (raw - (low + high) / 2) * 360 / ENCODER_MAX
    first, last = ENDS[scale]
    value = (min(high, max(low, raw)) - low) / (high - low) * (last - first) + first
    return first + last - value if joint.drive_mode else value


def value_to_raw(value: float, joint: JointCalibration, scale: Scale) -> int:
    """Raw position of a finite value, truncated toward zero. Degrees can be outside the range."""
    low, high = joint.range_min, joint.range_max
    if scale is Scale.DEGREES:
        return int(value * ENCODER_MAX / 360 + (low + high) / 2)
    first, last = ENDS[scale]
    value = first + last - value if joint.drive_mode else value
    return int((min(last, max(first, value)) - first) / (last - first) * (high - low) + low)


def to_values(
    raw: NDArray[np.int64], calibration: Calibration, units: Units
) -> NDArray[np.float64]:
    """[6] raw ticks -> [6] float64 robot units."""
    joints = zip(raw, calibration.joints, units.scales, strict=True)
    return np.array(
        [raw_to_value(int(ticks), joint, scale) for ticks, joint, scale in joints], np.float64
    )


def to_raw(
    values: NDArray[np.float64], calibration: Calibration, units: Units
) -> NDArray[np.int64]:
    """[6] finite robot units -> [6] int64 raw ticks, not yet clipped to the range."""
    joints = zip(values, calibration.joints, units.scales, strict=True)
    return np.array(
        [value_to_raw(float(value), joint, scale) for value, joint, scale in joints], np.int64
    )


def degrees_per_unit(calibration: Calibration, units: Units) -> NDArray[np.float64]:
    """[6] how many degrees one robot unit of each joint is."""
    ends = [ENDS.get(scale) for scale in units.scales]
    spans = [(j.range_max - j.range_min) * 360 / ENCODER_MAX for j in calibration.joints]
    return np.array(
        [span / (e[1] - e[0]) if e else 1.0 for span, e in zip(spans, ends, strict=True)]
    )
