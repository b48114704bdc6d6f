"""sim:<path>: one picture in a file, which the process of the virtual arm replaces as a whole.

The file holds time, number, height, width, then the RGB bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.errors import CameraError
from .camera import Camera, Frame

HEADER = struct.Struct("<dIII")


def write_frame(path: Path, image: NDArray[np.uint8], time_s: float, number: int) -> None:
    """Publish `image`, uint8 RGB [height, width, 3], taken at `time_s` (monotonic)."""
    beside = path.with_suffix(".new")
    beside.write_bytes(HEADER.pack(time_s, number, *image.shape[:2]) + image.tobytes())
    beside.replace(path)


def read_frame(path: Path) -> Frame:
    """The newest picture. CameraError when there is none."""
    try:
        data = path.read_bytes()
        time_s, number, height, width = HEADER.unpack_from(data)
        pixels = np.frombuffer(data, np.uint8, offset=HEADER.size)
        return Frame(pixels.reshape(height, width, 3), time_s, number)
    except OSError as error:
        raise CameraError(f"cannot open {path}: {error}. Is the virtual arm running?") from error
    except (struct.error, ValueError) as error:
        raise CameraError(
            f"{path} is no shared picture. Give the path that a virtual arm printed."
        ) from error


class SharedFrameCamera(Camera):
    """A camera of the virtual arm. source: sim:<path>."""

    def open(self) -> None:
        self.latest()

    def latest(self) -> Frame:
        frame = read_frame(Path(self._source.removeprefix("sim:")))
        if self._frame is None or frame.number != self._frame.number:
            self._frame = frame
        return self._frame
