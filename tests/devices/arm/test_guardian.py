"""The guardian against the virtual arm: hosts that die, freeze, say goodbye, or lose their
guardian."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from smolvla_edge.core.errors import GuardianLost
from smolvla_edge.devices.arm.guardian import Guardian, GuardianAction
from smolvla_edge.devices.bus import frames
from smolvla_edge.devices.bus.bus import FeetechBus
from smolvla_edge.devices.bus.sts3215 import Register
from support.faulty_arm import FaultyArm

pytestmark = pytest.mark.arm

IDS = (1, 2, 3, 4, 5, 6)
LIMITS = {i: 500 if i == 6 else 1000 for i in IDS}
TIOCGEXCL = 0x80045440
# A host energises the arm and then beats thirty times a second, until it is told to stop or its
# guardian is lost.
HOST = """
import sys, time
from smolvla_edge.devices.bus.bus import FeetechBus
from smolvla_edge.core.errors import GuardianLost
from smolvla_edge.devices.arm.guardian import Guardian, GuardianAction
from smolvla_edge.devices.bus.sts3215 import Register

with FeetechBus(sys.argv[1], reply_margin_s=0.05) as bus:
    limits = {i: 500 if i == 6 else 1000 for i in range(1, 7)}
    guardian = Guardian(bus.fileno(), bus.path, GuardianAction(sys.argv[2]), limits)
    guardian.beat()
    for servo_id in range(1, 7):
        bus.write(servo_id, Register.TORQUE_LIMIT, 500 if servo_id == 6 else 1000)
        present = bus.read(servo_id, Register.PRESENT_POSITION).value
        bus.write(servo_id, Register.GOAL_POSITION, present)
        bus.write(servo_id, Register.TORQUE_ENABLE, 1)
        guardian.beat()
    print(guardian.pid, flush=True)
    try:
        while True:
            guardian.beat()
            time.sleep(0.033)
    except GuardianLost as lost:
        print("lost:", lost, flush=True)
        guardian.dismiss()
"""


@pytest.fixture
def arm(virtual):
    return virtual


class Host:
    """A running host; `pid` and `guardian` are process ids."""

    def __init__(self, port, action):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST, port, action.value],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.guardian = int(line)

    def told(self):
        """What host and guardian said, once both have ended: the guardian inherits stderr."""
        return self.process.communicate(timeout=20)


@contextmanager
def hosted(port, action=GuardianAction.OFF):
    host = Host(port, action)
    try:
        yield host
    finally:
        with suppress(ProcessLookupError):
            os.kill(host.guardian, signal.SIGCONT)
        host.process.kill()
        host.process.communicate()


def torque(arm):
    return [arm.registers(servo_id)[Register.TORQUE_ENABLE] for servo_id in IDS]


def assert_unmarked(port):
    """Anybody may open it: the mark on the port is gone, and its lock."""
    fd = os.open(port, os.O_RDWR | os.O_NOCTTY)
    assert struct.unpack("i", fcntl.ioctl(fd, TIOCGEXCL, b"\0" * 4))[0] == 0
    os.close(fd)


def wait_until(condition, limit_s=10.0):
    """Seconds until it held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s
        time.sleep(0.005)
    return time.monotonic() - start


def ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize(
    "action", [GuardianAction.OFF, GuardianAction.SOFT], ids=lambda action: action.value
)
@pytest.mark.parametrize(
    "blow", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV], ids=lambda blow: blow.name
)
def test_the_arm_is_off_soon_after_its_host_died_or_froze(arm, blow, action):
    with hosted(arm.port, action) as host:
        assert torque(arm) == [1] * 6
        os.kill(host.pid, blow)
        took_s = wait_until(lambda: torque(arm) == [0] * 6)
        print(f"{blow.name}, {action.value}: every servo was off after {took_s:.3f} s")
        assert took_s < 1.5
        wait_until(lambda: ended(host.guardian))
        if blow is signal.SIGSTOP:
            os.kill(host.pid, signal.SIGCONT)
        out, error = host.told()
    reason = (
        "no heartbeat for 0.8 s"
        if blow is signal.SIGSTOP
        else "the program has ended without switching"
    )
    assert error.count("\n") == 1
    assert f"guardian of {arm.port}: {reason}" in error
    assert error.endswith("every servo is switched off.\n")
    if blow is signal.SIGSTOP:
        assert "lost: this program stood still for more than 0.8 s" in out
    assert arm.violations() == []
    assert_unmarked(arm.port)
    with FeetechBus(arm.port) as bus:
        assert bus.ping(1)


def test_a_soft_end_lowers_the_torque_of_each_servo_from_its_own_limit_before_it_is_cut(arm):
    with hosted(arm.port, GuardianAction.SOFT) as host:
        before = len(arm.writes())
        os.kill(host.pid, signal.SIGKILL)
        wait_until(lambda: torque(arm) == [0] * 6)
        host.told()
    for servo_id in IDS:
        writes = [w for w in arm.writes()[before:] if w.id == servo_id]
        limits = [w for w in writes if w.register is Register.TORQUE_LIMIT]
        *values, restored = [w.value for w in limits]
        assert values == sorted(values, reverse=True)
        assert (437 if servo_id == 6 else 875) == values[0]
        assert values[-1] == 0
        # The next program finds the servo as it was
        assert restored == (500 if servo_id == 6 else 1000)
        assert limits[-2].time_s - limits[0].time_s > 0.3
        offs = [w for w in writes if w.register is Register.TORQUE_ENABLE]
        assert [w.value for w in offs] == [0] * len(offs)
        assert writes.index(limits[-2]) < writes.index(offs[0]) < writes.index(limits[-1])


def test_holding_writes_nothing_and_says_so(arm):
    with hosted(arm.port, GuardianAction.HOLD) as host:
        before = arm.frames_seen()
        os.kill(host.pid, signal.SIGKILL)
        _, error = host.told()
    assert "the arm holds its last goal, energised" in error
    assert_unmarked(arm.port)
    assert arm.frames_seen() == before
    assert torque(arm) == [1] * 6


def test_after_a_goodbye_nothing_is_written_and_the_port_is_free(arm):
    with FeetechBus(arm.port) as bus:
        guardian = Guardian(bus.fileno(), bus.path, GuardianAction.OFF, LIMITS)
        guardian.beat()
        before = arm.frames_seen()
        guardian.dismiss()
        assert ended(guardian.pid)
        guardian.dismiss()
        assert arm.frames_seen() == before
        with pytest.raises(GuardianLost, match="has ended"):
            guardian.beat()
    with FeetechBus(arm.port) as bus:
        assert bus.ping(1)


def test_a_guardian_waits_for_the_first_beat(arm):
    with FeetechBus(arm.port) as bus:
        guardian = Guardian(bus.fileno(), bus.path, GuardianAction.OFF, LIMITS, timeout_s=0.05)
        time.sleep(0.3)
        guardian.beat()
        guardian.dismiss()
        assert arm.writes() == []


def test_a_host_that_learns_of_its_guardian_s_death_stops(arm):
    with hosted(arm.port) as host:
        os.kill(host.guardian, signal.SIGKILL)
        out, error = host.told()
    assert "lost: the guardian process has ended" in out
    assert error == ""


def test_a_host_whose_guardian_froze_stops_and_ends_it(arm):
    with hosted(arm.port) as host:
        os.kill(host.guardian, signal.SIGSTOP)
        before = time.monotonic()
        out, _ = host.told()
        assert 0.9 < time.monotonic() - before < 10
    assert "lost: the guardian process has not answered for 1.0 s" in out
    assert ended(host.guardian)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTERM]
)
def test_signals_of_a_terminal_do_not_end_a_guardian(arm, number):
    with FeetechBus(arm.port) as bus:
        guardian = Guardian(bus.fileno(), bus.path, GuardianAction.OFF, LIMITS)
        assert os.getsid(guardian.pid) == guardian.pid
        os.kill(guardian.pid, number)
        guardian.beat()
        time.sleep(0.1)
        guardian.beat()
        assert not ended(guardian.pid)
        guardian.dismiss()
    assert arm.writes() == []


def test_a_guardian_that_is_ended_is_learned_of(arm):
    with hosted(arm.port) as host:
        os.kill(host.guardian, signal.SIGKILL)
        assert "lost: the guardian process has ended" in host.told()[0]


def test_a_port_that_is_gone_is_told_in_one_line():
    with FaultyArm(cameras=()) as arm, hosted(arm.port) as host:
        arm.hang_up()
        os.kill(host.pid, signal.SIGKILL)
        _, error = host.told()
    assert error.count("\n") == 1
    assert "the port failed" in error and "switch the power off" in error


def test_servos_that_do_not_answer_are_named(arm):
    with hosted(arm.port) as host:
        arm.inject("mute", 2, count=-1)
        arm.inject("mute", 5, count=-1)
        os.kill(host.pid, signal.SIGKILL)
        _, error = host.told()
    assert "may still be energised. Switch the arm's power off" in error
    assert "shoulder_lift (2): " in error and "wrist_roll (5): " in error and "(3)" not in error
    assert torque(arm) == [0] * 6


def test_servos_that_were_told_off_in_vain_are_told_again(arm):
    with hosted(arm.port) as host:
        arm.inject("lost_write", 3, count=4, value=Register.TORQUE_ENABLE.address)
        os.kill(host.pid, signal.SIGKILL)
        _, error = host.told()
    assert "every servo is switched off" in error
    assert torque(arm) == [0] * 6


def test_a_garbled_confirmation_is_asked_for_again(arm):
    with hosted(arm.port) as host:
        for kind, servo_id in (("wrong_length", 2), ("wrong_id", 3), ("corrupt", 4), ("noise", 5)):
            arm.inject(kind, servo_id)
        os.kill(host.pid, signal.SIGKILL)
        _, error = host.told()
    assert error.count("\n") == 1
    assert "every servo is switched off" in error


def test_goals_still_on_their_way_do_not_follow_and_a_full_port_does_not_keep_the_guardian(
    arm, capfd
):
    goals = frames.sync_write(Register.GOAL_POSITION.address, dict.fromkeys(IDS, b"\x00\x08"))
    with FeetechBus(arm.port) as bus:
        for servo_id in IDS:
            arm.set_register(servo_id, Register.TORQUE_ENABLE, 1)
        guardian = Guardian(bus.fileno(), bus.path, GuardianAction.OFF, LIMITS)
        guardian.beat()
        arm.deaf(True)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(bus.fileno(), goals)
        wait_until(lambda: ended(guardian.pid))
        arm.deaf(False)
        wait_until(lambda: torque(arm) == [0] * 6)
        with pytest.raises(GuardianLost, match="stood still"):
            guardian.beat()
        guardian.dismiss()
    # What the arm had taken in before it went deaf may come.
    assert len(arm.goals()) < 6 * 200
    assert "gripper (6): " in capfd.readouterr().err


def test_an_echoing_adapter_changes_nothing(arm):
    arm.inject("echo")
    with hosted(arm.port, GuardianAction.SOFT) as host:
        os.kill(host.pid, signal.SIGKILL)
        assert "every servo is switched off" in host.told()[1]


def test_a_host_that_beats_keeps_its_guardian_quiet(arm):
    with FeetechBus(arm.port) as bus:
        guardian = Guardian(bus.fileno(), bus.path, GuardianAction.OFF, LIMITS)
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            guardian.beat()
            time.sleep(0.03)
        guardian.dismiss()
    assert arm.writes() == []


def test_a_guardian_that_cannot_start_is_told(arm, monkeypatch):
    with FeetechBus(arm.port) as bus:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(GuardianLost, match="did not start"):
            Guardian(bus.fileno(), bus.path, GuardianAction.OFF, LIMITS)


def test_a_guardian_is_small_and_starts_quickly(arm):
    with FeetechBus(arm.port) as bus:
        before = time.monotonic()
        guardian = Guardian(bus.fileno(), bus.path, GuardianAction.OFF, LIMITS)
        started_s = time.monotonic() - before
        lines = Path(f"/proc/{guardian.pid}/smaps_rollup").read_text().splitlines()
        size_kb = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        guardian.dismiss()
    print(f"started after {started_s:.3f} s, {size_kb} kB")
    assert started_s < 5 and size_kb < 40_000


def test_a_beat_never_blocks_even_when_the_guardian_reads_none(arm, monkeypatch):
    monkeypatch.setattr("smolvla_edge.devices.arm.guardian.ECHO_LIMIT_S", 60)
    with FeetechBus(arm.port) as bus:
        guardian = Guardian(bus.fileno(), bus.path, GuardianAction.OFF, LIMITS)
        os.kill(guardian.pid, signal.SIGSTOP)
        longest_s = 0.0
        # More than a pipe holds.
        for _ in range(70_000):
            before = time.monotonic()
            guardian.beat()
            longest_s = max(longest_s, time.monotonic() - before)
        print(f"the longest of 70,000 beats took {longest_s * 1e3:.3f} ms")
        guardian.dismiss()
        assert ended(guardian.pid)
