"""The interface of all cameras: the newest picture and when it was taken.

Nobody waits for a camera. `latest` returns at once. The age of the picture shows a stalled camera.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.errors import CameraError

WIDTH, HEIGHT, FPS = 640, 480, 30.0  # what cameras are opened with
OPEN_LIMIT_S = 8.0
STOP_LIMIT_S = 3.0


@dataclass(frozen=True)
class Frame:
    """image: uint8 RGB [height, width, 3]. time_s: of its capture, monotonic. number: from 1 on."""

    image: NDArray[np.uint8]
    time_s: float
    number: int


class Camera:
    """The interface of all cameras, and a thread of its own that runs `_read`.

    source: as `open_camera` takes it. asked_fps: the expected rate, 0 if there is none. has_noise:
    a sensor never gives the same picture twice, a file can. `open` and `latest` raise CameraError.
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
        """Start, and return when the first picture is there. Call it once."""
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
                    f"camera {self.name}: no picture from {self._source} in {OPEN_LIMIT_S} s. "
                    f"{self.advice}"
                )
            return self._frame

    def close(self) -> None:
        """May be called again."""
        self._stopping.set()
        if self._thread.is_alive():
            # A thread inside a stalled driver ends later by itself. Nobody waits for it.
            self._thread.join(STOP_LIMIT_S)

    def _read(self) -> str:
        """Show picture after picture. Returns the reason when no more come. Raises OSError."""
        raise NotImplementedError

    def _run(self) -> None:
        try:
            problem = self._read()
        except OSError as error:
            problem = f"failed: {error}"
        with self._changed:
            self._error = f"camera {self.name} ({self._source}): {problem}"
            self._changed.notify_all()

    def _show(self, rgb: NDArray[np.uint8], time_s: float) -> None:
        with self._changed:
            self._frame = Frame(rgb, time_s, self._frame.number + 1 if self._frame else 1)
            self._changed.notify_all()
