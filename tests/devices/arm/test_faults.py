"""What goes wrong on an arm under way, one by one: F01 to F38 of docs/safety.md, as far as no
policy is needed.

Every test ends with the same question to the servos: all off, and nothing ever seen on the wire
that a careful host would not have sent (the virtual arm checks each frame).
"""

import time

import numpy as np
import pytest

from smolvla_edge.core.errors import ArmError, BusError, BusLost, DeviceError
from smolvla_edge.devices.arm.limits import Limits
from smolvla_edge.devices.arm.so101 import SO101
from smolvla_edge.devices.arm.units import Units
from smolvla_edge.devices.bus import frames
from smolvla_edge.devices.bus.sts3215 import Register
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION
from support.faulty_arm import FaultyArm

pytestmark = pytest.mark.arm

IDS = (1, 2, 3, 4, 5, 6)
HOME = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 50.0])
PERIOD_S = 1 / 30


def from_home(*degrees):
    """The home pose with the first joints so many degrees further on."""
    return HOME + np.array([*degrees, *[0] * (6 - len(degrees))])


@pytest.fixture
def arm(virtual):
    """An energised arm; afterwards every servo is off, and nothing was seen that must not be."""
    with SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES) as made:
        made.enable()
        yield made
        made.release()
        assert [virtual.registers(i)[Register.TORQUE_ENABLE] for i in IDS] == [0] * 6
        assert virtual.violations() == []
        virtual.reset()  # silent servos cannot confirm it to the driver


def ticks(arm, count, target=HOME, until=lambda: False):
    """Run the arm like the control loop does; -> the readings."""
    readings = []
    for _ in range(count):
        start = time.monotonic()
        readings.append(arm.read())
        arm.send(target)
        if until():
            break
        time.sleep(max(0.0, PERIOD_S - (time.monotonic() - start)))
    return readings


def run_until_stopped(arm, limit_s=5.0, target=HOME):
    start = time.monotonic()
    ticks(arm, int(limit_s / PERIOD_S), target, until=lambda: bool(arm.stopped))
    assert arm.stopped, f"not stopped within {limit_s} s"
    return time.monotonic() - start


def settled(arm):
    ticks(arm, 3)
    assert not arm.stopped
    arm.new_warnings()


def test_f01_a_servo_silent_once_is_asked_again_within_the_tick(virtual, arm):
    settled(arm)
    virtual.inject("mute", 3)
    state = ticks(arm, 1)[0]
    assert state.missed == (0,) * 6
    assert arm.anomalies["retries"] == 1 and not arm.stopped
    assert len(ticks(arm, 5)) == 5


def test_f02_a_servo_silent_for_good_stops_the_arm_after_five_readings_and_all_are_switched_off(
    virtual, arm
):
    settled(arm)
    virtual.inject("mute", 4, count=-1)
    others = ticks(arm, 3, from_home(5))
    assert not arm.stopped and others[-1].missed == (0, 0, 0, 3, 0, 0)
    assert others[-1].raw[0] != others[0].raw[0]  # the others go on
    run_until_stopped(arm)
    assert "wrist_flex (4): no answer" in arm.stopped
    assert any("no answer 2 times in a row" in w for w in arm.new_warnings())
    result = arm.release()
    assert list(result.unconfirmed) == ["wrist_flex (4)"]
    off = {w.id for w in virtual.writes() if w.register is Register.TORQUE_ENABLE and w.value == 0}
    assert off == set(IDS)


def test_f03_an_arm_silent_altogether_stops_within_0_3_s(virtual, arm):
    settled(arm)
    for servo_id in IDS:
        virtual.inject("mute", servo_id, count=-1)
    took = run_until_stopped(arm)
    print(f"all silent: stopped after {took:.3f} s")
    assert took < 0.35  # 0.2 s of silence, and a tick of a busy machine
    arm.release()
    assert {
        w.id for w in virtual.writes() if w.register is Register.TORQUE_ENABLE and w.value == 0
    } == set(IDS)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("corrupt", 0),  # F04
        ("truncate", 7),  # F05
        ("trickle", 0.0002),
        ("trickle", 0.002),
        ("delay", 0.09),  # F06
        ("noise", 0),  # F07
        ("wrong_id", 0),  # F08
        ("wrong_length", 0),
        ("bad_error", 0),
    ],
)
def test_f04_to_f08_one_spoiled_answer_is_never_a_wrong_value(virtual, arm, kind, value):
    settled(arm)
    virtual.inject(kind, 3, value=value)
    raw = np.array([state.raw for state in ticks(arm, 12)])
    assert np.abs(raw - raw[0]).max() <= 2, raw
    assert not arm.stopped


@pytest.mark.parametrize("kind", ["corrupt", "wrong_id", "wrong_length", "bad_error", "truncate"])
def test_f04_to_f08_answers_spoiled_for_good_end_in_a_stop_or_an_error_of_the_line(
    virtual, arm, kind
):
    settled(arm)
    virtual.inject(kind, 3, count=-1, value=7)
    try:
        run_until_stopped(arm)
        assert "elbow_flex (3)" in arm.stopped
    except BusError as error:
        assert "nois" in str(error)


def test_f09_an_adapter_that_echoes_gives_the_same_values(virtual):
    virtual.inject("echo")
    with SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES) as arm:
        arm.enable()
        raw = np.array([state.raw for state in ticks(arm, 5)])
        assert arm.bus.echo and np.abs(raw - raw[0]).max() <= 2
    assert virtual.violations() == []


def test_f10_two_servos_with_one_id_are_refused_by_name(virtual):
    virtual.inject("duplicate", 1, count=-1)
    with pytest.raises(ArmError, match=r"shoulder_pan \(1\): 2 servos share id 1"):
        SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES).connect()


@pytest.mark.parametrize("bit", [0x02, 0x04, 0x08, 0x20])
def test_f12_a_fault_bit_under_way_stops_the_arm_and_unloads_that_servo(virtual, arm, bit):
    ticks(arm, 10, from_home(20))  # under way, so that goal and position differ
    virtual.inject("error", 1, value=bit)
    run_until_stopped(arm, target=from_home(20))
    assert "shoulder_pan (1): reports" in arm.stopped
    held = arm.hold().raw
    state = arm.read()
    assert abs(held[0] - state.raw[0]) <= 30
    assert virtual.registers(1)[Register.TORQUE_LIMIT] == 200
    assert virtual.registers(2)[Register.TORQUE_LIMIT] == 1000
    for _ in range(5):
        arm.read()
        assert arm.send(HOME).raw == held  # latched
    virtual.inject("error", 1, value=0)
    arm.read()
    arm.resume()
    ticks(arm, 3, from_home(20))
    assert not arm.stopped
    assert virtual.registers(1)[Register.TORQUE_LIMIT] == 1000


def test_f12_a_voltage_bit_under_way_is_a_warning_and_its_data_are_used(virtual, arm):
    settled(arm)
    virtual.inject("error", 1, value=0x01)
    states = ticks(arm, 5)
    assert not arm.stopped and states[-1].errors[0] == 1 and states[-1].missed == (0,) * 6
    assert arm.new_warnings() == ["shoulder_pan (1): reports voltage"]


def test_f14_servos_that_never_acknowledge_are_driven_all_the_same(virtual):
    for servo_id in IDS:
        virtual.set_register(servo_id, Register.RESPONSE_STATUS_LEVEL, 0)
    with SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES) as arm:
        arm.enable()
        ticks(arm, 5)
        assert not arm.stopped
        assert arm.release().unconfirmed == {}
    assert virtual.violations() == []


@pytest.mark.parametrize("shown", [-100, 5000, 4001])
def test_f17_a_position_no_joint_can_have_reached_is_not_believed_and_then_a_fault(
    virtual, arm, shown
):
    settled(arm)
    virtual.force(2, Register.PRESENT_POSITION, shown)
    states = ticks(arm, 2)
    assert abs(states[-1].raw[1] - 2025) <= 2 and not arm.stopped
    run_until_stopped(arm)
    assert "shoulder_lift (2): 3 positions in a row not believed" in arm.stopped
    virtual.force(2, Register.PRESENT_POSITION, None)


BAD = [
    [np.nan] * 6,
    [0, np.inf, 0, 0, 0, 0],
    [0] * 5,
    {"shoulder_pan.pos": 0},
    None,
]


@pytest.mark.parametrize("target", BAD, ids=repr)
def test_f18_what_is_no_target_is_held(virtual, arm, target):
    settled(arm)
    before = arm.hold().raw
    arm.read()
    assert arm.send(target).raw == before
    arm.read()
    assert arm.send(np.array([1e9] * 6)).raw == before  # a jump
    assert arm.send(np.arange(6)).rejected == ""  # whole numbers are numbers


@pytest.mark.parametrize("units", Units)
@pytest.mark.parametrize("sign", [1, -1])
def test_f19_targets_beyond_the_range_stop_at_its_margin(virtual, units, sign):
    with SO101(virtual.port, VIRTUAL_CALIBRATION, units) as arm:
        arm.enable(far=True)
        target = np.array([300.0 * sign] * 6)
        ticks(arm, 12, target)
    goals = np.array([g.raw for g in virtual.goals()]).reshape(-1, 6)
    low = [j.range_min + 10 for j in VIRTUAL_CALIBRATION.joints]
    high = [j.range_max - 10 for j in VIRTUAL_CALIBRATION.joints]
    assert (goals >= low).all() and (goals <= high).all()
    assert np.abs(goals[-1] - goals[0]).max() > 50  # it did move
    assert virtual.violations() == []


def test_f20_a_step_of_90_degrees_between_ticks_is_held_not_crept_to(virtual, arm):
    settled(arm)
    before = arm.hold().raw
    ticks(arm, 5, from_home(90))
    assert arm.hold().raw == before and arm.counts.jumped == 5
    ticks(arm, 12, from_home(90))
    assert "15 targets in a row" in arm.stopped


def test_f21_a_first_target_far_away_is_approached_slowly_from_where_the_arm_stands(virtual, arm):
    # The first-move speed
    virtual.expect_steps([30 * 4095 / 360 * 0.1 + 2] * 5 + [60 / 100 * 1463 * 0.1 + 2])
    target = from_home(40)
    emitted = []
    for _ in range(20):
        arm.read()
        emitted.append(arm.send(target))
        time.sleep(PERIOD_S)
    assert all(e.ramping for e in emitted)
    assert abs(emitted[0].raw[0] - 2001) < 40


@pytest.mark.parametrize(
    ("register", "value", "limit_s", "said"),
    [
        (Register.PRESENT_TEMPERATURE, 66, 1.0, "66 C"),
        (Register.PRESENT_VOLTAGE, 35, 2.0, "supply"),
        (Register.PRESENT_VOLTAGE, 0, 2.0, "supply"),
        (Register.PRESENT_LOAD, 900, 3.0, "load 90 %"),
    ],
)
def test_f29_what_the_servos_report_stops_the_arm(virtual, arm, register, value, limit_s, said):
    settled(arm)
    virtual.force(3, register, value)
    run_until_stopped(arm, limit_s)
    assert "elbow_flex (3)" in arm.stopped and said in arm.stopped
    virtual.force(3, register, None)


@pytest.mark.parametrize(
    ("register", "value", "said"),
    [
        (Register.PRESENT_TEMPERATURE, 57, "57 C"),
        (Register.PRESENT_VOLTAGE, 43, "4.3 V"),
        (Register.PRESENT_CURRENT, 300, "mA"),
    ],
)
def test_f29_less_of_it_is_a_warning(virtual, arm, register, value, said):
    settled(arm)
    if register is Register.PRESENT_VOLTAGE:  # sagging, not falling
        for volts in (60, 50):
            virtual.force(3, register, volts)
            ticks(arm, 9)
    virtual.force(3, register, value)
    ticks(arm, 25)
    assert not arm.stopped
    assert any(said in warning for warning in arm.new_warnings())


def test_f30_a_servo_that_restarts_is_noticed_within_a_second_and_never_switched_on_again(
    virtual, arm
):
    settled(arm)
    virtual.reboot(5)
    took = run_until_stopped(arm)
    print(f"restarted servo: noticed after {took:.2f} s")
    assert took < 1.0
    assert "wrist_roll (5): torque went off by itself" in arm.stopped
    ticks(arm, 10)
    with pytest.raises(ArmError, match=r"wrist_roll \(5\) is off"):
        arm.resume()
    assert virtual.registers(5)[Register.TORQUE_ENABLE] == 0


def test_f31_a_servo_that_does_not_follow_is_a_fault_with_a_hint(virtual, arm):
    settled(arm)
    virtual.inject("stuck", 1, count=-1)
    run_until_stopped(arm, target=from_home(30))
    assert "shoulder_pan (1)" in arm.stopped
    assert "Goal_Velocity" in arm.stopped or "blocked" in arm.stopped or "load" in arm.stopped
    assert abs(arm.hold().raw[0] - arm.read().raw[0]) <= 2  # it pushes no more


def test_f32_a_slow_bus_costs_rate_and_not_order(virtual, arm):
    settled(arm)
    for servo_id in IDS:
        virtual.inject("delay", servo_id, count=-1, value=0.005)
    start = time.monotonic()
    try:
        states = ticks(arm, 8)
        assert all(abs(s.raw[0] - 2001) <= 2 for s in states)
        assert (time.monotonic() - start) / 8 < 0.1
    except BusError as error:
        assert "nois" in str(error)


def test_f36_a_frame_cut_in_the_middle_does_not_disturb_the_next_connect(virtual):
    import serial

    with serial.Serial(virtual.port, 1_000_000) as port:
        port.write(frames.sync_write(42, dict.fromkeys(IDS, b"\x00\x08"))[:17])
        port.flush()
    with SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES) as arm:
        arm.enable()
        ticks(arm, 3)
    assert virtual.violations() == []


@pytest.mark.parametrize("how", ["hang_up", "deaf"])
def test_f27_and_f37_a_port_that_is_gone_is_one_error_and_no_hang(how):
    with FaultyArm(cameras=()) as virtual:
        arm = SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES)
        arm.connect()
        arm.enable()
        settled(arm)
        virtual.hang_up() if how == "hang_up" else virtual.deaf(True)
        start = time.monotonic()
        with pytest.raises((BusLost, StopIteration)):
            for _ in range(3000):
                arm.read()
                arm.send(HOME)
                if arm.stopped:
                    raise StopIteration
        assert time.monotonic() - start < 5
        start = time.monotonic()
        assert len(arm.release().unconfirmed) == 6
        assert time.monotonic() - start < 5
        arm.bus.close()


def test_what_goes_wrong_during_a_stop_is_told_and_unloaded_as_well(virtual, arm):
    settled(arm)
    arm.stop("the operator pressed stop")
    virtual.inject("error", 2, value=0x20)
    virtual.force(4, Register.PRESENT_TEMPERATURE, 85)
    for _ in range(20):
        arm.read()
        arm.hold()
        time.sleep(PERIOD_S)
    assert (
        "pressed stop" in arm.stopped
        and "shoulder_lift (2)" in arm.stopped
        and "85 C" in arm.stopped
    )
    told = [w for w in arm.new_warnings() if "and now" in w]
    assert len(told) == 1 and "wrist_flex (4): 85 C" in told[0]
    assert virtual.registers(2)[Register.TORQUE_LIMIT] == 200
    virtual.inject("error", 2, value=0)
    virtual.force(4, Register.PRESENT_TEMPERATURE, None)


def test_a_fault_that_lasts_stops_the_arm_again_after_a_resume(virtual, arm):
    settled(arm)
    virtual.force(3, Register.PRESENT_TEMPERATURE, 66)
    run_until_stopped(arm, 1.0)
    arm.resume()
    assert not arm.stopped
    run_until_stopped(arm, 1.0)
    assert "66 C" in arm.stopped
    virtual.force(3, Register.PRESENT_TEMPERATURE, None)


def test_an_encoder_that_lies_does_not_move_a_stopped_arm(virtual, arm):
    settled(arm)
    virtual.force(1, Register.PRESENT_POSITION, 3001)
    run_until_stopped(arm)
    for _ in range(30):
        arm.read()
        assert arm.hold().raw[0] == 2001
        time.sleep(PERIOD_S)
    virtual.force(1, Register.PRESENT_POSITION, None)
    arm.resume()
    assert ticks(arm, 3)[-1].raw[0] in range(1998, 2005)


def test_an_unloaded_servo_is_told_so_at_once_and_not_pressed_harder_while_the_arm_sinks(
    virtual, arm
):
    settled(arm)
    virtual.inject("stuck", 2, count=-1)
    ticks(arm, 6, from_home(0, 12))
    virtual.inject("error", 2, value=0x20)
    arm.read()
    assert arm.stopped
    goal = [g.raw for g in virtual.goals() if g.id == 2][-1]
    assert abs(goal - 2025) <= 2  # before another tick
    arm.release(soft=True)
    limits = [
        w.value for w in virtual.writes() if w.register is Register.TORQUE_LIMIT and w.id == 2
    ]
    lowered = limits[limits.index(200) :]
    # Sinks from where it was; only then as it was before
    assert lowered[-1] == 1000 and max(lowered[:-1]) == 200
    virtual.inject("error", 2, value=0)


def test_an_arm_found_energised_and_never_enabled_is_left_as_it_was_found(virtual):
    for servo_id, raw in zip(IDS, (2001, 2025, 2000, 2027, 2047, 2748), strict=True):
        virtual.set_register(servo_id, Register.GOAL_POSITION, raw)
        virtual.set_register(servo_id, Register.TORQUE_ENABLE, 1)
    with SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES) as arm:
        arm.read()
    assert [virtual.registers(i)[Register.TORQUE_ENABLE] for i in IDS] == [1] * 6
    assert virtual.writes() == []


def test_a_slow_arm_is_parked_to_the_end(virtual):
    slow = Limits(speed_deg_s=20, first_move_speed_deg_s=20)
    with SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES, slow) as arm:
        arm.enable()
        ticks(arm, 45, from_home(25))
        arm.begin_park()
        while not arm.park()[0]:
            arm.read()
            time.sleep(PERIOD_S)
        assert abs(arm.read().raw[0] - 2001) <= 12
    assert virtual.violations() == []


def test_a_stop_is_latched_and_resumed_slowly(virtual, arm):
    target = from_home(30)
    settled(arm)
    arm.stop("the operator pressed stop")
    held = arm.hold().raw
    ticks(arm, 5, target)
    assert arm.hold().raw == held
    arm.resume()
    arm.read()
    assert arm.send(target).ramping


def test_parking_leads_back_to_where_the_arm_was_switched_on(virtual, arm):
    ticks(arm, 40, from_home(15, -10, 5))
    before = arm.read().raw.copy()
    took = arm.begin_park()
    until = time.monotonic() + took + 2
    while not arm.park()[0]:
        arm.read()
        assert time.monotonic() < until
        time.sleep(PERIOD_S)
    after = arm.read().raw
    assert abs(before[0] - 2001) > 100
    assert np.abs(after - [2001, 2025, 2000, 2027, 2047, 2748]).max() <= 12


def test_parking_a_stopped_arm_waits_for_the_operator(virtual, arm):
    ticks(arm, 30, from_home(10))
    arm.begin_park()
    arm.stop("the operator pressed stop")
    held = arm.hold().raw
    for _ in range(5):
        arm.read()
        arrived, emitted = arm.park()
        assert not arrived and emitted.raw == held


def test_releasing_softly_lowers_the_torque_first_and_leaves_the_limit_as_it_was(virtual, arm):
    settled(arm)
    arm.release(soft=True)
    lowered = [
        w.value for w in virtual.writes() if w.register is Register.TORQUE_LIMIT and w.id == 2
    ]
    assert lowered[-9:-1] == sorted(lowered[-9:-1], reverse=True) and lowered[-2] == 0
    assert virtual.registers(2)[Register.TORQUE_LIMIT] == 1000


def test_an_arm_that_was_on_already_is_taken_over_as_it_stands(virtual):
    raised = [2300, 1900, 2100, 2027, 2047, 2748]
    for servo_id, raw in zip(IDS, raised, strict=True):
        virtual.set_register(servo_id, Register.PRESENT_POSITION, raw)
        virtual.set_register(servo_id, Register.GOAL_POSITION, raw)
        virtual.set_register(servo_id, Register.TORQUE_ENABLE, 1)
    with SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES) as arm:
        before = len(virtual.writes())
        arm.enable()
        offs = [
            w
            for w in virtual.writes()[before:]
            if w.register is Register.TORQUE_ENABLE and w.value == 0
        ]
        assert offs == []
        assert np.abs(arm.read().raw - raised).max() <= 2
        assert arm.begin_park() == 0.0  # nobody knows where it rested
    assert virtual.violations() == []


def test_with_the_motors_off_nothing_at_all_is_written(virtual):
    with SO101(virtual.port, VIRTUAL_CALIBRATION, Units.DEGREES, motors_off=True) as arm:
        arm.enable()
        for _ in range(10):
            arm.read()
            emitted = arm.send(from_home(20))
        assert emitted.raw[0] > 2001
        assert arm.release().unconfirmed == {}
    assert virtual.goals() == []
    assert [
        w for w in virtual.writes() if w.register is not Register.TORQUE_ENABLE or w.value
    ] == []


def test_what_the_watchdog_raises_ends_the_tick(virtual, arm):
    def lost():
        raise DeviceError("the guardian is gone")

    settled(arm)
    arm.beat = lost
    with pytest.raises(DeviceError, match="guardian"):
        arm.read()
    arm.beat = lambda: None
