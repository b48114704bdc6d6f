"""The policy in its own thread, so that the control loop never waits for it."""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ...core.worker import Worker
from ..policy.policy import Policy, Timing
from .chunks import Continuation

STOP_LIMIT_S = 30.0  # a device that hangs must not keep the process alive


@dataclass(frozen=True)
class ChunkRequest:
    """What the policy is asked. time_s: monotonic, when the observation was made."""

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float64]
    continuation: Continuation
    time_s: float


@dataclass(frozen=True)
class ActionChunk:
    """What the policy answered.

    actions: float32 [rows, dof] in robot units. noise: float32 [1, rows, max_action_dim], the start
    of the denoising. steps: denoise steps. latency_s: from the observation to the answer.
    """

    actions: NDArray[np.float32]
    noise: NDArray[np.float32]
    steps: int
    request: ChunkRequest
    latency_s: float
    timing: Timing


class InferenceThread:
    """One request at a time: `request`, then `poll` until the chunk is there."""

    def __init__(self, policy: Policy, task: str, steps: int) -> None:
        self._policy, self._task, self._steps = policy, task, steps
        self._worker = Worker("inference", limit=1)
        self._answer: Future[ActionChunk] | None = None

    @property
    def busy(self) -> bool:
        """Whether a chunk was requested and not yet polled."""
        return self._answer is not None

    def request(self, request: ChunkRequest) -> None:
        """Ask for a chunk; returns at once. Only while not busy."""
        assert not self.busy, "one request at a time"
        self._answer = self._worker.submit(partial(self._compute, request))

    def poll(self) -> ActionChunk | None:
        """The requested chunk, or None while it is computed. Raises what the policy raised."""
        if self._answer is None or not self._answer.done():
            return None
        answer, self._answer = self._answer, None
        return answer.result()

    def stop(self) -> None:
        """End the thread. Waits at most STOP_LIMIT_S for the current chunk."""
        self._worker.stop(STOP_LIMIT_S)

    def _compute(self, request: ChunkRequest) -> ActionChunk:
        noise = self._policy.draw_noise()
        actions = self._policy.predict_chunk(
            request.images,
            request.state,
            self._task,
            noise=noise,
            steps=self._steps,
            prev_chunk=request.continuation.prev_chunk,
            delay=request.continuation.delay,
        )
        latency_s = time.monotonic() - request.time_s
        return ActionChunk(actions, noise, self._steps, request, latency_s, self._policy.timing)
