"""What a run looks like, for a person."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .command import say
from .control import Log, Tick

if TYPE_CHECKING:
    from ..devices.motion import MotionCounts

CLAMP_WARNING = 0.01  # share of targets
MISSED_WARNING = 0.01  # share of ticks


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
        joints = " ".join(f"{n}={v:7.1f}" for n, v in zip(self._joints, tick.state.position, strict=False))
        doing = {"run": f"{tick.queued:3d} actions left", "hold": "waiting for a chunk"}.get(tick.doing, tick.doing)
        say(f"{tick.elapsed_s:6.1f} s  {joints}  {doing}")


def summary(log: Log, period_s: float, motion: MotionCounts, anomalies: Mapping[str, int]) -> str:
    """Stages of a chunk and of a tick: median, 95th and 99th percentile and worst; then what was counted."""
    stages: list[tuple[str, Sequence[float]]] = []
    if log.chunks:
        timings = [c.timing for c in log.chunks]
        stages = [
            ("preprocess", [t.preprocess_ms for t in timings]),
            ("prefix", [t.prefix_ms for t in timings]),
            ("denoise", [t.denoise_ms for t in timings]),
            ("chunk, as the loop saw it", [1e3 * c.latency_s for c in log.chunks]),
        ]
    stages += [
        ("tick: read the arm", log.read_ms),
        ("tick: command the arm", log.write_ms),
        ("tick: all work", log.busy_ms),
        ("tick: late by", log.late_ms),
        ("tick: period off by", log.period_error_ms),
    ]
    lines = [f"{'milliseconds':<28}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}{'n':>8}"]
    for name, values in stages:
        if values:
            cells = "".join(f"{x:>10.2f}" for x in (*np.percentile(values, [50, 95, 99]), max(values)))
            lines.append(f"{name:<28}{cells}{len(values):>8}")
    c = log.counts
    lines.append(
        f"{c.ticks} ticks of {1e3 * period_s:.1f} ms, {c.missed} missed: {c.acted} with an action, {c.held} held "
        f"while no action was there ({c.starved} of them after the first action)"
    )
    if c.missed > MISSED_WARNING * c.ticks:
        lines.append("warning: ticks are missed: the bus, the cameras or this machine are too slow for this rate")
    if log.seams_deg:
        gap, step = (f"{np.median(x):.1f} deg median, {max(x):.1f} at most" for x in (log.gaps_deg, log.seams_deg))
        lines.append(f"{len(log.seams_deg)} seams: chunks disagree by {gap}; the first step of the new one is {step}")
    m = motion
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
