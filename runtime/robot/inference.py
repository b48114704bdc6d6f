"""The policy in a thread of its own, so that control never waits for it."""

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..policy.policy import Policy, Timing
from .chunks import Ask

STOP_LIMIT_S = 30.0  # a device that hangs must not keep the process alive


@dataclass(frozen=True)
class Observation:
    """What the policy is asked about. time_s: monotonic."""

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float64]
    ask: Ask
    time_s: float


@dataclass(frozen=True)
class Chunk:
    """What it answered. actions: float32 [rows, dof] in robot units; noise: what they were made from, in how many
    steps; latency_s: from request to answer."""

    actions: NDArray[np.float32]
    noise: NDArray[np.float32]
    steps: int
    observation: Observation
    latency_s: float
    timing: Timing


class InferenceThread:
    """One request at a time: `request`, then `poll` until the chunk is there."""

    def __init__(self, policy: Policy, task: str, steps: int) -> None:
        self._policy, self._task, self._steps = policy, task, steps
        self._requests: queue.SimpleQueue[Observation | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Chunk | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self.busy = False

    def start(self) -> None:
        self._thread.start()

    def request(self, observation: Observation) -> None:
        """Ask for a chunk; returns at once. Only while not busy."""
        assert not self.busy, "one request at a time"
        self.busy = True
        self._requests.put(observation)

    def poll(self) -> Chunk | None:
        """The chunk that was asked for, or None while it is computed. Raises what the policy raised."""
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            return None
        self.busy = False
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self) -> None:
        """End the thread; waits for a chunk under way, but not for ever. May be called again."""
        self._requests.put(None)
        if self._thread.is_alive():
            self._thread.join(STOP_LIMIT_S)

    def _work(self) -> None:
        while (observation := self._requests.get()) is not None:
            try:
                noise = self._policy.draw_noise()
                actions = self._policy.predict_chunk(
                    observation.images,
                    observation.state,
                    self._task,
                    noise=noise,
                    steps=self._steps,
                    prev_chunk=observation.ask.prev_chunk,
                    delay=observation.ask.delay,
                )
                latency_s = time.monotonic() - observation.time_s
                self._answers.put(
                    Chunk(actions, noise, self._steps, observation, latency_s, self._policy.timing)
                )
            except BaseException as e:  # raised again in the thread that polls
                self._answers.put(e)
