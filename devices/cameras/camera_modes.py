"""The video nodes of this machine and the modes of their drivers, read without a camera start.

Source: linux/videodev2.h. A camera has several nodes. Some give no pictures, only metadata.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .camera import HEIGHT, WIDTH

QUERYCAP, ENUM_FMT, ENUM_FRAMESIZES, ENUM_FRAMEINTERVALS = (
    0x80685600,
    0xC0405602,
    0xC02C564A,
    0xC034564B,
)
GROUP_ADVICE = "Add the user to the group video (sudo usermod -aG video $USER, then log in again)"
CAP_VIDEO_CAPTURE, CAP_DEVICE_CAPS = 0x1, 0x80000000
BUF_TYPE_VIDEO_CAPTURE = DISCRETE = 1


@dataclass(frozen=True)
class Mode:
    """fps: the highest rate; 0 if the driver does not tell."""

    format: str
    width: int
    height: int
    fps: float

    def __str__(self) -> str:
        return f"{self.format} {self.width}x{self.height}@{self.fps:.3g}"


@dataclass(frozen=True)
class Node:
    """One /dev/video*.

    link: its path by USB port, which stays the same, else the node's path. problem: why it cannot
    be used, "" if it can.
    """

    path: str
    link: str
    card: str
    modes: tuple[Mode, ...]
    problem: str


def read_nodes(dev: Path = Path("/dev")) -> list[Node]:
    """Every video node, in order of their numbers. Never raises."""
    links = {link.resolve(): link for link in sorted(dev.glob("v4l/by-path/*"), reverse=True)}
    paths = sorted(dev.glob("video*"), key=lambda path: (len(path.name), path.name))
    return [_node(path, str(links.get(path.resolve(), path))) for path in paths]


def _node(path: Path, link: str) -> Node:
    card = ""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError as e:
        problem = f"cannot be opened: {e.strerror}"
        if isinstance(e, PermissionError):
            problem += f". {GROUP_ADVICE}"
        return Node(str(path), link, card, (), problem)
    try:
        answer = _ask(fd, QUERYCAP, bytes(104))
        card = answer[16:48].split(b"\0")[0].decode(errors="replace")
        whole, own = struct.unpack_from("=II", answer, 84)
        if not (own if whole & CAP_DEVICE_CAPS else whole) & CAP_VIDEO_CAPTURE:
            return Node(str(path), link, card, (), "gives no pictures: not the camera's first node")
        return Node(str(path), link, card, tuple(_modes(fd)), "")
    except OSError as e:
        return Node(str(path), link, card, (), f"does not answer as a video device: {e.strerror}")
    finally:
        os.close(fd)


def _ask(fd: int, request: int, data: bytes) -> bytes:
    return fcntl.ioctl(fd, request, data)


def _each(fd: int, request: int, head: str, *fields: int) -> Iterator[bytes]:
    """Answers to an enumeration, whose structs begin with an index and `fields`."""
    for index in range(1000):
        size = request >> 16 & 0x3FFF
        try:
            yield _ask(fd, request, struct.pack(head, index, *fields).ljust(size, b"\0"))
        except OSError:
            return


def _modes(fd: int) -> Iterator[Mode]:
    for answer in _each(fd, ENUM_FMT, "=II", BUF_TYPE_VIDEO_CAPTURE):
        fourcc = answer[44:48]
        (number,) = struct.unpack("=I", fourcc)
        for sizes in _each(fd, ENUM_FRAMESIZES, "=II", number):
            kind, *values = struct.unpack_from("=7I", sizes, 8)
            found = [(values[0], values[1])]
            if kind != DISCRETE:  # a range
                low_width, high_width, _, low_height, high_height, _ = values
                found = [(high_width, high_height)]
                if low_width <= WIDTH <= high_width and low_height <= HEIGHT <= high_height:
                    found.insert(0, (WIDTH, HEIGHT))
            for width, height in found:
                yield Mode(
                    fourcc.decode(errors="replace").strip(),
                    width,
                    height,
                    _fps(fd, number, width, height),
                )
            if kind != DISCRETE:
                break


def _fps(fd: int, fourcc: int, width: int, height: int) -> float:
    best = 0.0
    for answer in _each(fd, ENUM_FRAMEINTERVALS, "=IIII", fourcc, width, height):
        # If the driver gives a range of intervals, this is the shortest.
        kind, numerator, denominator = struct.unpack_from("=3I", answer, 16)
        best = max(best, denominator / max(1, numerator))
        if kind != DISCRETE:
            break
    return best
