"""OpenCV at the border: captures that are released, errors as OSError, pictures as RGB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray


@contextmanager
def capturing() -> Iterator[cv2.VideoCapture]:
    """A capture that is released at the end. An error of OpenCV becomes an OSError."""
    capture = cv2.VideoCapture()
    try:
        yield capture
    except cv2.error as error:
        raise OSError(str(error)) from error
    finally:
        capture.release()


def to_rgb(bgr: cv2.typing.MatLike) -> NDArray[np.uint8]:
    """A picture of OpenCV -> uint8 RGB [height, width, 3]."""
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
