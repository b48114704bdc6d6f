"""LeRobot's normalisation of states and actions.

Source: lerobot 0.4.4, processor/normalize_processor.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Mode = Literal["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10", "IDENTITY"]
# The two statistics that each mode needs.
NEEDS: dict[str, tuple[str, ...]] = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    "IDENTITY": (),
}


@dataclass(frozen=True)
class Normalization:
    """How a vector is scaled.

    `statistics` holds every per-dimension statistic of the checkpoint: the mode needs two of them,
    the others describe the range seen in training. Without statistics the values stay as they are,
    as in LeRobot.
    """

    mode: Mode
    eps: float
    statistics: dict[str, tuple[float, ...]]

    @property
    def active(self) -> bool:
        """Whether values are changed at all."""
        return self.mode != "IDENTITY" and bool(self.statistics)

    def problems(self, dim: int) -> list[str]:
        """Why this cannot normalise vectors of `dim` values; the exporter checks with it."""
        if not self.active:
            return []
        if not 0 < self.eps < 1:
            return [f"eps is {self.eps}, expected a small number above 0"]
        found = [
            f"{self.mode} needs statistic '{name}'"
            for name in NEEDS[self.mode]
            if name not in self.statistics
        ]
        for name, values in self.statistics.items():
            if len(values) != dim:
                found.append(f"statistic '{name}' has {len(values)} values, expected {dim}")
            elif not np.all(np.isfinite(values)):
                found.append(f"statistic '{name}' is not finite")
        if found:
            return found
        first, second = self._pair()
        if self.mode == "MEAN_STD" and (second < 0).any():
            found.append("statistic 'std' is negative")
        elif self.mode != "MEAN_STD" and (first > second).any():
            found.append(f"statistic '{NEEDS[self.mode][0]}' is above '{NEEDS[self.mode][1]}'")
        return found

    def normalize(self, x: Array) -> Array:
        """Robot units [..., dim] -> the policy's units, float32."""
        return self._normalized(x, lambda std: std + self.eps)

    def normalize_inverse(self, x: Array) -> Array:
        """The exact inverse of `unnormalize`, without LeRobot's eps."""
        return self._normalized(x, lambda std: np.where(std == 0, 1, std))

    def _normalized(self, x: Array, divisor: Callable[[Array], Array]) -> Array:
        if not self.active:
            return x.astype(np.float32)
        first, second = self._pair()
        if self.mode == "MEAN_STD":
            return np.asarray((x - first) / divisor(second), np.float32)
        return np.asarray(2 * (x - first) / self._range(first, second) - 1, np.float32)

    def unnormalize(self, x: Array) -> Array:
        """The policy's units [..., dim] -> robot units, float32."""
        if not self.active:
            return x.astype(np.float32)
        first, second = self._pair()
        if self.mode == "MEAN_STD":
            return np.asarray(x * second + first, np.float32)
        return np.asarray((x + 1) / 2 * self._range(first, second) + first, np.float32)

    def _pair(self) -> tuple[Array, Array]:
        """The two statistics of the mode."""
        first, second = (np.array(self.statistics[name], np.float32) for name in NEEDS[self.mode])
        return first, second

    def _range(self, low: Array, high: Array) -> Array:
        """high - low, and eps where they are equal."""
        return np.where(high == low, self.eps, high - low).astype(np.float32)
