"""What a run looks like, for a person, and whether a rehearsal passed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...core.command import say
from ...core.errors import CheckFailed
from ...core.files import write_whole
from .loop import Log, Tick

if TYPE_CHECKING:
    from ...devices.arm.motion import MotionCounts
    from .plan import Plan

CLAMP_WARNING = 0.01  # share of targets
MISSED_WARNING = 0.01  # share of ticks
PERIOD_SHARE = 0.25  # of a period that a tick of a rehearsal may be off, at its 99th percentile
REHEARSAL = "rehearsal.json"


class Watcher:
    """Hands every tick on, and prints a line a second: where the arm is."""

    def __init__(self, tick: Callable[[Tick], None], joints: Sequence[str]) -> None:
        self._tick, self._joints, self._next_s = tick, joints, 0.0

    def __call__(self, tick: Tick) -> None:
        self._tick(tick)
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + 1.0
        joints = " ".join(
            f"{n}={v:7.1f}" for n, v in zip(self._joints, tick.state.position, strict=False)
        )
        doing = {"run": f"{tick.queued:3d} actions left", "hold": "waiting for a chunk"}.get(
            tick.doing, tick.doing
        )
        say(f"{tick.elapsed_s:6.1f} s  {joints}  {doing}")


def summary(log: Log, period_s: float, motion: MotionCounts, anomalies: Mapping[str, int]) -> str:
    """Stages of a chunk and of a tick: median, 95th and 99th percentile and worst; then what was counted."""
    timings = [c.timing for c in log.chunks]
    stages: dict[str, Sequence[float]] = {
        "preprocess": [t.preprocess_ms for t in timings],
        "prefix": [t.prefix_ms for t in timings],
        "denoise": [t.denoise_ms for t in timings],
        "chunk, as the loop saw it": [1e3 * c.latency_s for c in log.chunks],
        "tick: read the arm": log.read_ms,
        "tick: age of the pictures": log.picture_age_ms,
        "tick: command the arm": log.write_ms,
        "tick: all work": log.busy_ms,
        "tick: late by": log.late_ms,
        "tick: period off by": log.period_error_ms,
    }
    lines = [f"{'milliseconds':<28}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}{'n':>8}"]
    for name, values in stages.items():
        if values:
            cells = "".join(
                f"{x:>10.2f}" for x in (*np.percentile(values, [50, 95, 99]), max(values))
            )
            lines.append(f"{name:<28}{cells}{len(values):>8}")
    c, m = log.counts, motion
    lines.append(
        f"{c.ticks} ticks of {1e3 * period_s:.1f} ms, {c.missed} missed: {c.acted} with an action, {c.held} held "
        f"while no action was there ({c.starved} of them after the first action)"
    )
    if c.missed > MISSED_WARNING * c.ticks:
        lines.append(
            "warning: ticks are missed: the bus, the cameras or this machine are too slow for this rate"
        )
    if log.seams_deg:
        gap, step = (
            f"{np.median(x):.1f} deg median, {max(x):.1f} at most"
            for x in (log.gaps_deg, log.seams_deg)
        )
        lines.append(
            f"{len(log.seams_deg)} seams: chunks disagree by {gap}; the first step of the new one is {step}"
        )
    lines.append(
        f"{m.accepted} targets followed: {m.clipped} clipped to the calibrated range, {m.slewed} slowed to the speed "
        f"limit, {m.slowed} to the acceleration limit, {m.led} held close to the joint; {m.ramped} of them at the "
        f"first-move speed; rejected: {m.malformed} malformed, {m.stale} too old, {m.jumped} jumps"
    )
    if m.accepted and m.limited > CLAMP_WARNING * m.accepted:
        lines.append(
            f"warning: a limit changed {100 * m.limited / m.accepted:.0f} % of the targets, so this is not quite the "
            "policy that was trained. Compare [limits] in robot.toml with the speeds in your episodes"
        )
    troubles = {
        "ticks with an unanswered reading": c.unanswered,
        "ticks without usable pictures": c.blind,
        "chunks that were not finite": c.bad_chunks,
        "chunks thrown away as too late": c.late_chunks,
        "stops": c.stops,
        "warnings": len(log.warnings),
    }
    troubles |= {f"{name.replace('_', ' ')} on the bus": count for name, count in anomalies.items()}
    if told := ", ".join(f"{count} {name}" for name, count in troubles.items() if count):
        lines.append(told)
    return "\n".join(lines)


def judge(
    log: Log, motion: MotionCounts, anomalies: Mapping[str, int], plan: Plan, failure: str
) -> None:
    """The verdict on the whole loop, run with the motors off: printed, and written to `rehearsal.json`.

    Raises CheckFailed when something would have gone wrong."""
    counts, period_ms, chunking = log.counts, 1e3 / plan.fps, plan.settings.chunking
    ticks = max(counts.ticks, 1)
    off_ms = float(np.percentile(log.period_error_ms, 99)) if log.period_error_ms else float("inf")
    few, followed = MISSED_WARNING * ticks, max(motion.accepted, 1)
    checks = [
        ("the loop ran to its end", not failure, failure or "it did"),
        ("it had chunks to execute", bool(log.chunks), f"{len(log.chunks)} chunks"),
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
    write_whole(Path(REHEARSAL), json.dumps(document, indent=1).encode())
    print(f"rehearsal {'passed' if passed else 'failed'}, see {REHEARSAL}")
    if not passed:
        raise CheckFailed(
            "the rehearsal failed: " + ", ".join(name for name, ok, _ in checks if not ok)
        )
