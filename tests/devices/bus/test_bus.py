"""The bus against the virtual arm, and against bytes no servo of ours would send."""

import os
import termios
import threading
import time
import tty

import pytest

from smolvla_edge.core.errors import ArmError, BusError
from smolvla_edge.devices.bus import frames
from smolvla_edge.devices.bus.bus import FeetechBus, Reading
from smolvla_edge.devices.bus.port import Port
from smolvla_edge.devices.bus.sts3215 import Register

pytestmark = pytest.mark.arm

IDS = (1, 2, 3, 4, 5, 6)
TIOCGEXCL = 0x80045440
POSITION = Register.PRESENT_POSITION


@pytest.fixture
def arm(virtual):
    return virtual


@pytest.fixture
def bus(arm):
    # A margin that a busy machine does not use up: these tests count anomalies.
    with FeetechBus(arm.port, reply_margin_s=0.03, reply_gap_s=0.03) as bus:
        yield bus


class Wire:
    """The far end of a serial line that answers each request with what `script` says: [(delay_s,
    bytes)]."""

    def __init__(self, script):
        self.master, self.slave = os.openpty()
        tty.setraw(self.master)
        tty.setraw(self.slave)
        self.port = os.ttyname(self.slave)
        self.requests = []
        self._script = script
        self._closed = False
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
                    if self._closed:
                        return
        except OSError:
            return

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            data += os.read(self.master, size - len(data))
        return data

    def close(self):
        self._closed = True
        # A write that waits for room ends.
        termios.tcflush(self.slave, termios.TCIFLUSH)
        os.close(self.slave)
        self._thread.join(2)
        os.close(self.master)


@pytest.fixture
def wired():
    """Make a bus whose far end follows a script."""
    opened = []

    def make(script, **options):
        # The probe for an echo asks id 253; nobody answers it.
        wire = Wire(
            lambda request: [] if request[4] == 0x82 and request[7] == 0xFD else script(request)
        )
        bus = FeetechBus(wire.port, **{"reply_margin_s": 0.04, **options})
        opened.extend((bus, wire))
        bus.open()
        return bus, wire

    yield make
    for thing in opened:
        thing.close()


def answer(position, servo_id=1, error=0, size=2):
    return frames.build(servo_id, error, position.to_bytes(size, "little"))


def asked_size(request):
    """How many bytes a READ asks for."""
    assert request[4] == frames.Instruction.READ
    return request[6]


def test_a_servo_that_is_there_answers_a_ping_and_another_does_not(bus):
    assert bus.ping(3) == (0, 1)
    assert bus.ping(9) is None


def test_a_silent_servo_costs_bounded_time(bus):
    before = time.monotonic()
    with pytest.raises(
        BusError, match=r"servo 9 .* did not answer a read of Present_Position \(56\)"
    ):
        bus.read(9, POSITION)
    assert time.monotonic() - before < 0.2
    assert bus.counters["timeouts"] == 2


def test_a_register_is_read_with_its_sign(arm, bus):
    assert bus.read(1, Register.HOMING_OFFSET) == Reading(-709, 0)
    arm.force(1, POSITION, -100)
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
    assert bus.counters["unacknowledged_writes"] == 0


def test_a_servo_that_never_acknowledges_is_verified_by_reading_back(arm, bus):
    arm.set_register(2, Register.RESPONSE_STATUS_LEVEL, 0)
    assert bus.write(2, Register.GOAL_VELOCITY, 1200) == 0
    assert bus.counters["unacknowledged_writes"] == 1


def test_a_write_that_does_not_take_is_told(wired):
    bus, _ = wired(
        lambda r: [(0, answer(7, size=asked_size(r)))] if r[4] == frames.Instruction.READ else []
    )
    with pytest.raises(BusError, match=r"did not take Goal_Velocity \(46\) = 1200, it reads 7"):
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
    assert (bus.counters["timeouts"], bus.counters["retries"]) == (1, 1)


def test_a_servo_silent_for_good_does_not_hide_the_others(arm, bus):
    arm.inject("mute", 3, count=-1)
    before = time.monotonic()
    assert list(bus.sync_read(IDS, POSITION)) == [1, 2, 4, 5, 6]
    assert time.monotonic() - before < 0.2


def test_a_wrong_checksum_is_never_a_value(arm, bus):
    arm.inject("corrupt", 1)
    assert bus.read(1, POSITION) == Reading(2001, 0)
    assert bus.counters["bad_checksums"] == 1
    arm.inject("corrupt", 1, count=-1)
    with pytest.raises(BusError):
        bus.read(1, POSITION)


def test_a_late_reply_is_not_taken_for_the_next_answer(arm, bus):
    arm.inject("delay", 1, value=0.09)
    bus.sync_read(IDS, POSITION)
    assert bus.counters["timeouts"] >= 1
    for k in range(30):
        arm.set_register(1, POSITION, 1500 + k)
        blocks = bus.sync_read(IDS, POSITION)
        if 1 in blocks:
            assert blocks[1].values[POSITION] == 1500 + k
        time.sleep(0.01)
    assert 1 in blocks


@pytest.mark.parametrize("lengths", [1, 16])
def test_a_late_reply_inside_the_next_request_is_not_its_answer(wired, monkeypatch, lengths):
    monkeypatch.setattr("smolvla_edge.devices.bus.bus.SPARE_LENGTHS", lengths)
    late = []

    def script(request):
        whole = answer(1111 * (len(late) + 1), size=asked_size(request))
        late.append(whole)
        return [[], [(0, late[0]), (0.002, whole)], [(0, whole)]][len(late) - 1]

    bus, _ = wired(script)
    assert bus.read(1, POSITION).value == 2222
    assert bus.counters["foreign_frames"] == 1
    assert bus.read(1, POSITION).value == 3333


@pytest.mark.parametrize("delay_s", [0.012, 0.02, 0.05, 0.09])
def test_a_servo_that_is_always_late_never_gives_an_old_value(arm, delay_s):
    seen = 0
    arm.inject("delay", 1, count=-1, value=delay_s)
    with FeetechBus(arm.port, reply_margin_s=0.03) as bus:
        for k in range(15):
            arm.force(1, POSITION, 1500 + k)
            try:
                blocks = bus.sync_read(IDS, POSITION)
            except BusError as error:
                assert "too noisy" in str(error)
                continue
            if 1 in blocks:
                seen += 1
                assert blocks[1].values[POSITION] == 1500 + k
    assert seen or delay_s > 0.012


def test_a_late_acknowledgement_is_not_taken_for_that_of_the_next_write(wired):
    written = []

    def script(request):
        if request[4] == frames.Instruction.READ:
            # The third write and its repetition are lost.
            return [(0, answer(min(len(written), 2), size=asked_size(request)))]
        written.append(request)
        # Each acknowledgement comes when the next write is on its way.
        return [(0, frames.build(1, 0))] if len(written) in (2, 3) else []

    bus, _ = wired(script)
    assert bus.write(1, Register.GOAL_VELOCITY, 1) == 0
    assert bus.write(1, Register.GOAL_VELOCITY, 2) == 0
    with pytest.raises(BusError, match=r"did not take Goal_Velocity \(46\) = 3, it reads 2"):
        bus.write(1, Register.GOAL_VELOCITY, 3)


def test_a_late_answer_to_a_ping_is_no_second_servo(wired):
    pings = []

    def script(request):
        pings.append(request)
        return [(0, frames.build(1, 0))] * (2 if len(pings) == 2 else 0)

    bus, _ = wired(script)
    assert bus.ping(1) == (0, 1)


def test_an_interrupted_request_leaves_no_answer_to_the_next(arm, bus, monkeypatch):
    def interrupt(self, deadline):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Port, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bus.read(1, POSITION)
    arm.set_register(1, POSITION, 1700)
    assert bus.read(1, POSITION).value == 1700


def test_bytes_left_from_before_are_thrown_away(wired):
    bus, wire = wired(lambda request: [(0.002, answer(2048, size=asked_size(request)))])
    os.write(wire.master, answer(4369))
    time.sleep(0.02)
    assert bus.read(1, POSITION).value == 2048
    assert bus.counters["stray_bytes"] == 8


def test_a_reply_in_pieces_is_put_together(wired):
    bus, _ = wired(
        lambda r: [(0.0005, bytes((byte,))) for byte in answer(2048, size=asked_size(r))]
    )
    assert bus.read(1, POSITION).value == 2048


def test_a_truncated_reply_is_no_value(wired):
    requests = []

    def script(request):
        requests.append(request)
        whole = answer(2048 + len(requests), size=asked_size(request))
        return [(0, whole[:-2] if len(requests) == 1 else whole)]

    bus, _ = wired(script)
    assert bus.read(1, POSITION).value == 2050
    assert bus.counters["stray_bytes"] == len(answer(0)) - 2


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
    ids=[
        "noise",
        "one FF",
        "many FF",
        "other id",
        "short",
        "long",
        "error above 7F",
        "wrong checksum",
    ],
)
def test_what_is_not_the_answer_is_passed_over(wired, noise):
    bus, _ = wired(lambda request: [(0, noise), (0.002, answer(2048, size=asked_size(request)))])
    assert bus.read(1, POSITION).value == 2048


def test_a_value_that_looks_like_a_header_is_a_value(wired):
    bus, _ = wired(lambda request: [(0, answer(0xFFFF, size=asked_size(request)))])
    assert bus.read(1, Register.MODEL_NUMBER).value == 0xFFFF


def test_an_adapter_that_echoes_is_found_out_and_its_echo_removed(arm):
    arm.inject("echo")
    with FeetechBus(arm.port) as bus:
        assert bus.echo
        assert bus.read(1, POSITION) == Reading(2001, 0)
        assert bus.ping(2) == (0, 1)
        assert list(bus.sync_read(IDS, POSITION)) == list(IDS)
        bus.sync_write(Register.GOAL_POSITION, dict.fromkeys(IDS, 2100))
        assert bus.read(6, Register.GOAL_POSITION) == Reading(2100, 0)
        assert bus.counters["timeouts"] == bus.counters["foreign_frames"] == 0


def test_two_servos_with_one_id_are_noticed(wired):
    bus, _ = wired(lambda request: [(0, frames.build(1, 0)), (0.001, frames.build(1, 0))])
    assert bus.ping(1) == (0, 2)


@pytest.mark.parametrize("bit", [0x01, 0x02, 0x04, 0x08, 0x20])
def test_an_error_bit_comes_beside_the_value(arm, bus, bit):
    arm.inject("error", 3, value=bit)
    assert bus.ping(3) == (bit, 1)
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


def test_a_closed_bus_says_so(arm):
    bus = FeetechBus(arm.port)
    with pytest.raises(BusError, match="not open"):
        bus.ping(1)
    bus.open()
    bus.close()
    bus.close()
    with pytest.raises(BusError, match="not open"):
        bus.broadcast_torque_off()


def from_another_thread(action):
    """Its result or exception."""
    results = []

    def run():
        try:
            results.append(action())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, name="the other")
    thread.start()
    thread.join(10)
    return results[0]


def test_another_thread_is_refused(arm, bus):
    seen = arm.frames_seen()
    for action in (
        lambda: bus.ping(1),
        lambda: bus.read(1, POSITION),
        lambda: bus.write(1, Register.ACCELERATION, 50),
        lambda: bus.sync_read(IDS, POSITION),
        lambda: bus.sync_write(Register.GOAL_POSITION, {1: 2000}),
        bus.broadcast_torque_off,
        bus.fileno,
    ):
        error = from_another_thread(action)
        assert isinstance(error, ArmError)
        assert "belongs to the thread that opened it, MainThread" in str(error)
    assert arm.frames_seen() == seen
    assert bus.ping(1)


def test_another_thread_may_close_the_bus_and_open_it_for_itself(arm):
    bus = FeetechBus(arm.port)
    bus.open()
    assert from_another_thread(bus.close) is None
    assert not bus.is_open

    def run():
        with bus:
            return bus.ping(1)

    assert from_another_thread(run) == (0, 1)


def test_a_bus_closed_by_another_thread_while_it_is_asked_is_one_kind_of_error(arm):
    for _ in range(20):
        with FeetechBus(arm.port) as bus, pytest.raises(BusError):
            closer = threading.Timer(0.01, bus.close)
            closer.start()
            while True:
                bus.sync_read(IDS, POSITION)
        closer.join()


def test_asking_again_ends_with_the_budget(arm, bus):
    for servo_id in IDS[1:]:
        arm.inject("mute", servo_id, count=-1)
    # Six servos at 30 ms each, and no time for it.
    bus.sync_read(IDS, POSITION, budget_s=0.02)
    assert bus.counters["retries"] == 0
    bus.sync_read(IDS, POSITION)
    assert bus.counters["retries"] == 5


def test_a_servo_silent_once_is_asked_again_within_the_budget(arm, bus):
    arm.inject("mute", 3)
    assert list(bus.sync_read(IDS, POSITION, budget_s=5.0)) == list(IDS)
    assert bus.counters["retries"] == 1


def test_a_gap_between_answers_ends_the_waiting(arm, monkeypatch):
    """Servo 6 comes too late after servo 5, though not too late for a first answer."""
    monkeypatch.setattr("smolvla_edge.devices.bus.bus.RETRIES", 0)
    arm.inject("delay", 6, count=-1, value=0.03)
    with FeetechBus(arm.port, reply_margin_s=0.05, reply_gap_s=0.005) as bus:
        # Five tries, for a machine that is slow itself.
        assert [1, 2, 3, 4, 5] in [list(bus.sync_read(IDS, POSITION)) for _ in range(5)]
        assert [6] in [list(bus.sync_read([6], POSITION)) for _ in range(5)]


def test_a_slow_bus_gives_every_servo_and_is_no_noise(arm):
    for servo_id in IDS:
        arm.inject("delay", servo_id, count=-1, value=0.005)
    with FeetechBus(arm.port, reply_margin_s=0.05) as bus:
        for _ in range(30):
            assert list(bus.sync_read(IDS, POSITION, Register.PRESENT_CURRENT)) == list(IDS)
        assert bus.counters["timeouts"] < 15


def test_a_dead_servo_is_not_noise(arm, bus):
    arm.inject("mute", 3, count=-1)
    for _ in range(15):
        bus.sync_read(IDS, POSITION)
    assert bus.counters["timeouts"] >= 30


@pytest.mark.parametrize(
    "kind", ["corrupt", "noise", "truncate", "wrong_id", "wrong_length", "bad_error", "duplicate"]
)
def test_a_line_that_stays_disturbed_is_told_as_too_noisy(arm, kind):
    arm.inject(kind, 3, count=-1, value=4 if kind == "truncate" else 0)
    with FeetechBus(arm.port) as bus:
        with pytest.raises(BusError, match=r"too noisy: .*no second program"):
            for _ in range(12):
                block = bus.sync_read(IDS, POSITION).get(3)
                assert block is None or block.values[POSITION] == 2000
        # It is told once, so that the motors can still be switched off.
        bus.broadcast_torque_off()
        for _ in range(3):
            bus.sync_read(IDS, POSITION)


def test_ten_disturbances_are_borne_and_those_of_long_ago_forgotten(arm, monkeypatch):
    monkeypatch.setattr("smolvla_edge.devices.bus.bus.DESYNCS_WINDOW_S", 0.2)
    with FeetechBus(arm.port, reply_margin_s=0.03) as bus:
        arm.inject("noise", 1, count=10)
        for _ in range(10):
            bus.read(1, POSITION)
        time.sleep(0.2)
        arm.inject("noise", 1)
        bus.read(1, POSITION)
        assert bus.counters["stray_bytes"] > 10


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("truncate", 5),
        ("trickle", 0.002),
        ("noise", 40),
        ("wrong_id", 2),
        ("wrong_length", 2),
        ("bad_error", 0),
    ],
)
def test_a_spoiled_answer_is_read_right_or_not_at_all(arm, bus, kind, value):
    for round_ in range(5):
        arm.set_register(1, POSITION, 1500 + round_)
        arm.inject(kind, 1, count=1, value=value)
        assert bus.sync_read(IDS, POSITION)[1].values[POSITION] == 1500 + round_
        assert bus.read(2, POSITION).value == 2025


def test_nothing_is_sent_before_the_line_has_fallen_silent(wired, monkeypatch):
    silence_s = 0.5
    times = []

    def script(request):
        times.append(time.monotonic())
        if len(times) == 1:
            # Cut short: what is left may still be on its way.
            return [(0.04, answer(1, size=asked_size(request))[:3])]
        return [(0, answer(2, size=asked_size(request)))]

    def babble():
        for _ in range(10):
            os.write(wire.master, b"\x55")
            times.append(time.monotonic())
            time.sleep(0.02)

    bus, wire = wired(script, reply_margin_s=0.05)
    monkeypatch.setattr("smolvla_edge.devices.bus.bus.SILENCE_S", silence_s)
    monkeypatch.setattr("smolvla_edge.devices.bus.bus.DRAIN_LIMIT_S", 5.0)
    assert bus.read(1, POSITION).value == 2
    assert times[1] - times[0] >= 0.04 + silence_s
    times.append(0.0)
    babbler = threading.Thread(target=babble)
    babbler.start()
    time.sleep(0.05)
    assert bus.read(1, POSITION).value == 2
    babbler.join()
    assert max(times) == times[-1]
    assert times[-1] - times[-2] >= silence_s


def test_no_request_goes_out_when_the_budget_ended_while_the_line_fell_silent(wired):
    half = answer(1)[:3]
    bus, wire = wired(lambda request: [(0.006, half)], reply_margin_s=0.008)
    before = len(wire.requests)
    assert bus.sync_read([1], POSITION, budget_s=0.01) == {}
    time.sleep(0.1)
    assert len(wire.requests) == before + 1


def test_endless_noise_does_not_hang(wired):
    flood = frames.build(9, 0, b"\x11\x11") * 4000
    bus, _ = wired(lambda request: [(0, flood)] * 1000)
    before = time.monotonic()
    with pytest.raises(BusError):
        bus.read(1, POSITION)
    assert time.monotonic() - before < 2


def test_a_goal_cut_off_by_an_unplugged_cable_does_not_disturb_the_next_start(arm):
    goals = frames.sync_write(Register.GOAL_POSITION.address, dict.fromkeys(IDS, b"\x00\x08"))
    for size in range(1, len(goals)):
        fd = os.open(arm.port, os.O_RDWR | os.O_NOCTTY)
        os.write(fd, goals[:size])
        os.close(fd)
        with FeetechBus(arm.port, reply_margin_s=0.03) as bus:
            assert bus.read(1, POSITION) == Reading(2001, 0)
    assert arm.goals() == arm.violations() == []


def test_a_block_of_registers_is_written_to_all_servos_in_one_frame(arm, bus):
    seen = arm.frames_seen()
    values = {
        servo_id: {
            Register.ACCELERATION: 40 + servo_id,
            Register.GOAL_POSITION: 2000 + servo_id,
            Register.GOAL_TIME: 0,
            Register.GOAL_VELOCITY: 1000 + servo_id,
        }
        for servo_id in IDS
    }
    bus.sync_write_block(values)
    bus.ping(1)
    assert arm.frames_seen() == seen + 2
    for servo_id in IDS:
        registers = arm.registers(servo_id)
        assert {register: registers[register] for register in values[servo_id]} == values[servo_id]


def test_a_block_with_a_gap_or_a_missing_or_forbidden_value_is_refused_before_the_wire(arm, bus):
    seen = arm.frames_seen()
    speed, limit = {Register.GOAL_VELOCITY: 1000}, {Register.TORQUE_LIMIT: 500}
    for values in (
        {1: speed | limit | {Register.LOCK: 1}},
        {1: speed | limit, 2: speed},
        {1: limit | speed},
        {1: {Register.TORQUE_ENABLE: 128, Register.ACCELERATION: 0}},
    ):
        with pytest.raises(ArmError):
            bus.sync_write_block(values)
    assert arm.frames_seen() == seen


def test_every_register_write_is_journaled_and_goals_are_not(arm, bus):
    journal = []
    bus.on_write = lambda *write: journal.append(write)
    bus.write(1, Register.ACCELERATION, 50)
    bus.sync_write(Register.GOAL_POSITION, {1: 2001})
    with pytest.raises(ArmError):
        bus.write(1, Register.ID, 2)
    arm.inject("lost_write", 2, value=Register.ACCELERATION.address)
    arm.inject("mute", 2)
    bus.write(2, Register.ACCELERATION, 50)
    bus.broadcast_torque_off()
    assert journal == [
        (1, Register.ACCELERATION, 50),
        # Lost once, so sent twice.
        (2, Register.ACCELERATION, 50),
        (2, Register.ACCELERATION, 50),
        (254, Register.TORQUE_ENABLE, 0),
    ]


@pytest.mark.parametrize("jump_s", [-1e9, 1e9])
def test_a_jump_of_the_wall_clock_changes_nothing(arm, bus, monkeypatch, jump_s):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s * (time.monotonic() % 0.02 > 0.01))
    for _ in range(20):
        assert list(bus.sync_read(IDS, POSITION)) == list(IDS)
        assert bus.read(1, POSITION) == Reading(2001, 0)
