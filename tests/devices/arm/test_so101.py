"""The whole arm against the virtual one: what it refuses, what it sends, and that it always lets
go."""

import dataclasses
import os
import signal
import threading
import time

import numpy as np
import pytest

from smolvla_edge.core.errors import ArmError, BusError, BusLost
from smolvla_edge.devices.arm.calibration import JOINT_NAMES, Calibration
from smolvla_edge.devices.arm.so101 import SO101
from smolvla_edge.devices.arm.units import Units
from smolvla_edge.devices.bus.sts3215 import Register
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION
from support.faulty_arm import FaultyArm

pytestmark = pytest.mark.arm

IDS = (1, 2, 3, 4, 5, 6)
MIDDLE = (2001, 2025, 2000, 2027, 2047, 2748)
HOME = [0.0, 0.0, 0.0, 0.0, 0.0, 50.0]


def driver(virtual, calibration=VIRTUAL_CALIBRATION, units=Units.DEGREES, **options):
    return SO101(virtual.port, calibration, units, **options)


def torque(virtual):
    return [virtual.registers(i)[Register.TORQUE_ENABLE] for i in IDS]


def images(virtual):
    """All registers that do not change by themselves."""
    live = {
        Register.PRESENT_POSITION,
        Register.PRESENT_VELOCITY,
        Register.MOVING,
        Register.PRESENT_LOAD,
    }
    return [{r: v for r, v in virtual.registers(i).items() if r not in live} for i in IDS]


def refusal(virtual, **options):
    """The message of a refused connect; checks that nothing was written and the port is free
    again."""
    before = images(virtual)
    arm = driver(virtual, **options)
    with pytest.raises(ArmError) as error:
        arm.connect()
    assert images(virtual) == before
    assert not arm.bus.is_open
    assert "nothing was written" in str(error.value)
    return str(error.value)


def test_the_joints_are_in_lerobot_s_order():
    assert JOINT_NAMES == (
        "shoulder_pan",
        "shoulder_lift",
        "elbow_flex",
        "wrist_flex",
        "wrist_roll",
        "gripper",
    )


def test_connecting_and_reading_write_nothing(virtual):
    before = images(virtual)
    arm = driver(virtual)
    assert arm.connect() == ()
    state = arm.read()
    assert tuple(state.raw) == MIDDLE
    assert state.position.shape == (6,) and state.position.dtype == np.float64
    assert abs(state.position[5] - 50) < 0.1
    assert 0 <= time.monotonic() - state.time_s < 1
    assert images(virtual) == before
    arm.bus.close()
    assert images(virtual) == before


def test_reading_is_one_request(virtual):
    with driver(virtual) as arm:
        seen = virtual.frames_seen()
        arm.read()
        assert virtual.frames_seen() == seen + 1


def test_everything_wrong_is_told_in_one_message(virtual):
    virtual.inject("mute", 2, count=-1)
    virtual.set_register(3, Register.MODEL_NUMBER, 2825)
    virtual.inject("error", 4, value=0x24)
    virtual.set_register(5, Register.OPERATING_MODE, 1)
    virtual.set_register(5, Register.PHASE, 0x1C)
    virtual.set_register(6, Register.PRESENT_VOLTAGE, 120)
    virtual.set_register(6, Register.HOMING_OFFSET, 0)
    message = refusal(virtual)
    for part in (
        "no answer from shoulder_lift (2)",
        "found: shoulder_pan (1), elbow_flex (3)",
        "elbow_flex (3): model 2825, expected 777",
        "wrist_flex (4): reports overheat, overload",
        "wrist_roll (5): Operating_Mode 1",
        "wrist_roll (5): multi-turn feedback",
        "gripper (6): supply 12.0 V, expected 4.0 to 8.0 V",
        "gripper (6): Homing_Offset (31) is 0 in the servo, 207 in the virtual arm",
    ):
        assert part in message


@pytest.mark.parametrize("servo_id", IDS)
@pytest.mark.parametrize("key", ["homing_offset", "range_min", "range_max"])
def test_a_calibration_of_another_arm_is_refused(virtual, servo_id, key):
    joints = list(VIRTUAL_CALIBRATION.joints)
    joint = joints[servo_id - 1]
    value = getattr(joint, key) + (-1 if key == "range_max" else 1)
    joints[servo_id - 1] = dataclasses.replace(joint, **{key: value})
    message = refusal(virtual, calibration=Calibration(tuple(joints), "blue.json"))
    assert f"{value} in blue.json" in message
    assert message.count("in the servo") == 1


@pytest.mark.parametrize("beyond", [51, -51])
def test_a_joint_far_outside_its_range_is_refused(virtual, beyond):
    joint = VIRTUAL_CALIBRATION.joints[0]
    virtual.set_register(
        1, Register.PRESENT_POSITION, (joint.range_max if beyond > 0 else joint.range_min) + beyond
    )
    assert "shoulder_pan (1): position" in refusal(virtual)


def test_a_silent_bus_is_refused_with_all_joints(virtual):
    for servo_id in IDS:
        virtual.inject("mute", servo_id, count=-1)
    message = refusal(virtual)
    assert all(name in message for name in JOINT_NAMES)
    assert "found: none" in message


def test_mixed_firmware_and_an_energised_servo_are_warnings(virtual):
    virtual.set_register(2, Register.FIRMWARE_MINOR_VERSION, 9)
    virtual.set_register(4, Register.GOAL_POSITION, MIDDLE[3])
    virtual.set_register(4, Register.TORQUE_ENABLE, 1)
    arm = driver(virtual)
    warnings = "\n".join(arm.connect())
    assert "shoulder_lift (2) 3.9" in warnings
    assert "wrist_flex (4) is energised already" in warnings
    arm.bus.close()


def test_nothing_moves_before_enable(virtual):
    with driver(virtual) as arm:
        for action in (lambda: arm.send(HOME), arm.hold):
            with pytest.raises(ArmError, match=r"Call enable\(\) first"):
                action()
        assert virtual.goals() == []
    with pytest.raises(ArmError, match="before connect"):
        driver(virtual).enable()


def test_enabling_holds_the_arm_where_it_stands(virtual):
    # A goal left from before would make the arm jump.
    for servo_id in IDS:
        virtual.set_register(servo_id, Register.GOAL_POSITION, 1000)
    beats = []
    with driver(virtual) as arm:
        arm.beat = lambda: beats.append(time.monotonic())
        arm.enable()
        arm.enable()
        assert np.diff(beats).max() < 0.4  # a watchdog waits 0.8 s
        assert torque(virtual) == [1] * 6
        assert [(g.id, g.raw) for g in virtual.goals()] == list(zip(IDS, MIDDLE, strict=True))
        assert tuple(arm.read().raw) == MIDDLE
        registers = [virtual.registers(i) for i in IDS]
        assert [r[Register.TORQUE_LIMIT] for r in registers] == [1000] * 5 + [500]
        assert all(1024 < r[Register.GOAL_VELOCITY] <= 3400 for r in registers)
        assert all(r[Register.ACCELERATION] == 50 for r in registers)
        for _ in range(4):
            arm.read()
            arm.send(HOME)
        assert all(virtual.registers(i)[Register.ACCELERATION] == 254 for i in IDS)
    assert torque(virtual) == [0] * 6
    assert virtual.violations() == []


def test_a_servo_that_jumps_when_switched_on_switches_all_off(virtual):
    pushed = []

    def push_once_energised():
        while virtual.registers(3)[Register.TORQUE_ENABLE] == 0:
            time.sleep(0.001)
        pushed.append(torque(virtual))
        virtual.set_register(3, Register.PRESENT_POSITION, MIDDLE[2] + 300)

    with driver(virtual) as arm:
        hand = threading.Thread(target=push_once_energised)
        hand.start()
        with pytest.raises(ArmError, match=r"elbow_flex \(3\) moved \d+ ticks"):
            arm.enable()
        hand.join()
        assert pushed == [[1, 1, 1, 0, 0, 0]]
        assert torque(virtual) == [0] * 6
        with pytest.raises(ArmError, match="not energised"):
            arm.hold()


@pytest.mark.parametrize("bit", [0x04, 0x20])
def test_an_error_bit_at_enable_switches_all_off(virtual, bit):
    with driver(virtual) as arm:
        virtual.inject("error", 5, value=bit)
        with pytest.raises(ArmError, match=r"wrist_roll \(5\) reports over"):
            arm.enable()
        assert torque(virtual) == [0] * 6


def test_a_servo_that_falls_silent_during_enable_switches_all_off(virtual):
    with pytest.raises(BusError, match="servo 4"), driver(virtual) as arm:
        virtual.inject("mute", 4, count=-1)
        arm.enable()
    assert torque(virtual) == [0] * 6


@pytest.mark.parametrize("units", Units)
def test_the_arm_goes_where_it_is_sent_and_never_out_of_range(virtual, units):
    with driver(virtual, units=units, rate_hz=100) as arm:
        arm.enable()
        for target in ([20, -20, 20, -20, 20, 80], [1e9] * 6):
            for _ in range(130):
                arm.read()
                emitted = arm.send(target)
                time.sleep(0.01)
            if target[0] > 100:  # too far for one step; the way there is the ramp's
                assert "jumps" in arm.stopped and arm.counts.jumped == 15
                assert np.abs(arm.read().position - [20, -20, 20, -20, 20, 80]).max() < 0.5
                arm.release()
                arm.enable(far=True)
                for _ in range(500):
                    arm.read()
                    emitted = arm.send(target)
                    time.sleep(0.01)
            if target[0] == 20:
                assert np.abs(arm.read().position - target).max() < 0.5
        assert emitted.clipped == (True,) * 6
        goals = virtual.goals()
    for joint, servo_id in zip(VIRTUAL_CALIBRATION.joints, IDS, strict=True):
        raw = [g.raw for g in goals if g.id == servo_id]
        assert max(raw) <= joint.range_max and min(raw) >= joint.range_min
    assert virtual.violations() == []


def test_a_bad_target_sends_the_last_goal_again(virtual):
    with driver(virtual) as arm:
        arm.enable()
        first = arm.send(HOME)
        bad = arm.send([np.nan] * 6)
        assert bad.rejected and bad.raw == first.raw
        assert arm.hold().raw == first.raw
        assert arm.counts.malformed == 1
        arm.read()
        assert [g.raw for g in virtual.goals()[-6:]] == list(first.raw)


def test_a_missing_joint_is_named_when_reading(virtual):
    with driver(virtual) as arm:
        virtual.inject("mute", 3, count=-1)
        virtual.inject("mute", 5, count=-1)
        with pytest.raises(BusError, match=r"no answer from elbow_flex \(3\), wrist_roll \(5\)"):
            arm.read()
        virtual.reset()


def test_leaving_switches_off_whatever_happened(virtual):
    with pytest.raises(ZeroDivisionError), driver(virtual) as arm:
        arm.enable()
        assert torque(virtual) == [1] * 6
        raise ZeroDivisionError
    assert torque(virtual) == [0] * 6
    assert not arm.bus.is_open


def test_an_error_bit_does_not_keep_a_servo_energised(virtual):
    with driver(virtual) as arm:
        arm.enable()
        for servo_id in IDS:
            virtual.inject("error", servo_id, value=0x20)
        assert arm.release().unconfirmed == {}
        assert torque(virtual) == [0] * 6
        assert arm.release().unconfirmed == {}


def test_a_servo_that_stays_silent_at_release_is_named_and_the_others_are_off(virtual):
    with driver(virtual) as arm:
        arm.enable()
        virtual.inject("mute", 2, count=-1)
        result = arm.release()
        assert list(result.unconfirmed) == ["shoulder_lift (2)"]
        assert torque(virtual) == [0] * 6
        virtual.reset()


def test_leaving_with_an_unconfirmed_servo_is_an_error(virtual):
    with (
        pytest.raises(ArmError, match=r"(?s)may still be energised.*gripper \(6\)"),
        driver(virtual) as arm,
    ):
        arm.enable()
        virtual.inject("mute", 6, count=-1)
    assert not arm.bus.is_open


def test_an_interrupt_during_release_waits_for_the_last_servo(virtual):
    def interrupt_at_servo_2(seen):
        while virtual.frames_seen() < seen + 3:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with driver(virtual) as arm:
        arm.enable()
        for servo_id in (2, 3, 4, 5):
            virtual.inject("mute", servo_id, count=-1)
        seen = virtual.frames_seen()
        press = threading.Thread(target=interrupt_at_servo_2, args=(seen,))
        press.start()
        with pytest.raises(KeyboardInterrupt):
            arm.release()
        press.join()
        # One broadcast, servos 1 and 6 once, three silent ones twice, the interrupted one at least
        # once.
        assert virtual.frames_seen() - seen >= 1 + 2 + 3 * 2 + 1
        assert torque(virtual) == [0] * 6
        virtual.reset()


def test_an_arm_unplugged_while_moving_is_one_error_and_closes():
    with FaultyArm(cameras=()) as virtual:
        arm = driver(virtual)
        arm.connect()
        arm.enable()
        virtual.close()
        with pytest.raises(BusLost):
            arm.send(HOME)
        result = arm.release()
        assert len(result.unconfirmed) == 6
        arm.bus.close()
        arm.bus.close()
