"""Pictures of the virtual arm: discs for cube, plate and hand on a table, and the arm as lines.

There is no perspective. Metres, z up, x away from the base. The lengths are about those of an
SO-101.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from ..arm.calibration import Calibration
from ..arm.units import Scale, raw_to_value

SHOULDER = (0.0, 0.0, 0.12)
LENGTHS = np.array([[0.116], [0.135], [0.06]])  # upper arm, forearm, hand
# The directions that point right and down in the picture. The wrist camera is on the hand, and
# closer.
VIEWS = {
    "front": ((0.0, 1.0, 0.0), (0.5, 0.0, -1.0)),
    "wrist": ((0.0, -1.0, 0.0), (-1.0, 0.0, 0.0)),
    "other": ((-0.7, 0.7, 0.0), (0.3, 0.3, -1.0)),
}
CENTRE, SEEN_M, SEEN_BY_HAND_M = np.array([0.15, 0.0, 0.08]), 0.8, 0.4
TABLE, CUBE, PLATE, ARM, HAND = (
    (205, 180, 140),
    (190, 30, 30),
    (240, 240, 245),
    (250, 200, 40),
    (60, 60, 70),
)
CUBE_SIZE, PLATE_SIZE, HAND_SIZE, OPENING = 0.03, 0.12, 0.02, 0.04
# A real sensor never gives the same bytes twice. No colour here is so close to 0 or 255 that this
# overflows.
NOISY_VALUES, NOISE = 300, np.array([-2, -1, 1, 2])


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
        degrees = [
            raw_to_value(round(ticks), j, Scale.DEGREES)
            for ticks, j in zip(raw, self._joints, strict=True)
        ]
        pan, lift, elbow, flex = np.radians(degrees[:4])
        opening = raw_to_value(round(raw[5]), self._joints[5], Scale.RANGE_0_100) / 100
        up = np.cumsum([math.pi / 2 - lift, -math.pi / 2 - elbow, -math.pi / 6 - flex])
        parts = LENGTHS * np.stack(
            [np.cos(up) * np.cos(pan), np.cos(up) * np.sin(pan), np.sin(up)], axis=1
        )
        arm = np.cumsum([np.zeros(3), SHOULDER, *parts], axis=0)
        centre, metres = (arm[-1], SEEN_BY_HAND_M) if self._on_hand else (CENTRE, SEEN_M)
        scale = self._width / metres
        image = np.full((self._height, self._width, 3), TABLE, np.uint8)

        def pixels(points: NDArray[np.float64]) -> NDArray[np.int32]:
            """[points, 3] -> [points, 2]"""
            flat = (points - centre) @ self._axes.T * scale + np.array(
                [self._width, self._height]
            ) / 2
            return np.asarray(np.rint(flat), np.int32)

        def disc(at: Sequence[float], size: float, colour: Sequence[float]) -> None:
            (x, y), radius = pixels(np.array([at]))[0], max(1, round(size / 2 * scale))
            cv2.circle(image, (int(x), int(y)), radius, colour, cv2.FILLED)

        disc((0.22, 0.1, 0.0), PLATE_SIZE, PLATE)
        disc((0.235, -0.065, 0.015), CUBE_SIZE, CUBE)
        if not self._on_hand:
            cv2.polylines(image, [pixels(arm)], False, ARM, max(1, round(0.03 * scale)))
        disc(arm[-1].tolist(), HAND_SIZE + OPENING * opening, HAND)
        values = self._random.integers(image.size, size=NOISY_VALUES)
        image.flat[values] = image.flat[values] + self._random.choice(NOISE, NOISY_VALUES)
        return image
