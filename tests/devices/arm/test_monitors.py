"""What the servos report becomes warnings and stops: each row of the requirements, its thresholds
and durations."""

import dataclasses

import numpy as np
import pytest

from smolvla_edge.devices.arm.calibration import IDS, JOINT_NAMES
from smolvla_edge.devices.arm.limits import TICKS_PER_DEG, Limits
from smolvla_edge.devices.arm.monitors import Monitors
from smolvla_edge.devices.arm.motion import EASED_LEAD_TICKS, MotionShaper
from smolvla_edge.devices.arm.telemetry import MA_PER_STEP, JointState
from smolvla_edge.devices.arm.units import Units
from smolvla_edge.devices.bus.sts3215 import Register
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION
from smolvla_edge.devices.virtual.virtual_bus import VARIANT_VALUES
from support.faulty_arm import FaultyServo

REGISTERS = {register: VARIANT_VALUES.get(register, register.default or 0) for register in Register}
TICK_S = 1 / 16  # times that add up exactly
WELL = JointState(
    time_s=100.0,
    position=np.zeros(6),
    raw=np.full(6, 2000),
    velocity=np.zeros(6, np.int64),
    load=np.zeros(6),
    voltage=np.full(6, 7.0),
    temperature=np.full(6, 30),
    current=np.zeros(6),
    errors=(0,) * 6,
    age_s=np.zeros(6),
    missed=(0,) * 6,
    jumps=(0,) * 6,
)
PROTECTION_MA = 500 * MA_PER_STEP


def monitors(limits=None, own=None):
    """own: registers that all six servos hold other than from the factory."""
    return Monitors(limits or Limits(), dict.fromkeys(IDS, REGISTERS | (own or {})))


def reading(time_s, joint=2, **values):
    """All well, but for `values` on one joint."""
    changed = {}
    for name, value in values.items():
        column = list(getattr(WELL, name))
        column[joint] = value
        changed[name] = (
            tuple(column) if isinstance(getattr(WELL, name), tuple) else np.array(column)
        )
    return dataclasses.replace(WELL, time_s=time_s, **changed)


class Watch:
    """Monitors and the time: each `for_` lets one condition last."""

    def __init__(self, limits=None, own=None, behind_deg=0.0, joint=2, limp=False):
        self.monitors, self.joint, self.time_s = monitors(limits, own), joint, 100.0
        self.goal = (
            None if limp else WELL.raw + behind_deg * TICKS_PER_DEG * (np.arange(6) == joint)
        )
        self.warned, self.stopped, self.verdict = {}, None, None

    def for_(self, seconds, **values):
        """-> self. warned: {text: when it was told}, stopped: when it was, said: why; since the
        condition began."""
        start, self.stopped, self.warned, self.said = self.time_s, None, {}, ""
        while self.time_s - start <= seconds:
            self.verdict = self.monitors.check(
                reading(self.time_s, self.joint, **values), self.goal
            )
            for text in self.verdict.warnings:
                assert text not in self.warned, "told twice"
                self.warned[text] = self.time_s - start
            if self.verdict.stops and self.stopped is None:
                self.stopped, self.said = self.time_s - start, "; ".join(self.verdict.stops)
            self.time_s += TICK_S
        return self


def test_an_arm_that_is_well_gives_no_verdict():
    watch = Watch().for_(5)
    assert not watch.warned and watch.stopped is None
    assert (watch.verdict.unload, watch.verdict.ease) == ([], [])


WIDE = Limits(lead_deg=45)  # so that 25 degrees are reached
ROWS = {
    # what: (limits, the servo's own registers, degrees behind, reading, warned after s, stopped
    # after s, said)
    "cool": (None, {}, 0, {"temperature": 54}, None, None, ""),
    "warm": (None, {}, 0, {"temperature": 55}, 0, None, "55 C"),
    "hot": (None, {}, 0, {"temperature": 65}, None, 0, "65 C"),
    "hot for this servo": (
        None,
        {Register.MAX_TEMPERATURE_LIMIT: 60},
        0,
        {"temperature": 55},
        None,
        0,
        "55 C",
    ),
    "warm for this servo": (
        None,
        {Register.MAX_TEMPERATURE_LIMIT: 60},
        0,
        {"temperature": 45},
        0,
        None,
        "45 C",
    ),
    "a cooler limit": (
        Limits(temperature_warn_c=35, temperature_stop_c=40),
        {},
        0,
        {"temperature": 40},
        None,
        0,
        "",
    ),
    "a cooler warning": (
        Limits(temperature_warn_c=35),
        {},
        0,
        {"temperature": 35},
        0,
        None,
        "35 C",
    ),
    "enough voltage": (None, {}, 0, {"voltage": 7.5}, None, None, ""),
    "little voltage": (None, {}, 0, {"voltage": 7.6}, 0, None, "supply 7.6 V, limits 4.0 to 8.0 V"),
    "too much voltage": (
        None,
        {},
        0,
        {"voltage": 8.1},
        0,
        0.5,
        "supply 8.1 V, expected 4.0 to 8.0 V",
    ),
    "half its protection current": (None, {}, 0, {"current": 0.5 * PROTECTION_MA}, None, None, ""),
    "more current": (None, {}, 0, {"current": 0.51 * PROTECTION_MA}, 0.5, None, "1658 mA"),
    "more for this servo": (
        None,
        {Register.PROTECTION_CURRENT: 200},
        0,
        {"current": 660.0},
        0.5,
        None,
        "at 1300",
    ),
    "stalled": (
        None,
        {},
        6,
        {"current": PROTECTION_MA + 1, "velocity": -29},
        0.5,
        1.0,
        "blocked: 3251 mA",
    ),
    "strong but moving": (
        None,
        {},
        6,
        {"current": PROTECTION_MA + 1, "velocity": -30},
        0.5,
        None,
        "",
    ),
    "strong but there": (None, {}, 4.9, {"current": PROTECTION_MA + 1}, 0.5, None, ""),
    "not quite that strong": (None, {}, 6, {"current": PROTECTION_MA}, 0.5, None, ""),
    "loaded a little": (None, {}, 0, {"load": 60.0}, None, None, ""),
    "loaded": (None, {}, 0, {"load": -61.0}, 1.0, None, "load 61 %"),
    "overloaded": (None, {}, 0, {"load": -81.0}, 1.0, 1.5, "load 81 % for 1.5 s"),
    "a lower load limit": (Limits(load_stop_pct=70), {}, 0, {"load": 71.0}, 1.0, 1.5, "load 71 %"),
    "overloaded for this servo": (
        None,
        {Register.OVERLOAD_TORQUE: 40},
        0,
        {"load": 41.0},
        1.0,
        1.5,
        "load 41 %",
    ),
    "loaded for this servo": (
        None,
        {Register.OVERLOAD_TORQUE: 40},
        0,
        {"load": 31.0},
        1.0,
        None,
        "load 31 %",
    ),
    "a servo that trips early": (
        None,
        {Register.PROTECTION_TIME: 100},
        0,
        {"load": 81.0},
        None,
        0.75,
        "for 0.75 s",
    ),
    "a servo that trips late": (
        None,
        {Register.PROTECTION_TIME: 250},
        0,
        {"load": 81.0},
        1.0,
        1.5,
        "for 1.5 s",
    ),
    "a little behind": (WIDE, {}, 9.9, {"velocity": 5}, None, None, ""),
    "lagging": (WIDE, {}, 10.1, {"velocity": 5}, 0.5, None, "10 deg behind its goal"),
    "behind": (WIDE, {}, 25.1, {"velocity": 5}, 0.5, 1.0, "25 deg behind its goal."),
    "as far behind as the lead lets it": (
        None,
        {},
        14.1,
        {"velocity": 5},
        0.5,
        1.0,
        "14 deg behind its goal.",
    ),
    "a small lead": (
        Limits(lead_deg=5),
        {},
        4.1,
        {"velocity": 5},
        0.5,
        1.0,
        "4 deg behind its goal.",
    ),
    "a position not believed twice": (None, {}, 0, {"jumps": 2}, None, None, ""),
    "a position not believed": (
        None,
        {},
        0,
        {"jumps": 3},
        None,
        0,
        "3 positions in a row not believed",
    ),
    "silent once": (None, {}, 0, {"missed": 1}, None, None, ""),
    "silent twice": (None, {}, 0, {"missed": 2}, 0, None, "no answer 2 times in a row"),
    "silent": (None, {}, 0, {"missed": 5, "age_s": 0.16}, None, 0, "no answer for 0.16 s"),
    "silent for long": (None, {}, 0, {"missed": 2, "age_s": 0.21}, None, 0, "no answer for 0.21 s"),
    "silent, not for long": (None, {}, 0, {"missed": 4, "age_s": 0.2}, 0, None, ""),
    "voltage bit": (None, {}, 0, {"errors": 0x01}, 0, None, "reports voltage"),
    "an unnamed bit": (None, {}, 0, {"errors": 0x10}, 0, None, "reports bit 4"),
    "encoder bit": (None, {}, 0, {"errors": 0x02}, None, 0, "reports encoder"),
    "overheat bit": (None, {}, 0, {"errors": 0x04}, None, 0, "reports overheat"),
    "overcurrent bit": (None, {}, 0, {"errors": 0x08}, None, 0, "reports overcurrent"),
    "overload bit": (None, {}, 0, {"errors": 0x21}, None, 0, "reports voltage, overload"),
}


@pytest.mark.parametrize("joint", [0, 4])
@pytest.mark.parametrize("what", ROWS)
def test_a_warning_or_a_stop_comes_when_it_must_and_not_before(what, joint):
    limits, own, behind_deg, values, warned_s, stopped_s, said = ROWS[what]
    watch = Watch(limits, own, behind_deg, joint).for_(3, **values)
    assert (min(watch.warned.values(), default=None), watch.stopped) == (warned_s, stopped_s)
    told = watch.said or "; ".join(watch.warned)
    assert said in told
    assert not told or told.startswith(f"{JOINT_NAMES[joint]} ({joint + 1}): ")
    lets_go = {"current", "load", "errors"} & set(values) or behind_deg
    assert set(watch.verdict.unload) == ({joint} if stopped_s is not None and lets_go else set())
    assert watch.verdict.ease == []


def test_servos_for_12_v_are_judged_by_their_own_limits():
    watched = monitors(own={Register.MIN_VOLTAGE_LIMIT: 95, Register.MAX_VOLTAGE_LIMIT: 140})

    def check(time_s, volt):
        return watched.check(
            dataclasses.replace(WELL, time_s=time_s, voltage=np.full(6, volt)), None
        )

    assert check(0, 12.1).warnings == check(1, 10.1).warnings == []
    assert len(check(2, 9.9).warnings) == 6 and not check(3, 9.4).stops and check(4, 9.4).stops


def test_the_supply_falling_is_a_stop_at_once_and_sagging_is_not():
    watch = Watch().for_(0.1)
    assert watch.for_(0, voltage=5.1).stopped is None
    watch = Watch().for_(0.1)
    assert watch.for_(0, voltage=4.9).stopped == 0 and "fell by 2.1 V at once" in watch.said
    watch = Watch()
    for tenths in range(70, 45, -1):
        assert watch.for_(0, voltage=tenths / 10).stopped is None


def test_f29_a_supply_that_is_gone_stops_at_once_and_one_too_low_within_half_a_second():
    watch = Watch()
    for volt in (6.2, 5.3, 4.6, 4.1):
        assert watch.for_(0.2, voltage=volt).stopped is None
    assert watch.for_(1, voltage=3.5).stopped == 0.5
    assert Watch().for_(0.1).for_(0, voltage=0.0).stopped == 0


def test_f29_a_servo_that_heats_up_is_warned_of_once_before_it_stops():
    watch, told = Watch(), {}
    for celsius in range(30, 76):
        watch.for_(0, temperature=celsius)
        told |= dict.fromkeys(watch.warned, celsius)
        assert (watch.stopped is None) == (celsius != 65)
    assert told == {"elbow_flex (3): 55 C": 55}


def test_a_condition_that_goes_away_in_between_starts_anew():
    for signal, value, seconds in (
        ("current", 3000.0, 0.5),
        ("load", 70.0, 1.0),
        ("load", 90.0, 1.5),
    ):
        watch = Watch()
        for _ in range(5):
            watch.for_(seconds - 3 * TICK_S, **{signal: value})
            assert watch.stopped is None and (value == 90.0 or not watch.warned)
            watch.for_(0)
    watch = Watch(behind_deg=14.5)
    for _ in range(5):
        assert watch.for_(0.8, velocity=5).stopped is None
        watch.goal, goal = WELL.raw, watch.goal
        watch.for_(0)
        watch.goal = goal


def test_a_warning_is_told_once_until_the_operator_resumes():
    watch = Watch()
    assert watch.for_(3, load=70.0, temperature=56, errors=1).warned.keys() == {
        "elbow_flex (3): load 70 %",
        "elbow_flex (3): 56 C",
        "elbow_flex (3): reports voltage",
    }
    watch.for_(1)
    assert not watch.for_(3, load=70.0, temperature=57, errors=1).warned
    assert watch.for_(0, errors=0x11).warned  # a new bit
    watch.monitors.reset()
    watch.for_(3, load=70.0, temperature=57, errors=1)
    assert sorted(watch.warned.values()) == [0, 0, 1.0]


def test_after_a_resume_every_duration_starts_anew_and_an_old_voltage_is_forgotten():
    watch = Watch(behind_deg=14.5)
    assert watch.for_(1, velocity=5).stopped == 1
    watch.monitors.reset()
    assert watch.for_(2, velocity=5).stopped == 1
    watch.monitors.reset()
    assert watch.for_(0, voltage=4.6, velocity=5).stopped is None


def test_a_stop_says_everything_once():
    state = reading(100.0, temperature=70, jumps=3)
    state = dataclasses.replace(state, errors=(0x20, 0, 0, 0, 0, 0x04))
    verdict = monitors().check(state, WELL.raw)
    assert "; ".join(verdict.stops) == (
        "shoulder_pan (1): reports overload; "
        "elbow_flex (3): 3 positions in a row not believed: encoder or line; elbow_flex (3): 70 C. Let it cool; "
        "gripper (6): reports overheat"
    )
    assert verdict.unload == [0, 5]
    watch = Watch()
    assert watch.for_(1, temperature=70).stopped == 0 and watch.verdict.stops == []
    assert watch.for_(0, temperature=60).stopped is None


def test_f31_a_joint_that_does_not_move_at_all_gets_a_hint():
    for velocity, hinted in ((0, True), (3, False)):
        watch = Watch(behind_deg=14.5).for_(1, velocity=velocity)
        assert ("Goal_Velocity and Phase" in watch.said) == hinted


def test_a_limp_arm_is_behind_nothing_and_blocked_by_nothing_but_may_be_too_hot():
    watch = Watch(limp=True).for_(3, current=2 * PROTECTION_MA)
    assert watch.stopped is None and list(watch.warned.values()) == [0.5]
    assert watch.for_(0, temperature=70).stopped == 0


def test_a_gripper_that_does_not_arrive_is_no_fault():
    assert Watch(behind_deg=32, joint=5).for_(5, load=20.0).warned == {}


@pytest.mark.parametrize(
    ("own", "values", "after_s"),
    [
        ({}, {"current": PROTECTION_MA + 1, "load": 20.0}, 1.0),
        ({Register.PROTECTION_CURRENT: 250}, {"current": 250 * MA_PER_STEP + 1, "load": 20.0}, 1.0),
        (
            {Register.OVERLOAD_TORQUE: 25},
            {"load": 26.0},
            1.5,
        ),  # LeRobot's gripper: it would trip after 2 s
        ({}, {"load": -81.0}, 1.5),
    ],
)
def test_a_gripper_that_presses_hard_is_eased_before_it_trips_and_the_arm_goes_on(
    own, values, after_s
):
    watch = Watch(own=own, behind_deg=20, joint=5).for_(after_s - TICK_S, **values)
    assert watch.verdict.ease == []
    told = watch.warned
    watch.for_(1, **values)
    assert (watch.verdict.ease, watch.verdict.unload, watch.stopped) == ([5], [], None)
    assert [text.split(" (")[0] for text in (*told, *watch.warned) if "firmly" in text] == [
        "gripper"
    ]
    assert watch.for_(0).verdict.ease == []


@pytest.mark.parametrize(
    "own", [{Register.PROTECTION_CURRENT: 250}, {Register.OVERLOAD_TORQUE: 25}]
)
def test_a_gripper_around_something_hard_is_eased_once_and_keeps_a_light_pressure(own):
    """Shaper, monitors and a blocked servo in a loop, for 20 s: no hunting between pressing and
    easing."""
    servo = FaultyServo(VIRTUAL_CALIBRATION.joints[5], 2748)
    servo.set_register(Register.TORQUE_ENABLE, 1)
    servo.set_register(Register.TORQUE_LIMIT, 500)
    servo.stuck = True
    watched = monitors(own=own)
    shaper = MotionShaper(VIRTUAL_CALIBRATION, Units.DEGREES, Limits(), 30.0)
    middle = [(j.range_min + j.range_max) // 2 for j in VIRTUAL_CALIBRATION.joints]
    shaper.start(middle, 0.0)
    eased, loads, told = [], [], []
    for tick in range(1, 600):
        raw = np.array([*middle[:5], servo.peek(Register.PRESENT_POSITION)])
        goal = shaper.shape([0, 0, 0, 0, 0, 0.0], raw, tick / 30).raw
        servo.set_register(Register.GOAL_POSITION, goal[5])
        servo.advance(1 / 30)
        load, current = (
            servo.peek(Register.PRESENT_LOAD) / 10,
            servo.peek(Register.PRESENT_CURRENT) * MA_PER_STEP,
        )
        state = dataclasses.replace(reading(tick / 30, 5, load=load, current=current), raw=raw)
        verdict = watched.check(state, goal)
        assert not verdict.stops and not verdict.unload
        told += verdict.warnings
        loads.append(abs(load))
        if verdict.ease:
            eased.append(tick / 30)
            shaper.ease(5, raw)
    assert max(loads) == 50 and 0.9 < eased[0] < 1.8 and eased[-1] - eased[0] < 0.2
    # 1 % of duty a tick in this servo: below what trips it
    assert set(loads[60:]) == {EASED_LEAD_TICKS}
    assert [text for text in told if "firmly" in text] == told[-1:]
    opened = shaper.shape([0, 0, 0, 0, 0, 100.0], raw, 20.0 + 1 / 30).raw[5]
    assert opened > raw[5] + 20
