"""The person beside the arm: keys through a real terminal, signals to a real process."""

import os
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from smolvla_edge.runtime.robot.keys import Operator

LIMIT_S = 30.0
# Takes argv[1] as its controlling terminal, as a program of a shell does; prints the keys.
ON_A_TERMINAL = """
import os, signal, sys, time
os.dup2(os.open(sys.argv[1], os.O_RDWR), 0)
sys.stdin = open(0)
from smolvla_edge.runtime.robot.keys import Operator
hung_up = []
signal.signal(signal.SIGHUP, lambda *_: hung_up.append(1))
def tell(*words):
    print(*words, flush=True)
def watch():
    with Operator() as operator:
        tell("present", operator.present)
        while operator.present:
            for key in operator.keys():
                tell(key)
                if key == "quit":
                    return
            time.sleep(0.01)
    tell("gone", bool(hung_up))
"""


class Child:
    """A Python process of its own session; its lines are waited for."""

    def __init__(self, script, *args, **options):
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", script, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
        self.pid, self.said = self.process.pid, b""

    def line(self):
        while b"\n" not in self.said:
            assert select.select([self.process.stdout], [], [], LIMIT_S)[0], "it says nothing"
            more = os.read(self.process.stdout.fileno(), 4096)
            assert more, f"it ended: {self.said.decode()}"
            self.said += more
        line, self.said = self.said.split(b"\n", 1)
        return line.decode()

    def ends(self):
        return self.process.wait(LIMIT_S)


@pytest.fixture
def start():
    children = []

    def child(*args, **options):
        children.append(Child(*args, **options))
        return children[-1]

    yield child
    for one in children:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def terminal():
    """(what the person types into, the name of what the program has)"""
    person, program = os.openpty()
    yield person, os.ttyname(program)
    os.close(program)
    os.close(person)


def modes(terminal):
    fd = os.open(terminal[1], os.O_RDWR | os.O_NOCTTY)
    try:
        return termios.tcgetattr(fd)
    finally:
        os.close(fd)


def test_keys_arrive_singly_and_the_terminal_is_as_before_afterwards(start, terminal):
    before = modes(terminal)
    child = start(ON_A_TERMINAL + "watch()", terminal[1])
    assert child.line() == "present True"
    for typed, key in ((b" ", "stop"), (b"\x1b", "stop"), (b"r", "resume"), (b"\x1b[A", "stop")):
        os.write(terminal[0], typed)
        assert child.line() == key
    os.write(terminal[0], b"xyz\nR\x00r q")  # unknown ones are passed over
    assert [child.line() for _ in range(3)] == ["resume", "stop", "quit"]
    assert child.ends() == 0
    assert modes(terminal) == before


def test_while_keys_are_read_nothing_is_echoed_ctrl_c_is_a_signal_and_ctrl_s_freezes_nothing(
    start, terminal
):
    child = start(ON_A_TERMINAL + "watch()", terminal[1])
    assert child.line() == "present True"
    until = time.monotonic() + LIMIT_S
    while modes(terminal)[3] & termios.ICANON:
        assert time.monotonic() < until
    flags_in, flags_local = modes(terminal)[0], modes(terminal)[3]
    assert not flags_local & termios.ECHO
    assert flags_local & termios.ISIG
    assert not flags_in & termios.IXON
    os.write(terminal[0], b"\x03")
    assert child.ends() != 0


def test_the_terminal_is_as_before_after_an_error_too(start, terminal):
    before = modes(terminal)
    child = start(
        ON_A_TERMINAL + "with Operator() as o:\n    tell(o.present)\n    raise SystemExit(3)",
        terminal[1],
    )
    assert child.line() == "True"
    assert child.ends() == 3
    assert modes(terminal) == before


def test_a_background_job_has_no_keys_and_leaves_the_terminal_alone(start, terminal):
    """Else it would be stopped by the terminal, with the motors on."""
    before = modes(terminal)
    job = """
if os.fork() == 0:
    os.setpgid(0, 0)
    with Operator() as operator:
        tell("present", operator.present, operator.keys())
        tell("waiting")
        time.sleep(0.5)
    os._exit(0)
tell(os.WIFEXITED(os.waitpid(-1, os.WUNTRACED)[1]))
"""
    child = start(ON_A_TERMINAL + job, terminal[1])
    assert child.line() == "present False []"
    assert child.line() == "waiting"
    assert modes(terminal) == before
    assert child.line() == "True"  # it was not stopped
    assert child.ends() == 0


def test_a_terminal_that_does_not_control_this_session_has_keys(start, terminal):
    """As some containers hand it on."""
    script = ON_A_TERMINAL.replace("os.O_RDWR", "os.O_RDWR | os.O_NOCTTY")
    child = start(script + "watch()", terminal[1])
    assert child.line() == "present True"
    os.write(terminal[0], b"q")
    assert child.line() == "quit"
    assert child.ends() == 0


def test_a_terminal_that_goes_away_takes_the_operator_along_and_raises_nothing(start):
    person, program = os.openpty()
    child = start(ON_A_TERMINAL + "watch()", os.ttyname(program))
    assert child.line() == "present True"
    os.close(program)
    os.close(person)
    assert child.line() == "gone True"
    assert child.ends() == 0


def test_leaving_a_terminal_that_is_gone_raises_nothing(start):
    person, program = os.openpty()
    leave = "with Operator() as o:\n    tell(o.present)\n    while not hung_up:\n"
    leave += "        time.sleep(0.01)\ntell('left')"
    child = start(ON_A_TERMINAL + leave, os.ttyname(program))
    assert child.line() == "True"
    os.close(program)
    os.close(person)
    assert child.line() == "left"
    assert child.ends() == 0


def test_a_job_that_nobody_can_bring_back_to_the_foreground_has_lost_its_operator(start, terminal):
    """Reading is an error then."""
    job = """
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
with Operator() as operator:
    other = os.fork()
    if other == 0:
        os.setpgid(0, 0)
        time.sleep(60)
    while os.getpgid(other) != other:
        time.sleep(0.01)
    os.tcsetpgrp(0, other)
    tell("present", operator.present)
    while operator.present:
        operator.keys()
        time.sleep(0.01)
    os.kill(other, signal.SIGKILL)
    tell("gone")
"""
    child = start(ON_A_TERMINAL + job, terminal[1])
    assert child.line() == "present True"
    os.write(terminal[0], b"r")
    assert child.line() == "gone"


def test_without_a_terminal_there_is_no_operator(monkeypatch):
    with Path(os.devnull).open() as file:
        for nobody in (None, file):
            monkeypatch.setattr(sys, "stdin", nobody)
            with Operator() as operator:
                assert not operator.present
                assert operator.keys() == []


# Signals

# Ctrl-C, kill, a closed terminal, Ctrl-\, Ctrl-Z
WAYS_TO_END_IT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
ASKED = """
import signal, sys, time
from smolvla_edge.core import command
command.terminate_like_interrupt()
before = [signal.getsignal(n) for n in command.SIGNALS]
try:
    with command.first_signal_asks(lambda line: print("said", line, flush=True)) as asked:
        print("ready", asked(), flush=True)
        while not asked():
            time.sleep(0.01)
        print("asked", flush=True)
        if "leave" not in sys.argv:
            time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print("restored", before == [signal.getsignal(n) for n in command.SIGNALS], flush=True)
"""


@pytest.mark.parametrize("number", WAYS_TO_END_IT, ids=lambda n: n.name)
def test_the_first_signal_asks_and_the_second_interrupts(start, number):
    """F25."""
    child = start(ASKED)
    assert child.line() == "ready False"
    os.kill(child.pid, number)
    assert child.line() == f"said {number.name}: once more switches the motors off at once"
    assert child.line() == "asked"
    os.kill(child.pid, signal.SIGTERM if number == signal.SIGINT else signal.SIGINT)
    assert child.line() == "interrupted"
    assert child.line() == "restored True"
    assert child.ends() == 0


def test_afterwards_signals_do_what_they_did_before(start):
    child = start(ASKED, "leave")
    assert child.line() == "ready False"
    os.kill(child.pid, signal.SIGTERM)
    assert [child.line() for _ in range(3)][1:] == ["asked", "restored True"]
    assert child.ends() == 0


def test_a_signal_asks_even_where_it_cannot_be_told(start):
    """The terminal is gone, or the signal came in the middle of another line."""
    child = start(ASKED.replace('print("said", line, flush=True)', "1 / 0"))
    assert child.line() == "ready False"
    os.kill(child.pid, signal.SIGHUP)
    assert child.line() == "asked"


def test_a_line_that_nobody_can_read_any_more_ends_nothing(start):
    read, write = os.pipe()
    script = "from smolvla_edge.core.command import say; import os, sys\n"
    script += "sys.stdin.readline()\nfor _ in range(3):\n    say('left is nobody')\nos._exit(7)"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=write)
    os.close(write)
    os.close(read)
    process.communicate(b"\n", LIMIT_S)
    assert process.returncode == 7
