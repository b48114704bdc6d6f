"""Pictures of the virtual arm: a table, a red cube, a plate and the arm, without perspective.

Metres, z up, x away from the base. The lengths resemble an SO-101; this is a drawing, not a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .units import Scale, raw_to_value

Points = NDArray[np.float64]  # [points, 3]

SHOULDER = (0.0, 0.0, 0.12)
LENGTHS = (0.116, 0.135, 0.06)  # upper arm, forearm, hand
FINGER = 0.05
# The directions that are right and down in the picture of each camera; all others share the last.
VIEWS = {
    "front": ((0.0, 1.0, 0.0), (0.5, 0.0, -1.0)),
    "top": ((0.0, -1.0, 0.0), (-1.0, 0.0, 0.0)),
    "wrist": ((0.0, -1.0, 0.0), (-1.0, 0.0, 0.0)),  # on the hand, and nearer
    "side": ((-1.0, 0.0, 0.0), (0.0, 0.5, -1.0)),
    "other": ((-0.7, 0.7, 0.0), (0.3, 0.3, -1.0)),
}
CENTRE, SEEN_M, SEEN_BY_HAND_M = np.array([0.15, 0.0, 0.08]), 0.8, 0.4
TABLE, CUBE, PLATE, ARM, HAND = (205, 180, 140), (190, 30, 30), (240, 240, 245), (250, 200, 40), (60, 60, 70)
# A real sensor never gives the same bytes twice. No colour here is so near 0 or 255 that this overflows.
NOISY_VALUES, NOISE = 300, np.array([-2, -1, 1, 2])
CUBE_CORNERS = np.array([(x, y, z) for x in (0.22, 0.25) for y in (-0.08, -0.05) for z in (0.0, 0.03)])
PLATE_EDGE = np.array([(0.22 + 0.06 * math.cos(t), 0.1 + 0.06 * math.sin(t), 0.0) for t in np.arange(0, 6.2, 0.3)])


class VirtualView:
    """The view of camera `name`, `width` x `height` pixels."""

    def __init__(self, name: str, calibration: Calibration, width: int, height: int) -> None:
        self._axes = np.array(VIEWS.get(name, VIEWS["other"]))
        self._on_hand = name == "wrist"
        self._joints = calibration.joints
        self._width, self._height = width, height
        self._random = np.random.default_rng(0)

    def render(self, raw: Sequence[float]) -> NDArray[np.uint8]:
        """uint8 RGB [height, width, 3] of the arm at `raw`, [6] raw ticks."""
        arm, fingers = self._pose(raw)
        centre, metres = (arm[-1], SEEN_BY_HAND_M) if self._on_hand else (CENTRE, SEEN_M)

        def pixels(points: Points) -> NDArray[np.int32]:
            middle = np.array([self._width, self._height]) / 2
            flat = (points - centre) @ self._axes.T * self._width / metres + middle
            return np.asarray(np.rint(flat), np.int32)

        image = np.full((self._height, self._width, 3), TABLE, np.uint8)
        for points, colour in ((PLATE_EDGE, PLATE), (CUBE_CORNERS, CUBE)):
            cv2.fillConvexPoly(image, cv2.convexHull(pixels(points)), colour)
        thick = max(1, round(0.03 * self._width / metres))
        if not self._on_hand:
            cv2.polylines(image, [pixels(arm)], False, ARM, thick)
        cv2.polylines(image, [pixels(finger) for finger in fingers], False, HAND, max(1, thick // 2))
        values = self._random.integers(image.size, size=NOISY_VALUES)
        image.flat[values] = image.flat[values] + self._random.choice(NOISE, NOISY_VALUES)
        return image

    def _pose(self, raw: Sequence[float]) -> tuple[Points, list[Points]]:
        """Points along the arm, and along both fingers."""
        degrees = [raw_to_value(round(ticks), j, Scale.DEGREES) for ticks, j in zip(raw, self._joints, strict=True)]
        pan, lift, elbow, flex, roll = np.radians(degrees[:5])
        opening = raw_to_value(round(raw[5]), self._joints[5], Scale.RANGE_0_100) / 100
        elevations = np.cumsum([math.pi / 2 - lift, -math.pi / 2 - elbow, -math.pi / 6 - flex])
        ahead = np.array(
            [(math.cos(e) * math.cos(pan), math.cos(e) * math.sin(pan), math.sin(e)) for e in elevations]
        )
        steps = ahead * np.array(LENGTHS)[:, None]
        arm = np.cumsum([np.zeros(3), SHOULDER, *steps], axis=0)
        across = np.array([-math.sin(pan), math.cos(pan), 0.0])
        sideways = math.cos(roll) * across + math.sin(roll) * np.cross(ahead[-1], across)
        fingers = []
        for side in (-1, 1):
            root = arm[-1] + side * 0.012 * sideways
            fingers.append(np.stack([root, root + FINGER * ahead[-1] + side * 0.03 * opening * sideways]))
        return arm, fingers
