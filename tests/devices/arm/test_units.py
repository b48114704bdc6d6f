"""Raw ticks and robot units against values LeRobot's own code produced."""

import json

import numpy as np
import pytest

from smolvla_edge.devices.arm.calibration import JointCalibration
from smolvla_edge.devices.arm.units import (
    Scale,
    Units,
    raw_to_value,
    to_raw,
    to_values,
    value_to_raw,
)
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION
from support.paths import DATA

CASES = json.loads((DATA / "golden_normalize.json").read_text())["cases"]


def joint_of(case: dict) -> JointCalibration:
    return JointCalibration(1, case["drive_mode"], 0, case["range_min"], case["range_max"])


def names(case: dict) -> str:
    return f"{case['case']}-{case['mode']}"


@pytest.mark.parametrize("case", CASES, ids=names)
def test_values_are_bit_equal_to_lerobot(case):
    ours = [
        raw_to_value(raw, joint_of(case), Scale(case["mode"])) for raw, _ in case["raw_to_value"]
    ]
    assert ours == [value for _, value in case["raw_to_value"]]


@pytest.mark.parametrize("case", CASES, ids=names)
def test_raw_ticks_are_equal_to_lerobot(case):
    ours = [
        value_to_raw(value, joint_of(case), Scale(case["mode"]))
        for value, _ in case["value_to_raw"]
    ]
    assert ours == [raw for _, raw in case["value_to_raw"]]


def test_body_joints_share_the_units_and_the_gripper_is_always_0_to_100():
    assert Units("degrees").scales == (Scale.DEGREES,) * 5 + (Scale.RANGE_0_100,)
    assert Units("range_m100_100").scales == (Scale.RANGE_M100_100,) * 5 + (Scale.RANGE_0_100,)
    with pytest.raises(ValueError, match="range_0_100"):
        Units("range_0_100")


@pytest.mark.parametrize("units", Units)
def test_a_whole_arm_converts_joint_by_joint(units):
    raw = np.array([701, 2025, 3100, 1000, 17, 3480], np.int64)
    values = to_values(raw, VIRTUAL_CALIBRATION, units)
    assert values.dtype == np.float64
    for index, (joint, scale) in enumerate(
        zip(VIRTUAL_CALIBRATION.joints, units.scales, strict=True)
    ):
        assert values[index] == raw_to_value(int(raw[index]), joint, scale)
    assert np.abs(to_raw(values, VIRTUAL_CALIBRATION, units) - raw).max() <= 1
