"""The virtual arm, asked by clients nobody here wrote, and its own promises."""

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

from smolvla_edge.devices import frames
from smolvla_edge.devices.bus import FeetechBus
from smolvla_edge.devices.camera import open_camera
from smolvla_edge.devices.errors import DeviceError
from smolvla_edge.devices.sts3215 import Register
from smolvla_edge.devices.virtual_arm import VIRTUAL_CALIBRATION, VirtualArm
from smolvla_edge.devices.virtual_bus import Fault, VirtualBus

IDS = (1, 2, 3, 4, 5, 6)
MIDDLE = [2001, 2025, 2000, 2027, 2047, 2748]


@pytest.fixture(scope="module")
def started():
    with VirtualArm(width=160, height=120) as arm:
        yield arm


@pytest.fixture
def arm(started):
    started.reset()
    return started


@pytest.fixture
def bus():
    """The protocol without a port, at time 0."""
    return VirtualBus(VIRTUAL_CALIBRATION, 0.0)


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


def test_the_vendor_s_sdk_writes_now_and_acts_later(arm, sdk):
    port, packets = sdk
    assert packets.regWriteTxRx(port, 1, 42, 2, [0x34, 0x08]) == (0, 0)
    assert arm.registers(1)[Register.GOAL_POSITION] == 0
    assert packets.action(port, frames.BROADCAST_ID) == scservo_sdk.COMM_SUCCESS
    assert packets.read2ByteTxRx(port, 1, 42)[0] == 0x0834


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
    bus.servos[1].poke(Register.PRESENT_POSITION, 1304)
    assert ask(bus, bytes.fromhex("ff ff 01 04 02 38 02 be")).hex(" ") == "ff ff 01 04 00 18 05 dd"
    for servo_id, position, voltage, temperature in ((1, 2048, 121, 30), (2, 2047, 119, 35)):
        servo = bus.servos[servo_id]
        servo.poke(Register.PRESENT_POSITION, position)
        servo.poke(Register.PRESENT_VOLTAGE, voltage)
        servo.poke(Register.PRESENT_TEMPERATURE, temperature)
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
    bus.servos[1].poke(Register.RESPONSE_STATUS_LEVEL, 0)
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
        servo.poke(register, value)
    return servo


def test_a_servo_without_torque_does_not_follow(bus):
    energised(bus, 2501).poke(Register.TORQUE_ENABLE, 0)
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


def test_a_goal_velocity_of_0_means_stop_or_full_speed_as_the_phase_says(bus):
    servo = energised(bus, 3001, velocity=0)
    servo.poke(Register.PHASE, 0)
    assert moved(bus, 0.5) == 0
    servo.poke(Register.PHASE, 8)
    assert moved(bus, 1.0) == 1000


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
    bus.servos[1].poke(Register.PRESENT_POSITION, 3340)
    for goal in (3340, 3330, 3310, 3300):
        ask(bus, frames.write(1, 42, goal.to_bytes(2, "little")))
    assert not bus.violations


def test_a_late_answer_keeps_the_order_of_one_servo(bus):
    bus.inject(Fault("delay", 1, value=0.09))
    bus.receive(frames.ping(1))
    bus.receive(frames.ping(2))
    bus.receive(frames.read(1, 3, 2))
    assert [f.id for f in frames.status_parser().feed(bus.due())] == [2]
    bus.advance(0.1)
    assert [len(f.params) for f in frames.status_parser().feed(bus.due())] == [0, 2]


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


def test_an_unknown_fault_is_refused(arm):
    with pytest.raises(DeviceError, match="unknown fault 'melt'"):
        arm.inject("melt")
    assert arm.violations() == []


def test_the_port_passes_every_byte_to_a_client_that_sets_no_terminal_mode():
    with VirtualArm(cameras=()) as arm:
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
    arm = VirtualArm(width=32, height=24)
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
        "from smolvla_edge.devices.virtual_arm import VirtualArm\n"
        "arm = VirtualArm(width=32, height=24)\n"
        "print(arm.pid, arm.camera_sources['front'], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as starter:
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
