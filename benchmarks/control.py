"""The control loop beside a policy that computes: is it on time, and what does a tick cost?

    python -m smolvla_edge.benchmarks.control --bundle bundle-demo --fps 30 --fps 60 --seconds 60

Runs the very loop that drives an arm, on the virtual one, which is a process of its own: on two cores it competes
with loop and policy, as a real arm would not. The last line is JSON.
"""

from collections.abc import Sequence

import numpy as np
import typer

from ..runtime import SmolVLAError, command
from ..runtime.chunks import Chunking
from ..runtime.drive import drive
from ..runtime.settings import SIM, Settings
from .machine import machine, report

app = command.new_app()


@app.command()
def control(
    bundle: str = typer.Option("bundle", help="Bundle folder."),
    device: str = typer.Option("cpu", help="auto, cpu, cuda or jetson."),
    fps: list[float] = typer.Option([30.0, 60.0], help="Control rates, one run each."),
    seconds: float = typer.Option(60.0, min=1.0, help="Of each run."),
    chunking: Chunking = typer.Option("async", help="sync, async or rtc."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
) -> None:
    """Run the loop on the virtual arm and tell how punctual it was."""
    command.terminate_like_interrupt()
    results = []
    for rate in fps:
        log = drive(Settings(bundle=bundle, device=device, port=SIM, fps=rate, seconds=seconds, chunking=chunking))
        result: dict[str, object] = {"fps": rate, "counts": vars(log.counts)}
        for name in ("period_error_ms", "late_ms", "read_ms", "write_ms", "busy_ms", "seams_deg"):
            result[name] = spread(getattr(log, name))
        result["chunk_s"] = spread([c.latency_s for c in log.chunks])
        results.append(result)
    print(f"\nmachine    {machine()}")
    for result in results:
        error, counts = result["period_error_ms"], result["counts"]
        print(f"{result['fps']:g} Hz: period off by p50, p99, max = {error} ms; {counts}")
    report("control", None, runs=results)


def spread(values: Sequence[float]) -> list[float]:
    """p50, p99 and max."""
    return [round(float(x), 3) for x in np.percentile(values, [50, 99, 100])] if values else []


def main() -> None:
    """Entry point of `python -m smolvla_edge.benchmarks.control`."""
    command.run(app, mistakes=(SmolVLAError,), failures=())


if __name__ == "__main__":
    main()
