"""Seconds per chunk: bundles through the runtime beside the checkpoint in torch, interleaved.

    python -m smolvla_edge.benchmarks.latency --demo --bundle bundle-demo
    python -m smolvla_edge.benchmarks.latency path/to/my_finetune --bundle my_bundle --lerobot lerobot-env/bin/python

The machine's noise falls on all, so the ratio of neighbouring runs is what to trust. The last line is JSON.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray

from ..export.checkpoint import Checkpoint, load_checkpoint
from ..export.demo import write_demo_checkpoint
from ..export.errors import ExportError
from ..export.layers import FP32
from ..export.reference import Reference, fixed_observations
from ..export.weights import build_views
from ..export.writer import architecture_of
from ..runtime import Policy, SmolVLAError, command
from .lerobot_process import LeRobotProcess

app = command.new_app()


@app.command()
def latency(
    checkpoint: str = typer.Argument("lerobot/smolvla_base", help="What the bundle was exported from."),
    bundle: list[str] = typer.Option(["bundle"], help="Bundle folder; give it again for each to compare."),
    device: str = typer.Option("cpu", help="auto, cpu, cuda or jetson, for the bundles."),
    demo: bool = typer.Option(False, "--demo", help="The demo weights instead of CHECKPOINT."),
    lerobot: str | None = typer.Option(
        None,
        help="A Python with lerobot 0.4.4 and this package: time LeRobot, float32 and bfloat16, in processes of "
        "their own.  [default: this exporter's torch views]",
    ),
    repeats: int = typer.Option(7, min=1, help="Timed runs of each."),
    warmup: int = typer.Option(2, min=0, help="Runs thrown away before."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
) -> None:
    """Time one chunk of each bundle and of the checkpoint in torch, in turns."""
    if demo and lerobot:
        raise ExportError(
            "LeRobot cannot load the demo's short processor files: name a checkpoint of its own, or --demo"
        )
    with tempfile.TemporaryDirectory(prefix="smolvla-demo-") as temporary, ExitStack() as stack:
        if demo:
            checkpoint = str(Path(temporary) / "checkpoint")
            write_demo_checkpoint(Path(checkpoint), print)
        source = load_checkpoint(checkpoint)
        baselines: dict[str, Callable[[], float]] = {}
        if lerobot is None:
            arch = architecture_of(source)
            views = Reference(source, arch, *build_views(arch, source.tensors, FP32))
            baselines["torch views float32"] = _timed(partial(views.run, fixed_observations(source, arch)[-1]))
        else:
            for dtype in ("float32", "bfloat16"):
                process = LeRobotProcess(lerobot, str(source.folder), dtype)
                stack.callback(process.close)
                baselines[f"LeRobot {dtype}"] = process.run
        _compare(source, bundle, baselines, device, repeats, warmup)


def _compare(
    source: Checkpoint,
    bundles: list[str],
    baselines: dict[str, Callable[[], float]],
    device: str,
    repeats: int,
    warmup: int,
) -> None:
    observation = fixed_observations(source, architecture_of(source))[-1]
    given = observation.images, observation.state, observation.task, observation.noise
    policies = {name: Policy.load(name, device) for name in bundles}
    for name, policy in policies.items():
        if policy.manifest.source.weights_sha256 != source.weights_sha256:
            raise ExportError(f"{name} was exported from other weights than {source.name}: name its own checkpoint")
    stages: dict[str, list[tuple[float, float, float]]] = {name: [] for name in policies}

    def chunk(name: str) -> None:
        policies[name].predict_chunk(*given)
        t = policies[name].timing
        stages[name].append((t.preprocess_ms, t.prefix_ms, t.denoise_ms))

    runs = baselines | {name: _timed(partial(chunk, name)) for name in policies}
    seconds = dict(zip(runs, interleaved(list(runs.values()), repeats, warmup), strict=True))
    print(f"machine    {machine()}")
    for name, policy in policies.items():
        m = policy.manifest
        parts = np.median(np.array(stages[name][warmup:]), axis=0)
        print(f"bundle     {name}: {m.precision}, {m.target}, {len(m.cameras)} cameras, {m.tokens.length} tokens, "
              f"{m.sampling.num_steps} steps; {policy.graphs.reason}")  # fmt: skip
        print("           preprocess {:.1f} ms, prefix {:.1f} ms, denoise {:.1f} ms".format(*parts))
    for name, values in seconds.items():
        print(f"{name:<40} p50 {np.median(values):7.3f} s   min {values.min():7.3f}   max {values.max():7.3f}")
    for name in policies:
        for other in baselines:
            ratio = seconds[other] / seconds[name]
            print(f"{name} is faster than {other} by   p50 {np.median(ratio):.2f}x   "
                  f"min {ratio.min():.2f}   max {ratio.max():.2f}")  # fmt: skip
    result = {"command": " ".join(sys.argv), "machine": machine()}
    print(json.dumps(result | {"seconds": {name: values.tolist() for name, values in seconds.items()}}))


def _timed(run: Callable[[], object]) -> Callable[[], float]:
    """`run`, giving its wall seconds."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def interleaved(runs: list[Callable[[], float]], repeats: int, warmup: int) -> NDArray[np.float64]:
    """What each of `runs` returns, its seconds, taken in turns: [len(runs), repeats]."""
    turns = [[run() for run in runs] for _ in range(warmup + repeats)]
    seconds: NDArray[np.float64] = np.array(turns[warmup:]).T
    return seconds


def machine() -> str:
    """CPU model, cores this process may use, and the kernel's release."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}"


def main() -> None:
    """Entry point of `python -m smolvla_edge.benchmarks.latency`."""
    command.run(app, mistakes=(ExportError, SmolVLAError), failures=())


if __name__ == "__main__":
    main()
