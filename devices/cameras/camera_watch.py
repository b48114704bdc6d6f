"""What is wrong with the cameras, told beside every picture: failed, stalled, resized, frozen; and, between two runs,
cameras that changed places.

`CameraWatch.look` is called once per control tick and costs next to nothing where no new picture came. A picture
with a problem must not reach the policy; what else follows from it is the control loop's business.
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

Thumbnail = NDArray[
    np.float64
]  # [192], mean 0 and length 1, or all 0: a dot product is a correlation


@dataclass(frozen=True)
class View:
    """The newest picture of a camera. problem: "" when the policy may see it, else such as "stalled: why"."""

    image: NDArray[np.uint8]
    time_s: float
    problem: str


class CameraWatch:
    """Watches open cameras, in the thread that calls it. CameraError when one of them has no picture at all."""

    def __init__(self, cameras: Sequence[Camera]) -> None:
        self._watched = [_Watched(camera) for camera in cameras]
        self._warnings: list[str] = []

    def look(self) -> dict[str, View]:
        """{camera name: its newest picture and what is wrong with it}, at once."""
        now_s = time.monotonic()
        for watched in self._watched:
            watched.look(now_s)
            if warning := watched.slow():
                self._warnings.append(warning)
        return {w.name: View(w.frame.image, w.frame.time_s, w.problem) for w in self._watched}

    def warnings(self) -> list[str]:
        """New ones since the last call: cameras that are slow, each told once."""
        found, self._warnings = self._warnings, []
        return found

    def compare_with(self, path: Path) -> list[str]:
        """Which cameras seem to have changed places since `remember(path)`; nothing where `path` cannot be read.

        Call both when the arm rests and the cameras have settled, so that like is compared with like.
        """
        try:
            with path.open("rb") as file, np.load(file) as stored:
                pictures = (
                    stored["thumbnails"]
                    .astype(np.float64)
                    .reshape(-1, THUMBNAIL_SIZE[0] * THUMBNAIL_SIZE[1])
                )
                past = dict(zip(stored["names"].tolist(), pictures, strict=True))
        except Exception:  # whatever is in there, it is nothing to compare with
            return []
        now = {name: thumbnail for name, thumbnail in self._thumbnails().items() if name in past}
        return [
            f"cameras '{a}' and '{b}' look swapped since the last run"
            for a, b in combinations(now, 2)
            if max(now[a] @ past[b], now[b] @ past[a])
            >= max(RESEMBLES, MARGIN + max(now[a] @ past[a], now[b] @ past[b]))
        ]

    def remember(self, path: Path) -> None:
        """Store what the cameras show now, for `compare_with` in the next run. OSError when it cannot."""
        thumbnails, data = self._thumbnails(), io.BytesIO()
        np.savez(data, names=np.array([*thumbnails], np.str_), thumbnails=[*thumbnails.values()])
        write_whole(path, data.getvalue())

    def _thumbnails(self) -> dict[str, Thumbnail]:
        return {name: _thumbnail(view.image) for name, view in self.look().items()}


class _Watched:
    """One camera and what is known of it."""

    def __init__(self, camera: Camera) -> None:
        self._camera, self.name = camera, camera.name
        self.frame = self._changed = self._rated = camera.latest()
        self._shape = self.frame.image.shape
        self._told_slow = False
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
            self._rated = self.frame  # a pause is not a slow camera
        same = 1 + self.frame.number - self._changed.number
        if now_s - self.frame.time_s > STALE_S:
            self.problem = f"stalled: no new picture for more than {STALE_S} s"
        elif self.frame.image.shape != self._shape:
            (height, width), (old_height, old_width) = self.frame.image.shape[:2], self._shape[:2]
            self.problem = f"resized: {width} x {height}, was {old_width} x {old_height}"
        elif same >= FROZEN_PICTURES and self.frame.time_s - self._changed.time_s >= FROZEN_S:
            self.problem = "frozen: the same picture again and again"

    def slow(self) -> str:
        """The warning that it is slow, once; else empty."""
        span_s = self.frame.time_s - self._rated.time_s
        if self._told_slow or span_s < RATE_WINDOW_S:
            return ""
        pictures, self._rated = self.frame.number - self._rated.number, self.frame
        expected_hz = max(SLOWEST_HZ, self._camera.asked_fps / 2)
        # One more: whether a window ends before or after a picture is chance.
        self._told_slow = (pictures + 1) / span_s < expected_hz
        if not self._told_slow:
            return ""
        return (
            f"camera '{self.name}' is slow: {pictures / span_s:.1f} pictures a second, expected {expected_hz:g}. "
            "Check its USB port, and the light: in the dark it exposes longer"
        )


def _equal(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    # Some rows tell nearly all pictures apart, in a tenth of the time.
    return a is b or (np.array_equal(a[::32], b[::32]) and np.array_equal(a, b))


def _thumbnail(image: NDArray[np.uint8]) -> Thumbnail:
    grey = cv2.resize(
        cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), THUMBNAIL_SIZE, interpolation=cv2.INTER_AREA
    )
    centred = grey.astype(np.float64).ravel() - grey.mean()
    return centred / np.linalg.norm(centred) if centred.std() >= FLAT else np.zeros(centred.size)
