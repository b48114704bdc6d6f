"""The keys of the person beside the arm. Only where standard input is a terminal."""

import os
import re
import select
import sys
import termios
import tty
from contextlib import suppress
from typing import Any, Literal

Key = Literal["stop", "resume", "quit"]
KEYS: dict[bytes, Key] = {b" ": "stop", b"\x1b": "stop", b"r": "resume", b"q": "quit"}
HELP = "space or Esc: stop and hold (again: motors off), r: go on, q or Ctrl-C: park and end"


class Operator:
    """Reads single keys, without waiting; the terminal is as before afterwards. `present`: whether
    there are any."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._saved: Any = None

    @property
    def present(self) -> bool:
        return self._saved is not None

    def __enter__(self) -> "Operator":
        # A background job may not touch the terminal: it would be stopped, motors on.
        if self._fd is not None and _is_foreground(self._fd):
            self._saved = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)  # Ctrl-C stays a signal
            mode = termios.tcgetattr(self._fd)
            mode[
                0
            ] &= ~termios.IXON  # Ctrl-S would freeze the control loop in its next line of output
            termios.tcsetattr(self._fd, termios.TCSANOW, mode)
        return self

    def __exit__(self, *error: object) -> None:
        if self._fd is not None and self._saved is not None:
            with suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
            self._saved = None

    def keys(self) -> list[Key]:
        """What was pressed since the last call, oldest first; unknown keys are passed over."""
        if self._fd is None or not self.present or not select.select([self._fd], [], [], 0)[0]:
            return []
        try:
            data = os.read(self._fd, 64)
        except OSError:
            data = b""
        if not data:  # the terminal is gone, and the operator with it
            self._saved = None
        # An arrow key sends Esc and more: one key.
        pressed = re.findall(rb"\x1b(?:\[[0-9;]*.|O.)?|.", data, re.DOTALL)
        return [KEYS[key[:1]] for key in pressed if key[:1] in KEYS]


def _is_foreground(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not the terminal that controls this process: it stops nobody
        return True
