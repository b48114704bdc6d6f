"""Seconds per chunk: bundles through the runtime beside the checkpoint in torch, interleaved.

    python -m smolvla_edge.benchmarks.latency --demo --bundle bundle-demo
    python -m smolvla_edge.benchmarks.latency path/to/my_finetune --bundle my_bundle --lerobot lerobot-env/bin/python
    python -m smolvla_edge.benchmarks.latency path/to/my_finetune --bundle fp32 --bundle fp16 --device cuda --compile

The machine's noise falls on all, so the ratio of neighbouring runs is what to trust. On CUDA each bundle runs with
CUDA graphs and without. The last line is JSON, as --output is:

    format, version, kind    "smolvla-edge-result", 1, "latency"
    command, machine         how it was started, on what
    gflops                   on a CPU: float32 and int8 through ONNX Runtime, before and after the timed runs
    bundles                  name -> precision, target, reason, stages_ms (medians), selfcheck (errors by stage), and
                             on a CPU floor: the time of its float32 products alone, as a share of its median
    seconds                  name of bundle or baseline -> seconds of each timed run, in turns
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from ..export.checkpoint import Checkpoint, load_checkpoint
from ..export.demo import write_demo_checkpoint
from ..export.errors import ExportError
from ..export.layers import FP16, FP32
from ..export.reference import Observation, fixed_observations
from ..export.weights import build_views
from ..export.writer import architecture_of
from ..runtime import Policy, SmolVLAError, command
from ..runtime.ort import OrtGraphs
from ..runtime.selfcheck import run_selfcheck
from .lerobot_process import LeRobotProcess
from .machine import machine, matmul_rates, report

app = command.new_app()


@app.command()
def latency(
    checkpoint: str = typer.Argument("lerobot/smolvla_base", help="What the bundle was exported from."),
    bundle: list[str] = typer.Option(["bundle"], help="Bundle folder; give it again for each to compare."),
    device: str = typer.Option("cpu", help="auto, cpu, cuda or jetson; torch takes CUDA for all but cpu."),
    demo: bool = typer.Option(False, "--demo", help="The demo weights instead of CHECKPOINT."),
    lerobot: str | None = typer.Option(
        None,
        help="A Python with lerobot 0.4.4 and this package: time LeRobot, float32 and bfloat16, in processes of "
        "their own.  [default: this exporter's torch views, float32 and on CUDA float16]",
    ),
    compiled: bool = typer.Option(False, "--compile", help="Each baseline through torch.compile as well."),
    repeats: int = typer.Option(7, min=1, help="Timed runs of each."),
    warmup: int = typer.Option(2, min=0, help="Runs thrown away before."),
    output: str | None = typer.Option(None, help="Write the result to this file too."),
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
        policies = _policies(source, bundle, device)
        torch_device = next(iter(policies.values())).graphs.device
        observation = fixed_observations(source, architecture_of(source))[-1]
        baselines: dict[str, Callable[[], float]] = {}
        for compile_it in (False, True) if compiled else (False,):
            suffix = " compiled" if compile_it else ""
            if lerobot:
                for dtype in ("float32", "bfloat16"):
                    process = LeRobotProcess(lerobot, str(source.folder), dtype, torch_device, compile_it)
                    stack.callback(process.close)
                    baselines[f"LeRobot {dtype}{suffix}"] = process.run
                continue
            for recipe in (FP32,) if torch_device == "cpu" else (FP32, FP16):
                name = f"torch views {str(recipe.matmul).removeprefix('torch.')}{suffix}"
                views = build_views(architecture_of(source), source.tensors, recipe)
                prefix, expert = (torch.compile(v) if compile_it else v for v in (v.to(torch_device) for v in views))
                given = prefix, expert, next(iter(policies.values())), observation
                baselines[name] = _timed(partial(_run_views, *given))
        _compare(policies, baselines, observation, repeats, warmup, output)


def _policies(source: Checkpoint, bundles: list[str], device: str) -> dict[str, Policy]:
    """The bundles, loaded; on CUDA each without CUDA graphs as well."""
    policies = {}
    for name in bundles:
        policies[name] = policy = Policy.load(name, device)
        if policy.manifest.source.weights_sha256 != source.weights_sha256:
            raise ExportError(f"{name} was exported from other weights than {source.name}: name its own checkpoint")
        if policy.graphs.device == "cuda" and device != "jetson":
            plain = OrtGraphs(policy.bundle, "ort-cuda", cuda_graphs=False)
            policies[f"{name} without CUDA graphs"] = Policy(policy.bundle, plain, policy.rtc, None)
    return policies


@torch.no_grad()
def _run_views(
    prefix: Callable[..., list[torch.Tensor]],
    expert: Callable[..., list[torch.Tensor]],
    policy: Policy,
    observation: Observation,
) -> NDArray[np.float32]:
    """A chunk by the exporter's views, where their weights are; `policy` lends preprocessing and step schedule."""
    m = policy.manifest
    feeds = policy.preprocessor.feeds(observation.images, observation.state, observation.task)
    with torch.device(policy.graphs.device):
        mask, *cache = prefix(*(torch.as_tensor(feeds[t.name]) for t in m.prefix.inputs))
        x = torch.as_tensor(observation.noise)
        nothing = torch.zeros_like(x)
        for step in policy.steps(m.sampling.num_steps):
            given = (torch.as_tensor(a) for a in (step.embedding, step.time, step.dt))
            _, x = expert(x, *given, nothing, nothing[:, :, :1], torch.zeros(1), mask, *cache)
    return policy.robot_units(x.cpu().numpy())


def _compare(
    policies: dict[str, Policy],
    baselines: dict[str, Callable[[], float]],
    observation: Observation,
    repeats: int,
    warmup: int,
    output: str | None,
) -> None:
    given = observation.images, observation.state, observation.task, observation.noise
    stages: dict[str, list[tuple[float, float, float]]] = {name: [] for name in policies}

    def chunk(name: str) -> None:
        policies[name].predict_chunk(*given)
        t = policies[name].timing
        stages[name].append((t.preprocess_ms, t.prefix_ms, t.denoise_ms))

    on_cpu = next(iter(policies.values())).graphs.device == "cpu"
    checks = {name: run_selfcheck(policy) for name, policy in policies.items()}
    runs = baselines | {name: _timed(partial(chunk, name)) for name in policies}
    before = matmul_rates() if on_cpu else {}
    seconds = dict(zip(runs, interleaved(list(runs.values()), repeats, warmup), strict=True))
    after = matmul_rates() if on_cpu else {}
    gflops = {kind: [before[kind], after[kind]] for kind in before}
    print(f"machine    {machine()}")
    for kind, rates in gflops.items():
        print("{} product {:.0f} GFLOP/s before, {:.0f} after".format(kind, *rates))
    bundles: dict[str, dict[str, object]] = {}
    for name, policy in policies.items():
        m = policy.manifest
        parts = np.median(np.array(stages[name][warmup:]), axis=0)
        worst = ", ".join(f"{stage} {error:.1e}" for stage, error in checks[name].items())
        print(f"bundle     {name}: {m.precision}, {m.target}, {len(m.cameras)} cameras, {m.tokens.length} tokens, "
              f"{m.sampling.num_steps} steps; {policy.graphs.reason}")  # fmt: skip
        print("           preprocess {:.1f} ms, prefix {:.1f} ms, denoise {:.1f} ms".format(*parts))
        print(f"           self-check: {worst}")
        bundles[name] = {"precision": m.precision, "target": m.target, "reason": policy.graphs.reason,
                         "stages_ms": dict(zip(("preprocess", "prefix", "denoise"), parts.tolist(), strict=True)),
                         "selfcheck": checks[name]}  # fmt: skip
        if on_cpu:
            floor_s = 1e-9 * (m.prefix.flops + m.sampling.num_steps * m.expert.flops) / max(gflops["float32"])
            bundles[name]["floor"] = floor = floor_s / float(np.median(seconds[name]))
            print(f"           float32 products alone {floor_s:.3f} s: {floor:.0%} of its p50")
    for name, values in seconds.items():
        p50, p95 = np.percentile(values, [50, 95])
        print(f"{name:<40} p50 {p50:7.4f} s   p95 {p95:7.4f}   min {values.min():7.4f}   max {values.max():7.4f}")
    for name in policies:
        for other in baselines:
            ratio = seconds[other] / seconds[name]
            print(f"{name} is faster than {other} by   p50 {np.median(ratio):.2f}x   "
                  f"min {ratio.min():.2f}   max {ratio.max():.2f}")  # fmt: skip
    lists = {name: values.tolist() for name, values in seconds.items()}
    report("latency", output, gflops=gflops, bundles=bundles, seconds=lists)


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


def main() -> None:
    """Entry point of `python -m smolvla_edge.benchmarks.latency`."""
    command.run(app, mistakes=(ExportError, SmolVLAError), failures=())


if __name__ == "__main__":
    main()
