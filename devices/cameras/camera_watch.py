"""Camera faults, reported with every picture: failed, stalled, resized, frozen.

Between two runs: cameras that changed places. `CameraWatch.look` is called once per control tick,
and costs almost nothing without a new picture. A picture with a problem must not reach the policy.
The control loop decides the rest.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ...core.errors import CameraError
from ...core.files import write_whole
from .camera import Camera

STALE_S = 0.5
FROZEN_S, FROZEN_PICTURES = 1.0, 5
RATE_WINDOW_S, SLOWEST_HZ = 3.0, 10.0
THUMBNAIL_SIZE = (16, 12)
RESEMBLES, MARGIN = 0.75, 0.3  # correlations
FLAT = 2.0  # grey levels of contrast, below which a picture (dark, covered) resembles nothing

# [192], mean 0 and length 1, or all 0: a dot product is a correlation
Thumbnail = NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """The newest picture of a camera.

    problem: "" if the policy may see it, else such as "stalled: why".
    """

    image: NDArray[np.uint8]
    time_s: float
    problem: str


class CameraWatch:
    """Watches open cameras in the calling thread. CameraError if one of them has no picture."""

    def __init__(self, cameras: Sequence[Camera]) -> None:
        self._watched = [_CameraState(camera) for camera in cameras]
        self._warnings: list[str] = []

    def look(self) -> dict[str, View]:
        """{camera name: its newest picture and what is wrong with it}, at once."""
        now_s = time.monotonic()
        for watched in self._watched:
            watched.look(now_s)
            warning = watched.slow()
            if warning:
                self._warnings.append(warning)
        return {w.name: View(w.frame.image, w.frame.time_s, w.problem) for w in self._watched}

    def warnings(self) -> list[str]:
        """Slow cameras since the last call; each is reported once."""
        found, self._warnings = self._warnings, []
        return found

    def compare_with(self, path: Path) -> list[str]:
        """Pairs of cameras that look swapped since `remember(path)`. Empty if `path` cannot be
        read.

        Call both when the arm rests and the cameras have settled.
        """
        try:
            with path.open("rb") as file, np.load(file) as stored:
                pictures = (
                    stored["thumbnails"]
                    .astype(np.float64)
                    .reshape(-1, THUMBNAIL_SIZE[0] * THUMBNAIL_SIZE[1])
                )
                past = dict(zip(stored["names"].tolist(), pictures, strict=True))
        except Exception:  # an unreadable file: there is nothing to compare with
            return []
        now = {name: thumbnail for name, thumbnail in self._thumbnails().items() if name in past}
        return [
            f"cameras '{a}' and '{b}' look swapped since the last run"
            for a, b in combinations(now, 2)
            if max(now[a] @ past[b], now[b] @ past[a])
            >= max(RESEMBLES, MARGIN + max(now[a] @ past[a], now[b] @ past[b]))
        ]

    def remember(self, path: Path) -> None:
        """Store what the cameras show now, for `compare_with` in the next run. Raises OSError."""
        thumbnails, data = self._thumbnails(), io.BytesIO()
        np.savez(data, names=np.array([*thumbnails], np.str_), thumbnails=[*thumbnails.values()])
        write_whole(path, data.getvalue())

    def _thumbnails(self) -> dict[str, Thumbnail]:
        return {name: _thumbnail(view.image) for name, view in self.look().items()}


class _CameraState:
    """One camera and its state."""

    def __init__(self, camera: Camera) -> None:
        self._camera, self.name = camera, camera.name
        self.frame = self._changed = self._rated = camera.latest()
        self._shape = self.frame.image.shape
        self._reported_slow = False
        self.problem = ""

    def look(self, now_s: float) -> None:
        old, old_problem, self.problem = self.frame, self.problem, ""
        try:
            self.frame = self._camera.latest()
        except CameraError as error:
            self.problem = f"failed: {error}"
            return
        if not (self._camera.has_noise and _equal(self.frame.image, old.image)):
            self._changed = self.frame
        if old_problem:
            self._rated = self.frame  # the time of a fault does not count as slow
        same = 1 + self.frame.number - self._changed.number
        if now_s - self.frame.time_s > STALE_S:
            self.problem = f"stalled: no new picture for more than {STALE_S} s"
        elif self.frame.image.shape != self._shape:
            (height, width), (old_height, old_width) = self.frame.image.shape[:2], self._shape[:2]
            self.problem = f"resized: {width} x {height}, was {old_width} x {old_height}"
        elif same >= FROZEN_PICTURES and self.frame.time_s - self._changed.time_s >= FROZEN_S:
            self.problem = "frozen: the same picture again and again"

    def slow(self) -> str:
        """The warning that the camera is slow, once; else ""."""
        span_s = self.frame.time_s - self._rated.time_s
        if self._reported_slow or span_s < RATE_WINDOW_S:
            return ""
        pictures, self._rated = self.frame.number - self._rated.number, self.frame
        expected_hz = max(SLOWEST_HZ, self._camera.asked_fps / 2)
        # Plus one: by chance, a window ends before or after a picture.
        self._reported_slow = (pictures + 1) / span_s < expected_hz
        if not self._reported_slow:
            return ""
        return (
            f"camera '{self.name}' is slow: {pictures / span_s:.1f} pictures a second, expected "
            f"{expected_hz:g}. Check its USB port and the light: in the dark it exposes longer"
        )


def _equal(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    # Some rows differ in nearly all pairs of pictures. To compare them takes a tenth of the time.
    return a is b or (np.array_equal(a[::32], b[::32]) and np.array_equal(a, b))


def _thumbnail(image: NDArray[np.uint8]) -> Thumbnail:
    grey = cv2.resize(
        cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), THUMBNAIL_SIZE, interpolation=cv2.INTER_AREA
    )
    centred = grey.astype(np.float64).ravel() - grey.mean()
    return centred / np.linalg.norm(centred) if centred.std() >= FLAT else np.zeros(centred.size)
