"""A run under way, and what befalls it: program, port, cameras, person. Bytes seen by the servos
count.

The faults that need no policy are in test_faults.py, those of the loop alone in test_control.py.
"""

import fcntl
import os
import pty
import re
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from smolvla_edge.devices.bus.sts3215 import Register
from support.faulty_arm import FaultyArm
from support.running import SERVOS, assert_limp_and_unharmed, real_port, run, wait_for_goals

pytestmark = pytest.mark.arm


@pytest.fixture
def under_way(fresh, export_case, tmp_path, start):
    """(flags...) -> the process of a run whose arm is moving."""

    def begin(*flags, count=40, **options):
        process = start(real_port(fresh, export_case("tiny", "fp32"), tmp_path, *flags), **options)
        wait_for_goals(fresh, process, count=count)
        return process

    return begin


def torque(arm):
    return [arm.registers(i)[Register.TORQUE_ENABLE] for i in SERVOS]


def seconds_until_limp(arm, limit_s=10.0):
    start = time.monotonic()
    while any(torque(arm)):
        assert time.monotonic() - start < limit_s, torque(arm)
        time.sleep(0.01)
    return time.monotonic() - start


def children(pid):
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return {int(line.split()[0]): line for line in listed.splitlines()}


def guardian_of(process):
    (pid,) = [pid for pid, line in children(process.pid).items() if "guardian" in line]
    return pid


@pytest.mark.parametrize("action", ["soft", "off"])
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP], ids=lambda n: n.name
)
def test_f26_a_killed_crashed_or_frozen_host_leaves_a_limp_arm_within_1_5_s(
    fresh, under_way, how, action
):
    process = under_way("--guardian", action)
    process.send_signal(how)
    took = seconds_until_limp(fresh)
    print(f"{how.name}, guardian {action}: last servo off after {took:.2f} s")
    assert took < 1.5
    assert fresh.violations() == []
    if how is signal.SIGSTOP:  # a host that comes back finds the guardian gone, and stops
        goals = len(fresh.goals())
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=20)
        assert process.returncode == 1
        assert len(fresh.goals()) - goals <= 6  # at most the tick it was frozen in
        assert_limp_and_unharmed(fresh)
    until = time.monotonic() + 2
    # Or the next program would find a limp arm
    while fresh.registers(2)[Register.TORQUE_LIMIT] != 1000:
        assert time.monotonic() < until


def test_f26_told_to_hold_the_guardian_leaves_the_arm_as_it_is(fresh, under_way):
    process = under_way("--guardian", "hold")
    process.kill()
    time.sleep(1.5)
    assert torque(fresh) == [1] * 6
    fresh.reset()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
def test_f26_without_its_guardian_a_run_stops(fresh, under_way, how):
    process = under_way()
    guardian = guardian_of(process)
    os.kill(guardian, how)
    _, err = process.communicate(timeout=20)
    if how is signal.SIGSTOP:
        with suppress(ProcessLookupError):
            os.kill(guardian, signal.SIGKILL)
    assert process.returncode == 1
    assert "guardian" in err
    assert_limp_and_unharmed(fresh)


def test_a_run_that_ended_leaves_no_guardian(fresh, under_way):
    process = under_way("--seconds", "1", count=5)
    guardian = guardian_of(process)
    process.communicate(timeout=20)
    with pytest.raises(ProcessLookupError):
        os.kill(guardian, 0)


def test_f27_a_port_that_is_unplugged_is_one_error(export_case, tmp_path, start):
    with FaultyArm(cameras=("front", "wrist"), width=160, height=120) as virtual:
        virtual.calibration.save(tmp_path / "my_arm.json")
        (tmp_path / "robot.toml").write_text("[limits]\njump_deg = 360\n")
        process = start(real_port(virtual, export_case("tiny", "fp32"), tmp_path))
        wait_for_goals(virtual, process)
        virtual.hang_up()
        began = time.monotonic()
        _, err = process.communicate(timeout=20)
        print(f"unplugged: the run ended after {time.monotonic() - began:.2f} s")
        assert process.returncode == 1
        assert "lost /dev/pts/" in err and "switch" in err.lower()
        assert "Traceback" not in err


def test_f28_a_port_in_use_is_refused_with_its_holder(fresh, under_way, export_case, tmp_path):
    process = under_way()
    done = run(real_port(fresh, export_case("tiny", "fp32"), tmp_path), tmp_path)
    assert done.returncode == 2
    assert f"process {process.pid}" in done.stderr
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)


def test_f25_ctrl_c_parks_and_then_lets_go(fresh, under_way):
    process = under_way("--seed", "3")
    before = {i: fresh.registers(i)[Register.PRESENT_POSITION] for i in SERVOS}
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "parking the arm" in out
    began_at = {g.id: g.raw for g in fresh.goals()[:6]}
    moved = max(abs(before[i] - began_at[i]) for i in SERVOS)
    left = max(abs(fresh.registers(i)[Register.PRESENT_POSITION] - began_at[i]) for i in SERVOS)
    assert left <= 25 < moved
    assert_limp_and_unharmed(fresh)


def test_f25_a_second_ctrl_c_switches_off_at_once(fresh, under_way):
    process = under_way("--seed", "3")
    process.send_signal(signal.SIGINT)
    time.sleep(0.15)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    seconds_until_limp(fresh, 2.0)
    took = time.monotonic() - began
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "once more switches the motors off at once" in out
    assert took < 0.3
    assert_limp_and_unharmed(fresh)


def test_f25_a_signal_that_is_sent_twice_at_once_parks_all_the_same(fresh, under_way):
    """As a closing shell does with SIGHUP, and `timeout` with SIGTERM."""
    process = under_way("--seed", "3")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    began_at = {g.id: g.raw for g in fresh.goals()[:6]}
    left = max(abs(fresh.registers(i)[Register.PRESENT_POSITION] - began_at[i]) for i in SERVOS)
    assert process.returncode == 130 and left <= 25, out
    assert_limp_and_unharmed(fresh)


def test_a_terminal_that_stalls_does_not_stop_the_loop(fresh, export_case, tmp_path, start):
    """Nobody reads the run's output, as behind a pager or a stalled connection: its pipe fills
    up."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, b"x" * 1000)
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    process = subprocess.Popen(
        line, stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    os.close(write_end)
    try:
        wait_for_goals(fresh, process, count=300)  # some hundred characters a second
        assert moving(fresh)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 130
        assert_limp_and_unharmed(fresh)
    finally:
        process.kill()
        os.close(read_end)


@pytest.mark.parametrize("mode", ["stall", "freeze"])
def test_f24_a_camera_that_goes_wrong_under_way_ends_the_run_parked(fresh, under_way, mode):
    process = under_way()
    fresh.camera("front", mode)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.search(r"camera '(front|wrist)' has had no usable picture for 2 s", err)
    assert {"stall": "stalled", "freeze": "frozen"}[mode] in err
    assert "parking the arm" in out
    assert_limp_and_unharmed(fresh)


def test_f24_a_slow_camera_is_a_warning(fresh, under_way):
    process = under_way("--seconds", "7")
    fresh.camera("front", "slow", 5)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "warning: camera 'front' is slow" in out
    assert_limp_and_unharmed(fresh)


class Terminal:
    """A run with a person at the keyboard: a pseudo-terminal as its standard input."""

    def __init__(self, under_way, *flags):
        self.master, slave = pty.openpty()
        self.process = under_way(*flags, stdin=slave, preexec_fn=lambda: _take_terminal(slave))
        os.close(slave)

    def press(self, keys):
        os.write(self.master, keys)

    def end(self):
        out, err = self.process.communicate(timeout=20)
        os.close(self.master)
        return out, err, self.process.returncode


def _take_terminal(slave):
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def moving(arm, seconds=0.6):
    before = len(arm.goals())
    time.sleep(seconds)
    goals = arm.goals()[before:]
    return any(len({g.raw for g in goals if g.id == servo}) > 1 for servo in SERVOS)


@pytest.mark.parametrize("key", [b" ", b"\x1b"], ids=["space", "escape"])
def test_f38_the_stop_key_holds_until_r_and_then_the_arm_goes_on(fresh, under_way, key):
    person = Terminal(under_way)
    assert moving(fresh)
    person.press(key)
    time.sleep(0.3)
    assert not moving(fresh) and torque(fresh) == [1] * 6
    person.press(b"r")
    time.sleep(0.3)
    assert moving(fresh)
    person.press(b"q")
    out, _, status = person.end()
    assert status == 0
    assert "STOPPED: the operator pressed stop" in out and "going on, slowly" in out
    assert_limp_and_unharmed(fresh)


def test_f38_the_stop_key_pressed_twice_lets_go_at_once(fresh, under_way):
    person = Terminal(under_way)
    for _ in range(10):  # held down: one press
        person.press(b" ")
        time.sleep(0.05)
    person.press(b"\x1b[A\x1b[B")  # and no arrow key is a second one
    time.sleep(0.9)
    assert torque(fresh) == [1] * 6
    person.press(b" ")
    assert seconds_until_limp(fresh, 2.0) < 0.5
    _, err, status = person.end()
    assert status == 1 and "the operator switched the motors off" in err
    assert_limp_and_unharmed(fresh)


def test_f38_the_stop_key_works_while_parking(fresh, under_way):
    person = Terminal(under_way, "--seed", "3")
    person.press(b"q")
    time.sleep(0.2)
    person.press(b" ")
    time.sleep(0.3)
    assert not moving(fresh) and torque(fresh) == [1] * 6
    person.press(b"r")
    _, _, status = person.end()
    assert status == 0
    assert_limp_and_unharmed(fresh)


def test_f38_a_fault_waits_for_the_person_and_latches(fresh, under_way):
    person = Terminal(under_way)
    fresh.inject("error", 3, value=0x04)
    time.sleep(0.5)
    assert not moving(fresh)
    person.press(b"r")  # the servo still reports it
    time.sleep(0.3)
    assert not moving(fresh)
    fresh.inject("error", 3, value=0)
    person.press(b"r")
    time.sleep(0.4)
    assert moving(fresh)
    person.press(b"q")
    out, _, status = person.end()
    assert status == 0 and "elbow_flex (3): reports overheat" in out
    assert_limp_and_unharmed(fresh)


def test_f30_a_servo_that_restarts_ends_a_run_without_a_person(fresh, under_way):
    process = under_way()
    fresh.reboot(4)
    began = time.monotonic()
    _, err = process.communicate(timeout=20)
    print(f"restarted servo: the run ended after {time.monotonic() - began:.2f} s")
    assert process.returncode == 1 and "wrist_flex (4): torque went off by itself" in err
    assert_limp_and_unharmed(fresh)


def test_f32_a_slow_bus_lowers_the_rate_and_says_so(fresh, under_way):
    process = under_way("--seconds", "3", "--fps", "30", count=5)
    for servo in SERVOS:
        fresh.inject("delay", servo, count=-1, value=0.006)
    out, err = process.communicate(timeout=40)
    fresh.reset()
    assert process.returncode == 0, err
    assert "warning: " in out and "missed" in out
