"""Pictures of the virtual arm: a table, a red cube, a plate and the arm, drawn from one viewpoint.

Metres, z up, x away from the base. The lengths resemble an SO-101; this is a drawing, not a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .units import Scale, raw_to_value

Points = NDArray[np.float64]  # [points, 3]
Colour = tuple[int, int, int]  # RGB

SHOULDER_HEIGHT, UPPER_ARM, FOREARM, HAND, FINGER = 0.12, 0.116, 0.135, 0.06, 0.05
NEAR = 0.02
# A real sensor never gives the same bytes twice. No colour here is so near 0 or 255 that this overflows.
NOISY_VALUES, NOISE = 300, np.array([-2, -1, 1, 2])
# Camera position and the point it looks at. The wrist camera rides on the arm.
VIEWPOINTS = {
    "front": ((0.75, 0.0, 0.45), (0.15, 0.0, 0.08)),
    "top": ((0.2, 0.001, 0.9), (0.2, 0.0, 0.0)),
    "side": ((0.2, 0.75, 0.35), (0.15, 0.0, 0.1)),
    "other": ((0.6, -0.55, 0.5), (0.15, 0.0, 0.05)),
}
WALL, TABLE, PLATE, ARM, JOINT, FINGERS = (
    (170, 178, 186),
    (205, 180, 140),
    (240, 240, 245),
    (250, 200, 40),
    (50, 50, 55),
    (60, 60, 70),
)
CUBE_FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))


class VirtualView:
    """The view of camera `name`, `width` x `height` pixels. Names without a viewpoint share one."""

    def __init__(self, name: str, calibration: Calibration, width: int, height: int) -> None:
        self._name = name
        self._calibration = calibration
        self._size = (width, height)
        self._focal = 0.9 * width
        self._random = np.random.default_rng(0)
        corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float64)
        self._cube = corners * 0.03 + np.array([0.22, -0.08, 0.0])
        turns = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        self._plate = np.stack([0.22 + 0.06 * np.cos(turns), 0.1 + 0.06 * np.sin(turns), 0 * turns], axis=1)
        self._table = np.array([[-0.2, -0.45, 0], [0.55, -0.45, 0], [0.55, 0.45, 0], [-0.2, 0.45, 0]], np.float64)

    def render(self, raw: Sequence[float]) -> NDArray[np.uint8]:
        """uint8 RGB [height, width, 3] of the arm at `raw`, [6] raw ticks."""
        chain, fingers, hand_axis = self._pose(raw)
        if self._name == "wrist":
            self._look(chain[2] + np.array([0, 0, 0.06]) - 0.03 * hand_axis, chain[-1] + 0.04 * hand_axis)
        else:
            self._look(*(np.array(point, np.float64) for point in VIEWPOINTS.get(self._name, VIEWPOINTS["other"])))
        image = np.full((self._size[1], self._size[0], 3), WALL, np.uint8)
        self._polygon(image, self._table, TABLE)
        self._polygon(image, self._plate, PLATE)
        faces = [self._cube[list(face)] for face in CUBE_FACES]
        faces.sort(key=lambda face: -float(np.linalg.norm(face.mean(axis=0) - self._eye)))
        for number, face in enumerate(faces):
            self._polygon(image, face, (130 + 20 * number, 30, 30))
        # The wrist camera sits in front of the arm and sees the hand only.
        for start, end in pairwise(chain if self._name != "wrist" else chain[-1:] * 2):
            self._bar(image, start, end, 0.03, ARM)
            self._bar(image, end, end, 0.036, JOINT)
        for finger in fingers:
            self._bar(image, finger[0], finger[1], 0.014, FINGERS)
        values = self._random.integers(image.size, size=NOISY_VALUES)
        image.flat[values] = image.flat[values] + self._random.choice(NOISE, NOISY_VALUES)
        return image

    def _pose(self, raw: Sequence[float]) -> tuple[list[Points], list[tuple[Points, Points]], Points]:
        """Points along the arm, both fingers, and the direction of the hand."""
        joints = self._calibration.joints
        degrees = [raw_to_value(round(ticks), joint, Scale.DEGREES) for ticks, joint in zip(raw, joints, strict=True)]
        pan, lift, elbow, flex, roll = np.radians(degrees[:5])
        opening = raw_to_value(round(raw[5]), joints[5], Scale.RANGE_0_100) / 100

        def direction(elevation: float) -> Points:
            flat = math.cos(elevation)
            return np.array([flat * math.cos(pan), flat * math.sin(pan), math.sin(elevation)])

        elevations = np.cumsum([math.pi / 2 - lift, -math.pi / 2 - elbow, -math.pi / 6 - flex])
        chain = [np.zeros(3), np.array([0.0, 0.0, SHOULDER_HEIGHT])]
        for elevation, length in zip(elevations, (UPPER_ARM, FOREARM, HAND), strict=True):
            chain.append(chain[-1] + length * direction(float(elevation)))
        axis = direction(float(elevations[-1]))
        across = np.array([-math.sin(pan), math.cos(pan), 0.0])
        sideways = math.cos(roll) * across + math.sin(roll) * np.cross(axis, across)
        fingers = []
        for sign in (-1, 1):
            root = chain[-1] + sign * 0.012 * sideways
            fingers.append((root, root + FINGER * axis + sign * 0.03 * opening * sideways))
        return chain, fingers, axis

    def _look(self, eye: Points, target: Points) -> None:
        forward = (target - eye) / np.linalg.norm(target - eye)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        # Straight down has no horizon to level with.
        right = right / np.linalg.norm(right) if np.linalg.norm(right) > 1e-6 else np.array([0.0, -1.0, 0.0])
        self._eye = eye
        self._axes = np.stack([right, np.cross(forward, right), forward])  # rows: right, down, ahead

    def _seen(self, points: Points) -> Points:
        """[points, 3] right, down and ahead of the camera."""
        seen: Points = (points - self._eye) @ self._axes.T
        return seen

    def _pixels(self, seen: Points) -> NDArray[np.int32]:
        """[points, 2] pixel positions of points ahead of the near plane."""
        flat = seen[:, :2] / seen[:, 2:] * self._focal + np.array(self._size) / 2
        return np.clip(np.rint(flat), -10_000, 10_000).astype(np.int32)

    def _polygon(self, image: NDArray[np.uint8], points: Points, colour: Colour) -> None:
        seen = self._seen(points)
        kept = []
        for start, end in zip(seen, np.roll(seen, -1, axis=0), strict=True):
            if start[2] >= NEAR:
                kept.append(start)
            if (start[2] >= NEAR) != (end[2] >= NEAR):
                kept.append(start + (NEAR - start[2]) / (end[2] - start[2]) * (end - start))
        if len(kept) >= 3:
            cv2.fillPoly(image, [self._pixels(np.array(kept))], colour)

    def _bar(self, image: NDArray[np.uint8], start: Points, end: Points, width: float, colour: Colour) -> None:
        seen = self._seen(np.stack([start, end]))
        if seen[:, 2].min() < NEAR:
            return
        a, b = self._pixels(seen).tolist()
        thickness = max(1, min(200, round(self._focal * width / float(seen[:, 2].mean()))))
        cv2.line(image, a, b, colour, thickness)
