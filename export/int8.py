"""Checkpoint and observations -> views whose Linears are INT8 as far as the gate allows.

The float32 views are smoothed (quantize/int8/smoothing.py), each group of layers is measured alone,
and the best groups are taken together (quantize/int8/plan.py). All of this runs in torch, in
modules that round as the backend does. Afterwards `Int8Plan.judged` judges the exported graphs.
"""

from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from ..core.errors import CheckpointError, ObservationsError
from ..core.progress import Progress
from ..quantize.int8 import gate as gates
from ..quantize.int8.gate import Errors, Gate
from ..quantize.int8.linear import Dynamic, Int8Linear, Static
from ..quantize.int8.plan import Cost, choose, order
from ..quantize.int8.sites import Quantizable
from ..quantize.int8.smoothing import measure_errors, measure_moments, smooth
from ..quantize.observations.calibration import CalibrationSet, read_calibration
from ..quantize.observations.sample import Sample
from ..runtime import InputError, Policy
from ..runtime.bundle import manifest as contract
from ..runtime.policy.preprocessing import Tokenizer
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.tokens import instructions, read_tokenizer
from .held_out import HeldOut, hold_out, reference_outputs
from .reference import TorchReference
from .sites import quantizable
from .views.expert import Expert
from .views.layers import FP16, FP32, Linear, Recipe, join_views, pin
from .views.prefix import Prefix
from .views.weights import build_views

Views = tuple[Prefix, Expert]
Layers = dict[str, Int8Linear]  # by module path, which begins with prefix. or expert.
RECIPES: dict[contract.Target, Recipe] = {
    "cpu": replace(FP32, table=torch.float16, ort=True),
    "portable": FP16,
}
_TRIAL_SAMPLES, _TRIAL_SEEDS = 2, 2  # measure a group
_SPREAD_SEEDS = 16  # give the spread that a group is judged against


@dataclass(frozen=True)
class Int8Plan:
    """Which groups become INT8, and what is needed to build and to judge them."""

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
        prefix, expert = Prefix(arch, self.recipe), Expert(arch, self.recipe)
        views = join_views(prefix, expert)
        pin(views, pinned)
        views.load_state_dict(join_views(*self.smoothed).state_dict())
        for path, layer in _together(self.groups.values()).items():
            linear = cast(Linear, views.get_submodule(path))
            views.set_submodule(path, deepcopy(layer).to(linear.compute or linear.weight.dtype))
        floats = {n: t for n, t in views.state_dict().items() if t.is_floating_point()}
        wrong = [name for name, t in floats.items() if not torch.isfinite(t).all()]
        if wrong:
            raise CheckpointError(f"beyond float16: {', '.join(wrong[:5])}. Use --precision fp32")
        views.requires_grad_(False).eval()
        return prefix, expert

    def without_last(self) -> "Int8Plan":
        """Without the group that was taken last: for graphs that do not meet the gate."""
        groups = dict(list(self.groups.items())[:-1])
        manifest = replace(self.manifest, **_claims(groups, self.costs))
        return replace(self, groups=groups, manifest=manifest)

    def judged(self, policy: Policy, progress: Progress) -> contract.Int8Record:
        """The manifest with what the gate found of a bundle's own graphs.

        Raises GateError where the gate is not met.
        """
        progress.stage(f"judging {len(self.held_out.samples)} held-out observations by the gate")
        errors = self.held_out.judge(policy, progress)
        progress.note("\n" + errors.table(self.joints))
        gates.require(errors, self.gate, self.joints)
        found = {"action_p99": errors.action, "cache": errors.worst_cache}
        if errors.flips is not None:
            found["gripper_flips"] = errors.flips
        return replace(self.manifest, found=found)


def observations_for(
    checkpoint: Checkpoint, source: str, frames: int, progress: Progress
) -> CalibrationSet:
    """Read `frames` observations that fit the checkpoint, and a quarter as many to judge by.

    Raises ObservationsError, also for instructions that do not fit.
    """
    processors = checkpoint.processors
    length = processors.token_length
    data = read_calibration(
        source,
        checkpoint.camera_names,
        checkpoint.config.state_dim,
        instructions(read_tokenizer(checkpoint.tokenizer), length),
        statistics=processors.state.statistics,
        frames=frames,
        held_out=max(2, frames // 4),
        progress=progress,
    )
    if len(data.calibration) < 2:
        raise ObservationsError(
            f"{source} leaves {len(data.calibration)} frame to calibrate with, expected at least 2 "
            "(one sets the scales, another tries them): record more"
        )
    tokenizer = Tokenizer(checkpoint.tokenizer, contract.Tokens(length, 0))
    for task in {sample.task for sample in (*data.calibration, *data.held_out)}:
        try:
            tokenizer.encode(task)
        except InputError as e:
            raise ObservationsError(f"{source}: {e}") from e
    return data


def plan_int8(
    reference: TorchReference,
    data: CalibrationSet,
    target: contract.Target,
    gate: Gate,
    progress: Progress,
) -> Int8Plan:
    """Measure every group and choose. The plan is empty where no group meets the gate."""
    checkpoint, arch = reference.checkpoint, reference.arch
    progress.stage(
        f"running float32 on {len(data.held_out)} held-out observations, {gate.seeds} seeds each"
    )
    held_out = hold_out(reference, data.held_out, gate.seeds, progress)
    tried = min(_TRIAL_SAMPLES, len(data.calibration) - 1)
    # Other observations than those that calibrate and those that judge.
    trial = hold_out(reference, data.calibration[:tried], _SPREAD_SEEDS)
    views = build_views(arch, checkpoint.tensors, FP32)  # of their own: they are changed in place
    smoothed = TorchReference(checkpoint, *views)
    model = quantizable(*views)
    layers, costs = quantize_groups(model, smoothed, data.calibration[tried:], target, progress)
    seeds = [noises[:_TRIAL_SEEDS] for noises in trial.noises]

    def errors_of(groups: list[str]) -> Errors:
        """How far the views with these groups in INT8 are from float32."""
        with model.replaced(_together(layers[group] for group in groups)):
            return trial.compare(reference_outputs(smoothed, trial.samples, seeds))

    progress.stage("measuring each group of layers in INT8 alone")
    measured: dict[str, tuple[float, Errors]] = {}
    for group in layers:
        seconds, errors = sum(c.saved_s(target) for c in costs[group]), errors_of([group])
        measured[group] = seconds, errors
        progress.note(
            f"{group} alone: saves {1e3 * seconds:.0f} ms, worst joint {errors.action:.3f} of its "
            f"spread, worst cache {errors.worst_cache:.4f}"
        )
        progress.count(len(measured), len(layers))
    progress.stage("choosing groups, the most time saved for their error first")
    groups = {group: layers[group] for group in choose(order(measured, gate), errors_of, gate)}
    float_groups = [group for group in layers if group not in groups]
    progress.note(
        f"INT8: {', '.join(groups) or 'nothing'}; float: {', '.join(float_groups) or 'nothing'}"
    )
    record = contract.Int8Record(
        **_claims(groups, costs),
        sensitivity={
            group: contract.Sensitivity(1e3 * seconds, errors.action, errors.worst_cache)
            for group, (seconds, errors) in measured.items()
        },
        calibration=data.record,
        gate=asdict(gate),
        gate_is_default=gate == Gate(),
        found={},
    )
    joints = checkpoint.joints or tuple(f"joint {i}" for i in range(checkpoint.config.action_dim))
    return Int8Plan(RECIPES[target], views, groups, costs, record, gate, held_out, joints)


def quantize_groups(
    model: Quantizable,
    smoothed: TorchReference,
    samples: tuple[Sample, ...],
    target: contract.Target,
    progress: Progress,
) -> tuple[dict[str, Layers], dict[str, list[Cost]]]:
    """Smooth the views of `smoothed` in place, which `model` is of.

    -> the INT8 layers and the costs of every group.
    """

    def run(samples: tuple[Sample, ...]) -> None:
        rng = np.random.default_rng(0)
        for done, sample in enumerate(samples, 1):
            _, mask, cache = smoothed.prefill(sample)
            noise = rng.standard_normal(smoothed.arch.noise_shape, dtype=np.float32)
            smoothed.denoise(noise, mask, cache)
            progress.count(done, len(samples))

    static = target == "portable"
    layers: dict[str, Layers] = {}
    costs: dict[str, list[Cost]] = {}
    progress.stage(f"calibrating on {len(samples)} observations")
    with torch.no_grad():
        statistics = measure_moments(model, partial(run, samples))
        progress.stage("choosing the smoothing")
        measure_errors(model, statistics, partial(run, samples[:1]), static=static)
        progress.stage("rounding the weights to INT8")
        made = smooth(model, statistics, Static if static else Dynamic, progress)
    for site, found in statistics.items():
        for path in site.linears:
            runs = 1 if path.startswith("prefix.") else smoothed.checkpoint.config.num_steps
            layers.setdefault(site.group, {})[path] = made[path]
            costs.setdefault(site.group, []).append(
                Cost(found.rows, made[path].weight.numel(), runs)
            )
    return layers, costs


def _claims(groups: dict[str, Layers], costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """What the manifest says of these groups."""
    taken = [cost for group in groups for cost in costs[group]]
    return {
        "groups": tuple(groups),
        "weights": sum(cost.weights for cost in taken),
        "multiply_adds": sum(cost.multiply_adds for cost in taken),
    }


def _together(groups: Iterable[Layers]) -> Layers:
    return {path: layer for layers in groups for path, layer in layers.items()}
