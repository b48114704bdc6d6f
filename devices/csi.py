"""A CSI camera of a Jetson, through `gst-launch-1.0`: PyPI's OpenCV has no GStreamer.

The pictures come raw through a pipe of their own, because nvarguscamerasrc writes messages to stdout.
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
from typing import BinaryIO

import numpy as np

from .camera import OPEN_LIMIT_S, STOP_LIMIT_S, Frame
from .errors import CameraError

PROGRAM = "gst-launch-1.0"
SOURCE = (
    "nvarguscamerasrc sensor-id={sensor} ! video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}"
)
# nvvidconv knows no RGB, and a queue that forgets keeps the newest picture, not a backlog.
SINK = (
    "nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=RGB ! "
    "queue max-size-buffers=1 leaky=downstream ! fdsink sync=false fd={fd}"
)


class CsiCamera:
    """Sensor `sensor` as nvarguscamerasrc counts them, read by a thread. Raises CameraError as a Camera does."""

    has_noise = True

    def __init__(self, name: str, sensor: int, width: int = 640, height: int = 480, fps: float = 30.0) -> None:
        self.name, self.asked_fps = name, fps
        self._sensor, self._width, self._height = sensor, width, height
        self._frame: Frame | None = None
        self._error = ""
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        if shutil.which(PROGRAM) is None:
            raise CameraError(
                f"camera {self.name}: csi:{self._sensor} needs {PROGRAM}, not found. "
                "Install it: sudo apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good"
            )
        read, write = os.pipe()
        pipeline = f"{SOURCE} ! {SINK}".format(
            sensor=self._sensor, width=self._width, height=self._height, fps=f"{self.asked_fps:.0f}/1", fd=write
        )
        said = tempfile.TemporaryFile()  # noqa: SIM115  (the thread closes it)
        try:
            # A session of its own: Ctrl-C is for the control loop, which still needs pictures to stop well.
            self._process = subprocess.Popen(
                [PROGRAM, "--quiet", *pipeline.split()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=(write,),
                start_new_session=True,
            )
        finally:
            os.close(write)
        work = (self._process, os.fdopen(read, "rb"), said)
        self._thread = threading.Thread(target=self._read, args=work, name=f"camera {self.name}", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._frame or self._error, OPEN_LIMIT_S)
        try:
            self.latest()
        except CameraError:
            self.close()
            raise

    def latest(self) -> Frame:
        with self._changed:
            if self._error:
                raise CameraError(self._error)
            if self._frame is None:
                raise CameraError(
                    f"camera {self.name}: no picture from csi:{self._sensor} in {OPEN_LIMIT_S} s. "
                    "Check its ribbon cable, and run: sudo systemctl restart nvargus-daemon"
                )
            return self._frame

    def close(self) -> None:
        if self._process is None or self._thread is None:
            return
        self._process.send_signal(signal.SIGINT)  # killed outright, it leaves the sensor taken
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_LIMIT_S)
        self._process.kill()
        self._thread.join(STOP_LIMIT_S)

    def _read(self, process: subprocess.Popen[bytes], pictures: BinaryIO, said: BinaryIO) -> None:
        row = -(-3 * self._width // 4) * 4  # bytes: GStreamer pads rows to four
        number = 0
        with pictures, said:
            while len(data := pictures.read(row * self._height)) == row * self._height:
                rows = np.frombuffer(data, np.uint8).reshape(self._height, row)[:, : 3 * self._width]
                number += 1
                with self._changed:
                    self._frame = Frame(rows.reshape(self._height, self._width, 3), time.monotonic(), number)
                    self._changed.notify_all()
            status = process.wait()
            said.seek(0)
            words = " ".join(said.read().decode(errors="replace").split())
        with self._changed:
            self._error = (
                f"camera {self.name} (csi:{self._sensor}): {PROGRAM} ended with status {status}: "
                f"{words[-300:] or 'it said nothing'}. Check the ribbon cable and that no other program has the "
                "camera, then run: sudo systemctl restart nvargus-daemon"
            )
            self._changed.notify_all()
