"""Pictures and videos in files, as cameras. Each has its own size."""

from __future__ import annotations

import time

import cv2

from ...core.errors import CameraError
from .camera import Camera, Frame
from .opencv import capturing, to_rgb

# The rate of a video that tells none, and the highest rate that is believed: some files tell their
# time base.
VIDEO_FPS, HIGHEST_VIDEO_FPS = 30.0, 240.0


class VideoFileCamera(Camera):
    """A video file as a camera, with its own size and rate. It repeats for ever."""

    has_noise = False
    advice = "Take another file."

    def _read(self) -> str:
        due_s = time.monotonic()
        with capturing() as capture:
            while not self._stopping.is_set():
                capture.open(self._source)  # again at its end: not every format can seek
                fps = capture.get(cv2.CAP_PROP_FPS)
                self.asked_fps = fps if 0 < fps <= HIGHEST_VIDEO_FPS else VIDEO_FPS
                ok, image = capture.read()
                if not ok:
                    return "no picture and no video that OpenCV reads"
                while ok and not self._stopping.wait(max(0.0, due_s - time.monotonic())):
                    self._show(to_rgb(image), due_s)
                    # A late picture delays all others: there is no burst to catch up.
                    due_s = max(due_s + 1 / self.asked_fps, time.monotonic())
                    ok, image = capture.read()
        return "closed"


class ImageFileCamera(Camera):
    """A still picture as a camera. It never gets old: the time of every picture is now."""

    has_noise = False

    def open(self) -> None:
        bgr = cv2.imread(self._source, cv2.IMREAD_COLOR)
        if bgr is None:
            raise CameraError(
                f"camera {self.name}: {self._source} is no picture that OpenCV reads."
            )
        self._show(to_rgb(bgr), time.monotonic())

    def latest(self) -> Frame:
        self._show(super().latest().image, time.monotonic())
        return super().latest()
