"""The verdict of a rehearsal: the whole loop, run with the motors off."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from ...core.errors import CheckFailed
from ...core.files import write_whole
from ...devices.arm.motion import MotionCounts
from .checked_run import CheckedRun
from .run_statistics import RunStatistics
from .summary import CLAMP_WARNING, MISSED_WARNING

PERIOD_SHARE = 0.25  # of a period that a tick may be off, at its 99th percentile
REHEARSAL = "rehearsal.json"


def judge(
    statistics: RunStatistics,
    motion: MotionCounts,
    anomalies: Mapping[str, int],
    run: CheckedRun,
    failure: str,
) -> None:
    """Print the checks, and write them to `rehearsal.json` in the current folder.

    failure: why the loop ended early; empty where it did not. Raises CheckFailed where a check
    failed.
    """
    counts, period_ms, chunking = statistics.counts, 1e3 / run.fps, run.settings.chunking
    ticks = max(counts.ticks, 1)
    errors_ms, chunks = statistics.period_error_ms, len(statistics.chunk_ms)
    off_ms = errors_ms.percentile(99) if errors_ms else math.inf
    few, followed = MISSED_WARNING * ticks, max(motion.accepted, 1)
    checks = [
        ("the loop ran to its end", not failure, failure or "it did"),
        ("it had chunks to execute", chunks > 0, f"{chunks} chunks"),
        (
            "ticks come on time",
            off_ms <= PERIOD_SHARE * period_ms,
            f"p99 {off_ms:.1f} ms off {period_ms:.1f}",
        ),
        ("none is missed", counts.missed <= few, f"{counts.missed} of {ticks}"),
        (
            "actions do not run out",
            chunking == "sync" or not counts.starved,
            f"{counts.starved} held ({chunking})",
        ),
        (
            "every joint answers",
            counts.unanswered <= few,
            f"{counts.unanswered} of {ticks} readings short",
        ),
        ("cameras deliver", not counts.blind, f"{counts.blind} ticks without usable pictures"),
        ("chunks are finite", not counts.bad_chunks, f"{counts.bad_chunks} were not"),
        ("chunks are in time", not counts.late_chunks, f"{counts.late_chunks} were late"),
        ("no target is rejected", not counts.rejected, f"{counts.rejected} rejected"),
        (
            "limits change nothing",
            motion.limited <= CLAMP_WARNING * followed,
            f"{motion.limited} of {followed} changed",
        ),
        ("nothing warns", not statistics.warnings, "; ".join(statistics.warnings) or "no warning"),
    ]
    passed = all(ok for _, ok, _ in checks)
    for name, ok, found in checks:
        print(f"{'pass' if ok else 'FAIL'}  {name:<32}{found}")
    document = {
        "passed": passed,
        "checks": [{"name": name, "passed": ok, "found": found} for name, ok, found in checks],
        "counts": vars(counts),
        "motion": vars(motion),
        "bus": dict(anomalies),
        "fps": run.fps,
        "chunking": chunking,
    }
    write_whole(Path(REHEARSAL), json.dumps(document, indent=1).encode())
    print(f"rehearsal {'passed' if passed else 'failed'}, see {REHEARSAL}")
    if not passed:
        raise CheckFailed(
            "the rehearsal failed: " + ", ".join(name for name, ok, _ in checks if not ok)
        )
