"""What a run counts and measures, in bounded memory: a run may last for days."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

BINS_PER_E = 100  # bins per factor e: each is 1 % wide, so a percentile is within 0.5 %
SMALLEST = 1e-6
KEPT_WARNINGS = 50


class Distribution:
    """Values as a histogram with logarithmic bins; minimum and maximum are exact.

    Values from SMALLEST up are kept within 0.5 %, smaller ones count as SMALLEST. Where `values` is
    a list, every value is appended to it too: for short runs only.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.values: list[float] | None = None
        self.min, self.max = math.inf, -math.inf
        self._bins: Counter[int] = Counter()  # at most some thousand keys
        self._count = 0
        for value in values:
            self.add(value)

    def __len__(self) -> int:
        return self._count

    def add(self, value: float) -> None:
        self._count += 1
        self.min, self.max = min(self.min, value), max(self.max, value)
        self._bins[math.floor(BINS_PER_E * math.log(max(value, SMALLEST)))] += 1
        if self.values is not None:
            self.values.append(value)

    def percentile(self, percent: float) -> float:
        """As numpy.percentile, within 0.5 %. Only where there are values."""
        bins = sorted(self._bins)
        counted = np.cumsum([self._bins[i] for i in bins])
        rank = percent / 100 * (self._count - 1)

        def value(rank: int) -> float:
            middle = math.exp(
                (bins[int(np.searchsorted(counted, rank, "right"))] + 0.5) / BINS_PER_E
            )
            return min(max(middle, self.min), self.max)

        below, above = value(math.floor(rank)), value(math.ceil(rank))
        return below + (above - below) * (rank - math.floor(rank))


@dataclass
class Counts:
    """What happened, in ticks where nothing else is said."""

    ticks: int = 0
    acted: int = 0
    held: int = 0  # no action was there
    starved: int = 0  # of them: after the first action, not during a stop
    rejected: int = 0  # actions that the arm did not follow
    missed: int = 0  # ticks that never ran because an earlier one took too long
    unanswered: int = 0  # a joint did not answer
    blind: int = 0  # a camera had no usable picture
    bad_chunks: int = 0  # chunks with a NaN or an infinity
    late_chunks: int = 0  # chunks that were not executed because they took far too long
    stops: int = 0
    warnings: int = 0


@dataclass
class RunStatistics:
    """What the summary of a run is made of."""

    counts: Counts = field(default_factory=Counts)
    warnings: list[str] = field(default_factory=list)  # the first KEPT_WARNINGS
    # A chunk: its stages, and from the observation to the answer.
    preprocess_ms: Distribution = field(default_factory=Distribution)
    prefix_ms: Distribution = field(default_factory=Distribution)
    denoise_ms: Distribution = field(default_factory=Distribution)
    chunk_ms: Distribution = field(default_factory=Distribution)
    # Where a chunk follows another: its first step as executed, and how far the two differ.
    seams_deg: Distribution = field(default_factory=Distribution)
    gaps_deg: Distribution = field(default_factory=Distribution)
    # A tick: start to start against the period; start after its due time; all of its work.
    period_error_ms: Distribution = field(default_factory=Distribution)
    late_ms: Distribution = field(default_factory=Distribution)
    busy_ms: Distribution = field(default_factory=Distribution)
    read_ms: Distribution = field(default_factory=Distribution)
    write_ms: Distribution = field(default_factory=Distribution)
    capture_ms: Distribution = field(default_factory=Distribution)  # newest picture of each camera
    picture_age_ms: Distribution = field(default_factory=Distribution)  # oldest picture of a tick
    queued: Distribution = field(default_factory=Distribution)  # actions left

    @classmethod
    def keeping_values(cls) -> "RunStatistics":
        """With every value, for a benchmark of some minutes."""
        statistics = cls()
        for distribution in vars(statistics).values():
            if isinstance(distribution, Distribution):
                distribution.values = []
        return statistics

    def warn(self, text: str) -> None:
        self.counts.warnings += 1
        if len(self.warnings) < KEPT_WARNINGS:
            self.warnings.append(text)
