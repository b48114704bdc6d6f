"""Time per chunk: bundles through the runtime and the checkpoint in PyTorch, in turns.

Noise of the machine affects all that run in a turn, so trust the ratio within a turn most.
"""

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import numpy as np

from ..core.errors import BenchError
from ..export.checkpoint.cameras import Named
from ..export.reference_process import ReferenceRequest, observation
from ..runtime import Bundle, Policy
from ..runtime.budget.budget import TARGET_MS, budget
from ..runtime.budget.roofline import BoardPeaks
from ..runtime.bundle.manifest import Manifest
from ..runtime.policy.selfcheck import require, run_selfcheck, summary
from . import machine
from .reference_process import ReferenceProcess
from .result import (
    HardwareLimit,
    Latency,
    Machine,
    Rates,
    Ratio,
    Runner,
    Spread,
    TargetVerdict,
    spread,
)
from .start import cold_start

NOISE = 0.25  # at a larger spread, the machine decides the numbers
RATIO_NOISE = 2**0.5 * NOISE  # both sides are noisy
LEAST_TURNS = 3
ENERGY_S = 5.0


@dataclass(frozen=True)
class Effort:
    """`warmup` turns not counted, then `turns`, or fewer after `seconds` per participant."""

    warmup: int = 3
    turns: int = 30
    seconds: float = 60.0


@dataclass(frozen=True)
class ReferenceOptions:
    """The checkpoint and how to run it. lerobot: a Python that has LeRobot; None: this Python."""

    checkpoint: str
    vlm: str | None = None
    lerobot: str | None = None
    compiled: bool = False
    cameras: Named | None = None  # those of training, where the checkpoint does not say

    def processes(self, bundle: Bundle, device: str) -> tuple[str, list[ReferenceRequest], str]:
        """-> Python, the processes to start with it, and one sentence on them."""
        python = self.lerobot or (sys.executable if find_spec("lerobot") else None)
        kind: Literal["lerobot", "views"] = "lerobot"
        dtypes, words = ["float32", "bfloat16"], "LeRobot, in processes of its own"
        if not python:
            kind, dtypes = "views", ["float32", "float16"] if device == "cuda" else ["float32"]
            words = (
                "this project's torch views: this Python has no LeRobot, and --lerobot is not given"
            )
        asked = [
            ReferenceRequest(
                kind, self.checkpoint, self.vlm, str(bundle.folder), dtype, device, compiled
            )
            for compiled in ((False, True) if self.compiled else (False,))
            for dtype in dtypes
        ]
        return python or sys.executable, asked, words


class BundleRunner:
    """A loaded bundle. Raises CheckFailed if it fails its self-check."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        self.policy = Policy.load(bundle, device)
        errors = run_selfcheck(self.policy)
        require(bundle.manifest.precision, errors)
        self.selfcheck = summary(errors)
        self._given = observation(bundle)
        self.stages: list[dict[str, float]] = []  # ms, of each run

    def run(self) -> float:
        """-> seconds of one chunk."""
        policy, (images, state, task, noise) = self.policy, self._given
        seconds = timed(lambda: policy.predict_chunk(images, state, task, noise))
        t = policy.timing
        stages = {"preprocess": t.preprocess_ms, "prefix": t.prefix_ms, "denoise": t.denoise_ms}
        if policy.graphs.device == "tensorrt":  # one launch runs prefix and steps: run them apart
            feeds = policy.preprocessor.feeds(images, state, task, raw=policy.graphs.takes_frames)
            policy.graphs.prefill(feeds)
            stages["prefix"] = 1e3 * timed(policy.graphs.finish_prefill)
            stages["denoise"] = 1e3 * timed(lambda: policy.denoise(noise))
        stages["tokenize"] = 1e3 * timed(lambda: policy.preprocessor.tokenizer.encode(task))
        x, nothing = noise, np.zeros_like(noise)
        for i, step in enumerate(policy.steps(policy.manifest.sampling.num_steps), 1):
            start = time.perf_counter()
            x = policy.graphs.denoise(x, [step], nothing, nothing[:, :, :1])
            stages[f"step {i}"] = 1e3 * (time.perf_counter() - start)
        stages["postprocess"] = 1e3 * timed(lambda: policy.robot_units(x))
        self.stages.append(stages)
        return seconds

    def energy_j(self) -> float | None:
        """Of one chunk, from the power sensor of the board while the policy runs."""
        if machine.power_w() is None:
            return None
        watts: list[float] = []
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.02):
                if (power := machine.power_w()) is not None:
                    watts.append(power)

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        images, state, task, noise = self._given
        seconds: list[float] = []
        while sum(seconds) < ENERGY_S:
            seconds.append(timed(lambda: self.policy.predict_chunk(images, state, task, noise)))
        done.set()
        sampler.join()
        return float(np.mean(watts)) * float(np.mean(seconds)) if watts else None


def measure(
    bundles: Sequence[str],
    reference: ReferenceOptions | None,
    device: str,
    boards: Sequence[BoardPeaks],
    effort: Effort,
    say: Callable[[str], None],
) -> Latency:
    """boards: to project the bundles' chunks to.

    Raises BenchError for what cannot be compared, CheckFailed for a bundle that fails its
    self-check.
    """
    head = machine.watched()
    opened = {name: Bundle.open(name) for name in bundles}
    first = same_policy(opened)
    with ExitStack() as stack:
        say(f"loading {', '.join(opened)}")
        ours = {name: BundleRunner(bundle, device) for name, bundle in opened.items()}
        devices = {"cpu" if r.policy.graphs.device == "cpu" else "cuda" for r in ours.values()}
        if len(devices) > 1:
            raise BenchError(
                "one bundle runs on the CPU, another on a GPU: choose one with --device"
            )
        where = devices.pop()
        theirs, words = {}, ""
        if reference is not None:
            python, wanted, words = reference.processes(next(iter(opened.values())), where)
            say(f"reference: {words}")
            for one in wanted:
                if one.name in opened:
                    raise BenchError(
                        f"a bundle has the name of the reference, {one.name!r}: rename the bundle"
                    )
                theirs[one.name] = process = stack.enter_context(ReferenceProcess(python, one))
                _require_same(process, first, reference)
        runs = {name: r.run for name, r in theirs.items()} | {
            name: r.run for name, r in ours.items()
        }
        before = machine.rates(where)
        say(f"in turns: {', '.join(runs)}")
        seconds = in_turns(runs, effort)
        rates = machine.before_and_after(before, machine.rates(where))
        for process in theirs.values():
            process.close()
        energy = {name: r.energy_j() for name, r in ours.items()}
    count = first.sampling.n_action_steps
    times = {name: spread(1e3 * np.array(s)) for name, s in seconds.items()}
    here = head()["machine"]
    runners = []
    for name, process in theirs.items():
        t, asked = times[name], process.request
        runners.append(
            Runner(name, asked.kind, asked.dtype, process.note, t, t.p50 / count, noise(t))
        )
    for name, runner in ours.items():
        t, m, taken = times[name], runner.policy.manifest, runner.stages[effort.warmup :]
        stages = {stage: spread([turn[stage] for turn in taken]) for stage in taken[0]}
        say(f"starting {name} in new processes")
        reason = runner.policy.graphs.reason
        bundle = Runner(name, "bundle", m.precision, reason, t, t.p50 / count, noise(t))
        bundle = replace(
            bundle,
            stages_ms=stages,
            energy_j=energy[name],
            selfcheck=runner.selfcheck,
            limits=limits(m, rates, stages),
            start=cold_start(opened[name], device),
            verdicts=(verdict(t, here), *(projected(m, board) for board in boards)),
        )
        runners.append(bundle)
    names = list(times)
    ratios = [_ratio(a, b, times) for i, a in enumerate(names) for b in names[:i] if a in ours]
    return Latency(
        **head(),
        cameras=len(first.cameras),
        tokens=first.tokens.length,
        steps=first.sampling.num_steps,
        warmup=effort.warmup,
        reference=words,
        runners=tuple(runners),
        ratios=tuple(ratios),
        rates=rates,
    )


def same_policy(bundles: Mapping[str, Bundle]) -> Manifest:
    """-> the manifest of the first. Raises BenchError unless all are of the same policy."""
    manifests = {name: b.manifest for name, b in bundles.items()}
    name, first = next(iter(manifests.items()))

    def what(m: Manifest) -> tuple[object, ...]:
        return m.source.weights_sha256, m.cameras, m.tokens, m.sampling, m.state, m.action

    if others := [other for other, m in manifests.items() if what(m) != what(first)]:
        raise BenchError(
            f"{', '.join(others)} and {name} are different policies (weights, cameras, tokens or "
            "steps): compare bundles of the same checkpoint"
        )
    return first


def in_turns(runs: Mapping[str, Callable[[], float]], effort: Effort) -> dict[str, list[float]]:
    """The seconds that each of `runs` returns, without the warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(effort.warmup):
        for run in runs.values():
            run()
    end = time.monotonic() + effort.seconds * len(runs)
    for turn in range(effort.turns):
        if turn >= LEAST_TURNS and time.monotonic() >= end:
            break
        for name, run in runs.items():
            taken[name].append(run())
    return taken


def noise(t: Spread, bound: float = NOISE) -> str | None:
    """The sentence that replaces the numbers if they spread too much."""
    if t.spread <= bound:
        return None
    return (
        f"too noisy to say: nine in ten turns spread over {t.spread:.0%} of the median "
        f"(limit {bound:.0%}). End other jobs, fix the clocks, and measure again"
    )


def verdict(t: Spread, here: Machine) -> TargetVerdict:
    """Is p95 within the target? If noisy: is every run, or not one, within it?"""
    met, text = t.p95 <= TARGET_MS, f"p95 is {t.p95:.1f} ms"
    where, noisy = here.board or here.gpu or here.cpu, noise(t)
    if noisy:
        met, text = t.max <= TARGET_MS, "every run" if t.max <= TARGET_MS else "not one run"
        if not met and min(t.values) <= TARGET_MS:
            return TargetVerdict("measured", where, TARGET_MS, None, f"{TARGET_MS:g} ms: {noisy}")
        text += f" of {len(t.values)} took less, although the machine is noisy"
    text = f"{TARGET_MS:g} ms {'met' if met else 'not met'} on this machine: {text}"
    return TargetVerdict("measured", where, TARGET_MS, met, text)


def projected(m: Manifest, board: BoardPeaks) -> TargetVerdict:
    """From the roofline alone."""
    found = budget(m, board)
    ms, met = found.stages["chunk"], found.verdicts["projected"]
    text = (
        f"{TARGET_MS:g} ms {met} on {board.name}: {ms['projected']:.1f} ms projected by the "
        f"roofline, not measured; the lower bound is {ms['floor']:.1f} ms"
    )
    return TargetVerdict("projected", board.name, TARGET_MS, met == "met", text)


def limits(
    m: Manifest, rates: Rates | None, stages: Mapping[str, Spread]
) -> tuple[HardwareLimit, ...]:
    """The time of products and of memory alone, at the rates of this machine."""
    if rates is None:
        return ()
    gflops = {name: max(pair) for name, pair in rates.gflops.items()}
    floats = (
        gflops["float32"] if m.precision == "fp32" else gflops.get("float16", gflops["float32"])
    )
    # A portable bundle multiplies integers on TensorRT only, whose rate is not measured.
    integers = gflops.get("int8", floats) if m.target == "cpu" else floats
    steps = m.sampling.num_steps
    found = []
    for stage, graph, runs in (("prefix", m.prefix, 1), ("denoise", m.expert, steps)):
        int8 = runs * sum(work.gemm.get("int8", 0) for work in graph.stages.values())
        size = runs * (sum(work.weight_bytes for work in graph.stages.values()) + m.cache_bytes)
        flops = runs * graph.flops
        compute_ms = 1e-6 * ((flops - int8) / floats + int8 / integers)
        memory_ms = 1e-6 * size / max(rates.copy_gbs)
        share = max(compute_ms, memory_ms) / stages[stage].p50
        # mypy takes `stage` for any str
        found.append(
            HardwareLimit(stage, flops, int8, size, compute_ms, memory_ms, share)  # type: ignore[arg-type]
        )
    return tuple(found)


def _ratio(runner: str, against: str, times: Mapping[str, Spread]) -> Ratio:
    r = spread(np.array(times[against].values) / np.array(times[runner].values))
    noisy = noise(r, RATIO_NOISE)
    return Ratio(runner, against, r.p50, min(r.values), r.max, r.values, noisy)


def _require_same(process: ReferenceProcess, m: Manifest, reference: ReferenceOptions) -> None:
    if process.differences:
        raise BenchError(
            f"the bundle was exported from another checkpoint ({m.source.checkpoint}) than "
            f"--reference {reference.checkpoint}: other "
            f"{', '.join(process.differences)}. Name its own "
            "checkpoint"
        )
    if process.tokens != m.tokens.length:
        raise BenchError(
            f"{process.request.name} takes {process.tokens} tokens, the bundle {m.tokens.length}: "
            "the work is not the same"
        )


def timed(run: Callable[[], object]) -> float:
    """-> wall seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
