"""Targets become goals: nothing out of range, nothing too fast, nothing that is not a number."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvla_edge.devices.errors import ArmError
from smolvla_edge.devices.motion import MotionLimits, MotionShaper
from smolvla_edge.devices.units import Units, to_raw, to_values
from smolvla_edge.devices.virtual_arm import VIRTUAL_CALIBRATION

LOW = np.array([joint.range_min for joint in VIRTUAL_CALIBRATION.joints])
HIGH = np.array([joint.range_max for joint in VIRTUAL_CALIBRATION.joints])
MIDDLE = (LOW + HIGH) // 2
FIRST = np.array([1, 0, 0, 0, 0, 0])
RATE_HZ = 30.0
LIMITS = MotionLimits()


def shaper(units=Units.DEGREES, start=MIDDLE, limits=LIMITS):
    made = MotionShaper(VIRTUAL_CALIBRATION, units, limits, RATE_HZ)
    made.start(start, 0.0)
    return made


def values(raw, units=Units.DEGREES):
    return to_values(np.asarray(raw, np.int64), VIRTUAL_CALIBRATION, units)


def run(made, target, ticks, start_s=0.0):
    return [made.shape(target, start_s + (k + 1) / RATE_HZ) for k in range(ticks)]


def test_a_slow_loop_takes_no_larger_steps():
    """At 1 Hz a step of two periods would be one fast move of 60 degrees."""
    made = MotionShaper(VIRTUAL_CALIBRATION, Units.DEGREES, LIMITS, 1.0)
    made.start(MIDDLE, 0.0)
    emitted = made.shape(values(HIGH), 1.0)
    assert abs(emitted.raw[0] - MIDDLE[0]) <= 0.1 * LIMITS.first_move_speed_deg_s * 4095 / 360 + 1


@pytest.mark.parametrize(
    "target",
    [
        [math.nan, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, math.inf],
        [0, -math.inf, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0] * 7,
        [[0] * 6],
        0.0,
        None,
        ["0"] * 6,
        [[0], 0, 0, 0, 0, 0],
        {"shoulder_pan.pos": 0},
    ],
)
def test_what_is_not_six_finite_numbers_is_rejected_and_the_last_goal_held(target):
    made = shaper()
    before = run(made, values(MIDDLE + 100), 3)[-1]
    emitted = made.shape(target, 1.0)
    assert emitted.rejected
    assert emitted.raw == before.raw
    assert made.counts.rejected == 1


def test_a_rejection_names_the_joint():
    assert "elbow_flex" in shaper().shape([0, 0, math.nan, 0, 0, 0], 0.1).rejected


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_any_kind_of_number_is_a_target(dtype):
    assert not shaper().shape(np.zeros(6, dtype), 0.1).rejected


@pytest.mark.parametrize("units", Units)
@pytest.mark.parametrize("value", [1e9, -1e9, 1e308, -1e308, 100.0, -100.0])
def test_goals_stay_inside_the_range_and_its_margin_in_every_unit(units, value):
    emitted = run(shaper(units), [value] * 6, 600)[-1]
    edge = HIGH - LIMITS.margin_ticks if value > 0 else LOW + LIMITS.margin_ticks
    if abs(value) > 1000 or units is Units.RANGE_M100_100:
        assert list(emitted.raw) == list(edge)
        assert all(emitted.clipped)
    assert np.all(np.array(emitted.raw) >= LOW + LIMITS.margin_ticks)
    assert np.all(np.array(emitted.raw) <= HIGH - LIMITS.margin_ticks)


def test_a_value_the_units_clamp_counts_as_clipped_without_a_margin():
    limits = MotionLimits(margin_ticks=0)
    emitted = run(shaper(Units.RANGE_M100_100, limits=limits), [250, 100, 0, 0, 0, 101], 1)[-1]
    assert emitted.clipped == (True, False, False, False, False, True)


def test_the_first_target_is_approached_slowly_and_the_next_at_full_speed():
    made = shaper()
    slow, fast = (LIMITS.ticks_per_s(VIRTUAL_CALIBRATION, first_move=f)[0] for f in (True, False))
    first = run(made, values(MIDDLE + 500 * FIRST), 60)
    steps = np.diff([emitted.raw[0] for emitted in first])
    assert first[0].first_move and first[0].slewed[0] and not first[0].slewed[1]
    assert steps.max() <= math.ceil(slow / RATE_HZ)
    assert not first[-1].first_move and abs(first[-1].raw[0] - MIDDLE[0] - 500) <= 1
    second = run(made, values(MIDDLE - 500 * FIRST), 40, start_s=2.0)
    steps = -np.diff([emitted.raw[0] for emitted in second])
    assert math.floor(fast / RATE_HZ) <= steps.max() <= math.ceil(fast / RATE_HZ)


def test_a_first_target_that_is_never_reached_keeps_the_slow_speed():
    made = shaper()
    emitted = [made.shape(values(MIDDLE + 600 * (-1) ** k), (k + 1) / RATE_HZ) for k in range(100)]
    assert all(e.first_move for e in emitted)


def test_a_pause_does_not_turn_into_a_jump():
    made = shaper()
    made.shape(values(MIDDLE), 0.01)
    before = made.shape(values(MIDDLE), 0.02).raw[0]
    after = made.shape(values(MIDDLE + 1000), 60.0).raw[0]
    full = LIMITS.ticks_per_s(VIRTUAL_CALIBRATION)[0]
    assert 0 < after - before <= math.ceil(full * 2 / RATE_HZ)


def test_a_clock_that_stands_still_or_runs_back_moves_nothing():
    made = shaper()
    made.shape(values(MIDDLE), 5.0)
    assert made.shape(values(MIDDLE + 1000), 5.0).raw == tuple(MIDDLE)
    assert made.shape(values(MIDDLE + 1000), 4.0).raw == tuple(MIDDLE)


def test_steps_of_less_than_a_tick_add_up():
    made = shaper()
    for k in range(2000):
        emitted = made.shape(values(MIDDLE + 500), (k + 1) / 2000)
    slow = LIMITS.ticks_per_s(VIRTUAL_CALIBRATION, first_move=True)[0]
    assert abs(emitted.raw[0] - MIDDLE[0] - slow) <= 1


def test_an_arm_resting_beyond_its_range_is_led_back_without_a_jump():
    made = shaper(start=HIGH + 40)
    raw = np.array([emitted.raw for emitted in run(made, values(HIGH), 60)])
    assert np.all(np.diff(raw, axis=0) <= 0)
    assert np.all(raw[0] > HIGH)
    assert list(raw[-1]) == list(HIGH - LIMITS.margin_ticks)


def test_hold_repeats_the_last_goal():
    made = shaper()
    last = run(made, values(MIDDLE + 50), 3)[-1]
    assert made.hold().raw == last.raw


def test_what_was_emitted_is_also_told_in_robot_units():
    emitted = run(shaper(), [200.0, 0, 0, 0, 0, 50], 5)[-1]
    assert np.array_equal(emitted.position, values(emitted.raw))


def test_bites_are_counted():
    made = shaper(Units.RANGE_M100_100)
    middle = values(MIDDLE, Units.RANGE_M100_100)
    run(made, middle, 4)
    run(made, [500, 0, 0, 0, 0, 50], 2, start_s=1.0)
    made.shape(None, 2.0)
    assert (made.counts.accepted, made.counts.rejected, made.counts.clipped) == (6, 1, 2)
    assert made.counts.slewed == 2


@given(
    st.sampled_from(list(Units)),
    st.lists(
        st.tuples(
            st.lists(st.floats(-400, 400), min_size=6, max_size=6),
            st.floats(0, 0.2),
        ),
        max_size=20,
    ),
)
def test_no_sequence_of_targets_leaves_the_range_or_exceeds_the_speed(units, sequence):
    made = shaper(units)
    speed = LIMITS.ticks_per_s(VIRTUAL_CALIBRATION)
    last, time_s = MIDDLE, 0.0
    for target, dt_s in sequence:
        time_s += dt_s
        raw = np.array(made.shape(target, time_s).raw)
        assert np.all((raw >= LOW) & (raw <= HIGH))
        assert np.all(np.abs(raw - last) <= speed * min(dt_s, 2 / RATE_HZ) + 1)
        last = raw


@pytest.mark.parametrize("units", Units)
def test_an_inner_target_arrives_as_lerobot_would_send_it(units):
    target = [12.3, -33.3, 21.0, 5.5, -60.0, 40.0]
    emitted = run(shaper(units), target, 300)[-1]
    assert list(emitted.raw) == list(to_raw(np.array(target), VIRTUAL_CALIBRATION, units))
    assert not any(emitted.clipped)


def test_limits_that_make_no_sense_are_all_named():
    with pytest.raises(ArmError) as error:
        MotionLimits(speed_deg_s=0, gripper_speed_pct_s=math.nan, margin_ticks=-1)
    for name in ("speed_deg_s is 0", "gripper_speed_pct_s is nan", "margin_ticks is -1"):
        assert name in str(error.value)
    with pytest.raises(ArmError, match="first_move_speed_deg_s is above"):
        MotionLimits(speed_deg_s=10)
    with pytest.raises(ArmError, match="rate_hz"):
        MotionShaper(VIRTUAL_CALIBRATION, Units.DEGREES, LIMITS, 0)
