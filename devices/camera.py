"""Cameras, all with one face: the newest picture and when it was taken.

Nobody waits for a camera: `latest` returns at once, and a camera that stalls shows by the age of its picture.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import CameraError
from .shared_frame import read_frame

# Seconds OpenCV waits for a stalled V4L2 device, 10 unless told; it looks once, before the first capture.
SELECT_TIMEOUT_VARIABLE, SELECT_TIMEOUT_S = "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", "2"
OPEN_LIMIT_S = 8.0
STOP_LIMIT_S = 3.0
FAILED_READS_LIMIT = 10
FAILED_READ_PAUSE_S = 0.02
# Of a video file: its rate where it tells none, and the highest that is believed (some tell their time base).
VIDEO_FPS, HIGHEST_VIDEO_FPS = 30.0, 240.0


@dataclass(frozen=True)
class Frame:
    """image: uint8 RGB [height, width, 3]. time_s: monotonic, of its capture. number: counts the pictures."""

    image: NDArray[np.uint8]
    time_s: float
    number: int


class Camera(Protocol):
    """What the control loop needs of a camera. `open` and `latest` raise CameraError."""

    has_noise: bool  # a sensor never gives the same picture twice; a file may
    asked_fps: float  # the rate it should have, 0 where it has none

    @property
    def name(self) -> str: ...

    def open(self) -> None:
        """Return when the first picture is there. Once."""

    def latest(self) -> Frame:
        """The newest picture, at once; the caller judges its age."""

    def close(self) -> None:
        """May be called again."""


class OpenCVCamera:
    """A camera read by a thread of its own. `source`: device path or index, or what OpenCV opens alike.
    Another size than `width` x `height` is refused, unless they are 0."""

    has_noise = True

    def __init__(self, name: str, source: str | int, width: int = 640, height: int = 480, fps: float = 30.0) -> None:
        self.name = name
        self._source = source
        self._width, self._height, self.asked_fps = width, height, fps
        self._frame: Frame | None = None
        self._error = ""
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        device = Path(f"/dev/video{self._source}" if isinstance(self._source, int) else self._source)
        if not device.exists():
            present = ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "none"
            raise CameraError(f"camera {self.name}: no {device}. Video devices here: {present}.")
        os.environ.setdefault(SELECT_TIMEOUT_VARIABLE, SELECT_TIMEOUT_S)
        self._thread = threading.Thread(target=self._run, name=f"camera {self.name}", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._frame or self._error, OPEN_LIMIT_S)
        try:
            frame = self.latest()
            height, width = frame.image.shape[:2]
            if self._width and (width, height) != (self._width, self._height):
                raise CameraError(
                    f"camera {self.name} gives {width} x {height} pictures, expected "
                    f"{self._width} x {self._height}. Ask for a size that it supports."
                )
        except CameraError:
            self.close()
            raise

    def latest(self) -> Frame:
        with self._changed:
            if self._error:
                raise CameraError(self._error)
            if self._frame is None:
                raise CameraError(
                    f"camera {self.name}: no picture from {self._source} in {OPEN_LIMIT_S} s. "
                    "Check its cable, and whether it shares a USB port with another camera."
                )
            return self._frame

    def close(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            # A thread inside a stalled driver ends by itself; it holds nothing anybody waits for.
            self._thread.join(STOP_LIMIT_S)

    def _run(self) -> None:
        capture = cv2.VideoCapture()
        try:
            problem = self._read(capture)
        except cv2.error as error:
            problem = f"OpenCV failed: {error}"
        finally:
            capture.release()
        with self._changed:
            self._error = f"camera {self.name} ({self._source}): {problem}"
            self._changed.notify_all()

    def _read(self, capture: cv2.VideoCapture) -> str:
        """Show picture after picture; returns why no more will come."""
        is_device = isinstance(self._source, int) or str(self._source).startswith("/dev/")
        if not capture.open(self._source, cv2.CAP_V4L2 if is_device else cv2.CAP_ANY):
            return "cannot be opened. Is it the device's first node, and free of other programs?"
        if is_device:
            # In this order: uncompressed pictures eat the bandwidth of the others, and on some cameras the
            # rate cannot be set before the size.
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, self._width)
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, self._height)
            capture.set(cv2.CAP_PROP_FPS, self.asked_fps)
            # One picture in the queue: the newest, not one from a backlog.
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        failed = 0
        while failed < FAILED_READS_LIMIT:
            ok, image = capture.read()
            failed = 0 if ok else failed + 1
            if ok:
                self._show(image, time.monotonic())
            if self._stopping.wait(0.0 if ok else FAILED_READ_PAUSE_S):
                return "closed"
        return f"{failed} reads in a row failed. Check its cable"

    def _show(self, bgr: cv2.typing.MatLike, time_s: float) -> None:
        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        with self._changed:
            self._frame = Frame(rgb, time_s, self._frame.number + 1 if self._frame else 1)
            self._changed.notify_all()


class VideoFileCamera(OpenCVCamera):
    """A video file as a camera: its own size and rate, and from the start again at its end."""

    has_noise = False

    def __init__(self, name: str, path: str | Path) -> None:
        super().__init__(name, str(path), 0, 0)

    def _read(self, capture: cv2.VideoCapture) -> str:
        due_s = time.monotonic()
        while not self._stopping.is_set():
            capture.open(str(self._source))  # again at the end: not every format can be wound back
            fps = capture.get(cv2.CAP_PROP_FPS)
            self.asked_fps = fps if 0 < fps <= HIGHEST_VIDEO_FPS else VIDEO_FPS
            ok, image = capture.read()
            if not ok:
                return "no picture and no video that OpenCV reads"
            while ok and not self._stopping.wait(max(0.0, due_s - time.monotonic())):
                self._show(image, due_s)
                # Pictures that come too late move all others: no burst to catch up.
                due_s = max(due_s + 1 / self.asked_fps, time.monotonic())
                ok, image = capture.read()
        return "closed"


class ImageFileCamera:
    """A still picture as a camera. It never grows old: every picture is taken now."""

    has_noise = False
    asked_fps = 0.0

    def __init__(self, name: str, path: str | Path) -> None:
        self.name = name
        self._path = Path(path)
        self._image: NDArray[np.uint8] | None = None
        self._number = 0

    def open(self) -> None:
        bgr = cv2.imread(str(self._path), cv2.IMREAD_COLOR)
        if bgr is None:
            raise CameraError(f"camera {self.name}: {self._path} is no picture that OpenCV reads.")
        self._image = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)

    def latest(self) -> Frame:
        assert self._image is not None, "open() comes first"
        self._number += 1
        return Frame(self._image.copy(), time.monotonic(), self._number)

    def close(self) -> None: ...


class SharedFrameCamera:
    """A camera of the virtual arm: pictures another process draws into a shared file."""

    has_noise = True
    asked_fps = 0.0

    def __init__(self, name: str, path: str | Path) -> None:
        self.name = name
        self._path = Path(path)
        self._frame: Frame | None = None

    def open(self) -> None:
        self.latest()

    def latest(self) -> Frame:
        image, time_s, number = read_frame(self._path)
        if self._frame is None or number != self._frame.number:
            self._frame = Frame(image, time_s, number)
        return self._frame

    def close(self) -> None: ...


def open_camera(name: str, source: str | int, width: int = 640, height: int = 480, fps: float = 30.0) -> Camera:
    """An open camera for `source`; size and rate matter to devices only.

    /dev/video* or an integer: a video device; csi:<sensor>: a Jetson's CSI camera; sim:<path>: the virtual arm; an
    existing file: a picture or a video.
    """
    from .csi import CsiCamera  # it is made of what is above

    text = str(source)
    camera: Camera
    if text.isdecimal() or text.startswith(("/dev/video", "/dev/v4l/")):
        camera = OpenCVCamera(name, int(text) if text.isdecimal() else text, width, height, fps)
    elif text.startswith("csi:") and text[4:].isdecimal():
        camera = CsiCamera(name, int(text[4:]), width, height, fps)
    elif text.startswith("sim:"):
        camera = SharedFrameCamera(name, text.removeprefix("sim:"))
    elif Path(text).is_file():
        camera = ImageFileCamera(name, text) if cv2.haveImageReader(text) else VideoFileCamera(name, text)
    else:
        raise CameraError(
            f"camera {name}: cannot tell what {text!r} is. Expected /dev/video* or /dev/v4l/..., "
            "a device number, csi:<sensor>, an existing picture or video file, or sim:<path> of a virtual arm."
        )
    camera.open()
    return camera
