"""The numbers of [limits]: the spec's defaults, and everything wrong with them in one message."""

import dataclasses
import math

import numpy as np
import pytest

from smolvla_edge.core.errors import ArmError
from smolvla_edge.devices.arm.limits import Limits
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION

BOUNDS = {limit.name: limit.metadata["bounds"] for limit in dataclasses.fields(Limits)}
NOT_ABOVE = {
    limit.name: other
    for limit in dataclasses.fields(Limits)
    if (other := limit.metadata["not_above"])
}


def refusal(**values):
    with pytest.raises(ArmError) as error:
        Limits(**values)
    return str(error.value)


def test_the_defaults_are_those_of_the_requirements():
    assert dataclasses.asdict(Limits()) == {
        "speed_deg_s": 90,
        "gripper_speed_pct_s": 200,
        "accel_deg_s2": 0,
        "first_move_speed_deg_s": 30,
        "first_move_gripper_pct_s": 60,
        "ramp_threshold_deg": 5,
        "jump_deg": 60,
        "lead_deg": 15,
        "gripper_lead_pct": 25,
        "margin_ticks": 10,
        "action_max_age_s": 0.25,
        "torque_pct": 100,
        "gripper_torque_pct": 50,
        "temperature_warn_c": 55,
        "temperature_stop_c": 65,
        "voltage_drop_v": 2,
        "current_warn_pct": 50,
        "load_warn_pct": 60,
        "load_stop_pct": 80,
        "following_warn_deg": 10,
        "following_stop_deg": 25,
    }


def test_limits_cannot_be_changed_once_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().speed_deg_s = 500


def test_every_wrong_value_is_named_at_once():
    wrong = {name: high + 1 for name, (_, high) in BOUNDS.items()}
    message = refusal(**wrong)
    for name, (low, high) in BOUNDS.items():
        kind = "an integer" if name == "margin_ticks" else "a number"
        assert f"{name} is {wrong[name]!r}, expected {kind} from {low:g} to {high:g}" in message


@pytest.mark.parametrize("name", BOUNDS)
def test_both_ends_of_what_makes_sense_are_allowed_and_nothing_beyond(name):
    low, high = BOUNDS[name]
    pair = {other for one, other in NOT_ABOVE.items() if one == name}
    assert (
        getattr(Limits(**{name: high} | {other: BOUNDS[other][1] for other in pair}), name) == high
    )
    lower = {one: BOUNDS[one][0] for one, other in NOT_ABOVE.items() if other == name}
    assert getattr(Limits(**{name: low} | lower), name) == low
    step = 1 if name == "margin_ticks" else 1e-6
    for value in (low - step, high + step, math.nan, math.inf, -math.inf, 10**400, "1", None, True):
        assert f"{name} is {value!r}" in refusal(**{name: value})


def test_whole_numbers_are_numbers_but_ticks_come_whole():
    assert Limits(speed_deg_s=60, jump_deg=np.float64(30)).speed_deg_s == 60
    assert "margin_ticks is 10.0, expected an integer" in refusal(margin_ticks=10.0)
    assert "margin_ticks is False, expected an integer" in refusal(margin_ticks=False)


@pytest.mark.parametrize(("name", "other"), NOT_ABOVE.items())
def test_a_limit_that_must_not_exceed_another_is_named_with_it(name, other):
    low = max(BOUNDS[name][0], BOUNDS[other][0])
    assert f"{name} ({low + 2:g}) is above {other} ({low + 1:g})" in refusal(
        **{name: low + 2, other: low + 1}
    )
    assert Limits(**{name: low + 1, other: low + 1})


def test_a_wrong_value_does_not_hide_limits_in_the_wrong_order():
    message = refusal(jump_deg=0, load_warn_pct=90, temperature_warn_c=math.nan)
    assert (
        "jump_deg is 0" in message and "load_warn_pct (90) is above load_stop_pct (80)" in message
    )
    assert "temperature_warn_c (nan) is above" not in message


def test_degrees_are_for_the_body_and_percent_of_its_range_for_the_gripper():
    span = VIRTUAL_CALIBRATION.joints[-1].range_max - VIRTUAL_CALIBRATION.joints[-1].range_min
    fast, slow = (Limits().ticks_per_s(VIRTUAL_CALIBRATION, first_move=f) for f in (False, True))
    assert fast.tolist() == pytest.approx([90 * 4095 / 360] * 5 + [2.0 * span])
    assert slow.tolist() == pytest.approx([30 * 4095 / 360] * 5 + [0.6 * span])
