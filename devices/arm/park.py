"""The way back to where the arm lay: a minimum-jerk move, so that switching off does not drop it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .limits import TICKS_PER_DEG

# A minimum-jerk move is 15/8 times as fast in its middle as on average.
PEAK = 15 / 8
SPEED_DEG_S, LIMIT_S = 60.0, 5.0

Ticks = NDArray[np.float64]  # [6]


class Park:
    """From `start` to `rest`, [6] raw ticks, beginning at `start_s` (monotonic), within `limit_ticks_s`."""

    def __init__(self, start: Ticks, rest: Ticks, start_s: float, limit_ticks_s: Ticks) -> None:
        self._start, self._rest, self._start_s = start, rest, start_s
        way = PEAK * np.abs(rest - start)
        usual_s = min(LIMIT_S, float(way.max()) / (SPEED_DEG_S * TICKS_PER_DEG))
        # Never faster than a goal may go: it must have arrived before it is let go.
        self.duration_s = max(usual_s, float((way / limit_ticks_s).max()))
        self.end_s = start_s + self.duration_s

    def goal(self, time_s: float) -> Ticks:
        """Where the joints should be at `time_s`, [6] raw ticks."""
        part = 1.0 if time_s >= self.end_s else (time_s - self._start_s) / self.duration_s
        smooth = part**3 * (10 - 15 * part + 6 * part**2)
        return np.asarray(self._start + smooth * (self._rest - self._start), np.float64)
