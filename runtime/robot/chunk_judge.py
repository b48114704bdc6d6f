"""Whether a chunk may be executed: it must be finite, and not far too late."""

import numpy as np

from ...core.errors import SafetyStop
from .chunks import LatencyTracker
from .inference import ActionChunk
from .run_statistics import Counts

# So many chunks that are not finite, in a row or within BAD_CHUNKS_S, end the run.
BAD_CHUNKS, BAD_CHUNKS_S = 3, 10.0


class ChunkJudge:
    """Judges chunks in the order of their arrival, and keeps the latency up to date."""

    def __init__(self, latency: LatencyTracker, counts: Counts) -> None:
        self._latency, self._counts = latency, counts
        self._bad_s: list[float] = []
        self._bad_in_a_row = 0

    def is_finite(self, chunk: ActionChunk, now: float) -> bool:
        """Raises SafetyStop for the last of BAD_CHUNKS."""
        if np.isfinite(chunk.actions).all():
            self._bad_in_a_row = 0
            return True
        self._counts.bad_chunks += 1
        self._bad_s = [t for t in self._bad_s if now - t <= BAD_CHUNKS_S] + [now]
        self._bad_in_a_row += 1
        if max(len(self._bad_s), self._bad_in_a_row) >= BAD_CHUNKS:
            raise SafetyStop(f"the policy gave {BAD_CHUNKS} chunks that are not finite")
        return False

    def is_late(self, chunk: ActionChunk, now: float) -> bool:
        """By its age, which exceeds its latency where the loop itself was delayed."""
        late = self._latency.is_late(now - chunk.request.time_s)
        self._latency.add(chunk.latency_s)
        return late
