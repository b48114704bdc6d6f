"""One serial port, opened for this process alone; and which port to open.

Every failure is an error of ours.
"""

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

# A hung-up port also raises termios.error, which is no OSError. A port that another thread closes
# raises ValueError.
PORT_ERRORS = (OSError, termios.error, ValueError)
BAUDRATE, WRITE_TIMEOUT_S = 1_000_000, 0.1
# (vendor, product) id. Boards of Waveshare and Seeed have the first, older adapters the second.
ADAPTERS = {(0x1A86, 0x55D3): "CH343", (0x1A86, 0x7523): "CH340"}
BRLTTY_HINT = " If it disappears right after you plug it in, remove the package brltty."
BY_ID = Path("/dev/serial/by-id")


def find_port() -> tuple[str, str]:
    """The port of the only servo adapter, and the reason. BusError for none or several."""
    ports = list_ports.comports()
    found = [port for port in ports if (port.vid, port.pid) in ADAPTERS]
    if len(found) != 1:
        raise BusError(
            f"expected one USB servo adapter ({' or '.join(ADAPTERS.values())}), "
            f"found {len(found) or 'none'}. Serial ports here: {_listing(ports)}. "
            f"Give one with --port.{'' if found else BRLTTY_HINT}"
        )
    path = lasting_path(found[0])
    return (
        path,
        f"port {path}: the only servo adapter here, a {ADAPTERS[found[0].vid, found[0].pid]}.",
    )


class Port:
    """An open serial port. BusError if it cannot be opened, BusLost when it is gone.

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
                # exclusive=True is only flock, which a plain open ignores.
                fcntl.ioctl(self._fd, termios.TIOCEXCL)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Never raises: a port that is gone counts as closed."""
        fd, self._fd = self._fd, -1
        with suppress(*PORT_ERRORS):
            # The mark stays while another process has the terminal open.
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
        """Bytes that have arrived, or b"". Waits for the first until `deadline` (monotonic)."""
        with self._mapped():
            if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return b""
            data = os.read(self._fd, 4096)
            if not data:
                raise OSError("it gives no more bytes")
            return data

    def waiting(self) -> bool:
        """Whether unread bytes have arrived."""
        with self._mapped():
            return bool(select.select([self._fd], [], [], 0)[0])

    def flush(self) -> None:
        """Discard the bytes that are not sent and those that are not read."""
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
                f"lost {self.path}: {error}. Check the USB cable and the board's power, "
                "then start again."
            ) from error


def _open_problem(port: str, error: BaseException) -> str:
    code = getattr(error, "errno", None) or (error.args[0] if error.args else None)
    if code == errno.ENOENT:
        here = _listing(list_ports.comports())
        return f"no port {port}. Serial ports here: {here}. Check the USB cable."
    if code == errno.EACCES:
        return (
            f"no permission to open {port}. Add the user to the group that owns it "
            "(sudo usermod -aG dialout $USER, then log in again), or install a udev rule with "
            'TAG+="uaccess".'
        )
    if code in (errno.EBUSY, errno.EAGAIN) or "exclusively lock" in str(error):
        holders = ", ".join(_holders(port)) or "unknown (other users' processes are not visible)"
        return f"{port} is in use. Open in: {holders}. Close that program first."
    return (
        f"cannot open {port} at {BAUDRATE} baud: {error}. "
        "Expected the serial port of the servo board."
    )


def lasting_path(port: Any) -> str:
    """The link of a listed port, which keeps its name after a renumbering, else its device."""
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
