"""One observation in the robot's terms, as calibration uses it, and synthetic ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Statistics = Mapping[str, Sequence[float]]  # name -> a number for each joint, robot units


@dataclass(frozen=True)
class Sample:
    """What a policy is asked at one moment."""

    images: Mapping[str, NDArray[np.uint8]]  # camera -> [H, W, 3] RGB
    state: NDArray[np.float32]  # [dof] in robot units
    task: str


def draw_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Gradients and blocks [height, width, 3] that compress well and show shifted pixels."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack(
        [255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 17) * np.cos(y / 11)], -1
    )
    for _ in range(16):
        row, column, side = rng.integers(height), rng.integers(width), rng.integers(8, 80)
        image[row : row + side, column : column + side] = rng.integers(0, 256, 3)
    return image.astype(np.uint8)


def draw_state(rng: np.random.Generator, dof: int, statistics: Statistics) -> NDArray[np.float32]:
    """-> [dof] in robot units, by mean and std of `statistics`, 0 and 1 where they are missing."""
    mean, std = np.array(statistics.get("mean", 0)), np.array(statistics.get("std", 1))
    return np.asarray(mean + std * rng.standard_normal(dof), np.float32)


def draw_samples(
    count: int,
    cameras: Sequence[str],
    dof: int,
    statistics: Statistics,
    instructions: Sequence[str],
    seed: int,
) -> tuple[Sample, ...]:
    """`count` different samples: drawn pictures and states, with the instructions in turns."""
    rng = np.random.default_rng(seed)

    def picture() -> NDArray[np.uint8]:
        down, across = rng.choice([-1, 1], 2)
        image = draw_image(rng, 240, 320)[::down, ::across, rng.permutation(3)]
        return (image * rng.uniform(0.3, 1.0)).astype(np.uint8)

    return tuple(
        Sample(
            {camera: picture() for camera in cameras},
            draw_state(rng, dof, statistics),
            instructions[i % len(instructions)],
        )
        for i in range(count)
    )
