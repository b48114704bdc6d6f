"""Targets become goals: nothing out of range, too fast, too far ahead, too old, or not a number."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvla_edge.devices.arm.limits import TICKS_PER_DEG, Limits
from smolvla_edge.devices.arm.motion import EASED_LEAD_TICKS, MotionCounts, MotionShaper
from smolvla_edge.devices.arm.units import Units, to_raw, to_values
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION

LOW = np.array([joint.range_min for joint in VIRTUAL_CALIBRATION.joints])
HIGH = np.array([joint.range_max for joint in VIRTUAL_CALIBRATION.joints])
MIDDLE = (LOW + HIGH) // 2
SPAN = HIGH - LOW
PAN, GRIPPER = np.eye(6, dtype=int)[[0, 5]]
RATE_HZ = 30.0
PERIOD_S = 1 / RATE_HZ
LIMITS = Limits()
FAST, SLOW = (LIMITS.ticks_per_s(VIRTUAL_CALIBRATION, first_move=first) for first in (False, True))
DEG = TICKS_PER_DEG


def values(raw, units=Units.DEGREES):
    """Robot units that become exactly these ticks again: halfway, as the conversion truncates."""
    raw = np.asarray(raw, np.float64)
    low, high = LOW, HIGH
    degrees = (raw + 0.5 - (low + high) / 2) * 360 / 4095
    percent = (raw + 0.5 - low) / (high - low) * 100
    body = degrees if units is Units.DEGREES else 2 * percent - 100
    return np.append(body[:5], percent[5])


class Bench:
    """A shaper and its clock, with joints that follow at once unless `present` says where they
    are."""

    def __init__(
        self,
        units=Units.DEGREES,
        start=MIDDLE,
        limits=LIMITS,
        rate_hz=RATE_HZ,
        far=True,
        ramp=False,
    ):
        self.made = MotionShaper(VIRTUAL_CALIBRATION, units, limits, rate_hz)
        self.units, self.time_s, self.period_s = units, 100.0, 1 / rate_hz
        self.made.start(start, self.time_s, far=far)
        if not ramp:
            self.run(start)
            self.made.redirect()
            self.made.counts = MotionCounts()

    @property
    def goal(self):
        return np.rint(self.made.goal).astype(int)

    def send(self, target, present=None, age_s=None):
        """One tick later, a target in robot units."""
        self.time_s += self.period_s
        present = self.made.goal if present is None else present
        return self.made.shape(
            target, present, self.time_s, None if age_s is None else self.time_s - age_s
        )

    def hold(self, present=None):
        self.time_s += self.period_s
        return self.made.hold(self.made.goal if present is None else present, self.time_s)

    def run(self, raw, ticks=1, present=None):
        """`ticks` times the same target in raw ticks -> [ticks, 6] goals and what was emitted
        last."""
        emitted = [self.send(values(raw, self.units), present) for _ in range(ticks)]
        return np.array([e.raw for e in emitted]), emitted[-1]


# 1 six finite numbers

NO_TARGETS = [
    [math.nan, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, math.inf],
    [0, -math.inf, 0, 0, 0, 0],
    [0, 0, 0, 0, 0],
    [0] * 7,
    [[0] * 6],
    0.0,
    None,
    ["0"] * 6,
    "000000",
    [True] * 6,
    [1j] * 6,
    [10**400, 0, 0, 0, 0, 0],
    [[0], 0, 0, 0, 0, 0],
    {"shoulder_pan.pos": 0},
]


@pytest.mark.parametrize("target", NO_TARGETS, ids=range(len(NO_TARGETS)))
def test_what_is_not_six_finite_numbers_is_rejected_and_the_last_goal_held(target):
    bench = Bench()
    before = bench.run(MIDDLE + 100, 3)[1]
    emitted = bench.send(target)
    assert emitted.rejected and emitted.raw == before.raw and not emitted.stale
    assert (bench.made.counts.malformed, bench.made.counts.accepted) == (1, 3)


def test_a_rejection_names_the_joint():
    assert "elbow_flex, gripper" in Bench().send([0, 0, math.nan, 0, 0, math.inf]).rejected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.uint8, list])
def test_any_kind_of_number_is_a_target(dtype):
    target = [0] * 6 if dtype is list else np.zeros(6, dtype)
    assert not Bench().send(target).rejected


# 2 not older than action_max_age_s


def test_a_target_is_too_old_by_the_time_it_was_meant_for():
    bench = Bench()
    before = bench.goal
    emitted = bench.send(values(MIDDLE + 100), age_s=LIMITS.action_max_age_s + 0.01)
    assert (
        emitted.stale and "0.26 s old" in emitted.rejected and np.array_equal(emitted.raw, before)
    )
    for age_s in (LIMITS.action_max_age_s - 0.01, 0.0, -5.0, None):
        emitted = bench.send(values(MIDDLE + 100), age_s=age_s)
        assert not emitted.stale and not emitted.rejected
    assert (bench.made.counts.stale, bench.made.counts.accepted, bench.made.counts.malformed) == (
        1,
        4,
        0,
    )
    assert np.array_equal(bench.made.goal, bench.goal) and bench.goal[0] == MIDDLE[0] + 100


# 3 robot units to raw ticks


@pytest.mark.parametrize("units", Units)
def test_an_inner_target_arrives_as_lerobot_would_send_it(units):
    target = [12.3, -33.3, 21.0, 5.5, -60.0, 40.0]
    bench = Bench(units)
    for _ in range(300):
        emitted = bench.send(target)
    assert list(emitted.raw) == list(to_raw(np.array(target), VIRTUAL_CALIBRATION, units))
    assert not any(emitted.clipped + emitted.slewed + emitted.slowed + emitted.led)


@pytest.mark.parametrize("units", Units)
def test_what_was_emitted_is_also_told_in_robot_units(units):
    emitted = Bench(units).run(MIDDLE + 30)[1]
    assert np.array_equal(
        emitted.position, to_values(np.array(emitted.raw), VIRTUAL_CALIBRATION, units)
    )


# 4 the calibrated range


@pytest.mark.parametrize("units", Units)
@pytest.mark.parametrize("value", [1e9, -1e9, 1e308, -1e308, 250.0, -250.0])
def test_goals_stop_at_the_margin_of_the_range_in_every_unit(units, value):
    bench = Bench(units)
    for _ in range(200):
        emitted = bench.send([value] * 6)
    edge = HIGH - LIMITS.margin_ticks if value > 0 else LOW + LIMITS.margin_ticks
    assert list(emitted.raw) == list(edge)
    assert all(emitted.clipped) and bench.made.counts.clipped == 200


def test_a_value_the_units_clamp_counts_as_clipped_without_a_margin():
    bench = Bench(Units.RANGE_M100_100, limits=Limits(margin_ticks=0))
    assert bench.send([250, 100, 0, 0, 0, 101]).clipped == (True, False, False, False, False, True)
    assert bench.send([100, 100, 0, 0, 0, -1]).clipped == (False,) * 5 + (True,)


def test_an_arm_resting_beyond_its_range_is_led_back_without_a_jump():
    bench = Bench(start=HIGH + 40, ramp=True)
    assert list(bench.hold().raw) == list(HIGH + 40)
    raw, _ = bench.run(HIGH, 100)
    assert np.all(np.diff(raw, axis=0) <= 0) and np.all(HIGH + 40 - raw[0] <= FAST * PERIOD_S + 1)
    assert list(raw[-1]) == list(HIGH - LIMITS.margin_ticks)


# 5 a jump from the last target


def test_a_jump_is_held_not_crept_to_and_counted_in_a_row():
    bench = Bench()
    bench.run(MIDDLE + 20 * PAN, 3)
    before = bench.goal
    for count in range(1, 20):
        emitted = bench.send(values(MIDDLE + (20 + int(61 * DEG)) * PAN))
        assert emitted.rejected == "target jumps by more than 60 deg: shoulder_pan"
        assert np.array_equal(emitted.raw, before) and not any(emitted.slewed)
        assert bench.made.jumps_in_a_row == bench.made.counts.jumped == count
    assert not bench.send(values(before)).rejected
    assert bench.made.jumps_in_a_row == 0 and bench.made.counts.jumped == 19


def test_a_jump_is_measured_from_the_last_accepted_target_not_from_the_goal_on_its_way():
    bench = Bench()
    bench.run(MIDDLE + int(50 * DEG) * PAN)
    assert bench.goal[0] < MIDDLE[0] + 10 * DEG
    assert not bench.send(values(MIDDLE + int(100 * DEG) * PAN)).rejected
    assert bench.send(values(MIDDLE + int(30 * DEG) * PAN)).rejected
    assert not bench.send(values(MIDDLE + int(50 * DEG) * PAN)).rejected


def test_a_gripper_may_open_and_close_within_one_target():
    bench = Bench()
    for gripper in (0, 100, 0):
        assert not bench.send([0, 0, 0, 0, 0, gripper]).rejected
    assert bench.made.counts.jumped == 0


def test_the_first_target_must_be_near_unless_far_is_allowed():
    away = values(MIDDLE + int(70 * DEG) * PAN)
    assert "shoulder_pan" in Bench(far=False, ramp=True).send(away).rejected
    bench = Bench(far=True, ramp=True)
    assert not bench.send(away).rejected
    assert bench.send(values(MIDDLE - int(10 * DEG) * PAN)).rejected  # the first one only
    bench.made.redirect()
    assert not bench.send(values(MIDDLE - int(10 * DEG) * PAN)).rejected


def test_after_a_stop_a_jump_is_measured_from_where_the_arm_is_held():
    """Stopped on the way to a target 55 degrees off, the next one 10 degrees to the other side is
    no jump."""
    bench = Bench()
    bench.run(MIDDLE + int(55 * DEG) * PAN)
    fresh = values(MIDDLE - int(10 * DEG) * PAN)
    assert bench.send(fresh).rejected
    bench.made.resume()
    assert bench.made.jumps_in_a_row == 0
    assert bench.send(values(MIDDLE + int(80 * DEG) * PAN)).rejected
    assert not bench.send(fresh).rejected


# 6 speed, against the last goal emitted


def test_a_goal_moves_at_the_speed_limit_and_arrives():
    bench = Bench()
    first = bench.run(MIDDLE)[1]
    assert not any(first.slewed)
    under_way = bench.run(MIDDLE + 500 * PAN - 700 * GRIPPER)[1]
    assert under_way.slewed == (True, False, False, False, False, True) and not any(under_way.led)
    raw, emitted = bench.run(MIDDLE + 500 * PAN - 700 * GRIPPER, 99)
    steps = np.abs(np.diff(raw, axis=0))[:3]
    assert (
        np.all(np.abs(steps[:, [0, 5]] - FAST[[0, 5]] * PERIOD_S) <= 1) and not steps[:, 1:5].any()
    )
    assert list(raw[-1]) == list(MIDDLE + 500 * PAN - 700 * GRIPPER) and not any(emitted.slewed)
    moving = math.ceil(500 / (FAST[0] * PERIOD_S)) - 1
    assert bench.made.counts.slewed == bench.made.counts.limited == moving
    assert bench.made.counts.accepted == 101 and bench.made.counts.ramped == 0
    bench.made.start(MIDDLE, bench.time_s)
    assert bench.made.counts == MotionCounts()


def test_steps_of_less_than_a_tick_add_up():
    bench = Bench(rate_hz=2000)
    bench.run(MIDDLE + 500, 400)
    assert abs(bench.goal[0] - MIDDLE[0] - 0.2 * FAST[0]) <= 1


def test_a_pause_or_a_slow_loop_takes_no_larger_steps():
    for rate_hz, longest_s in ((RATE_HZ, 2 / RATE_HZ), (1.0, 0.1)):
        bench = Bench(rate_hz=rate_hz, ramp=True)
        bench.time_s += 60
        bench.run(HIGH)
        assert np.all(bench.goal - MIDDLE <= SLOW * longest_s + 1) and bench.goal[0] > MIDDLE[0]


def test_a_clock_that_stands_still_or_runs_back_moves_nothing():
    bench = Bench()
    for step_s in (0.0, -1.0):
        bench.time_s += step_s - bench.period_s
        assert list(bench.run(MIDDLE + 100)[1].raw) == list(MIDDLE)


# 7 acceleration, where limited


@pytest.mark.parametrize("accel", [5, 100, 400, 10_000])
def test_a_limited_acceleration_speeds_up_and_down_in_small_steps_and_arrives(accel):
    bench = Bench(limits=Limits(accel_deg_s2=accel))
    raw, emitted = bench.run(MIDDLE + 400 * PAN, 600)
    speeds = np.diff(np.concatenate([[MIDDLE[0]], raw[:, 0]])) * RATE_HZ
    change = accel * DEG * PERIOD_S
    # A tick of rounding in each of two goals
    assert np.all(np.diff(speeds) <= change + 2 * RATE_HZ)
    assert np.all(np.diff(speeds) >= -change - 2 * RATE_HZ)
    assert np.all(np.diff(raw[:, 0]) >= 0) and raw[-1, 0] == MIDDLE[0] + 400
    assert not any(emitted.slewed + emitted.slowed)
    assert bool(bench.made.counts.slowed) == (accel < 10_000)


def test_a_joint_that_was_blocked_starts_to_accelerate_anew():
    bench = Bench(limits=Limits(accel_deg_s2=60))
    bench.run(MIDDLE + 500 * PAN, 60, present=MIDDLE)
    blocked = bench.made.goal[0]
    bench.run(MIDDLE + 500 * PAN)
    assert 0 < bench.made.goal[0] - blocked <= 60 * DEG * PERIOD_S**2 + 1e-6


@pytest.mark.parametrize("accel", [0, 10_000])
def test_an_acceleration_limit_that_does_not_bite_counts_nothing_as_slowed(accel):
    bench = Bench(limits=Limits(accel_deg_s2=accel))
    bench.run(MIDDLE + 400, 30)
    assert bench.made.counts.slowed == 0


@settings(deadline=None)
@given(
    accel=st.floats(1, 10_000),
    moves=st.lists(st.tuples(st.integers(-600, 600), st.integers(1, 40)), min_size=1, max_size=6),
    dts=st.lists(st.floats(0.001, 0.1), min_size=1, max_size=5),
)
def test_a_limited_acceleration_never_overshoots_an_aim_that_stays_nor_speeds_up_faster(
    accel, moves, dts
):
    bench = Bench(limits=Limits(accel_deg_s2=accel, lead_deg=45, jump_deg=360), rate_hz=20)
    speed, k = 0.0, 0
    for offset, ticks in moves:
        aim = MIDDLE[0] + offset
        side = np.sign(aim - bench.made.goal[0])
        for _ in range(ticks):
            k += 1
            dt_s = dts[k % len(dts)]
            bench.time_s += dt_s - bench.period_s
            last = bench.made.goal[0]
            bench.run(MIDDLE + offset * PAN)
            step = (bench.made.goal[0] - last) / dt_s
            change = accel * DEG * dt_s + 1e-6
            assert min(0, speed - change) <= step <= max(0, speed + change)
            speed = step
            if side * (aim - last) > 0 and side * step > 0:  # under way to it
                assert side * (aim - bench.made.goal[0]) >= -1e-6
    assert LOW[0] <= bench.goal[0] <= HIGH[0]


def test_a_limited_acceleration_does_not_carry_a_goal_out_of_the_range():
    bench = Bench(limits=Limits(accel_deg_s2=20, lead_deg=45), start=HIGH - 300)
    bench.run(HIGH - 10, 20)
    raw, _ = bench.run(HIGH - 300, 60)
    assert np.all(raw[:, 0] <= HIGH[0] - 10)


# 8 lead over the joint itself


def test_a_goal_leads_a_joint_that_does_not_follow_only_so_far():
    bench = Bench()
    raw, emitted = bench.run(MIDDLE + int(50 * DEG) * PAN + 700 * GRIPPER, 60, present=MIDDLE)
    assert abs(raw[-1, 0] - MIDDLE[0] - 15 * DEG) <= 1
    assert abs(raw[-1, 5] - MIDDLE[5] - 0.25 * SPAN[5]) <= 1
    assert emitted.led == (True, False, False, False, False, True)
    assert 0 < bench.made.counts.led < 60 and bench.made.counts.limited == 60


def test_a_joint_pushed_far_away_is_led_back_to_not_jumped_after():
    bench = Bench()
    pushed = MIDDLE + int(80 * DEG) * PAN
    raw = np.array([bench.hold(pushed).raw for _ in range(100)])
    steps = np.diff(raw[:, 0])
    assert 0 < steps.max() <= FAST[0] * PERIOD_S + 1
    assert abs(raw[-1, 0] - pushed[0] + 15 * DEG) <= 1
    assert not np.diff(raw[:, 1:], axis=0).any()


def test_a_joint_pushed_out_of_its_range_does_not_take_its_goal_with_it():
    for way, edge in ((1, HIGH - LIMITS.margin_ticks), (-1, LOW + LIMITS.margin_ticks)):
        bench = Bench()
        pushed = MIDDLE + way * 4000
        assert list(np.array([bench.hold(pushed).raw for _ in range(200)])[-1]) == list(edge)
        assert list(bench.run(MIDDLE, 1, present=pushed)[1].raw) == list(edge)


def test_holding_keeps_the_last_goal_even_of_a_joint_that_sags():
    bench = Bench()
    bench.run(MIDDLE + 100, 10)
    for sag in range(0, int(15 * DEG), 7):
        assert list(bench.hold(MIDDLE + 100 - sag * PAN).raw) == list(MIDDLE + 100)


# The first move


def ramp_of(bench, target, ticks=200):
    """How many ticks of the way to `target` were at first-move speed, the goals, and whether the
    ramp is over."""
    emitted = [bench.send(values(target)) for _ in range(ticks)]
    ramping = [e.ramping for e in emitted]
    count = sum(ramping)
    assert ramping == [True] * count + [False] * (ticks - count)
    return count, np.array([e.raw for e in emitted]), count < ticks


def stopped(bench):
    bench.made.resume()


def paused(bench):
    for _ in range(9):
        bench.hold()


def restarted(bench):
    bench.made.start(bench.goal, bench.time_s, far=True)


@pytest.mark.parametrize("before", [stopped, paused, restarted])
def test_the_first_target_after_a_start_a_stop_or_a_pause_is_approached_slowly(before):
    bench = Bench()
    bench.run(MIDDLE + 200 * PAN, 20)
    before(bench)
    counts = bench.made.counts = MotionCounts()
    count, raw, over = ramp_of(bench, MIDDLE - 300 * PAN)
    steps = -np.diff(raw[:, 0])
    assert over and np.all(np.abs(steps[: count - 1] - SLOW[0] * PERIOD_S) <= 1)
    assert abs(steps[count - 1] - FAST[0] * PERIOD_S) <= 1
    assert abs(raw[count - 1, 0] - MIDDLE[0] + 300) <= 5 * DEG + 1  # ramp_threshold_deg
    assert abs(raw[count - 2, 0] - MIDDLE[0] + 300) > 5 * DEG - 1
    assert counts.ramped == count and counts.limited < count
    assert ramp_of(bench, MIDDLE + 300 * PAN)[0] == 0


def test_a_short_gap_is_no_pause_and_a_near_target_needs_no_slow_approach():
    bench = Bench()
    for _ in range(6):
        bench.hold()
    assert ramp_of(bench, MIDDLE + 200)[0] == 0
    bench.made.resume()
    assert (
        ramp_of(bench, MIDDLE + 200 + int(4.9 * DEG) * PAN + int(0.09 * SPAN[5]) * GRIPPER)[0] == 0
    )


def test_the_ticks_of_a_slow_loop_are_no_pauses():
    bench = Bench(limits=Limits(action_max_age_s=0.05), rate_hz=10)
    assert ramp_of(bench, MIDDLE + 300 * PAN)[0] == 0


def test_the_gripper_has_a_first_move_speed_and_a_threshold_of_its_own():
    count, raw, over = ramp_of(Bench(ramp=True), MIDDLE + 600 * GRIPPER)
    assert over and np.all(np.abs(np.diff(raw[: count - 1, 5]) - SLOW[5] * PERIOD_S) <= 1)
    assert abs(MIDDLE[5] + 600 - raw[count - 1, 5] - 0.1 * SPAN[5]) <= SLOW[5] * PERIOD_S + 1


@pytest.mark.parametrize("ease", [False, True])
def test_a_gripper_that_holds_something_does_not_keep_the_arm_slow(ease):
    """Its goal cannot come close to its target; the schedule would wait for ever."""
    bench = Bench()
    held, closed = MIDDLE, [0, 0, 0, 0, 0, 0.0]
    for _ in range(20):
        bench.send(closed, held)
    if ease:
        bench.made.ease(5, held)
    for _ in range(10):
        bench.hold(held)  # the policy computes
    ramping = [bench.send(closed, held).ramping for _ in range(10)]
    assert sum(ramping) <= 2 and not ramping[-1]


def test_a_first_target_that_is_never_reached_keeps_the_slow_speed():
    bench = Bench(ramp=True)
    emitted = [bench.run(MIDDLE + 300 * PAN * (-1) ** k)[1] for k in range(100)]
    assert all(e.ramping for e in emitted)


def test_holding_is_not_ramping_and_counts_no_target():
    bench = Bench(ramp=True)
    assert not bench.hold().ramping
    assert bench.made.counts == MotionCounts()
    assert bench.run(MIDDLE + 300)[1].ramping


# Letting go


def test_an_eased_gripper_presses_lightly_until_a_target_leads_away():
    bench = Bench()
    held, closed = MIDDLE, [0, 0, 0, 0, 0, 0.0]
    for _ in range(20):
        pressing = bench.send(closed, held)
    assert held[5] - pressing.raw[5] > 300
    bench.made.ease(5, held)
    raw = np.array([bench.send(closed, held).raw for _ in range(300)])
    assert np.all(np.diff(raw[:, 5]) >= 0)  # towards less, and never back
    assert np.all(raw[6:, 5] == held[5] - EASED_LEAD_TICKS)
    assert bench.hold(held).raw[5] == held[5] - EASED_LEAD_TICKS
    assert bench.run(held - 7 * GRIPPER, 1, present=held)[1].raw[5] == held[5] - 7
    opened = [bench.send([0, 0, 0, 0, 0, 100], held).raw[5] for _ in range(20)]
    assert np.all(np.diff(opened[:4]) > 50)
    again = [bench.send(closed, held).raw[5] for _ in range(20)]
    assert again[-1] < held[5] - 300


def test_an_eased_gripper_follows_what_gives_way_and_gives_way_itself():
    bench = Bench()
    closed = [0, 0, 0, 0, 0, 0.0]
    bench.run(MIDDLE - 300 * GRIPPER, 20, present=MIDDLE)
    bench.made.ease(5, MIDDLE)
    for held in (MIDDLE - 5 * GRIPPER, MIDDLE - 60 * GRIPPER, MIDDLE + 40 * GRIPPER):
        for _ in range(10):
            emitted = bench.send(closed, held)
        assert emitted.raw[5] == held[5] - EASED_LEAD_TICKS


def test_easing_a_joint_that_presses_on_nothing_changes_nothing():
    eased, plain = Bench(), Bench()
    eased.made.ease(5, MIDDLE)
    for bench in (eased, plain):
        bench.run(MIDDLE + 300 * GRIPPER, 5)
    assert np.array_equal(eased.goal, plain.goal)


def test_resuming_ends_the_easing():
    bench = Bench()
    bench.run(MIDDLE - 300 * GRIPPER, 20, present=MIDDLE)
    bench.made.ease(5, MIDDLE)
    bench.made.resume()
    bench.run(MIDDLE - 300 * GRIPPER, 40, present=MIDDLE)
    assert MIDDLE[5] - bench.goal[5] >= 299


def test_an_unloaded_joint_stands_where_it_was_and_does_not_sag():
    bench = Bench()
    bench.run(MIDDLE + 60, 40, present=MIDDLE)
    bench.made.unload(1, MIDDLE + 3)
    expected = MIDDLE + 60
    expected[1] = MIDDLE[1] + 3
    for sag in range(0, 100, 10):
        assert list(bench.hold(MIDDLE - sag).raw) == list(expected)


def test_unloading_changes_nothing_that_the_caller_holds_nor_what_a_jump_is_measured_from():
    start = MIDDLE.astype(np.float64)
    bench = Bench(start=start, far=False, ramp=True)
    bench.made.unload(0, MIDDLE + int(40 * DEG) * PAN)
    assert np.array_equal(start, MIDDLE)
    assert bench.send(values(MIDDLE + int(80 * DEG) * PAN)).rejected


# All of it at once

TICK = st.tuples(
    st.sampled_from(["target"] * 8 + ["hold", "unload", "ease", "resume", "redirect"]),
    st.lists(st.floats(-400, 400), min_size=6, max_size=6),  # the target
    st.one_of(
        st.none(), st.integers(-300, 300), st.integers(-5000, 9000)
    ),  # where joint `which` is, or offset
    st.integers(0, 5),
    st.floats(0, 0.4).map(
        lambda dt_s: round(dt_s, 6)
    ),  # to a microsecond: clocks have no finer steps
    st.floats(-0.1, 0.4),  # age
)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(list(Units)),
    st.sampled_from([0.0, 30.0, 2000.0]),
    st.sampled_from([5.0, RATE_HZ, 200.0]),
    st.lists(st.integers(-60, 60), min_size=6, max_size=6),  # resting beyond an end
    st.booleans(),
    st.lists(TICK, max_size=25),
)
def test_no_sequence_leaves_the_range_or_exceeds_speed_or_lead(
    units, accel, rate_hz, beyond, far, sequence
):
    limits = dataclasses.replace(LIMITS, accel_deg_s2=accel)
    made = MotionShaper(VIRTUAL_CALIBRATION, units, limits, rate_hz)
    beyond = np.array(beyond)
    start = np.where(beyond > 0, HIGH + beyond, LOW + beyond)
    made.start(start, 0.0, far=far)
    lead = limits.ticks(VIRTUAL_CALIBRATION, limits.lead_deg, limits.gripper_lead_pct)
    low, high = LOW + limits.margin_ticks, HIGH - limits.margin_ticks
    last, time_s = start.astype(float), 0.0
    for kind, target, where, which, dt_s, age_s in sequence:
        present = last.copy()
        if where is not None:
            present[which] = where if abs(where) > 300 else last[which] + where
        if kind == "unload":
            made.unload(which, present)
            last[which] = present[which]
        elif kind == "ease":
            made.ease(which, present)
        elif kind in ("resume", "redirect"):
            getattr(made, kind)()
        time_s += dt_s
        if kind in ("target", "ease"):
            emitted = made.shape(target, present, time_s, time_s - age_s)
        else:
            emitted = made.hold(present, time_s)
        raw = np.array(emitted.raw)
        assert all(type(ticks) is int for ticks in emitted.raw)
        assert np.all(raw >= np.minimum(low, last) - 0.5) and np.all(
            raw <= np.maximum(high, last) + 0.5
        )
        assert np.all(np.abs(raw - last) <= FAST * min(dt_s, 2 / rate_hz, 0.1) + 0.51)
        if emitted.ramping:
            assert np.all(np.abs(raw - last) <= SLOW * min(dt_s, 2 / rate_hz, 0.1) + 0.51)
        assert np.all(np.abs(raw - present) <= np.maximum(lead, np.abs(last - present)) + 0.51)
        if emitted.rejected:
            assert np.all(
                (np.abs(raw - last) < 0.51)
                | (np.abs(last - present) > lead - 1)
                | (which == np.arange(6))
            )
        last = made.goal.copy()
