"""One serial port, opened for this process alone, whose every failure is one of our errors."""

from __future__ import annotations

import errno
import fcntl
import select
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import serial

from .errors import BusError, BusLost

# flush and reset_input_buffer of a hung-up port raise termios.error, which is no OSError.
PORT_ERRORS = (serial.SerialException, OSError, termios.error)


class Port:
    """An open serial port. BusError when it cannot be opened, BusLost from any method once it is gone."""

    def __init__(self, path: str, baudrate: int, write_timeout_s: float) -> None:
        self.path = path
        try:
            self._serial: Any = serial.Serial(
                path, baudrate, timeout=0, write_timeout=write_timeout_s, exclusive=True
            )
        except (*PORT_ERRORS, ValueError) as error:
            raise BusError(_open_problem(path, baudrate, error)) from error
        try:
            with self._mapped():
                # exclusive=True is only flock, which plain opens ignore.
                fcntl.ioctl(self._serial.fileno(), termios.TIOCEXCL)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Never raises: a port that is gone counts as closed."""
        with suppress(*PORT_ERRORS):
            # The mark outlives this process while anybody else holds the terminal.
            fcntl.ioctl(self._serial.fileno(), termios.TIOCNXCL)
        with suppress(*PORT_ERRORS):
            self._serial.close()

    def write(self, data: bytes) -> None:
        with self._mapped():
            self._serial.write(data)

    def receive(self, deadline: float) -> bytes:
        """Whatever has arrived, waiting until `deadline` (monotonic) for the first byte; b"" for none."""
        with self._mapped():
            wait_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._serial.fileno()], [], [], wait_s)[0]:
                return b""
            return bytes(self._serial.read(4096))

    def discard_input(self) -> int:
        """Drop what has arrived and not been read; returns how many bytes."""
        with self._mapped():
            waiting = int(self._serial.in_waiting)
            self._serial.reset_input_buffer()
            return waiting

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except PORT_ERRORS as error:
            raise BusLost(
                f"lost {self.path}: {error}. Check the USB cable and the board's power, then start again."
            ) from error


def _open_problem(port: str, baudrate: int, error: BaseException) -> str:
    code = getattr(error, "errno", None) or (error.args[0] if error.args else None)
    if code == errno.ENOENT:
        candidates = sorted(
            str(path)
            for folder, pattern in (("/dev/serial/by-id", "*"), ("/dev", "ttyACM*"), ("/dev", "ttyUSB*"))
            for path in Path(folder).glob(pattern)
        )
        return f"no port {port}. Serial ports here: {', '.join(candidates) or 'none'}. Check the USB cable."
    if code == errno.EACCES:
        return (
            f"no permission to open {port}. Add the user to the group that owns it "
            '(sudo usermod -aG dialout $USER, then log in again), or install a udev rule with TAG+="uaccess".'
        )
    if code in (errno.EBUSY, errno.EAGAIN) or "exclusively lock" in str(error):
        holders = ", ".join(_holders(port)) or "unknown (other users' processes are not visible)"
        return f"{port} is in use. Open in: {holders}. Close that program first."
    return f"cannot open {port} at {baudrate} baud: {error}. Expected the serial port of the servo board."


def _holders(port: str) -> list[str]:
    """Processes that have `port` open, as far as /proc lets this user see."""
    target = Path(port).resolve()
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with suppress(OSError):
            if any(link.resolve() == target for link in (process / "fd").iterdir()):
                found.append(f"{(process / 'comm').read_text().strip()} (process {process.name})")
    return found
