"""csi:<sensor>: cameras on the CSI port of a Jetson, through gst-launch-1.0.

OpenCV from PyPI has no GStreamer.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress

import numpy as np

from .camera import STOP_LIMIT_S, Camera

GSTREAMER = "gst-launch-1.0"
# nvvidconv has no RGB. A leaky queue of one buffer keeps the newest picture. The pictures have a
# pipe of their own, because nvarguscamerasrc writes messages to stdout.
PIPELINE = (
    "nvarguscamerasrc sensor-id={sensor}"
    " ! video/x-raw(memory:NVMM),width={width},height={height},framerate={fps:.0f}/1"
    " ! nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=RGB"
    " ! queue max-size-buffers=1 leaky=downstream ! fdsink sync=false fd={fd}"
)
CSI_ADVICE = (
    "Check its ribbon cable and that no other program uses it, "
    "and run: sudo systemctl restart nvargus-daemon"
)


class CsiCamera(Camera):
    """source: csi:<sensor>, as nvarguscamerasrc counts the sensors."""

    advice = CSI_ADVICE
    _process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        self._stopping.set()
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # SIGKILL leaves the sensor taken
            with suppress(subprocess.TimeoutExpired):
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
        with os.fdopen(read, "rb") as pictures, tempfile.TemporaryFile() as output:
            try:
                # A session of its own: Ctrl-C is for the control loop, which still needs pictures.
                self._process = subprocess.Popen(
                    [GSTREAMER, "--quiet", *line.split()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(write,),
                    start_new_session=True,
                )
            finally:
                os.close(write)
            data = pictures.read(row * self._height)
            while len(data) == row * self._height:
                rows = np.frombuffer(data, np.uint8).reshape(self._height, row)
                rgb = rows[:, : 3 * self._width].reshape(self._height, self._width, 3)
                self._show(rgb, time.monotonic())
                data = pictures.read(row * self._height)
            status = self._process.wait()
            output.seek(0)
            words = " ".join(output.read().decode(errors="replace").split())
        words = words[-300:] or "no output"
        return f"{GSTREAMER} ended with status {status}: {words}. {CSI_ADVICE}"
