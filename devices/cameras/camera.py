"""Cameras, all with one face: the newest picture and when it was taken.

Nobody waits for a camera: `latest` returns at once, and a camera that stalls shows by the age of its picture.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ...core.errors import CameraError
from .camera_modes import FPS, HEIGHT, WIDTH
from .shared_frame import read_frame

# Seconds OpenCV waits for a stalled V4L2 device, 10 unless told; it looks once, before the first capture.
SELECT_TIMEOUT_VARIABLE, SELECT_TIMEOUT_S = "OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", "2"
OPEN_LIMIT_S = 8.0
STOP_LIMIT_S = 3.0
FAILED_READS_LIMIT = 10
FAILED_READ_PAUSE_S = 0.02
STAMP_LIMIT_S = 1.0  # a driver's stamp that is further back is of another clock
# Of a video file: its rate where it tells none, and the highest that is believed (some tell their time base).
VIDEO_FPS, HIGHEST_VIDEO_FPS = 30.0, 240.0
GSTREAMER = "gst-launch-1.0"
# nvvidconv knows no RGB, and a queue that forgets keeps the newest picture, not a backlog. The pictures have a pipe
# of their own, because nvarguscamerasrc writes messages to stdout.
PIPELINE = (
    "nvarguscamerasrc sensor-id={sensor}"
    " ! video/x-raw(memory:NVMM),width={width},height={height},framerate={fps:.0f}/1"
    " ! nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=RGB"
    " ! queue max-size-buffers=1 leaky=downstream ! fdsink sync=false fd={fd}"
)
CSI_ADVICE = "Check its ribbon cable and that no other program has it, and run: sudo systemctl restart nvargus-daemon"


@dataclass(frozen=True)
class Frame:
    """image: uint8 RGB [height, width, 3]. time_s: monotonic, of its capture. number: counts the pictures."""

    image: NDArray[np.uint8]
    time_s: float
    number: int


class Camera:
    """What the control loop needs of a camera; this one is read by a thread of its own, in `_read`.

    source: as `open_camera` takes it. asked_fps: the rate it should have, 0 where it has none. has_noise: a sensor
    never gives the same picture twice; a file may. `open` and `latest` raise CameraError.
    """

    has_noise = True
    advice = ""  # for a camera that shows nothing

    def __init__(
        self,
        name: str,
        source: str | Path,
        width: int = WIDTH,
        height: int = HEIGHT,
        fps: float = 0.0,
    ) -> None:
        self.name, self.asked_fps = name, fps
        self._source, self._width, self._height = str(source), width, height
        self._frame: Frame | None = None
        self._error = ""
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera {name}", daemon=True)

    def open(self) -> None:
        """Return when the first picture is there. Once."""
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._frame or self._error, OPEN_LIMIT_S)
        try:
            self.latest()
        except CameraError:
            self.close()
            raise

    def latest(self) -> Frame:
        """The newest picture, at once; the caller judges its age."""
        with self._changed:
            if self._error:
                raise CameraError(self._error)
            if self._frame is None:
                raise CameraError(
                    f"camera {self.name}: no picture from {self._source} in {OPEN_LIMIT_S} s. {self.advice}"
                )
            return self._frame

    def close(self) -> None:
        """May be called again."""
        self._stopping.set()
        if self._thread.is_alive():
            # A thread inside a stalled driver ends by itself; it holds nothing anybody waits for.
            self._thread.join(STOP_LIMIT_S)

    def _read(self) -> str:
        """Show picture after picture; returns why no more will come."""
        raise NotImplementedError

    def _run(self) -> None:
        try:
            problem = self._read()
        except (cv2.error, OSError) as error:
            problem = f"failed: {error}"
        with self._changed:
            self._error = f"camera {self.name} ({self._source}): {problem}"
            self._changed.notify_all()

    def _show(self, rgb: NDArray[np.uint8], time_s: float) -> None:
        with self._changed:
            self._frame = Frame(rgb, time_s, self._frame.number + 1 if self._frame else 1)
            self._changed.notify_all()


class OpenCVCamera(Camera):
    """`source`: device path, or what OpenCV opens alike. Pictures of another size than asked for are refused."""

    advice = "Check its cable, and whether it shares a USB port with another camera."

    def _read(self) -> str:
        if not Path(self._source).exists():
            present = ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "none"
            return f"no {self._source}. Video devices here: {present}."
        os.environ.setdefault(SELECT_TIMEOUT_VARIABLE, SELECT_TIMEOUT_S)
        with _capturing() as capture:
            is_device = self._source.startswith("/dev/")
            if not capture.open(self._source, cv2.CAP_V4L2 if is_device else cv2.CAP_ANY):
                return (
                    "cannot be opened. Is it the device's first node, and free of other programs?"
                )
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
                if (
                    ok
                    and self._frame is None
                    and (size := image.shape[1::-1]) != (self._width, self._height)
                ):
                    expected = f"{self._width} x {self._height}"
                    return f"gives {size[0]} x {size[1]} pictures, expected {expected}. Take one that has this size"
                if ok:
                    self._show(_rgb(image), _taken_s(capture, time.monotonic()))
                if self._stopping.wait(0.0 if ok else FAILED_READ_PAUSE_S):
                    return "closed"
            return f"{failed} reads in a row failed. Check its cable"


class CsiCamera(Camera):
    """csi:<sensor> of a Jetson, as nvarguscamerasrc counts them, through `gst-launch-1.0`: PyPI's OpenCV has no
    GStreamer."""

    advice = CSI_ADVICE
    _process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        self._stopping.set()
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # killed outright, it leaves the sensor taken
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
            self._process.kill()
        super().close()

    def _read(self) -> str:
        if shutil.which(GSTREAMER) is None:
            return (
                f"needs {GSTREAMER}, not found. "
                "Install it: sudo apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good"
            )
        row = -(-3 * self._width // 4) * 4  # bytes: GStreamer pads rows to four
        read, write = os.pipe()
        sensor = self._source.removeprefix("csi:")
        line = PIPELINE.format(
            sensor=sensor, width=self._width, height=self._height, fps=self.asked_fps, fd=write
        )
        with os.fdopen(read, "rb") as pictures, tempfile.TemporaryFile() as said:
            try:
                # A session of its own: Ctrl-C is for the control loop, which still needs pictures to stop well.
                self._process = subprocess.Popen(
                    [GSTREAMER, "--quiet", *line.split()],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=(write,),
                    start_new_session=True,
                )
            finally:
                os.close(write)
            while len(data := pictures.read(row * self._height)) == row * self._height:
                rows = np.frombuffer(data, np.uint8).reshape(self._height, row)[
                    :, : 3 * self._width
                ]
                self._show(rows.reshape(self._height, self._width, 3), time.monotonic())
            status = self._process.wait()
            said.seek(0)
            words = " ".join(said.read().decode(errors="replace").split())
        return f"{GSTREAMER} ended with status {status}: {words[-300:] or 'it said nothing'}. {CSI_ADVICE}"


class VideoFileCamera(Camera):
    """A video file as a camera: its own size and rate, and from the start again at its end."""

    has_noise = False
    advice = "Take another file."

    def _read(self) -> str:
        due_s = time.monotonic()
        with _capturing() as capture:
            while not self._stopping.is_set():
                capture.open(self._source)  # again at the end: not every format can be wound back
                fps = capture.get(cv2.CAP_PROP_FPS)
                self.asked_fps = fps if 0 < fps <= HIGHEST_VIDEO_FPS else VIDEO_FPS
                ok, image = capture.read()
                if not ok:
                    return "no picture and no video that OpenCV reads"
                while ok and not self._stopping.wait(max(0.0, due_s - time.monotonic())):
                    self._show(_rgb(image), due_s)
                    # Pictures that come too late move all others: no burst to catch up.
                    due_s = max(due_s + 1 / self.asked_fps, time.monotonic())
                    ok, image = capture.read()
        return "closed"


class ImageFileCamera(Camera):
    """A still picture as a camera. It never grows old: every picture is taken now."""

    has_noise = False

    def open(self) -> None:
        bgr = cv2.imread(self._source, cv2.IMREAD_COLOR)
        if bgr is None:
            raise CameraError(
                f"camera {self.name}: {self._source} is no picture that OpenCV reads."
            )
        self._show(_rgb(bgr), time.monotonic())

    def latest(self) -> Frame:
        self._show(super().latest().image, time.monotonic())
        return super().latest()


class SharedFrameCamera(Camera):
    """sim:<path>, a camera of the virtual arm: pictures another process draws into a shared file."""

    def open(self) -> None:
        self.latest()

    def latest(self) -> Frame:
        image, time_s, number = read_frame(Path(self._source.removeprefix("sim:")))
        if self._frame is None or number != self._frame.number:
            self._frame = Frame(image, time_s, number)
        return self._frame


def open_camera(name: str, source: str | int) -> Camera:
    """An open camera for `source`.

    /dev/video* or an integer: a video device; csi:<sensor>: a Jetson's CSI camera; sim:<path>: the virtual arm; an
    existing file: a picture or a video.
    """
    text = f"/dev/video{source}" if str(source).isdecimal() else str(source)
    camera: Camera
    if text.startswith(("/dev/video", "/dev/v4l/")):
        camera = OpenCVCamera(name, text, fps=FPS)
    elif text.startswith("csi:") and text[4:].isdecimal():
        camera = CsiCamera(name, text, fps=FPS)
    elif text.startswith("sim:"):
        camera = SharedFrameCamera(name, text)
    elif Path(text).is_file():
        camera = (
            ImageFileCamera(name, text)
            if cv2.haveImageReader(text)
            else VideoFileCamera(name, text)
        )
    else:
        raise CameraError(
            f"camera {name}: cannot tell what {text!r} is. Expected /dev/video* or /dev/v4l/..., "
            "a device number, csi:<sensor>, an existing picture or video file, or sim:<path> of a virtual arm."
        )
    camera.open()
    return camera


@contextlib.contextmanager
def _capturing() -> Iterator[cv2.VideoCapture]:
    capture = cv2.VideoCapture()
    try:
        yield capture
    finally:
        capture.release()


def _taken_s(capture: cv2.VideoCapture, now_s: float) -> float:
    """When the driver took the picture that was read last, where it tells: V4L2's stamps are of the monotonic clock
    (OpenCV hands them on, opencv/opencv#740). Else now, which leaves out exposure, transfer and decoding."""
    taken_s = 1e-3 * capture.get(cv2.CAP_PROP_POS_MSEC)
    return taken_s if 0.0 <= now_s - taken_s <= STAMP_LIMIT_S else now_s


def _rgb(bgr: cv2.typing.MatLike) -> NDArray[np.uint8]:
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
