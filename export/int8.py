"""Checkpoint and observations -> views whose Linears are INT8 as far as the gate allows.

The float32 views are smoothed (quantize/smoothing.py), each group of layers is measured alone and the best are taken
together (quantize/plan.py), all in torch, by modules that round as the backend will. What the exported graphs answer
through the runtime is judged afterwards (`HeldOut.judge`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..quantize import gate as gates
from ..quantize.calibration import CalibrationSet, read_calibration
from ..quantize.errors import CalibrationError
from ..quantize.gate import Answers, Asked, Errors, Gate
from ..quantize.linear import Dynamic, Int8Linear, Static
from ..quantize.plan import MACHINES, Cost, choose, order
from ..quantize.sample import Sample
from ..quantize.smoothing import smooth, watch_errors, watch_moments
from ..runtime import Policy, bundle
from .checkpoint import Checkpoint
from .errors import CheckpointError
from .expert import Expert
from .graph import cache_names
from .layers import FP16, FP32, Linear, Recipe, pin
from .prefix import Prefix
from .reference import Observation, Reference
from .sites import EXPERT_GROUPS, PREFIX_GROUPS, sites
from .tokens import instructions, read_tokenizer
from .weights import build_views

Array = NDArray[np.float32]
Views = tuple[Prefix, Expert]
Layers = dict[str, Int8Linear]  # by module path
RECIPES: dict[bundle.Target, Recipe] = {"cpu": replace(FP32, table=torch.float16, ort=True), "portable": FP16}
_TRIED = 2, 2, 4  # observations and seeds that measure the groups, and seeds that tell their spread


@dataclass(frozen=True)
class HeldOut:
    """Observations that calibration has not seen, and what float32 answers to them."""

    observations: list[Observation]
    noises: list[list[Array]]  # for each observation, one for each seed
    expected: Answers
    grippers: list[int]
    middle: Array  # of each joint, robot units [dof]

    def compare(self, got: Answers) -> Errors:
        return gates.compare(self.expected, got, self.grippers, self.middle)

    def judge(self, policy: Policy) -> Errors:
        """What a bundle's own graphs answer."""
        return self.compare(gates.answers(lambda i: ask_policy(policy, self.observations[i]), self.noises))


def ask_policy(policy: Policy, o: Observation) -> Asked:
    """What a bundle's own graphs make of an observation."""
    policy.prefill(o.images, o.state, o.task)
    cache = policy.graphs.cache()
    valid = cache.pop("prefix_mask")[0]
    kept = {name: t[:, :, valid] for name, t in cache.items()}
    return kept, lambda noise: policy.robot_units(policy.denoise(noise))


@dataclass(frozen=True)
class Int8:
    """The plan, and what is needed to build and to judge it."""

    recipe: Recipe
    smoothed: Views  # float32
    layers: tuple[Layers, Layers]  # those of the plan, by view
    manifest: bundle.Int8  # but for what the gate finds
    gate: Gate
    held_out: HeldOut
    joints: tuple[str, ...]

    def views(self, pinned: Collection[str]) -> Views:
        """pinned: stages that stay in the stream's dtype, as for `build_views`."""
        arch = self.smoothed[0].arch
        made = Prefix(arch, self.recipe), Expert(arch, self.recipe)
        for name, view, source, layers in zip(("prefix.", "expert."), made, self.smoothed, self.layers, strict=True):
            pin(view, (stage.removeprefix(name) for stage in pinned if stage.startswith(name)))
            view.load_state_dict(source.state_dict())
            for path, layer in layers.items():
                linear = cast(Linear, view.get_submodule(path))
                view.set_submodule(path, deepcopy(layer).to(linear.compute or linear.weight.dtype))
            floats = {n: t for n, t in view.state_dict().items() if t.is_floating_point()}
            if wrong := [n for n, t in floats.items() if not torch.isfinite(t).all()]:
                raise CheckpointError(f"beyond float16: {', '.join(wrong[:5])}. Use --precision fp32")
            view.requires_grad_(False).eval()
        return made

    def judged(self, policy: Policy, say: Callable[[str], None]) -> bundle.Int8:
        """The manifest with what the gate found of a bundle's own graphs. Raises GateError where it is not met."""
        say(f"judging {len(self.held_out.observations)} held-out observations by the gate")
        errors = self.held_out.judge(policy)
        say("\n" + errors.table(self.joints))
        gates.require(errors, self.gate, self.joints)
        found = {"action_p99": errors.action, "cache": errors.worst_cache}
        if errors.flips is not None:
            found["gripper_flips"] = errors.flips
        return replace(self.manifest, found=found)


def observations_for(checkpoint: Checkpoint, source: str, frames: int, say: Callable[[str], None]) -> CalibrationSet:
    """Read `frames` observations, and a quarter as many to judge by, that fit the checkpoint. Raises
    CalibrationError, also for instructions that do not fit."""
    around = checkpoint.processors
    tokenizer, length = read_tokenizer(checkpoint.tokenizer), around.token_length
    stats = {name: np.array(values, np.float32) for name, values in around.state.statistics.items()}
    data = read_calibration(
        source,
        around.camera_names,
        checkpoint.config.state_dim,
        instructions(tokenizer, length),
        statistics=(stats["mean"], stats["std"]) if {"mean", "std"} <= set(stats) else None,
        frames=frames,
        held_out=max(2, frames // 4),
        say=say,
    )
    if len(data.calibration) < 2:
        raise CalibrationError(
            f"{source} leaves {len(data.calibration)} frame to calibrate with, expected at least 2 (one sets "
            "the scales, another tries them): record more"
        )
    for task in {sample.task for sample in (*data.calibration, *data.held_out)}:
        if (n := len(tokenizer.encode(task.rstrip("\n") + "\n").ids)) > length:
            raise CalibrationError(f"{source}: the instruction {task!r} has {n} tokens, the policy takes {length}")
    return data


def plan_int8(
    reference: Reference,
    data: CalibrationSet,
    target: bundle.Target,
    gate: Gate,
    say: Callable[[str], None],
) -> Int8:
    """Measure the groups and choose; nothing may be left to choose."""
    checkpoint, arch = reference.checkpoint, reference.arch
    say(f"asking float32 on {len(data.held_out)} held-out observations, {gate.seeds} seeds each")
    held_out = hold_out(reference, data.held_out, gate.seeds)
    tried, seeds, spread_seeds = _TRIED
    tried = min(tried, len(data.calibration) - 1)
    trial_on = hold_out(reference, data.calibration[:tried], spread_seeds)  # others than calibrate and than judge
    views = build_views(arch, checkpoint.tensors, FP32)  # of their own, to be smoothed in place
    smoothed = Reference(checkpoint, arch, *views)
    layers, costs = _quantized(smoothed, data.calibration[tried:], target, say)

    groups = [g for g in (*PREFIX_GROUPS, *EXPERT_GROUPS) if g in layers]
    trial = _Trial(smoothed, layers, trial_on, seeds)
    measured = {}
    for group in groups:
        seconds = sum(c.saved_s(MACHINES[target]) for c in costs[group])
        measured[group] = seconds, trial.errors([group])
        say(f"{group} alone: saves {1e3 * seconds:.0f} ms, {measured[group][1].summary()}")
    say("taking groups, most time saved for their error first")
    taken = choose(order(measured, gate), trial.errors, gate)
    say(f"INT8: {', '.join(taken) or 'nothing'}" + "".join(f"; not {g}" for g in groups if g not in taken))
    record = bundle.Int8(
        groups=tuple(taken),
        weights=sum(c.weights for g in taken for c in costs[g]),
        multiply_adds=sum(c.multiply_adds for g in taken for c in costs[g]),
        sensitivity={g: bundle.Sensitivity(1e3 * s, e.action, e.worst_cache) for g, (s, e) in measured.items()},
        calibration=bundle.Calibration(data.source, data.kind, data.sha256, data.bytes, data.frames, data.episodes),
        gate=asdict(gate),
        gate_is_default=gate == Gate(),
        found={},
    )
    joints = checkpoint.joints or tuple(f"joint {i}" for i in range(checkpoint.config.action_dim))
    return Int8(RECIPES[target], views, trial.by_view(taken), record, gate, held_out, joints)


def hold_out(reference: Reference, samples: tuple[Sample, ...], seeds: int) -> HeldOut:
    """Ask float32 about samples, each with as many noises."""
    observations = _observations(samples, reference, seed=1)
    rng, shape = np.random.default_rng(2), observations[0].noise.shape
    noises = [[rng.standard_normal(shape, dtype=np.float32) for _ in range(seeds)] for _ in observations]
    expected = gates.answers(partial(_ask, reference, observations), noises)
    middle = reference.robot_units(np.zeros(shape, np.float32))[0]
    return HeldOut(observations, noises, expected, grippers_of(reference.checkpoint), middle)


def grippers_of(checkpoint: Checkpoint) -> list[int]:
    """Indices of the grippers in the action, where they can be told: by name, or last of an SO-101's six."""
    dim = checkpoint.config.action_dim
    if checkpoint.joints:
        return [i for i, name in enumerate(checkpoint.joints) if "gripper" in name]
    return [dim - 1] if dim == 6 else []


def _observations(samples: tuple[Sample, ...], reference: Reference, seed: int) -> list[Observation]:
    rng, arch = np.random.default_rng(seed), reference.arch
    shape = (1, arch.chunk_size, arch.max_action_dim)
    return [
        Observation(dict(s.images), s.state, s.task, rng.standard_normal(shape, dtype=np.float32)) for s in samples
    ]


def _ask(reference: Reference, observations: list[Observation], i: int) -> Asked:
    _, mask, cache = reference.prefill(observations[i])
    return _answering(reference, mask, cache)


def _answering(reference: Reference, mask: Tensor, cache: list[Tensor]) -> Asked:
    valid = {n: t[:, :, mask[0]].numpy() for n, t in zip(cache_names(reference.arch), cache, strict=True)}
    return valid, lambda noise: reference.robot_units(reference.denoise(noise, mask, cache)[1])


def _quantized(
    smoothed: Reference, samples: tuple[Sample, ...], target: bundle.Target, say: Callable[[str], None]
) -> tuple[dict[str, Layers], dict[str, list[Cost]]]:
    """Smooth the views in place; -> the INT8 layers and the costs of every group."""

    def run(observations: list[Observation]) -> None:
        for n, o in enumerate(observations, 1):
            _, mask, cache = smoothed.prefill(o)
            smoothed.denoise(o.noise, mask, cache)
            if n % 8 == 0:
                say(f"  {n} of {len(observations)} observations")

    observations = _observations(samples, smoothed, seed=0)
    views = {smoothed.prefix: sites(smoothed.prefix), smoothed.expert: sites(smoothed.expert)}
    say(f"calibrating on {len(observations)} observations")
    with torch.no_grad():
        watched = watch_moments(views, partial(run, observations))
        say("choosing the smoothing")
        watch_errors(watched, partial(run, observations[:1]), static=target == "portable")
        layers: dict[str, Layers] = {}
        costs: dict[str, list[Cost]] = {}
        for view, seen in watched.items():
            made = smooth(view, seen, Static if target == "portable" else Dynamic)
            runs = 1 if view is smoothed.prefix else smoothed.checkpoint.config.num_steps
            for site, w in seen.items():
                layers.setdefault(site.group, {}).update({path: made[path] for path in site.linears})
                costs.setdefault(site.group, []).extend(
                    Cost(w.rows, made[path].weight.numel(), runs) for path in site.linears
                )
    return layers, costs


class _Trial:
    """Groups of INT8 layers put into the float views for a while."""

    def __init__(self, smoothed: Reference, layers: Mapping[str, Layers], held_out: HeldOut, seeds: int) -> None:
        self._reference, self._layers, self._held_out, self._seeds = smoothed, layers, held_out, seeds
        self._prefills: dict[frozenset[str], list[tuple[Tensor, list[Tensor]]]] = {}  # those of prefix groups

    def by_view(self, groups: list[str]) -> tuple[Layers, Layers]:
        prefix, expert = (
            {path: layer for g in groups if g in own for path, layer in self._layers[g].items()}
            for own in (PREFIX_GROUPS, EXPERT_GROUPS)
        )
        return prefix, expert

    def errors(self, groups: list[str]) -> Errors:
        """How far the views with these groups in INT8 are from float32, on few observations and seeds."""
        prefix, expert = self.by_view(groups)
        key = frozenset(groups) & frozenset(PREFIX_GROUPS)
        if key not in self._prefills:
            with _swapped(self._reference.prefix, prefix):
                self._prefills[key] = [self._reference.prefill(o)[1:] for o in self._held_out.observations]

        def ask(i: int) -> Asked:
            return _answering(self._reference, *self._prefills[key][i])

        with _swapped(self._reference.expert, expert):
            return self._held_out.compare(gates.answers(ask, [s[: self._seeds] for s in self._held_out.noises]))


@contextmanager
def _swapped(view: nn.Module, layers: Layers) -> Iterator[None]:
    before = {path: view.get_submodule(path) for path in layers}
    for path, layer in layers.items():
        view.set_submodule(path, layer)
    try:
        yield
    finally:
        for path, module in before.items():
            view.set_submodule(path, module)
