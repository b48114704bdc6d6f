"""The pictures that the policy may see, and how long each camera has had none."""

import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ...core.errors import SafetyStop
from ...devices.cameras.camera_watch import CameraWatch
from .run_statistics import RunStatistics

CAMERA_FAULT_S = 2.0  # a camera without a usable picture for this long ends the run

Images = Mapping[str, NDArray[np.uint8]]


class CameraMonitor:
    """Looks at all cameras once a tick."""

    def __init__(self, cameras: CameraWatch, statistics: RunStatistics) -> None:
        self._cameras, self._statistics = cameras, statistics
        self._usable_s: dict[str, float] = {}  # when each camera last had a usable picture

    def look(self, now: float, *, patient: bool) -> Images:
        """The newest picture of every camera; empty where one has a problem.

        patient: wait for a camera as long as it takes, as during a stop, when somebody may repair
        it. Raises SafetyStop where a camera had no usable picture for CAMERA_FAULT_S.
        """
        start = time.perf_counter()
        views = self._cameras.look()
        self._statistics.capture_ms.add(1e3 * (time.perf_counter() - start))
        for name, view in views.items():
            if not view.problem or patient:
                self._usable_s[name] = now
            elif now - self._usable_s.setdefault(name, now) > CAMERA_FAULT_S:
                raise SafetyStop(
                    f"camera '{name}' has had no usable picture for {CAMERA_FAULT_S:g} s: "
                    f"{view.problem}"
                )
        if any(view.problem for view in views.values()):
            self._statistics.counts.blind += 1
            return {}
        oldest_s = min(view.time_s for view in views.values())
        self._statistics.picture_age_ms.add(1e3 * (time.monotonic() - oldest_s))
        return {name: view.image for name, view in views.items()}
