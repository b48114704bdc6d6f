"""Chunks as a queue of actions, and how one chunk is joined to the next.

    sync   the next chunk is asked for when the queue is empty; the arm holds meanwhile
    async  asked for early; it takes over in the middle of the old one, eased in from the last executed action
    rtc    asked for early with the unexecuted rest of the old one, which it follows (real-time chunking)

Rows are counted in executed actions, not in seconds: a new chunk starts behind as many of its rows as the arm has
really executed since the observation. A late chunk therefore never skips ahead of an arm that stood still.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Chunking = Literal["sync", "async", "rtc"]
Array = NDArray[np.float32]

JOIN_ROWS = 10  # an async chunk is eased in over so many actions
LATENCIES = 50
LATE_FACTOR, LATE_S = 3.0, 1.0  # a chunk that took longer than both shows a world that is gone


class LatencyTracker:
    """How long chunks take. The first inference of a process is no example: leave it out. A single slow one does not
    count (p95 is rounded down): where few are known, it would stop the arm between chunks for the next twenty."""

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
class Ask:
    """What a request carries beside the observation. executed: the action count at that moment; prev_chunk: float32
    [k, dof], the unexecuted tail as predicted; delay: how many of its actions will have run."""

    executed: int
    prev_chunk: Array | None
    delay: int


@dataclass(frozen=True)
class Seam:
    """Where one chunk takes over from another, [dof] each. gap: how far the two disagree about one and the same
    action; step: from the last executed target to the first of the new chunk, as it will be executed."""

    gap: Array
    step: Array


class ChunkQueue:
    """The actions that are still to be executed. rows: how many rows of a chunk are executed."""

    def __init__(
        self, chunking: Chunking, rows: int, period_s: float, latency: LatencyTracker
    ) -> None:
        self.chunking, self.rows, self.period_s, self.latency = chunking, rows, period_s, latency
        self._actions: deque[Action] = deque()
        self._predicted: Array | None = None  # the whole chunk under way, as predicted
        self._cursor = 0  # how many of its rows lie behind
        self._executed = 0
        self._last: Array | None = None  # last executed

    def __len__(self) -> int:
        return len(self._actions)

    @property
    def next(self) -> Action | None:
        return self._actions[0] if self._actions else None

    @property
    def keeps_up(self) -> bool:
        """Whether a chunk asked for with half of the last one left arrives before the queue is empty."""
        return self.latency.p95_s < self.rows * self.period_s / 2

    @property
    def wants_chunk(self) -> bool:
        """Whether it is time to ask: half of the chunk is left, or twice what runs meanwhile (latencies vary)."""
        early = self.chunking != "sync" and self.keeps_up
        return len(self._actions) <= (max(self.rows // 2, 2 * self.delay) if early else 0)

    @property
    def delay(self) -> int:
        """Actions that run while a chunk is computed: p95 of the latency, rounded up."""
        return math.ceil(self.latency.p95_s / self.period_s)

    def ask(self) -> Ask:
        tail = (
            None
            if self._predicted is None or not self._actions
            else self._predicted[self._cursor :]
        )
        if self.chunking != "rtc" or tail is None:
            return Ask(self._executed, None, 0)
        return Ask(self._executed, tail, min(self.delay, len(tail)))

    def done(self, *, followed: bool = True) -> None:
        """The next action was sent. followed: False where the arm rejected it, and so did not execute it."""
        values = self._actions.popleft().values
        self._cursor += 1
        if followed:
            self._last = values
            self._executed += 1

    def wait(self) -> None:
        """The arm is still on its way to the next action: everything is due one period later."""
        self._actions = deque(Action(a.values, a.due_s + self.period_s) for a in self._actions)

    def clear(self) -> None:
        """Forget what is left, as after a stop."""
        self._actions.clear()
        self._predicted = self._last = None

    def join(self, chunk: Array, ask: Ask, now_s: float) -> Seam | None:
        """Replace what is left by `chunk`, [rows, dof], that answers `ask`; -> how well they join, None where there
        is nothing to join to."""
        skip = self._executed - ask.executed
        rows, last = chunk[skip : self.rows], self._last
        seam = None
        if last is not None and len(rows):
            # How far the two are apart: in the last executed action, or, where none was executed, in the next one.
            coming = self._actions[0].values if self._actions else last
            gap = last - chunk[skip - 1] if skip else coming - rows[0]
            late = self.chunking == "rtc" and skip > ask.delay
            if (self.chunking == "async" or late) and (skip or self._actions):
                rows = _eased(rows, gap)
            seam = Seam(gap, rows[0] - last)
        self._predicted, self._cursor = chunk, skip
        self._actions = deque(Action(row, now_s + i * self.period_s) for i, row in enumerate(rows))
        return seam


def _eased(rows: Array, offset: Array) -> Array:
    """`rows` shifted by `offset`, which fades out over JOIN_ROWS."""
    fade = np.clip(1 - np.arange(1, len(rows) + 1) / (JOIN_ROWS + 1), 0, 1)
    return np.asarray(rows + fade[:, None] * offset, np.float32)


def degrees(values: Array, per_unit: Sequence[float] | NDArray[np.float64]) -> float:
    """The largest amount of a joint, [dof], in degrees."""
    return float(np.abs(values * np.asarray(per_unit)).max())
