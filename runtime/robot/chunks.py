"""The actions of the current chunk as a queue, and how one chunk is joined to the next.

    sync   the next chunk is requested when the queue is empty; the arm holds meanwhile
    async  requested early; it replaces the rest of the old chunk, blended from the last action
    rtc    requested early, with the rest of the old chunk, which the policy continues
           (real-time chunking); blended only when it comes later than the policy was told

Rows are counted in executed actions, not in seconds: a new chunk starts after as many of its rows
as the arm has executed since the observation. So a late chunk skips nothing while the arm holds.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Chunking = Literal["sync", "async", "rtc"]
Array = NDArray[np.float32]

BLEND_ROWS = 10  # a chunk is blended in over so many actions
LATENCIES = 50
LATE_FACTOR, LATE_S = 3.0, 1.0  # a chunk that took longer than both is too old to execute


class LatencyTracker:
    """How long chunks take. Leave out the first inference of a process: it is slower.

    p95 is rounded down, so that one slow chunk among few does not stop early requests.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=LATENCIES)

    def add(self, latency_s: float) -> None:
        self._seconds.append(latency_s)

    @property
    def p95_s(self) -> float:
        return (
            float(np.percentile(self._seconds, 95, method="lower")) if self._seconds else math.inf
        )

    def is_late(self, latency_s: float) -> bool:
        return latency_s > max(LATE_S, LATE_FACTOR * self.p95_s)


@dataclass(frozen=True)
class Action:
    """values: float32 [dof] in robot units. due_s: monotonic time it is meant for."""

    values: Array
    due_s: float


@dataclass(frozen=True)
class Continuation:
    """What a request says about the current chunk.

    executed: the action count at that moment. prev_chunk: float32 [k, dof], the unexecuted tail as
    predicted. delay: how many of its actions run before the new chunk starts.
    """

    executed: int
    prev_chunk: Array | None
    delay: int


@dataclass(frozen=True)
class Seam:
    """Where one chunk replaces another, [dof] each.

    gap: how far the two differ about one and the same action. step: from the last executed target
    to the first one of the new chunk, as it will be executed.
    """

    gap: Array
    step: Array


class ChunkQueue:
    """The actions that are still to be executed. rows: how many rows of a chunk are executed."""

    def __init__(self, chunking: Sync, rows: int, period_s: float, latency: LatencyTracker) -> None:
        self.chunking, self.rows, self.period_s, self.latency = chunking, rows, period_s, latency
        self._actions: deque[Action] = deque()
        self._predicted: Array | None = None  # the whole current chunk, as predicted
        self._cursor = 0  # how many of its rows are past
        self._executed = 0
        self._last: Array | None = None  # last executed

    def __len__(self) -> int:
        return len(self._actions)

    @property
    def next(self) -> Action | None:
        return self._actions[0] if self._actions else None

    @property
    def keeps_up(self) -> bool:
        """Whether a chunk requested with half of the last one left arrives before the queue is
        empty."""
        return self.latency.p95_s < self.rows * self.period_s / 2

    @property
    def delay(self) -> int:
        """Actions that run while a chunk is computed: p95 of the latency, rounded up."""
        return math.ceil(self.latency.p95_s / self.period_s)

    @property
    def tail(self) -> Array | None:
        """What is left of the current chunk, as predicted; None when no action is left."""
        if self._predicted is None or not self._actions:
            return None
        return self._predicted[self._cursor :]

    @property
    def wants_chunk(self) -> bool:
        """Whether it is time to request a chunk."""
        return len(self._actions) <= self.chunking.request_at(self)

    def continuation(self) -> Continuation:
        """What to say about the current chunk in a request."""
        return Continuation(self._executed, *self.chunking.previous(self))

    def done(self, *, followed: bool = True) -> None:
        """The next action was sent. followed: False where the arm rejected it: it was not
        executed."""
        values = self._actions.popleft().values
        self._cursor += 1
        if followed:
            self._last = values
            self._executed += 1

    def wait(self) -> None:
        """The arm still moves to the next action: everything is due one period later."""
        self._actions = deque(Action(a.values, a.due_s + self.period_s) for a in self._actions)

    def clear(self) -> None:
        """Forget what is left, as after a stop."""
        self._actions.clear()
        self._predicted = self._last = None

    def join(self, chunk: Array, asked: Continuation, now_s: float) -> Seam | None:
        """Replace what is left by `chunk`, [rows, dof], the answer to `asked`.

        -> how the two join; None where there is nothing to join to.
        """
        skip = self._executed - asked.executed
        rows, last = chunk[skip : self.rows], self._last
        seam = None
        if last is not None and len(rows):
            # The two differ in the last executed action, or, where none was, in the next one.
            next_action = self._actions[0].values if self._actions else last
            gap = last - chunk[skip - 1] if skip else next_action - rows[0]
            if (skip or self._actions) and self.chunking.blends(skip, asked):
                rows = blended(rows, gap)
            seam = Seam(gap, rows[0] - last)
        self._predicted, self._cursor = chunk, skip
        self._actions = deque(Action(row, now_s + i * self.period_s) for i, row in enumerate(rows))
        return seam


class Sync:
    """The next chunk is requested when no action is left."""

    def request_at(self, queue: ChunkQueue) -> int:
        """When to ask: at so many actions left, or fewer."""
        return 0

    def previous(self, queue: ChunkQueue) -> tuple[Array | None, int]:
        """What to ask: the part of the current chunk that the policy continues, float32 [k, dof],
        and how many of its actions run before the new chunk starts."""
        return None, 0

    def blends(self, skipped: int, asked: Continuation) -> bool:
        """How to join: whether the first rows are blended with the last executed action. skipped:
        rows that ran since the request."""
        return False


class Async(Sync):
    """The next chunk is requested while half of the current one is left."""

    def request_at(self, queue: ChunkQueue) -> int:
        """Half of the chunk, or twice what runs meanwhile: latencies vary."""
        return max(queue.rows // 2, 2 * queue.delay) if queue.keeps_up else 0

    def blends(self, skipped: int, asked: Continuation) -> bool:
        return True


class RealTime(Async):
    """As async, and the policy continues the current chunk."""

    def previous(self, queue: ChunkQueue) -> tuple[Array | None, int]:
        tail = queue.tail
        return (None, 0) if tail is None else (tail, min(queue.delay, len(tail)))

    def blends(self, skipped: int, asked: Continuation) -> bool:
        return skipped > asked.delay


CHUNKINGS: dict[Chunking, Sync] = {"sync": Sync(), "async": Async(), "rtc": RealTime()}


def blended(rows: Array, offset: Array) -> Array:
    """`rows`, [n, dof], shifted by `offset`, [dof], which fades to zero over BLEND_ROWS."""
    fade = np.clip(1 - np.arange(1, len(rows) + 1) / (BLEND_ROWS + 1), 0, 1)
    return np.asarray(rows + fade[:, None] * offset, np.float32)


def degrees(values: Array, per_unit: ArrayLike) -> float:
    """The largest amount of a joint, [dof], in degrees."""
    return float(np.abs(values * np.asarray(per_unit)).max())
