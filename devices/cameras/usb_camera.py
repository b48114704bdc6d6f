"""/dev/video*: cameras behind the kernel's V4L2 drivers, mostly USB webcams, through OpenCV."""

from __future__ import annotations

import os
import time
from pathlib import Path

import cv2

from .camera import Camera
from .opencv import capturing, to_rgb

# Seconds that OpenCV waits for a stalled V4L2 device, 10 if not set. OpenCV reads it once, before
# the first capture.
SELECT_TIMEOUT_VARIABLE, SELECT_TIMEOUT_S = "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", "2"
FAILED_READS_LIMIT = 10
FAILED_READ_PAUSE_S = 0.02
STAMP_LIMIT_S = 1.0  # a driver's stamp that is older is of another clock


class UsbCamera(Camera):
    """source: a device path, or a video file, which OpenCV opens like a device.

    Pictures of another size than WIDTH x HEIGHT are refused.
    """

    advice = "Check its cable, and whether it shares a USB port with another camera."

    def _read(self) -> str:
        if not Path(self._source).exists():
            present = ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "none"
            return f"no {self._source}. Video devices here: {present}."
        os.environ.setdefault(SELECT_TIMEOUT_VARIABLE, SELECT_TIMEOUT_S)
        with capturing() as capture:
            is_device = self._source.startswith("/dev/")
            if not capture.open(self._source, cv2.CAP_V4L2 if is_device else cv2.CAP_ANY):
                return (
                    "cannot be opened. Is it the device's first node, and free of other programs?"
                )
            if is_device:
                # MJPG first: uncompressed pictures take the USB bandwidth of other cameras. Some
                # cameras accept the rate only after the size.
                capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
                capture.set(cv2.CAP_PROP_FRAME_WIDTH, self._width)
                capture.set(cv2.CAP_PROP_FRAME_HEIGHT, self._height)
                capture.set(cv2.CAP_PROP_FPS, self.asked_fps)
                # A queue of one picture, so that a read gives the newest.
                capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            failed = 0
            while failed < FAILED_READS_LIMIT:
                ok, image = capture.read()
                failed = 0 if ok else failed + 1
                if ok:
                    height, width = image.shape[:2]
                    if self._frame is None and (width, height) != (self._width, self._height):
                        return (
                            f"gives {width} x {height} pictures, expected "
                            f"{self._width} x {self._height}. Use a camera that has this size"
                        )
                    self._show(to_rgb(image), _taken_s(capture, time.monotonic()))
                if self._stopping.wait(0.0 if ok else FAILED_READ_PAUSE_S):
                    return "closed"
            return f"{failed} reads in a row failed. Check its cable"


def _taken_s(capture: cv2.VideoCapture, now_s: float) -> float:
    """When the driver took the last picture, monotonic seconds.

    V4L2 stamps with the monotonic clock, and OpenCV passes the stamp on (opencv/opencv#740).
    Without a stamp: now, which leaves out exposure, transfer and decoding.
    """
    taken_s = 1e-3 * capture.get(cv2.CAP_PROP_POS_MSEC)
    return taken_s if 0.0 <= now_s - taken_s <= STAMP_LIMIT_S else now_s
