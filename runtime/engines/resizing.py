"""Images of any size -> the prefix graph's square images: on the host, and a device's check."""

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ...core.errors import BackendError

RESIZE_TOLERANCE = 1e-5  # of pixels in [-1, 1]


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """-> height and width in pixels that keep the aspect ratio and fit into `size`."""
    ratio = max(width / size, height / size)
    return int(height / ratio), int(width / ratio)


def resize_with_pad(image: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """uint8 [H, W, 3] -> float32 [3, size, size] in [-1, 1].

    Bilinear, with the aspect ratio kept and -1 as padding on the left and at the top. LeRobot's
    resize_with_pad (lerobot 0.4.4, modeling_smolvla.py) uses F.interpolate without align_corners or
    antialias. OpenCV's INTER_LINEAR computes the same on float32.
    """
    height, width = resized_shape(image.shape[0], image.shape[1], size)
    pixels = image.astype(np.float32) / np.float32(255)
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    out = np.full((3, size, size), -1, np.float32)
    out[:, size - height :, size - width :] = pixels.transpose(2, 0, 1) * np.float32(
        2
    ) - np.float32(1)
    return out


def require_resized(got: NDArray[Any], frame: NDArray[Any]) -> None:
    """Compare a device's image of `frame` with the host's, [3, size, size] in [-1, 1].

    Raises BackendError where they differ.
    """
    worst = float(np.abs(got - resize_with_pad(frame, got.shape[-1])).max())
    if not worst <= RESIZE_TOLERANCE:
        raise BackendError(
            f"the device resizes frames of {frame.shape[1]} x {frame.shape[0]} otherwise than the "
            f"host, by {worst:.1e} (at most {RESIZE_TOLERANCE:.0e}): try another --backend"
        )


@lru_cache(maxsize=8)
def resampling(height: int, width: int, size: int) -> dict[str, NDArray[Any]]:
    """The inputs of camera.onnx beside a frame [height, width, 3], to compute `resize_with_pad`.

    rows, columns: int32 [2, size], the two source rows or columns of each target row or column.
    row_weights: float32 [2, size, 1, 1], column_weights: [1, 2, size, 1], their shares, 0 in the
    padding.
    """
    rows, row_weights = _bilinear(height, resized_shape(height, width, size)[0], size)
    columns, column_weights = _bilinear(width, resized_shape(height, width, size)[1], size)
    return {
        "rows": rows,
        "row_weights": row_weights[:, :, None, None],
        "columns": columns,
        "column_weights": column_weights[None, :, :, None],
    }


def _bilinear(source: int, target: int, size: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Neighbours and weights, [2, size], of the last `target` of `size` pixels."""
    # Pixel centres are at halves.
    at = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    first = np.minimum(at.astype(np.int32), source - 1)
    indices, weights = np.zeros((2, size), np.int32), np.zeros((2, size), np.float32)
    indices[:, size - target :] = first, np.minimum(first + 1, source - 1)
    weights[:, size - target :] = 1 - (at - first), at - first
    return indices, weights
