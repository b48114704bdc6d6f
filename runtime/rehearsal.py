"""A rehearsal: the whole loop with the motors off, against the live arm and cameras, and a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .control import Log
from .errors import CheckFailed
from .plan import Plan
from .report import CLAMP_WARNING, MISSED_WARNING

if TYPE_CHECKING:
    from ..devices.motion import MotionCounts

REPORT = "rehearsal.json"
PERIOD_SHARE = 0.25  # of a period that a tick may be off, at its 99th percentile


def judge(log: Log, motion: MotionCounts, anomalies: Mapping[str, int], plan: Plan, failure: str) -> None:
    """Print and write `rehearsal.json`. Raises CheckFailed when something would have gone wrong."""
    counts, period_ms = log.counts, 1e3 / plan.fps
    ticks = max(counts.ticks, 1)
    off_ms = float(np.percentile(log.period_error_ms, 99)) if log.period_error_ms else float("inf")
    chunking = plan.settings.chunking
    few = MISSED_WARNING * ticks
    followed = max(motion.accepted, 1)
    checks = [
        ("the loop ran to its end", not failure, failure or "it did"),
        ("it had chunks to execute", bool(log.chunks), f"{len(log.chunks)} chunks"),
        ("ticks come on time", off_ms <= PERIOD_SHARE * period_ms, f"p99 {off_ms:.1f} ms off {period_ms:.1f}"),
        ("none is missed", counts.missed <= few, f"{counts.missed} of {ticks}"),
        ("actions do not run out", chunking == "sync" or not counts.starved, f"{counts.starved} held ({chunking})"),
        ("every joint answers", counts.unanswered <= few, f"{counts.unanswered} of {ticks} readings short"),
        ("cameras deliver", not counts.blind, f"{counts.blind} ticks without usable pictures"),
        ("chunks are finite", not counts.bad_chunks, f"{counts.bad_chunks} were not"),
        ("chunks are in time", not counts.late_chunks, f"{counts.late_chunks} were late"),
        ("no target is rejected", not counts.rejected, f"{counts.rejected} rejected"),
        (
            "limits change nothing",
            motion.limited <= CLAMP_WARNING * followed,
            f"{motion.limited} of {followed} changed",
        ),
        ("nothing warns", not log.warnings, "; ".join(log.warnings) or "no warning"),
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
        "fps": plan.fps,
        "chunking": chunking,
    }
    beside = Path(f"{REPORT}.part")
    beside.write_text(json.dumps(document, indent=1))
    beside.replace(REPORT)
    print(f"rehearsal {'passed' if passed else 'failed'}, see {REPORT}")
    if not passed:
        raise CheckFailed("the rehearsal failed: " + ", ".join(name for name, ok, _ in checks if not ok))
