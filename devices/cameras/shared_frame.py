"""One picture in a file, replaced as a whole by the process that draws it: time, number, height, width, RGB bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.errors import CameraError

HEADER = struct.Struct("<dIII")


def write_frame(path: Path, image: NDArray[np.uint8], time_s: float, number: int) -> None:
    """Publish `image`, uint8 RGB [height, width, 3], taken at `time_s` (monotonic)."""
    beside = path.with_suffix(".new")
    beside.write_bytes(HEADER.pack(time_s, number, *image.shape[:2]) + image.tobytes())
    beside.replace(path)


def read_frame(path: Path) -> tuple[NDArray[np.uint8], float, int]:
    """The newest picture, its time and its number. CameraError when there is none."""
    try:
        data = path.read_bytes()
        time_s, number, height, width = HEADER.unpack_from(data)
        return (
            np.frombuffer(data, np.uint8, offset=HEADER.size).reshape(height, width, 3),
            time_s,
            number,
        )
    except OSError as error:
        raise CameraError(f"cannot open {path}: {error}. Is the virtual arm running?") from error
    except (struct.error, ValueError) as error:
        raise CameraError(
            f"{path} is no shared picture. Give the path a virtual arm has named."
        ) from error
