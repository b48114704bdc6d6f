"""Is the control loop on time while the policy computes, and what does a tick cost?

Runs the loop that drives an arm, on the virtual arm. The virtual arm is a process of its own: it
takes CPU time from the loop and the policy, which a real arm does not.
"""

from collections.abc import Sequence

from ..runtime.robot.chunks import Chunking
from ..runtime.robot.drive import drive
from ..runtime.robot.run_statistics import Distribution, RunStatistics
from ..runtime.robot.settings import SIM, Settings
from . import machine
from .result import Control, LoopRun, Spread, spread

# Fields of the loop's log that are measurements: [ticks] of most.
MEASURED = (
    "period_error_ms", "late_ms", "read_ms", "capture_ms", "picture_age_ms", "write_ms", "busy_ms",
    "seams_deg",
)  # fmt: skip


def measure(
    bundle: str, device: str, rates: Sequence[float], seconds: float, chunking: Chunking
) -> Control:
    """Run the loop once at each of `rates`, per second. Raises what `drive` raises."""
    head, runs = machine.watched(realtime=True), []
    for fps in rates:
        log = drive(
            Settings(
                bundle=bundle, device=device, port=SIM, fps=fps, seconds=seconds, chunking=chunking
            ),
            statistics=RunStatistics.keeping_values(),
        )
        measured = {name: _spread(getattr(log, name)) for name in MEASURED}
        chunk_ms = _spread(log.chunk_ms)
        counts, queued = vars(log.counts), tuple(int(n) for n in log.queued.values or ())
        runs.append(LoopRun(fps, seconds, counts, chunk_ms=chunk_ms, queued=queued, **measured))
    return Control(**head(), bundle=bundle, chunking=chunking, loops=tuple(runs))


def _spread(measured: Distribution) -> Spread | None:
    return spread(measured.values) if measured.values else None
