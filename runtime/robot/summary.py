"""The lines that a person sees during a run and after it."""

import time
from collections.abc import Callable, Mapping, Sequence

from ...core.command import say
from ...devices.arm.motion import MotionCounts
from .loop import Tick
from .run_statistics import RunStatistics

CLAMP_WARNING = 0.01  # share of targets
MISSED_WARNING = 0.01  # share of ticks


class StatusLine:
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


def summary(
    statistics: RunStatistics, period_s: float, motion: MotionCounts, anomalies: Mapping[str, int]
) -> str:
    """Stages of a chunk and of a tick: median, 95th and 99th percentile and maximum; then
    counts."""
    s, c, m = statistics, statistics.counts, motion
    stages = {
        "preprocess": s.preprocess_ms,
        "prefix": s.prefix_ms,
        "denoise": s.denoise_ms,
        "chunk, as the loop saw it": s.chunk_ms,
        "tick: read the arm": s.read_ms,
        "tick: age of the pictures": s.picture_age_ms,
        "tick: command the arm": s.write_ms,
        "tick: all work": s.busy_ms,
        "tick: late by": s.late_ms,
        "tick: period off by": s.period_error_ms,
    }
    lines = [f"{'milliseconds':<28}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}{'n':>8}"]
    for name, values in stages.items():
        if values:
            numbers = (*(values.percentile(p) for p in (50, 95, 99)), values.max)
            cells = "".join(f"{x:>10.2f}" for x in numbers)
            lines.append(f"{name:<28}{cells}{len(values):>8}")
    lines.append(
        f"{c.ticks} ticks of {1e3 * period_s:.1f} ms, {c.missed} missed: {c.acted} with an action, "
        f"{c.held} held while no action was there ({c.starved} of them after the first action)"
    )
    if c.missed > MISSED_WARNING * c.ticks:
        lines.append(
            "warning: ticks are missed: the bus, the cameras or this machine are too slow for "
            "this rate"
        )
    if s.seams_deg:
        gap, step = (
            f"{d.percentile(50):.1f} deg median, {d.max:.1f} at most"
            for d in (s.gaps_deg, s.seams_deg)
        )
        lines.append(
            f"{len(s.seams_deg)} seams: chunks disagree by {gap}; "
            f"the first step of the new one is {step}"
        )
    lines.append(
        f"{m.accepted} targets followed: {m.clipped} clipped to the calibrated range, {m.slewed} "
        f"slowed to the speed limit, {m.slowed} to the acceleration limit, {m.led} held close to "
        f"the joint; {m.ramped} of them at the first-move speed; rejected: {m.malformed} "
        f"malformed, {m.stale} too old, {m.jumped} jumps"
    )
    if m.accepted and m.limited > CLAMP_WARNING * m.accepted:
        lines.append(
            f"warning: a limit changed {100 * m.limited / m.accepted:.0f} % of the targets, so the "
            "arm does not do what the policy was trained to do. Compare [limits] in robot.toml "
            "with the speeds in your episodes"
        )
    troubles = {
        "ticks with an unanswered reading": c.unanswered,
        "ticks without usable pictures": c.blind,
        "chunks that were not finite": c.bad_chunks,
        "chunks thrown away as too late": c.late_chunks,
        "stops": c.stops,
        "warnings": c.warnings,
    }
    troubles |= {f"{name.replace('_', ' ')} on the bus": count for name, count in anomalies.items()}
    counted = ", ".join(f"{count} {name}" for name, count in troubles.items() if count)
    if counted:
        lines.append(counted)
    return "\n".join(lines)
