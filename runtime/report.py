"""What a run looked like, for a person."""

from collections.abc import Sequence

import numpy as np

from .control import Log


def latency_table(log: Log, period_s: float) -> str:
    """Stages of a chunk and of a tick: median, 95th percentile and worst, in milliseconds."""
    stages: list[tuple[str, Sequence[float]]] = []
    if log.chunks:
        timings = [c.timing for c in log.chunks]
        stages = [
            ("preprocess", [t.preprocess_ms for t in timings]),
            ("prefix", [t.prefix_ms for t in timings]),
            ("denoise", [t.denoise_ms for t in timings]),
            ("chunk, as the loop saw it", [1e3 * c.latency_s for c in log.chunks]),
        ]
    stages += [("tick: work", log.busy_ms), ("tick: late by", log.late_ms)]
    lines = [f"{'milliseconds':<28}{'p50':>10}{'p95':>10}{'max':>10}{'n':>8}"]
    for name, values in stages:
        if values:
            p50, p95 = np.percentile(values, [50, 95])
            lines.append(f"{name:<28}{p50:>10.2f}{p95:>10.2f}{max(values):>10.2f}{len(values):>8}")
    c = log.counts
    lines.append(
        f"{c.ticks} ticks of {1e3 * period_s:.1f} ms: {c.acted} with an action, {c.held} held while no action was "
        f"there, {c.missed} missed"
    )
    troubles = [
        f"{count} {name}"
        for name, count in (
            ("failed reads", c.failed_reads),
            ("ticks with stale camera frames", c.stale_frames),
            ("chunks that were not finite", c.bad_chunks),
        )
        if count
    ]
    return "\n".join(lines + ([", ".join(troubles)] if troubles else []))
