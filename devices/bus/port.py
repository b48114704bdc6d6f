"""One serial port, opened for this process alone, whose every failure is one of our errors; and which to open."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import termios
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import serial
from serial.tools import list_ports

from ...core.errors import BusError, BusLost

# A hung-up port raises termios.error too, which is no OSError, and one that another thread closes ValueError.
PORT_ERRORS = (OSError, termios.error, ValueError)
BAUDRATE, WRITE_TIMEOUT_S = 1_000_000, 0.1
# By (vendor, product) id: the servo boards of Waveshare and Seeed carry the first, older adapters the second.
ADAPTERS = {(0x1A86, 0x55D3): "CH343", (0x1A86, 0x7523): "CH340"}
BY_ID = Path("/dev/serial/by-id")


def find_port() -> tuple[str, str]:
    """The port of the one servo adapter here, and a sentence that says why; BusError for none or several."""
    ports = list_ports.comports()
    found = [port for port in ports if (port.vid, port.pid) in ADAPTERS]
    if len(found) != 1:
        raise BusError(
            f"expected one USB servo adapter ({' or '.join(ADAPTERS.values())}), found {len(found) or 'none'}. "
            f"Serial ports here: {_listing(ports)}. Give one with --port."
            + (
                ""
                if found
                else " If it disappears right after it was plugged in, remove the package brltty."
            )
        )
    path = lasting_path(found[0])
    return (
        path,
        f"port {path}: the only servo adapter here, a {ADAPTERS[found[0].vid, found[0].pid]}.",
    )


class Port:
    """An open serial port. BusError when it cannot be opened, BusLost from any method once it is gone.

    fd: the port, opened by another process of ours.
    """

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path = path
        if fd is not None:
            self._fd, self._close = fd, partial(os.close, fd)
            return
        try:
            opened: Any = serial.Serial(path, BAUDRATE, exclusive=True)
        except PORT_ERRORS as error:
            raise BusError(_open_problem(path, error)) from error
        self._fd, self._close = opened.fileno(), opened.close
        try:
            with self._mapped():
                # exclusive=True is only flock, which plain opens ignore.
                fcntl.ioctl(self._fd, termios.TIOCEXCL)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Never raises: a port that is gone counts as closed."""
        fd, self._fd = self._fd, -1
        with suppress(*PORT_ERRORS):
            # The mark outlives this process while anybody else holds the terminal.
            fcntl.ioctl(fd, termios.TIOCNXCL)
        with suppress(*PORT_ERRORS):
            self._close()

    def write(self, data: bytes) -> None:
        with self._mapped():
            while data:
                if not select.select([], [self._fd], [], WRITE_TIMEOUT_S)[1]:
                    raise OSError("it takes no more bytes")
                data = data[os.write(self._fd, data) :]

    def receive(self, deadline: float) -> bytes:
        """Whatever has arrived, waiting until `deadline` (monotonic) for the first byte; b"" for none."""
        with self._mapped():
            if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return b""
            data = os.read(self._fd, 4096)
            if not data:
                raise OSError("it gives no more bytes")
            return data

    def waiting(self) -> bool:
        """Whether anything has arrived and not been read."""
        with self._mapped():
            return bool(select.select([self._fd], [], [], 0)[0])

    def flush(self) -> None:
        """Throw away what is still to be sent and to be read."""
        with self._mapped():
            termios.tcflush(self._fd, termios.TCIOFLUSH)

    def fileno(self) -> int:
        return self._fd

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except PORT_ERRORS as error:
            raise BusLost(
                f"lost {self.path}: {error}. Check the USB cable and the board's power, then start again."
            ) from error


def _open_problem(port: str, error: BaseException) -> str:
    code = getattr(error, "errno", None) or (error.args[0] if error.args else None)
    if code == errno.ENOENT:
        return f"no port {port}. Serial ports here: {_listing(list_ports.comports())}. Check the USB cable."
    if code == errno.EACCES:
        return (
            f"no permission to open {port}. Add the user to the group that owns it "
            '(sudo usermod -aG dialout $USER, then log in again), or install a udev rule with TAG+="uaccess".'
        )
    if code in (errno.EBUSY, errno.EAGAIN) or "exclusively lock" in str(error):
        holders = ", ".join(_holders(port)) or "unknown (other users' processes are not visible)"
        return f"{port} is in use. Open in: {holders}. Close that program first."
    return f"cannot open {port} at {BAUDRATE} baud: {error}. Expected the serial port of the servo board."


def lasting_path(port: Any) -> str:
    """Of one that pyserial lists: the link that keeps its name when devices are renumbered, else the device."""
    links = (
        str(link)
        for link in sorted(BY_ID.glob("*"))
        if link.resolve() == Path(port.device).resolve()
    )
    return next(links, str(port.device))


def _listing(ports: Iterable[Any]) -> str:
    return (
        ", ".join(sorted(f"{lasting_path(port)} ({port.description})" for port in ports)) or "none"
    )


def _holders(port: str) -> list[str]:
    """Processes that have `port` open, as far as /proc lets this user see."""
    target = Path(port).resolve()
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with suppress(OSError):
            if any(link.resolve() == target for link in (process / "fd").iterdir()):
                found.append(f"{(process / 'comm').read_text().strip()} (process {process.name})")
    return found
