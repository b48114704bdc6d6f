"""Checkpoint and observations -> views whose Linears are INT8 as far as the gate allows.

The float32 views are smoothed (quantize/smoothing.py), each group of layers is measured alone and the best are taken
together (quantize/plan.py), all in torch, by modules that round as the backend will. What the exported graphs answer
through the runtime is judged afterwards (`HeldOut.judge`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..core.errors import CheckpointError, ObservationsError
from ..quantize.int8 import gate as gates
from ..quantize.int8.gate import Answers, Array, Asked, Errors, Gate
from ..quantize.int8.linear import Dynamic, Int8Linear, Static
from ..quantize.int8.plan import Cost, choose, order
from ..quantize.int8.smoothing import smooth, watch_errors, watch_moments
from ..quantize.observations.calibration import CalibrationSet, read_calibration
from ..quantize.observations.sample import Sample
from ..runtime import InputError, Policy
from ..runtime.bundle import manifest as contract
from ..runtime.policy.preprocessing import Tokenizer
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.tokens import instructions, read_tokenizer
from .reference import Reference
from .sites import sites
from .views.expert import Expert
from .views.layers import FP16, FP32, Linear, Recipe, both, pin
from .views.prefix import Prefix
from .views.weights import build_views

Views = tuple[Prefix, Expert]
Layers = dict[str, Int8Linear]  # by module path, which begins with prefix. or expert.
RECIPES: dict[contract.Target, Recipe] = {
    "cpu": replace(FP32, table=torch.float16, ort=True),
    "portable": FP16,
}
_TRIED = (
    2,
    2,
    16,
)  # observations and seeds that measure the groups, and seeds that tell their spread


@dataclass(frozen=True)
class HeldOut:
    """Observations that calibration has not seen, and what float32 answers to them."""

    samples: tuple[Sample, ...]
    noises: list[list[Array]]  # for each sample, one for each seed
    expected: Answers
    grippers: list[int]
    middle: Array  # of each joint, robot units [dof]

    def compare(self, got: Answers) -> Errors:
        return gates.compare(self.expected, got, self.grippers, self.middle)

    def judge(self, policy: Policy) -> Errors:
        """What a bundle's own graphs answer."""
        return self.compare(
            gates.answers((ask_policy(policy, s) for s in self.samples), self.noises)
        )


def ask_policy(policy: Policy, o: Sample) -> Asked:
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
    groups: dict[str, Layers]  # those of the plan, in the order they were taken
    costs: dict[str, list[Cost]]
    manifest: contract.Int8Record  # but for what the gate finds
    gate: Gate
    held_out: HeldOut
    joints: tuple[str, ...]

    def views(self, pinned: Collection[str]) -> Views:
        """pinned: stages that stay in the stream's dtype, as for `build_views`."""
        arch = self.smoothed[0].arch
        made = Prefix(arch, self.recipe), Expert(arch, self.recipe)
        views = both(*made)
        pin(views, pinned)
        views.load_state_dict(both(*self.smoothed).state_dict())
        for path, layer in _together(self.groups.values()).items():
            linear = cast(Linear, views.get_submodule(path))
            views.set_submodule(path, deepcopy(layer).to(linear.compute or linear.weight.dtype))
        floats = {n: t for n, t in views.state_dict().items() if t.is_floating_point()}
        if wrong := [n for n, t in floats.items() if not torch.isfinite(t).all()]:
            raise CheckpointError(f"beyond float16: {', '.join(wrong[:5])}. Use --precision fp32")
        views.requires_grad_(False).eval()
        return made

    def fewer(self) -> "Int8":
        """Without the group that was taken last, for when the gate turns out not to be met."""
        groups = dict(list(self.groups.items())[:-1])
        return replace(
            self, groups=groups, manifest=replace(self.manifest, **_claims(groups, self.costs))
        )

    def judged(self, policy: Policy, say: Callable[[str], None]) -> contract.Int8Record:
        """The manifest with what the gate found of a bundle's own graphs. Raises GateError where it is not met."""
        say(f"judging {len(self.held_out.samples)} held-out observations by the gate")
        errors = self.held_out.judge(policy)
        say("\n" + errors.table(self.joints))
        gates.require(errors, self.gate, self.joints)
        flips = {} if errors.flips is None else {"gripper_flips": errors.flips}
        return replace(
            self.manifest, found={"action_p99": errors.action, "cache": errors.worst_cache, **flips}
        )


def observations_for(
    checkpoint: Checkpoint, source: str, frames: int, say: Callable[[str], None]
) -> CalibrationSet:
    """Read `frames` observations, and a quarter as many to judge by, that fit the checkpoint. Raises
    ObservationsError, also for instructions that do not fit."""
    around = checkpoint.processors
    length = around.token_length
    asked = Tokenizer(checkpoint.tokenizer, contract.Tokens(length, 0))
    data = read_calibration(
        source,
        checkpoint.camera_names,
        checkpoint.config.state_dim,
        instructions(read_tokenizer(checkpoint.tokenizer), length),
        statistics=around.state.statistics,
        frames=frames,
        held_out=max(2, frames // 4),
        say=say,
    )
    if len(data.calibration) < 2:
        raise ObservationsError(
            f"{source} leaves {len(data.calibration)} frame to calibrate with, expected at least 2 (one sets "
            "the scales, another tries them): record more"
        )
    for task in {sample.task for sample in (*data.calibration, *data.held_out)}:
        try:
            asked.encode(task)
        except InputError as e:
            raise ObservationsError(f"{source}: {e}") from e
    return data


def plan_int8(
    reference: Reference,
    data: CalibrationSet,
    target: contract.Target,
    gate: Gate,
    say: Callable[[str], None],
) -> Int8:
    """Measure the groups and choose; nothing may be left to choose."""
    checkpoint, arch = reference.checkpoint, reference.arch
    say(f"asking float32 on {len(data.held_out)} held-out observations, {gate.seeds} seeds each")
    held_out = hold_out(reference, data.held_out, gate.seeds)
    tried, seeds, spread_seeds = _TRIED
    tried = min(tried, len(data.calibration) - 1)
    trial_on = hold_out(
        reference, data.calibration[:tried], spread_seeds
    )  # others than calibrate and than judge
    views = build_views(arch, checkpoint.tensors, FP32)  # of their own, to be smoothed in place
    smoothed = Reference(checkpoint, *views)
    layers, costs = _quantized(smoothed, data.calibration[tried:], target, say)

    def errors_of(groups: list[str]) -> Errors:
        """How far the views with these groups in INT8 are from float32, on few observations and seeds."""
        with _swapped(both(*views), _together(layers[g] for g in groups)):
            return trial_on.compare(
                _answers(smoothed, trial_on.samples, [n[:seeds] for n in trial_on.noises])
            )

    measured = {}
    for group in layers:
        seconds = sum(c.saved_s(target) for c in costs[group])
        measured[group] = seconds, (errors := errors_of([group]))
        said = (
            f"worst joint {errors.action:.3f} of its spread, worst cache {errors.worst_cache:.4f}"
        )
        say(f"{group} alone: saves {1e3 * seconds:.0f} ms, {said}")
    say("taking groups, most time saved for their error first")
    taken = {g: layers[g] for g in choose(order(measured, gate), errors_of, gate)}
    say(
        f"INT8: {', '.join(taken) or 'nothing'}"
        + "".join(f"; not {g}" for g in layers if g not in taken)
    )
    record = contract.Int8Record(
        **_claims(taken, costs),
        sensitivity={
            g: contract.Sensitivity(1e3 * s, e.action, e.worst_cache)
            for g, (s, e) in measured.items()
        },
        calibration=data.record,
        gate=asdict(gate),
        gate_is_default=gate == Gate(),
        found={},
    )
    joints = checkpoint.joints or tuple(f"joint {i}" for i in range(checkpoint.config.action_dim))
    return Int8(RECIPES[target], views, taken, costs, record, gate, held_out, joints)


def _claims(groups: dict[str, Layers], costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """What the manifest says of these groups."""
    taken = [cost for group in groups for cost in costs[group]]
    counts = {
        "weights": sum(c.weights for c in taken),
        "multiply_adds": sum(c.multiply_adds for c in taken),
    }
    return {"groups": tuple(groups), **counts}


def _together(groups: Iterable[Layers]) -> Layers:
    return {path: layer for layers in groups for path, layer in layers.items()}


def hold_out(reference: Reference, samples: tuple[Sample, ...], seeds: int) -> HeldOut:
    """Ask float32 about samples, each with as many noises."""
    rng, shape = np.random.default_rng(2), reference.arch.noise_shape
    noises = [[rng.standard_normal(shape, dtype=np.float32) for _ in range(seeds)] for _ in samples]
    expected = _answers(reference, samples, noises)
    middle = reference.robot_units(np.zeros(shape, np.float32))[0]
    return HeldOut(samples, noises, expected, grippers_of(reference.checkpoint), middle)


def grippers_of(checkpoint: Checkpoint) -> list[int]:
    """Indices of the grippers in the action, where they can be told: by name, or last of an SO-101's six."""
    dim = checkpoint.config.action_dim
    if checkpoint.joints:
        return [i for i, name in enumerate(checkpoint.joints) if "gripper" in name]
    return [dim - 1] if dim == 6 else []


def _answers(
    reference: Reference, samples: tuple[Sample, ...], noises: list[list[Array]]
) -> Answers:
    def ask(sample: Sample) -> Asked:
        _, mask, cache = reference.prefill(sample)
        valid = {name: t[:, :, mask[0]].numpy() for name, t in cache.items()}
        return valid, lambda noise: reference.robot_units(reference.denoise(noise, mask, cache)[1])

    return gates.answers(map(ask, samples), noises)


def _quantized(
    smoothed: Reference,
    samples: tuple[Sample, ...],
    target: contract.Target,
    say: Callable[[str], None],
) -> tuple[dict[str, Layers], dict[str, list[Cost]]]:
    """Smooth the views in place; -> the INT8 layers and the costs of every group."""

    def run(samples: tuple[Sample, ...]) -> None:
        rng = np.random.default_rng(0)
        for n, sample in enumerate(samples, 1):
            _, mask, cache = smoothed.prefill(sample)
            smoothed.denoise(
                rng.standard_normal(smoothed.arch.noise_shape, dtype=np.float32), mask, cache
            )
            if n % 8 == 0:
                say(f"  {n} of {len(samples)} observations")

    views, static = both(smoothed.prefix, smoothed.expert), target == "portable"
    found = sites(smoothed.prefix, smoothed.expert)
    layers: dict[str, Layers] = {}
    costs: dict[str, list[Cost]] = {}
    say(f"calibrating on {len(samples)} observations")
    with torch.no_grad():
        seen = watch_moments(views, found, partial(run, samples))
        say("choosing the smoothing")
        watch_errors(views, seen, partial(run, samples[:1]), static=static)
        made = smooth(views, seen, Static if static else Dynamic)
    for site, watched in seen.items():
        for path in site.linears:
            runs = 1 if path.startswith("prefix.") else smoothed.checkpoint.config.num_steps
            layers.setdefault(site.group, {})[path] = made[path]
            costs.setdefault(site.group, []).append(
                Cost(watched.rows, made[path].weight.numel(), runs)
            )
    return layers, costs


@contextmanager
def _swapped(views: nn.Module, layers: Layers) -> Iterator[None]:
    """While open, `layers` stand in the place of what they are made of."""
    before = {path: views.get_submodule(path) for path in layers}
    for path, layer in layers.items():
        views.set_submodule(path, layer)
    try:
        yield
    finally:
        for path, module in before.items():
            views.set_submodule(path, module)
