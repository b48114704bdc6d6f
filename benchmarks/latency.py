"""Seconds per chunk: a bundle through the runtime beside the checkpoint's torch views, interleaved in one process.

    python -m smolvla_edge.benchmarks.latency --demo --bundle bundle-demo
    python -m smolvla_edge.benchmarks.latency path/to/my_finetune --bundle my_bundle

The machine's noise falls on both, so the ratio of two neighbouring runs is what to trust. The last line is JSON.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import typer

from ..export.checkpoint import Checkpoint, load_checkpoint
from ..export.demo import write_demo_checkpoint
from ..export.errors import ExportError
from ..export.layers import FP32
from ..export.reference import Reference, fixed_observations
from ..export.weights import build_views
from ..export.writer import architecture_of
from ..runtime import Policy, SmolVLAError, command

app = command.new_app()


@app.command()
def latency(
    checkpoint: str = typer.Argument("lerobot/smolvla_base", help="What the bundle was exported from."),
    bundle: str = typer.Option("bundle", help="Bundle folder."),
    device: str = typer.Option("cpu", help="auto, cpu, cuda or jetson, for the bundle."),
    demo: bool = typer.Option(False, "--demo", help="The demo weights instead of CHECKPOINT."),
    repeats: int = typer.Option(7, min=1, help="Timed runs of each."),
    warmup: int = typer.Option(2, min=0, help="Runs thrown away before."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
) -> None:
    """Time one chunk of the bundle and of the torch float32 views in turns."""
    with tempfile.TemporaryDirectory(prefix="smolvla-demo-") as temporary:
        if demo:
            checkpoint = str(Path(temporary) / "checkpoint")
            write_demo_checkpoint(Path(checkpoint), print)
        _compare(load_checkpoint(checkpoint), bundle, device, repeats, warmup)


def _compare(source: Checkpoint, bundle: str, device: str, repeats: int, warmup: int) -> None:
    arch = architecture_of(source)
    views = Reference(source, arch, *build_views(arch, source.tensors, FP32))
    observation = fixed_observations(source, arch)[-1]
    policy = Policy.load(bundle, device)
    if policy.manifest.source.weights_sha256 != source.weights_sha256:
        raise ExportError(f"{bundle} was exported from other weights than {source.name}: name its own checkpoint")
    stages: list[tuple[float, float, float]] = []

    def ours() -> None:
        policy.predict_chunk(observation.images, observation.state, observation.task, observation.noise)
        t = policy.timing
        stages.append((t.preprocess_ms, t.prefix_ms, t.denoise_ms))

    seconds = interleaved([ours, lambda: views.run(observation)], repeats, warmup)
    ratio = seconds[0] / seconds[1]
    m = policy.manifest
    print(f"machine    {machine()}")
    print(f"bundle     {bundle}: {m.precision}, {len(m.cameras)} cameras, {m.tokens.length} tokens, "
          f"{m.sampling.num_steps} steps; {policy.graphs.reason}")  # fmt: skip
    for name, values in (("bundle", seconds[0]), ("torch views float32", seconds[1])):
        print(f"{name:<20} p50 {np.median(values):7.3f} s   min {values.min():7.3f}   max {values.max():7.3f}")
    parts = np.median(np.array(stages[warmup:]), axis=0)
    print("bundle by stage     " + ", ".join(
        f"{n} {ms:.1f} ms" for n, ms in zip(("preprocess", "prefix", "denoise"), parts, strict=True)))  # fmt: skip
    print(f"bundle / torch      p50 {np.median(ratio):.3f}   min {ratio.min():.3f}   max {ratio.max():.3f}")
    result = {"command": " ".join(sys.argv), "machine": machine(), "bundle_s": seconds[0].tolist()}
    result |= {"torch_s": seconds[1].tolist(), "ratio_p50": float(np.median(ratio)), "precision": m.precision}
    print(json.dumps(result))


def interleaved(
    runs: list[Callable[[], object]], repeats: int, warmup: int
) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Wall seconds [len(runs), repeats] of each of `runs`, taken in turns."""
    seconds = np.zeros((len(runs), repeats))
    for i in range(-warmup, repeats):
        for j, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if i >= 0:
                seconds[j, i] = time.perf_counter() - start
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
