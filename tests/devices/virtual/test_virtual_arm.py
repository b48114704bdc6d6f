"""The virtual arm, asked by clients nobody here wrote, and its own promises."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rustypot
import scservo_sdk

from smolvla_edge.core.errors import DeviceError
from smolvla_edge.core.process import module_command
from smolvla_edge.devices.bus import frames
from smolvla_edge.devices.bus.bus import FeetechBus
from smolvla_edge.devices.bus.sts3215 import Register
from smolvla_edge.devices.cameras.sources import open_camera
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION, VirtualArm
from support.faulty_arm import FaultyArm, FaultyBus, Write

pytestmark = pytest.mark.arm

IDS = (1, 2, 3, 4, 5, 6)
MIDDLE = [2001, 2025, 2000, 2027, 2047, 2748]


@pytest.fixture(scope="module")
def started():
    with FaultyArm(width=160, height=120) as arm:
        yield arm


@pytest.fixture
def arm(started):
    started.reset()
    return started


@pytest.fixture
def bus():
    """The protocol without a port, at time 0."""
    return FaultyBus(VIRTUAL_CALIBRATION, 0.0)


def ask(bus, request):
    bus.receive(request)
    return bus.due()


@pytest.fixture
def sdk(arm):
    port = scservo_sdk.PortHandler(arm.port)
    assert port.openPort()
    assert port.setBaudRate(1_000_000)
    # Its own 34 ms are too short for a busy machine; LeRobot lengthens them too.
    port.setPacketTimeout = lambda length: port.setPacketTimeoutMillis(500)
    # Process-wide in the SDK: 0 is the byte order of STS servos.
    yield port, scservo_sdk.PacketHandler(0)
    port.closePort()


def test_the_vendor_s_sdk_pings_reads_and_writes(arm, sdk):
    port, packets = sdk
    assert packets.ping(port, 4) == (777, 0, 0)
    assert packets.ping(port, 9)[1] != scservo_sdk.COMM_SUCCESS
    assert packets.read2ByteTxRx(port, 2, 56) == (2025, 0, 0)
    assert packets.read1ByteTxRx(port, 2, 62) == (74, 0, 0)
    assert packets.write2ByteTxRx(port, 3, 42, 2100) == (0, 0)
    assert arm.registers(3)[Register.GOAL_POSITION] == 2100
    assert packets.write1ByteTxOnly(port, frames.BROADCAST_ID, 41, 77) == 0
    assert packets.read1ByteTxRx(port, 6, 41) == (77, 0, 0)
    arm.inject("error", 5, value=0x20)
    assert packets.read2ByteTxRx(port, 5, 56) == (2047, 0, 0x20)


def test_the_vendor_s_sdk_reads_and_writes_all_servos_at_once(arm, sdk):
    port, packets = sdk
    reader = scservo_sdk.GroupSyncRead(port, packets, 56, 15)
    for servo_id in IDS:
        assert reader.addParam(servo_id)
    assert reader.txRxPacket() == scservo_sdk.COMM_SUCCESS
    assert [reader.getData(i, 56, 2) for i in IDS] == MIDDLE
    assert [reader.getData(i, 62, 1) for i in IDS] == [74] * 6
    writer = scservo_sdk.GroupSyncWrite(port, packets, 42, 2)
    for servo_id in IDS:
        assert writer.addParam(servo_id, [(2000 + servo_id) & 0xFF, (2000 + servo_id) >> 8])
    assert writer.txPacket() == scservo_sdk.COMM_SUCCESS
    assert packets.read2ByteTxRx(port, 6, 42)[0] == 2006
    assert [arm.registers(i)[Register.GOAL_POSITION] for i in IDS] == [2000 + i for i in IDS]


def test_rustypot_pings_reads_and_writes(arm):
    controller = rustypot.Sts3215PyController(serial_port=arm.port, baudrate=1_000_000, timeout=0.5)
    assert controller.ping(1)
    assert not controller.ping(9)
    assert one(controller.read_model_number(2)) == 777
    assert one(controller.read_raw_present_position(2)) == 2025
    assert list(controller.sync_read_raw_present_position(list(IDS))) == MIDDLE
    controller.write_raw_goal_position(3, 2222)
    controller.sync_write_raw_goal_position([1, 2], [1900, 2000])
    assert list(controller.sync_read_raw_goal_position([1, 2, 3])) == [1900, 2000, 2222]
    assert arm.registers(3)[Register.GOAL_POSITION] == 2222


def one(value):
    """Some rustypot getters give a list of one."""
    return value[0] if isinstance(value, (list, tuple)) else value


def test_golden_requests_get_golden_answers(bus):
    assert ask(bus, bytes.fromhex("ff ff 01 02 01 fb")).hex(" ") == "ff ff 01 02 00 fc"
    bus.servos[1].set_register(Register.PRESENT_POSITION, 1304)
    assert ask(bus, bytes.fromhex("ff ff 01 04 02 38 02 be")).hex(" ") == "ff ff 01 04 00 18 05 dd"
    for servo_id, position, voltage, temperature in ((1, 2048, 121, 30), (2, 2047, 119, 35)):
        servo = bus.servos[servo_id]
        servo.set_register(Register.PRESENT_POSITION, position)
        servo.set_register(Register.PRESENT_VOLTAGE, voltage)
        servo.set_register(Register.PRESENT_TEMPERATURE, temperature)
    assert ask(bus, bytes.fromhex("ff ff fe 06 82 38 08 01 02 36")).hex(" ") == (
        "ff ff 01 0a 00 00 08 00 00 00 00 79 1e 55 ff ff 02 0a 00 ff 07 00 00 00 00 77 23 53"
    )


def test_only_ping_and_sync_read_are_answered_when_broadcast(bus):
    assert ask(bus, frames.read(frames.BROADCAST_ID, 56, 2)) == b""
    assert ask(bus, frames.write(frames.BROADCAST_ID, 41, b"\x10")) == b""
    assert all(bus.servos[i].peek(Register.ACCELERATION) == 16 for i in IDS)
    assert len(frames.status_parser().feed(ask(bus, frames.ping(frames.BROADCAST_ID)))) == 6


def test_sync_read_is_answered_in_the_order_asked(bus):
    found = frames.status_parser().feed(ask(bus, frames.sync_read(56, 2, [5, 1, 9, 3])))
    assert [frame.id for frame in found] == [5, 1, 3]


def test_writes_are_not_acknowledged_at_response_level_0(bus):
    bus.servos[1].set_register(Register.RESPONSE_STATUS_LEVEL, 0)
    assert ask(bus, frames.write(1, 41, b"\x10")) == b""
    assert ask(bus, frames.ping(1)) != b""


def test_eprom_survives_a_reboot_only_when_unlocked(bus):
    servo = bus.servos[1]
    ask(bus, frames.write(1, 16, (600).to_bytes(2, "little")))
    ask(bus, frames.write(1, 55, b"\x01"))
    ask(bus, frames.write(1, 13, b"\x32"))
    ask(bus, frames.write(1, 41, b"\x32"))
    servo.reboot()
    assert servo.peek(Register.MAX_TORQUE_LIMIT) == servo.peek(Register.TORQUE_LIMIT) == 600
    assert servo.peek(Register.MAX_TEMPERATURE_LIMIT) == 70
    assert servo.peek(Register.ACCELERATION) == servo.peek(Register.TORQUE_ENABLE) == 0


def test_a_homing_offset_shifts_the_present_position(bus):
    ask(bus, frames.write(1, 31, (100).to_bytes(2, "little")))
    bus.advance(0.01)
    assert bus.servos[1].peek(Register.PRESENT_POSITION) == 2001 - 709 - 100


def moved(bus, seconds, start_s=0.0):
    bus.advance(start_s + seconds)
    return bus.servos[1].peek(Register.PRESENT_POSITION) - MIDDLE[0]


def energised(bus, goal, velocity=1000, acceleration=0):
    servo = bus.servos[1]
    for register, value in (
        (Register.GOAL_VELOCITY, velocity),
        (Register.ACCELERATION, acceleration),
        (Register.GOAL_POSITION, goal),
        (Register.TORQUE_ENABLE, 1),
    ):
        servo.set_register(register, value)
    return servo


def test_a_servo_without_torque_does_not_follow(bus):
    energised(bus, 2501).set_register(Register.TORQUE_ENABLE, 0)
    assert moved(bus, 1.0) == 0


def test_a_servo_keeps_its_goal_velocity_and_arrives(bus):
    servo = energised(bus, 3001)
    assert 430 < moved(bus, 0.5) <= 500
    assert servo.peek(Register.MOVING) == 1 and servo.peek(Register.PRESENT_VELOCITY) > 900
    assert servo.peek(Register.PRESENT_LOAD) > 0
    assert moved(bus, 1.5) == 1000
    assert servo.peek(Register.MOVING) == 0 and servo.peek(Register.PRESENT_VELOCITY) == 0


def test_a_servo_keeps_its_acceleration(bus):
    energised(bus, 3001, velocity=3000, acceleration=10)
    assert 90 < moved(bus, 0.45) < 110  # 1000 ticks/s^2 x t^2 / 2


@pytest.mark.parametrize(
    ("request_bytes", "complaint"),
    [
        (frames.write(1, 42, (3312).to_bytes(2, "little")), "goal 3312 beyond the limits"),
        (frames.sync_write(42, {1: (600).to_bytes(2, "little")}), "goal 600 beyond the limits"),
        (frames.write(1, 5, b"\x02"), r"write to Id \(5\)"),
        (frames.write(1, 6, b"\x02"), r"write to Baud_Rate \(6\)"),
        (frames.write(1, 24, b"\x02\x02"), r"write to Integral_Limit \(25\)"),
        (frames.write(1, 40, b"\x80"), "Torque_Enable set to 128"),
        (frames.write(1, 40, b"\x01"), "torque on with goal 0 at position 2001"),
        (frames.write(frames.BROADCAST_ID, 40, b"\x01"), "torque on with goal 0"),
        (frames.write(1, 56, b"\x00\x00"), "read-only"),
        (frames.write(1, 85, b"\xfe"), "no known register"),
        (frames.build(1, 6), "instruction 6"),
        (frames.build(1, 2, b"\x38"), "malformed"),
        (frames.build(frames.BROADCAST_ID, 0x83, b"\x2a\x02\x01\x00"), "malformed"),
    ],
)
def test_what_a_careful_host_would_not_send_is_recorded(bus, request_bytes, complaint):
    ask(bus, request_bytes)
    assert any(re.search(complaint, violation) for violation in bus.violations)


def test_an_eprom_write_while_energised_is_recorded(bus):
    ask(bus, frames.write(1, 13, b"\x32"))
    assert not bus.violations
    energised(bus, MIDDLE[0])
    ask(bus, frames.write(1, 13, b"\x32"))
    assert list(bus.violations) == ["servo 1: EPROM write at 13 while energised"]


def test_leading_a_joint_back_from_beyond_its_range_is_no_violation(bus):
    bus.servos[1].set_register(Register.PRESENT_POSITION, 3340)
    for goal in (3340, 3330, 3310, 3300):
        ask(bus, frames.write(1, 42, goal.to_bytes(2, "little")))
    assert not bus.violations


def test_a_late_answer_keeps_the_order_of_one_servo(bus):
    bus.inject("delay", 1, value=0.09)
    bus.receive(frames.ping(1))
    bus.receive(frames.ping(2))
    bus.receive(frames.read(1, 3, 2))
    assert [f.id for f in frames.status_parser().feed(bus.due())] == [2]
    bus.advance(0.1)
    assert [len(f.params) for f in frames.status_parser().feed(bus.due())] == [0, 2]


ANSWER = frames.build(1, 0, (2001).to_bytes(2, "little"))
ASK = frames.read(1, 56, 2)


def answers(data):
    return frames.status_parser().feed(data)


@pytest.mark.parametrize(
    ("kind", "value", "spoiled"),
    [
        ("mute", 0, b""),
        ("corrupt", 0, ANSWER[:-1] + bytes((ANSWER[-1] ^ 0xFF,))),
        ("truncate", 5, ANSWER[:5]),
        ("wrong_id", 0, frames.build(101, 0, ANSWER[5:7])),
        ("wrong_id", 4, frames.build(4, 0, ANSWER[5:7])),
        ("wrong_length", 0, frames.build(1, 0, ANSWER[5:7] + b"\0")),
        ("bad_error", 0, frames.build(1, 0x80, ANSWER[5:7])),
        ("duplicate", 0, ANSWER * 2),
    ],
)
def test_a_fault_spoils_as_many_answers_of_one_servo_as_it_counts(bus, kind, value, spoiled):
    bus.inject(kind, 1, count=2, value=value)
    assert ask(bus, ASK) == ask(bus, ASK) == spoiled
    assert ask(bus, ASK) == ANSWER
    bus.inject(kind, 1, count=-1, value=value)
    assert [ask(bus, ASK) for _ in range(5)] == [spoiled] * 5
    assert [frame.id for frame in answers(ask(bus, frames.sync_read(56, 2, [2, 3])))] == [2, 3]
    bus.inject(kind, 1, count=0)
    assert ask(bus, ASK) == ANSWER


def test_noise_comes_before_a_whole_answer(bus):
    bus.inject("noise", 1, count=-1, value=20)
    noisy = [ask(bus, ASK) for _ in range(2)]
    assert all(
        len(data) == 20 + 3 + len(ANSWER) and data.endswith(b"\xff\xff\xff" + ANSWER)
        for data in noisy
    )
    assert noisy[0] != noisy[1]
    bus.inject("noise", 1)
    assert answers(ask(bus, ASK)) == answers(ANSWER)


def test_a_trickling_answer_comes_byte_by_byte_and_the_next_servo_waits_for_it(bus):
    bus.inject("trickle", 1, value=0.01)
    came = [ask(bus, frames.sync_read(56, 2, [1, 2]))]
    for tick in range(1, 9):
        bus.advance(0.01 * tick + 0.001)
        came.append(bus.due())
    assert came[:7] == [bytes((byte,)) for byte in ANSWER[:7]]
    assert came[7] == ANSWER[7:]
    assert [frame.id for frame in answers(came[8])] == [2]


def test_a_slow_bus_gives_the_answers_of_a_sync_read_one_after_the_other(bus):
    for servo_id in IDS:
        bus.inject("delay", servo_id, count=-1, value=0.005)
    came = [ask(bus, frames.sync_read(56, 2, IDS))]
    for tick in range(1, 7):
        bus.advance(0.005 * tick + 0.001)
        came.append(bus.due())
    assert [[frame.id for frame in answers(data)] for data in came] == [
        [],
        [1],
        [2],
        [3],
        [4],
        [5],
        [6],
    ]


def test_an_error_bit_shows_in_every_answer_and_in_status(bus):
    bus.inject("error", 1, value=0x24)
    for request in (
        frames.ping(1),
        ASK,
        frames.sync_read(56, 2, [1]),
        frames.write(1, 41, b"\x10"),
    ):
        assert [frame.code for frame in answers(ask(bus, request))] == [0x24]
    assert answers(ask(bus, frames.read(1, 65, 1))) == [frames.Frame(1, 0x24, b"\x24")]
    bus.advance(0.1)
    assert bus.servos[1].peek(Register.STATUS) == 0x24
    bus.inject("error", 1, value=0)
    assert answers(ask(bus, frames.read(1, 65, 1))) == [frames.Frame(1, 0, b"\0")]


def test_a_request_too_long_to_answer_does_not_end_the_arm(bus):
    assert ask(bus, frames.read(1, 0, 255)) == b""
    assert "malformed" in bus.violations[0]


def test_a_blocked_servo_stands_still_and_strains(bus):
    servo = energised(bus, MIDDLE[0] + 114)  # 10 degrees
    bus.inject("stuck", 1)
    assert moved(bus, 1.0) == 0
    assert servo.peek(Register.PRESENT_LOAD) > 0.8 * servo.peek(Register.TORQUE_LIMIT)
    assert servo.peek(Register.PRESENT_CURRENT) > servo.peek(Register.PROTECTION_CURRENT)
    assert servo.peek(Register.PRESENT_VELOCITY) == servo.peek(Register.MOVING) == 0
    servo.set_register(Register.TORQUE_ENABLE, 0)
    assert (
        moved(bus, 1.1)
        == servo.peek(Register.PRESENT_LOAD)
        == servo.peek(Register.PRESENT_CURRENT)
        == 0
    )
    servo.set_register(Register.TORQUE_ENABLE, 1)
    bus.inject("stuck", 1, count=0)
    assert moved(bus, 2.0) == 114


@pytest.mark.parametrize("velocity", [1500, 3400])
def test_a_servo_that_follows_at_90_degrees_a_second_does_not_strain(bus, velocity):
    servo = energised(bus, MIDDLE[0], velocity=velocity, acceleration=254)
    load, current = [], []
    for tick in range(1, 30):  # 30 Hz
        ask(
            bus,
            frames.sync_write(42, {1: (MIDDLE[0] + round(tick * 1024 / 30)).to_bytes(2, "little")}),
        )
        for step in range(10):
            bus.advance((tick + step / 10) / 30)
            load.append(servo.peek(Register.PRESENT_LOAD))
            current.append(servo.peek(Register.PRESENT_CURRENT))
    assert servo.peek(Register.PRESENT_POSITION) > MIDDLE[0] + 900
    assert 100 < max(load) < 400
    assert 10 < max(current) < 80  # x 6.5 mA
    assert not bus.violations


def test_a_lost_write_is_acknowledged_and_changes_nothing(bus):
    bus.inject("lost_write", 1, value=55)
    ask(bus, frames.write(1, 41, b"\x10"))
    assert bus.servos[1].peek(Register.ACCELERATION) == 16
    assert answers(ask(bus, frames.write(1, 55, b"\x01"))) == [frames.Frame(1, 0, b"")]
    assert bus.servos[1].peek(Register.LOCK) == 0
    ask(bus, frames.write(1, 55, b"\x01"))
    assert bus.servos[1].peek(Register.LOCK) == 1


def test_a_host_whose_goals_get_lost_is_not_blamed_for_a_step(bus):
    servo = energised(bus, MIDDLE[0])
    bus.inject("lost_write", 1, count=-1, value=42)
    for goal in range(MIDDLE[0], MIDDLE[0] + 1000, 100):
        ask(bus, frames.sync_write(42, {1: goal.to_bytes(2, "little")}))
    assert servo.peek(Register.GOAL_POSITION) == MIDDLE[0]
    assert [goal[2] for goal in bus.goals] == list(range(MIDDLE[0], MIDDLE[0] + 1000, 100))
    assert not bus.violations


def test_a_forced_register_is_read_in_place_of_the_truth(bus):
    servo = energised(bus, 2501)
    servo.force(Register.PRESENT_POSITION, -100)
    servo.force(Register.PRESENT_VOLTAGE, 35)
    assert moved(bus, 1.0) == 500
    (frame,) = answers(ask(bus, frames.sync_read(56, 15, [1])))
    assert frame.params[:2] == b"\x64\x80" and frame.params[6] == 35
    assert answers(ask(bus, frames.read(1, 57, 1)))[0].params == b"\x80"
    servo.force(Register.PRESENT_POSITION, None)
    assert answers(ask(bus, ASK))[0].params == (2501).to_bytes(2, "little")


def test_every_register_write_is_logged_but_not_the_goals_of_each_tick(bus):
    ask(bus, frames.write(1, 31, b"\xc5\x0a"))
    ask(bus, frames.sync_write(41, {1: bytes((254, 0xD1, 7, 0, 0, 0xE8, 3))}))
    ask(bus, frames.sync_write(48, {3: b"\xf4\x01"}))
    bus.advance(1.5)
    ask(bus, frames.write(2, 40, b"\x01"))
    ask(bus, frames.write(frames.BROADCAST_ID, 40, b"\0"))
    assert list(bus.writes) == [
        Write(0.0, 1, Register.HOMING_OFFSET, -709),
        Write(0.0, 3, Register.TORQUE_LIMIT, 500),
        Write(1.5, 2, Register.TORQUE_ENABLE, 1),
        *(Write(1.5, servo_id, Register.TORQUE_ENABLE, 0) for servo_id in IDS),
    ]
    assert [goal[1:] for goal in bus.goals] == [(1, 2001)]


def test_writes_to_eprom_are_counted(bus):
    ask(bus, frames.write(1, 41, b"\x10"))
    assert bus.eprom_writes == 0
    ask(bus, frames.write(1, 9, bytes(4)))
    ask(bus, frames.write(frames.BROADCAST_ID, 7, b"\0"))
    assert bus.eprom_writes == 2 + 6
    bus.reset(1.0)
    assert bus.eprom_writes == 0 and not bus.writes


def step(bus, servo_id, goal):
    ask(bus, frames.sync_write(42, {servo_id: goal.to_bytes(2, "little")}))
    return len(bus.violations)


def switch_on(bus):
    for servo_id in IDS:
        servo = bus.servos[servo_id]
        servo.set_register(Register.GOAL_POSITION, MIDDLE[servo_id - 1])
        servo.set_register(Register.TORQUE_ENABLE, 1)


def test_a_goal_too_far_from_the_last_one_is_recorded(bus):
    switch_on(bus)
    assert step(bus, 1, 2001 + 103) == 0
    assert step(bus, 1, 2001 + 206) == 0
    assert step(bus, 1, 2001 + 206 - 104) == 1
    assert bus.violations[0] == "servo 1: goal 2103 after 2207: a step of more than 103"
    # A tenth of a second at 200 %/s is 20 % of the gripper's 1463 ticks.
    assert step(bus, 6, 2748 + 293) == 1
    assert step(bus, 6, 2748 + 586) == 1
    assert step(bus, 6, 2748 + 586 - 294) == 2


def test_a_goal_at_the_present_position_or_for_a_servo_that_is_off_is_no_step(bus):
    assert step(bus, 1, 3000) == 0
    switch_on(bus)
    bus.servos[1].set_register(Register.PRESENT_POSITION, 2500)
    assert step(bus, 1, 2505) == 0
    assert step(bus, 1, 2001) == 1


def test_the_bound_on_steps_can_be_set_for_each_servo(bus):
    switch_on(bus)
    bus.expect_steps([10, 500, 10, 10, 10, 10])
    assert step(bus, 1, 2001 + 11) == 0
    assert step(bus, 1, 2001 + 23) == 1
    assert step(bus, 2, 2025 + 501) == 1
    with pytest.raises(ValueError):
        bus.expect_steps([10])
    bus.reset(0.0)
    switch_on(bus)
    assert step(bus, 1, 2001 + 103) == 0


def test_half_a_register_counts_as_a_write_of_it(bus):
    switch_on(bus)
    ask(bus, frames.write(1, 43, b"\x08"))
    assert "goal 2257 after 2001" in bus.violations[0]
    ask(bus, frames.write(1, 39, b"\0\x80"))
    assert any("Torque_Enable set to 128" in violation for violation in bus.violations)


def test_a_joint_turned_by_hand_past_the_end_of_a_turn_reads_0_again(bus):
    servo = bus.servos[1]
    servo.set_register(Register.HOMING_OFFSET, 0)
    for turned, seen in ((4095, 4095), (4096, 0), (4110, 14), (-3, 4093)):
        servo.set_register(Register.PRESENT_POSITION, turned)
        assert servo.peek(Register.PRESENT_POSITION) == round(servo.position) == seen
    # The offset moves the end of the turn, not the joint.
    ask(bus, frames.write(1, 31, (1000).to_bytes(2, "little")))
    bus.advance(0.01)
    assert servo.peek(Register.PRESENT_POSITION) == 3093
    ask(bus, frames.write(1, 31, (1000 | 0x800).to_bytes(2, "little")))
    bus.advance(0.02)
    assert servo.peek(Register.PRESENT_POSITION) == 997


def test_a_servo_does_not_turn_past_its_limits_and_keeps_the_goal_it_was_told(bus):
    servo = energised(bus, 3400)
    bus.advance(5.0)
    assert servo.peek(Register.PRESENT_POSITION) == 3301
    assert servo.peek(Register.GOAL_POSITION) == 3400


def test_an_arm_starts_and_restarts_at_its_pose():
    pose = [1000, 1100, 1200, 1300, 1400, 2500]
    with FaultyArm(cameras=(), pose=pose) as arm:
        for _ in range(2):
            assert [arm.registers(i)[Register.PRESENT_POSITION] for i in IDS] == pose
            arm.set_register(1, Register.PRESENT_POSITION, 2222)
            arm.reset()


def test_what_the_arm_was_told_can_be_asked_for(arm):
    with FeetechBus(arm.port) as bus:
        bus.write(2, Register.P_COEFFICIENT, 16)
        arm.force(2, Register.PRESENT_TEMPERATURE, 71)
        assert bus.read(2, Register.PRESENT_TEMPERATURE).value == 71
    assert arm.registers(2)[Register.PRESENT_TEMPERATURE] == 30
    assert [(w.id, w.register, w.value) for w in arm.writes()] == [(2, Register.P_COEFFICIENT, 16)]
    assert abs(arm.writes()[0].time_s - time.monotonic()) < 60
    assert arm.eprom_writes() == 1
    arm.expect_steps([1] * 6)
    for register in (Register.GOAL_POSITION, Register.TORQUE_ENABLE):
        arm.set_register(1, register, {Register.GOAL_POSITION: 2001}.get(register, 1))
    with FeetechBus(arm.port) as bus:
        bus.sync_write(Register.GOAL_POSITION, {1: 2050})
        bus.ping(1)
    assert arm.violations() == ["servo 1: goal 2050 after 2001: a step of more than 2"]


def test_an_arm_that_hangs_up_takes_the_port_away_and_still_tells(deadline_s=10):
    with FaultyArm(cameras=()) as arm:
        fd = os.open(arm.port, os.O_RDWR | os.O_NOCTTY)
        try:
            os.write(fd, frames.ping(1))
            assert select.select([fd], [], [], deadline_s)[0]
            assert os.read(fd, 64) == frames.build(1, 0)
            arm.hang_up()
            arm.hang_up()
            with pytest.raises(OSError):
                os.write(fd, frames.ping(1))
            assert not Path(arm.port).exists()
        finally:
            os.close(fd)
        assert arm.frames_seen() == 1
        arm.reset()
        assert arm.registers(1)[Register.PRESENT_POSITION] == 2001


def test_a_deaf_arm_lets_its_buffer_fill_and_hears_all_of_it_later(arm):
    arm.deaf(True)
    fd = os.open(arm.port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        sent = 0
        with pytest.raises(BlockingIOError):
            while sent < 1_000_000:
                sent += os.write(fd, frames.write(1, 41, b"\x10"))
        assert arm.frames_seen() == 0
        arm.deaf(False)
        wait_until(lambda: arm.frames_seen() == sent // 8)
        # What waits in the port does not outlive a reset.
        arm.deaf(True)
        os.write(fd, frames.write(1, 41, b"\x20"))
        arm.reset()
        os.write(fd, frames.write(1, 41, b"\x30"))
        wait_until(lambda: arm.frames_seen() == 1)
        assert [w.value for w in arm.writes()] == [0x30]
    finally:
        os.close(fd)


def wait_until(true, limit_s=20):
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def eyes(arm):
    """Both cameras, and a function that waits for so many further rounds of pictures."""
    cameras = {name: open_camera(name, source) for name, source in arm.camera_sources.items()}

    def rounds(count=3, by="wrist"):
        for _ in range(count):
            time_s = cameras[by].latest().time_s
            wait_until(lambda before=time_s: cameras[by].latest().time_s > before)

    rounds()
    yield cameras["front"], cameras["wrist"], rounds
    for camera in cameras.values():
        camera.close()


def test_two_pictures_of_a_camera_are_never_the_same_bytes(eyes):
    front, _, rounds = eyes
    seen = [front.latest().image]
    for _ in range(5):
        rounds(1, by="front")
        seen.append(front.latest().image)
        difference = np.abs(seen[-1].astype(int) - seen[-2])
        assert 0 < difference.max() <= 4
        assert np.count_nonzero(difference) <= 600


def test_a_stalled_camera_gives_no_new_pictures(arm, eyes):
    front, _, rounds = eyes
    arm.camera("front", "stall")
    rounds()
    old = front.latest()
    rounds()
    assert front.latest().time_s == old.time_s
    arm.camera("front", "live")
    rounds(1, by="front")


def test_a_frozen_camera_gives_the_same_picture_with_new_times(arm, eyes):
    front, wrist, rounds = eyes
    arm.camera("front", "freeze")
    rounds()
    old, other = front.latest(), wrist.latest()
    rounds()
    new = front.latest()
    assert new.time_s > old.time_s and np.array_equal(new.image, old.image)
    assert not np.array_equal(wrist.latest().image, other.image)


def test_a_slow_camera_keeps_its_rate(arm, eyes):
    front, _, rounds = eyes
    arm.camera("front", "slow", 2)
    rounds()
    times = []
    for _ in range(3):
        rounds(1, by="front")
        times.append(front.latest().time_s)
    assert np.diff(times).min() > 0.4


def test_the_cameras_show_the_arm_move(arm):
    cameras = [open_camera(name, source) for name, source in arm.camera_sources.items()]
    assert [camera.name for camera in cameras] == ["front", "wrist"]
    before = [camera.latest() for camera in cameras]
    assert before[0].image.shape == (120, 160, 3)
    assert before[0].image.std() > 10
    assert not np.array_equal(before[0].image, before[1].image)
    arm.set_register(1, Register.PRESENT_POSITION, 2400)
    deadline = time.monotonic() + 5
    while any(c.latest().time_s < b.time_s + 0.3 for c, b in zip(cameras, before, strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for camera, old in zip(cameras, before, strict=True):
        assert not np.array_equal(camera.latest().image, old.image)
        camera.close()


def test_the_arm_counts_frames_and_logs_goals(arm):
    with FeetechBus(arm.port) as bus:
        seen = arm.frames_seen()
        bus.sync_write(Register.GOAL_POSITION, {1: 2010, 2: 2020})
        bus.ping(1)
    assert arm.frames_seen() == seen + 2
    assert [(goal.id, goal.raw) for goal in arm.goals()] == [(1, 2010), (2, 2020)]
    assert abs(arm.goals()[0].time_s - time.monotonic()) < 5


def test_a_rebooted_servo_is_off(arm):
    arm.set_register(2, Register.GOAL_POSITION, 2025)
    arm.set_register(2, Register.TORQUE_ENABLE, 1)
    arm.reboot(2)
    assert arm.registers(2)[Register.TORQUE_ENABLE] == 0


def test_the_arm_that_is_shipped_follows_its_goal():
    with VirtualArm(cameras=()) as arm, FeetechBus(arm.port, reply_margin_s=0.05) as bus:
        bus.sync_write_block(
            {1: {Register.GOAL_POSITION: 2101, Register.GOAL_TIME: 0, Register.GOAL_VELOCITY: 3000}}
        )
        bus.write(1, Register.TORQUE_ENABLE, 1)
        wait_until(lambda: bus.read(1, Register.PRESENT_POSITION).value == 2101)
        block = bus.sync_read(IDS, Register.PRESENT_POSITION, Register.PRESENT_CURRENT)
        assert [block[i].values[Register.PRESENT_POSITION] for i in IDS] == [2101, *MIDDLE[1:]]


def test_the_port_passes_every_byte_to_a_client_that_sets_no_terminal_mode():
    with FaultyArm(cameras=()) as arm:
        fd = os.open(arm.port, os.O_RDWR | os.O_NOCTTY)
        try:
            for value in (0x03, 0x0A, 0x0D, 0x11, 0x13, 0x7F):
                arm.set_register(1, Register.ACCELERATION, value)
                os.write(fd, frames.read(1, 41, 1))
                assert select.select([fd], [], [], 2)[0]
                assert os.read(fd, 64) == frames.build(1, 0, bytes((value,)))
        finally:
            os.close(fd)


def test_closing_ends_the_process_and_removes_its_pictures():
    arm = FaultyArm(width=32, height=24)
    folder = Path(arm.camera_sources["front"].removeprefix("sim:")).parent
    assert folder.exists()
    arm.close()
    arm.close()
    assert not Path(f"/proc/{arm.pid}").exists()
    assert not folder.exists()
    with pytest.raises(DeviceError, match="has ended"):
        arm.violations()


def test_the_arm_ends_when_its_starter_is_killed():
    program = (
        "import sys, time\n"
        "from smolvla_edge.devices.virtual.virtual_arm import VirtualArm\n"
        "arm = VirtualArm(width=32, height=24)\n"
        "print(arm.pid, arm.camera_sources['front'], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as starter:
        pid, source = starter.stdout.readline().split()
        os.kill(starter.pid, signal.SIGKILL)
    folder = Path(source.removeprefix("sim:")).parent
    deadline = time.monotonic() + 10
    while folder.exists() or running(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid):
    """Whether the process still runs; an orphan nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_module_and_leaves_no_pictures(number):
    options = {"cameras": ["front"], "width": 32, "height": 24, "pose": None}
    line = module_command("smolvla_edge.devices.virtual.virtual_arm", json.dumps(options))
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        _, sources = json.loads(process.stdout.readline())
        folder = Path(sources["front"].removeprefix("sim:")).parent
        assert folder.exists()
        process.send_signal(number)
        assert process.wait(10) == 0
    assert not folder.exists()
