"""One picture in a memory-mapped file, written by one process and read by others.

Layout: magic, width, height, sequence, time, then width x height x 3 bytes RGB from byte 64. The sequence is
odd while the writer is at work; a reader keeps a picture only when it saw one even number before and after.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import CameraError

MAGIC = b"SVLAFRM1"
HEADER = struct.Struct("<8sII")
SEQUENCE = struct.Struct("<Q")
TIME = struct.Struct("<d")
SEQUENCE_AT, TIME_AT, PIXELS_AT = 16, 24, 64
# A writer is inside a picture for about a millisecond.
READ_LIMIT_S = 0.2


class SharedFrameWriter:
    """Creates the file, zero pictures long."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        with path.open("w+b") as file:
            file.truncate(PIXELS_AT + width * height * 3)
            self._map = mmap.mmap(file.fileno(), 0)
        self._map[: HEADER.size] = HEADER.pack(MAGIC, width, height)
        self._shape = (height, width, 3)
        self._sequence = 0

    def write(self, image: NDArray[np.uint8], time_s: float) -> None:
        """Publish `image`, uint8 RGB [height, width, 3], taken at `time_s` (monotonic)."""
        assert image.shape == self._shape and image.dtype == np.uint8, f"{image.dtype} {image.shape}"
        self._set_sequence(self._sequence + 1)
        self._map[TIME_AT : TIME_AT + TIME.size] = TIME.pack(time_s)
        self._map[PIXELS_AT:] = image.tobytes()
        self._set_sequence(self._sequence + 1)

    def close(self) -> None:
        self._map.close()

    def _set_sequence(self, value: int) -> None:
        self._sequence = value
        self._map[SEQUENCE_AT : SEQUENCE_AT + SEQUENCE.size] = SEQUENCE.pack(value)


class SharedFrameReader:
    """Opens a file made by SharedFrameWriter; CameraError when there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._newest: tuple[NDArray[np.uint8], float, int] | None = None
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(HEADER.size)
                magic, self._width, self._height = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
                if magic != MAGIC or size != PIXELS_AT + self._width * self._height * 3:
                    raise CameraError(f"{path} is no shared picture. Give the path a virtual arm has named.")
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise CameraError(f"cannot open {path}: {error}. Is the virtual arm running?") from error

    def read(self) -> tuple[NDArray[np.uint8], float, int] | None:
        """Newest whole picture, uint8 RGB [height, width, 3], its monotonic time and its number; None before the
        first. Only the first is waited for; a picture that was read before is the same array again."""
        deadline = time.monotonic() + READ_LIMIT_S
        while True:
            before = self._sequence()
            number, writing = divmod(before, 2)
            if number == (self._newest[2] if self._newest else 0) and not writing:
                return self._newest
            if not writing:
                (time_s,) = TIME.unpack_from(self._map, TIME_AT)
                pixels = np.frombuffer(self._map, np.uint8, offset=PIXELS_AT).copy()
                if self._sequence() == before:
                    self._newest = pixels.reshape(self._height, self._width, 3), time_s, number
                    return self._newest
            if self._newest:  # a writer that died in the middle shows by the age
                return self._newest
            if time.monotonic() > deadline:
                raise CameraError(f"{self._path} holds a half-written picture. Restart the virtual arm.")
            time.sleep(0.0005)

    def close(self) -> None:
        self._map.close()

    def _sequence(self) -> int:
        return int(SEQUENCE.unpack_from(self._map, SEQUENCE_AT)[0])
