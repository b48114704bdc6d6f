"""Flow matching on the host: step schedule, time embedding, weights of real-time chunking."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError
from ..bundle.manifest import Sampling
from ..engines.graphs import Step

Schedule = Literal["zeros", "ones", "linear", "exp"]


@dataclass(frozen=True)
class RealTimeChunking:
    """How strongly a new chunk follows the rest of the previous one (LeRobot's RTCConfig)."""

    schedule: Schedule = "exp"
    execution_horizon: int = 10
    max_guidance_weight: float = 10.0

    def __post_init__(self) -> None:
        """Raises InputError with every setting that is wrong."""
        wrong = []
        if self.schedule not in get_args(Schedule):
            wrong.append(
                f"schedule is {self.schedule!r}, expected one of {', '.join(get_args(Schedule))}"
            )
        if not isinstance(self.execution_horizon, int) or self.execution_horizon < 1:
            wrong.append(
                f"execution_horizon is {self.execution_horizon}, expected at least 1 action"
            )
        if not 0 < self.max_guidance_weight < math.inf:
            wrong.append(
                f"max_guidance_weight is {self.max_guidance_weight}, "
                "expected a finite number above 0"
            )
        if wrong:
            raise InputError("real-time chunking: " + "; ".join(wrong))

    def prefix_weights(self, delay: int, tail: int, chunk: int) -> NDArray[np.float32]:
        """Weight of each of `chunk` actions, [chunk]: 1 for the first `delay`, then falling to 0.

        It is 0 from the horizon on, and from the end of the tail on. Source:
        RTCProcessor.get_prefix_weights, lerobot 0.4.4.
        """
        end = min(self.execution_horizon, tail, chunk)
        start = min(delay, end)
        weights = np.zeros(chunk, np.float32)
        weights[:start] = 1
        if self.schedule == "ones":
            weights[:end] = 1
        elif self.schedule in ("linear", "exp") and end > start:
            falling = np.linspace(1, 0, end - start + 2)[1:-1]
            if self.schedule == "exp":
                falling = falling * np.expm1(falling) / (math.e - 1)
            weights[start:end] = falling
        return weights

    def guidance(self, time: float) -> float:
        """min((1 - tau) / tau * ((1 - tau)^2 + tau^2) / (1 - tau)^2, maximum) with tau = 1 -
        time."""
        tau = 1.0 - time
        if tau <= 0 or tau >= 1:
            return self.max_guidance_weight
        return min((time / tau) * (time**2 + tau**2) / time**2, self.max_guidance_weight)


def time_embedding(
    time: float, width: int, min_period: float, max_period: float
) -> NDArray[np.float32]:
    """Sine and cosine of time * 2 pi / period, [1, width]. float64 inside: angles reach 1570
    rad."""
    fraction = np.linspace(0.0, 1.0, width // 2)
    angle = 1.0 / (min_period * (max_period / min_period) ** fraction) * 2 * math.pi * time
    return np.concatenate([np.sin(angle), np.cos(angle)])[None].astype(np.float32)


def schedule(
    steps: int, width: int, sampling: Sampling, rtc: RealTimeChunking | None
) -> list[Step]:
    """Euler from time 1 to 0 in `steps` equal steps; `rtc` adds the guidance of each."""
    dt = -1.0 / steps
    result = []
    for i in range(steps):
        time = 1.0 + i * dt
        seen = float(np.float32(time))  # LeRobot hands the network a float32 time
        scalars = {"time": time, "dt": dt, "guidance": rtc.guidance(time) if rtc else 0.0}
        step = {name: np.array([value], np.float32) for name, value in scalars.items()}
        embedding = time_embedding(seen, width, sampling.min_period, sampling.max_period)
        result.append(step | {"time_embedding": embedding})
    return result
