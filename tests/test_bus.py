"""The bus against the virtual arm, and against bytes no servo of ours would send."""

import errno
import fcntl
import os
import struct
import threading
import time
import tty

import pytest
import serial

from smolvla_edge.devices import frames
from smolvla_edge.devices.bus import FeetechBus, Reading
from smolvla_edge.devices.errors import ArmError, BusError, BusLost
from smolvla_edge.devices.sts3215 import Register
from smolvla_edge.devices.virtual_arm import VirtualArm

IDS = (1, 2, 3, 4, 5, 6)
TIOCGEXCL = 0x80045440
POSITION = Register.PRESENT_POSITION


@pytest.fixture(scope="module")
def started():
    with VirtualArm(cameras=()) as arm:
        yield arm


@pytest.fixture
def arm(started):
    started.reset()
    return started


@pytest.fixture
def bus(arm):
    # A margin that a busy machine does not use up: these tests count anomalies.
    with FeetechBus(arm.port, reply_margin_s=0.03) as bus:
        yield bus


class Wire:
    """The far end of a serial line that answers each request with what `script` says: [(delay_s, bytes)]."""

    def __init__(self, script):
        self.master, self.slave = os.openpty()
        tty.setraw(self.master)
        tty.setraw(self.slave)
        self.port = os.ttyname(self.slave)
        self.requests = []
        self._script = script
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        try:
            while True:
                head = self._exactly(4)
                request = head + self._exactly(head[3])
                self.requests.append(request)
                for delay_s, data in self._script(request):
                    time.sleep(delay_s)
                    os.write(self.master, data)
        except OSError:
            return

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            data += os.read(self.master, size - len(data))
        return data

    def close(self):
        os.close(self.slave)
        self._thread.join(2)
        os.close(self.master)


@pytest.fixture
def wired():
    """Make a bus whose far end follows a script."""
    opened = []

    def make(script, **options):
        # The probe for an echo asks id 253; nobody answers it.
        wire = Wire(lambda request: [] if request[4] == 0x82 and request[7] == 0xFD else script(request))
        bus = FeetechBus(wire.port, **options)
        opened.extend((bus, wire))
        bus.open()
        return bus, wire

    yield make
    for thing in opened:
        thing.close()


def answer(position, servo_id=1, error=0):
    return frames.build(servo_id, error, position.to_bytes(2, "little"))


def test_a_servo_that_is_there_answers_a_ping_and_another_does_not(bus):
    reply = bus.ping(3)
    assert (reply.id, reply.error, reply.answers) == (3, 0, 1)
    assert bus.ping(9) is None


def test_a_silent_servo_costs_bounded_time(bus):
    before = time.monotonic()
    with pytest.raises(BusError, match=r"servo 9 .* did not answer a read of Present_Position \(56\)"):
        bus.read(9, POSITION)
    assert time.monotonic() - before < 0.2
    assert bus.counters.timeouts == 2


def test_a_register_is_read_with_its_sign(arm, bus):
    assert bus.read(1, Register.HOMING_OFFSET) == Reading(-709, 0)
    arm.set_register(1, POSITION, -100)
    assert bus.read(1, POSITION) == Reading(-100, 0)


def test_a_block_is_read_at_once(arm, bus):
    seen = arm.frames_seen()
    block = bus.read_block(4, Register.FIRMWARE_MAJOR_VERSION, Register.VELOCITY_I)
    assert arm.frames_seen() == seen + 1
    assert block.values[Register.MODEL_NUMBER] == 777
    assert block.values[Register.MAX_POSITION_LIMIT] == arm.calibration.joints[3].range_max


def test_a_write_is_acknowledged(arm, bus):
    assert bus.write(2, Register.GOAL_VELOCITY, 1500) == 0
    assert arm.registers(2)[Register.GOAL_VELOCITY] == 1500
    assert bus.counters.unacknowledged_writes == 0


def test_a_servo_that_never_acknowledges_is_verified_by_reading_back(arm, bus):
    arm.set_register(2, Register.RESPONSE_STATUS_LEVEL, 0)
    assert bus.write(2, Register.GOAL_VELOCITY, 1200) == 0
    assert bus.counters.unacknowledged_writes == 1


def test_a_write_that_does_not_take_is_told(wired):
    bus, _ = wired(lambda request: [(0, answer(7))] if request[4] == 2 else [])
    with pytest.raises(BusError, match=r"did not take Goal_Velocity \(46\) = 1200: it still reads 7"):
        bus.write(1, Register.GOAL_VELOCITY, 1200)


def test_a_sync_read_gives_every_servo_in_one_request(arm, bus):
    seen = arm.frames_seen()
    blocks = bus.sync_read(IDS, POSITION, Register.PRESENT_CURRENT)
    assert arm.frames_seen() == seen + 1
    assert list(blocks) == list(IDS)
    assert blocks[1].values[POSITION] == 2001
    assert blocks[6].values[Register.PRESENT_VOLTAGE] == 74


def test_a_servo_silent_once_is_asked_again_by_itself(arm, bus):
    arm.inject("mute", 3)
    assert list(bus.sync_read(IDS, POSITION)) == list(IDS)
    assert (bus.counters.timeouts, bus.counters.retries) == (1, 1)


def test_a_servo_silent_for_good_does_not_hide_the_others(arm, bus):
    arm.inject("mute", 3, count=-1)
    before = time.monotonic()
    assert list(bus.sync_read(IDS, POSITION)) == [1, 2, 4, 5, 6]
    assert time.monotonic() - before < 0.2


def test_a_wrong_checksum_is_never_a_value(arm, bus):
    arm.inject("corrupt", 1)
    assert bus.read(1, POSITION) == Reading(2001, 0)
    assert bus.counters.bad_checksums == 1
    arm.inject("corrupt", 1, count=-1)
    with pytest.raises(BusError):
        bus.read(1, POSITION)


def test_a_late_reply_is_not_taken_for_the_next_answer(arm, bus):
    arm.inject("delay", 1, value=0.09)
    bus.sync_read(IDS, POSITION)
    assert bus.counters.timeouts >= 1
    for k in range(30):
        arm.set_register(1, POSITION, 1500 + k)
        blocks = bus.sync_read(IDS, POSITION)
        if 1 in blocks:
            assert blocks[1].values[POSITION] == 1500 + k
        time.sleep(0.01)
    assert 1 in blocks


def test_a_late_reply_inside_the_next_request_gives_way_to_the_answer(wired):
    waiting = iter([[], [(0, answer(1111)), (0.002, answer(2222))], [(0, answer(3333))]])
    bus, _ = wired(lambda request: next(waiting), retries=1)
    assert bus.read(1, POSITION).value == 2222
    assert bus.counters.repeated_frames == 1
    assert bus.read(1, POSITION).value == 3333


def test_bytes_left_from_before_are_thrown_away(wired):
    bus, wire = wired(lambda request: [(0.002, answer(2048))])
    os.write(wire.master, answer(4369))
    time.sleep(0.02)
    assert bus.read(1, POSITION).value == 2048
    assert bus.counters.stray_bytes == 8


def test_a_reply_in_pieces_is_put_together(wired):
    whole = answer(2048)
    bus, _ = wired(lambda request: [(0.0005, bytes((byte,))) for byte in whole])
    assert bus.read(1, POSITION).value == 2048


def test_a_truncated_reply_is_no_value(wired):
    replies = iter([[(0, answer(2048)[:-2])], [(0, answer(2049))]])
    bus, _ = wired(lambda request: next(replies))
    assert bus.read(1, POSITION).value == 2049
    # One at the start, one before asking again.
    assert bus.counters.drains == 2


@pytest.mark.parametrize(
    "noise",
    [
        b"\x00\x7f\xff\x12",
        b"\xff",
        b"\xff\xff\xff\xff",
        frames.build(2, 0, b"\x11\x11"),
        frames.build(1, 0, b"\x11"),
        frames.build(1, 0, b"\x11\x11\x11"),
        frames.build(1, 0x80, b"\x11\x11"),
        answer(4369)[:-1] + b"\x00",
    ],
    ids=["noise", "one FF", "many FF", "other id", "short", "long", "error above 7F", "wrong checksum"],
)
def test_what_is_not_the_answer_is_passed_over(wired, noise):
    bus, _ = wired(lambda request: [(0, noise), (0.002, answer(2048))])
    assert bus.read(1, POSITION).value == 2048


def test_a_value_that_looks_like_a_header_is_a_value(wired):
    bus, _ = wired(lambda request: [(0, answer(0xFFFF))])
    assert bus.read(1, Register.MODEL_NUMBER).value == 0xFFFF


def test_an_adapter_that_echoes_is_found_out_and_its_echo_removed(arm):
    arm.inject("echo")
    with FeetechBus(arm.port) as bus:
        assert bus.echo
        assert bus.read(1, POSITION) == Reading(2001, 0)
        assert bus.ping(2).error == 0
        assert list(bus.sync_read(IDS, POSITION)) == list(IDS)
        bus.sync_write(Register.GOAL_POSITION, dict.fromkeys(IDS, 2100))
        assert bus.read(6, Register.GOAL_POSITION) == Reading(2100, 0)
        assert bus.counters.timeouts == bus.counters.foreign_frames == 0


def test_two_servos_with_one_id_are_noticed(wired):
    bus, _ = wired(lambda request: [(0, frames.build(1, 0)), (0.001, frames.build(1, 0))])
    assert bus.ping(1).answers == 2


@pytest.mark.parametrize("bit", [0x01, 0x02, 0x04, 0x08, 0x20])
def test_an_error_bit_comes_beside_the_value(arm, bus, bit):
    arm.inject("error", 3, value=bit)
    assert bus.ping(3).error == bit
    assert bus.read(3, POSITION) == Reading(2000, bit)
    assert bus.sync_read(IDS, POSITION)[3].error == bit
    assert bus.write(3, Register.ACCELERATION, 50) == bit


def test_what_must_never_be_written_is_refused_before_the_wire(arm, bus):
    seen = arm.frames_seen()
    for register, value in (
        (Register.ID, 2),
        (Register.BAUD_RATE, 1),
        (Register.MINIMUM_STARTUP_FORCE, 1),
        (Register.INTEGRAL_LIMIT, 1),
        (Register.TORQUE_ENABLE, 128),
        (Register.PRESENT_POSITION, 0),
        (Register.GOAL_POSITION, 40_000),
    ):
        with pytest.raises(ArmError):
            bus.write(1, register, value)
        with pytest.raises(ArmError):
            bus.sync_write(register, {1: value})
    assert arm.frames_seen() == seen


def test_one_frame_switches_all_servos_off(arm, bus):
    for servo_id in IDS:
        arm.set_register(servo_id, Register.TORQUE_ENABLE, 1)
    bus.broadcast_torque_off()
    bus.ping(1)
    assert [arm.registers(i)[Register.TORQUE_ENABLE] for i in IDS] == [0] * 6


def test_a_missing_port_is_told_with_the_ports_there_are():
    with pytest.raises(BusError, match=r"no port /dev/ttyNOWHERE\. Serial ports here: "):
        FeetechBus("/dev/ttyNOWHERE").open()


def test_a_port_in_use_is_told_with_its_holder(arm, bus):
    with pytest.raises(BusError, match=rf"in use.*\(process {os.getpid()}\)"):
        FeetechBus(arm.port).open()


def test_a_port_without_permission_is_told_with_the_remedy(monkeypatch):
    def refuse(*arguments, **options):
        raise serial.SerialException(errno.EACCES, "could not open port: Permission denied")

    monkeypatch.setattr(serial, "Serial", refuse)
    with pytest.raises(BusError, match=r"dialout.*udev"):
        FeetechBus("/dev/ttyACM0").open()


def test_a_file_is_no_port(tmp_path):
    path = tmp_path / "port"
    path.write_text("")
    with pytest.raises(BusError, match="cannot open"):
        FeetechBus(str(path)).open()


def test_plain_opens_by_others_are_locked_out_while_the_bus_is_open_and_not_after(arm):
    def exclusive():
        fd = os.open(arm.port, os.O_RDWR | os.O_NOCTTY)
        try:
            return struct.unpack("i", fcntl.ioctl(fd, TIOCGEXCL, b"\0" * 4))[0]
        finally:
            os.close(fd)

    with FeetechBus(arm.port):
        if os.geteuid() == 0:
            assert exclusive() == 1
        else:
            with pytest.raises(OSError, match="busy"):
                exclusive()
    assert exclusive() == 0


def test_a_port_that_goes_away_is_one_kind_of_error():
    with VirtualArm(cameras=()) as arm:
        bus = FeetechBus(arm.port)
        bus.open()
        assert bus.ping(1)
        arm.close()
        for action in (
            lambda: bus.read(1, POSITION),
            lambda: bus.ping(1),
            lambda: bus.sync_read(IDS, POSITION),
            lambda: bus.sync_write(Register.GOAL_POSITION, {1: 2000}),
            bus.broadcast_torque_off,
        ):
            with pytest.raises(BusLost, match="USB cable"):
                action()
        bus.close()
        bus.close()


def test_a_line_nobody_reads_is_lost_and_does_not_hang():
    master, slave = os.openpty()
    tty.setraw(master)
    tty.setraw(slave)
    values = dict.fromkeys(range(80), 0)
    try:
        with FeetechBus(os.ttyname(slave)) as bus, pytest.raises(BusLost):
            for _ in range(1000):
                bus.sync_write(Register.GOAL_POSITION, values)
    finally:
        os.close(slave)
        os.close(master)


def test_a_closed_bus_says_so(arm):
    bus = FeetechBus(arm.port)
    with pytest.raises(BusError, match="not open"):
        bus.ping(1)
    bus.open()
    bus.open()
    bus.close()
    bus.close()
    with pytest.raises(BusError, match="not open"):
        bus.broadcast_torque_off()


def test_threads_take_turns_on_the_bus(bus):
    wrong = []

    def ask(servo_id, expected):
        wrong.extend(
            value for value in (bus.read(servo_id, Register.ID).value for _ in range(100)) if value != expected
        )

    threads = [threading.Thread(target=ask, args=(i, i)) for i in IDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert bus.counters.timeouts == bus.counters.foreign_frames == 0


def test_options_that_make_no_sense_are_all_named():
    with pytest.raises(BusError, match=r"reply_margin_s.*write_timeout_s.*retries"):
        FeetechBus("/dev/null", reply_margin_s=1, write_timeout_s=0, retries=-1)
