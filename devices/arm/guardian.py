"""A second process that takes the arm to a safe state when its host dies or freezes.

A servo holds its last goal for ever, and no register of it is a watchdog. So the host sends this process one
byte per control tick and gets each back:

    pipe closes without a goodbye    ──▶  dead     ┐  a host that comes back is told at its next tick;
    no byte for timeout_s            ──▶  frozen   ┘  the action; one line on stderr; exit status 3
    goodbye                          ──▶  exit status 0

It inherits the host's open port and touches it only then. To open it by itself, it would wait for ever for the
lock of a frozen host.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from subprocess import PIPE, Popen, TimeoutExpired

from ...core.errors import DeviceError, GuardianLost
from ...core.process import first_line, module_command
from ..bus.bus import FeetechBus
from ..bus.port import Port
from ..bus.sts3215 import Register
from . import power
from .calibration import IDS

READY, BEAT, TAKEN, GOODBYE = b"ready\n", b".", b"t", b"q"
ACTED = 3
START_LIMIT_S = 10.0
ECHO_LIMIT_S = 1.0
# Longer than any action takes: killed halfway, it would leave servos on.
DISMISS_LIMIT_S = 2.0
ROUNDS = 3
REPLY_MARGIN_S = 0.015


class GuardianAction(Enum):
    """What happens to the arm when the host is gone."""

    HOLD = "hold"  # nothing: the servos keep their last goal
    SOFT = "soft"  # the arm sinks, then off
    OFF = "off"  # off at once: the arm falls


class Guardian:
    """Starts the process and returns once it watches; GuardianLost when it does not start.

    port_fd: the open port, kept open by the host until `dismiss`. path: its name, for messages. limits:
    what Torque_Limit is to be afterwards, {id: 0.1 %}. The time counts from the first `beat`; from then on the
    host beats more often than every `timeout_s`.
    """

    def __init__(
        self,
        port_fd: int,
        path: str,
        action: GuardianAction,
        limits: Mapping[int, int],
        timeout_s: float = 0.8,
    ) -> None:
        self._action, self._timeout_s = action, timeout_s
        self._unanswered_s: float | None = None
        arguments = json.dumps((port_fd, path, action.value, timeout_s, [*limits.items()]))
        command = module_command("smolvla_edge.devices.arm.guardian", arguments)
        # A session of its own: Ctrl-C is for the host.
        self._process = Popen(
            command, stdin=PIPE, stdout=PIPE, bufsize=0, pass_fds=(port_fd,), start_new_session=True
        )
        self.pid = self._process.pid
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        try:
            if first_line(self._process, START_LIMIT_S) != READY:
                raise GuardianLost(
                    f"the guardian of {path} did not start within {START_LIMIT_S:.0f} s. Try again."
                )
        except BaseException:
            self._end()
            raise
        for pipe in (self._to, self._from):
            os.set_blocking(pipe.fileno(), False)

    def beat(self) -> None:
        """Once per control tick; does not block. GuardianLost when nobody watches any more: stop the arm."""
        now_s = time.monotonic()
        heard = b"" if self._from.closed else self._from.read(65536)
        if heard is not None:  # not that there is nothing yet
            if TAKEN in heard:
                raise GuardianLost(
                    f"this program stood still for more than {self._timeout_s} s, so the guardian has taken the arm "
                    f"over (action: {self._action.value}). Start again."
                )
            if not heard:
                raise GuardianLost(
                    "the guardian process has ended; nobody would stop the arm in need. Start again."
                )
            self._unanswered_s = None
        if self._unanswered_s is None:
            self._unanswered_s = now_s
        elif now_s - self._unanswered_s > ECHO_LIMIT_S:
            raise GuardianLost(
                f"the guardian process has not answered for {ECHO_LIMIT_S} s. Start again."
            )
        # What goes wrong here is told by the next read.
        with suppress(OSError):
            self._to.write(BEAT)

    def dismiss(self) -> None:
        """Say goodbye; after it the port may be closed. May be called again, and when the guardian is gone."""
        with suppress(OSError, ValueError):
            self._to.write(GOODBYE)
        self._end(DISMISS_LIMIT_S)

    def _end(self, limit_s: float = 0.0) -> None:
        try:
            self._process.wait(limit_s)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._to.close()
        self._from.close()


def main() -> int:
    """The process. Argument: JSON of the port (file descriptor, path), action, timeout in seconds, torque limits."""
    # SIGTERM too: a service manager sends it to all, and the host still has to park.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    fd, path, action, timeout_s, limits = json.loads(sys.argv[1])
    os.write(1, READY)
    reason = _watch(timeout_s)
    if not reason:
        return 0
    with suppress(OSError):
        os.write(1, TAKEN)
    try:
        done = _act(fd, path, GuardianAction(action), dict(limits))
    except DeviceError as error:
        done = f"the port failed ({error}). The servos may still be energised: switch the power off"
    with suppress(OSError):
        os.write(2, f"guardian of {path}: {reason}; {done}.\n".encode())
    return ACTED


def _watch(timeout_s: float) -> str:
    """Why the host counts as gone; empty when it said goodbye."""
    wait_s = None
    while select.select([0], [], [], wait_s)[0]:
        data = os.read(0, 4096)
        if GOODBYE in data:
            return ""
        if not data:
            return "the program has ended without switching the arm off"
        wait_s = timeout_s
        with suppress(OSError):
            os.write(1, data)
    return f"no heartbeat for {timeout_s} s"


def _act(fd: int, path: str, action: GuardianAction, limits: dict[int, int]) -> str:
    """Do it; returns what came of it."""
    if action is GuardianAction.HOLD:
        Port(path, fd).close()
        return "the arm holds its last goal, energised. Switch its power off by hand"
    with FeetechBus(path, reply_margin_s=REPLY_MARGIN_S, fd=fd) as bus:
        if action is GuardianAction.SOFT:
            with suppress(DeviceError):  # off in any case
                known = bus.sync_read(IDS, Register.TORQUE_LIMIT)
                told = {i: block.values[Register.TORQUE_LIMIT] for i, block in known.items()}
                power.sink(
                    bus, dict.fromkeys(IDS, min(limits.values())) | told, limits, lambda: None
                )
        for _ in range(ROUNDS):
            result = power.switch_off(bus)
            if not result.unconfirmed:
                return "every servo is switched off"
        return result.message
