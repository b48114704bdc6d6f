"""The control loop beside a policy that computes: is it on time, and what does a tick cost?

Runs the very loop that drives an arm, on the virtual one, which is a process of its own: on two cores it competes
with loop and policy, as a real arm would not.
"""

from collections.abc import Sequence

from ..runtime.robot.chunks import Chunking
from ..runtime.robot.drive import drive
from ..runtime.robot.run_statistics import Distribution, RunStatistics
from ..runtime.robot.settings import SIM, Settings
from . import machine
from .result import Control, Loop, Spread, spread


def measure(
    bundle: str, device: str, rates: Sequence[float], seconds: float, chunking: Chunking
) -> Control:
    """One run of the loop at each of `rates`, per second. Raises what `drive` raises."""
    head, loops = machine.watched(), []
    for fps in rates:
        log = drive(
            Settings(
                bundle=bundle, device=device, port=SIM, fps=fps, seconds=seconds, chunking=chunking
            ),
            statistics=RunStatistics.keeping_values(),
        )
        loops.append(
            Loop(
                fps=fps,
                seconds=seconds,
                counts=vars(log.counts),
                period_error_ms=_spread(log.period_error_ms),
                late_ms=_spread(log.late_ms),
                read_ms=_spread(log.read_ms),
                capture_ms=_spread(log.capture_ms),
                picture_age_ms=_spread(log.picture_age_ms),
                write_ms=_spread(log.write_ms),
                busy_ms=_spread(log.busy_ms),
                chunk_ms=_spread(log.chunk_ms),
                seams_deg=_spread(log.seams_deg),
                queued=tuple(int(n) for n in log.queued.values or ()),
            )
        )
    return Control(**head(), bundle=bundle, chunking=chunking, loops=tuple(loops))


def _spread(measured: Distribution) -> Spread | None:
    return spread(measured.values) if measured.values else None
