"""The move back to where the arm lay, so that switching off does not drop it.

The path is a minimum-jerk move.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .limits import TICKS_PER_DEG

# Peak speed of a minimum-jerk move over its mean speed.
PEAK = 15 / 8
SPEED_DEG_S, LIMIT_S = 60.0, 5.0

Ticks = NDArray[np.float64]  # [6]


class Park:
    """A move from `start` to `rest`, [6] raw ticks, within `limit_ticks_s`. start_s: monotonic."""

    def __init__(self, start: Ticks, rest: Ticks, start_s: float, limit_ticks_s: Ticks) -> None:
        self._start, self._rest, self._start_s = start, rest, start_s
        way = PEAK * np.abs(rest - start)
        usual_s = min(LIMIT_S, float(way.max()) / (SPEED_DEG_S * TICKS_PER_DEG))
        # The speed limit applies: the arm must have arrived before it is switched off.
        self.duration_s = max(usual_s, float((way / limit_ticks_s).max()))
        self.end_s = start_s + self.duration_s

    def goal(self, time_s: float) -> Ticks:
        """Where the joints should be at `time_s`, [6] raw ticks."""
        part = 1.0 if time_s >= self.end_s else (time_s - self._start_s) / self.duration_s
        smooth = part**3 * (10 - 15 * part + 6 * part**2)
        return np.asarray(self._start + smooth * (self._rest - self._start), np.float64)
