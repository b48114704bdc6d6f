"""The graphs that an export tries, one candidate after the other, until one is good enough.

fp32 has one candidate. The next one of fp16 keeps more stages in float32. The next one of INT8
keeps one more group of layers in float.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import distributions
from pathlib import Path

import torch

from ..core.errors import GateError
from ..core.progress import Progress
from ..quantize.ranges import policy_ranges, stages_to_pin
from ..runtime import Bundle, Policy
from ..runtime.bundle import manifest as contract
from ..runtime.bundle.manifest import CAMERA_GRAPH
from . import graph
from .camera_graph import write_camera_graph
from .checkpoint import tokens
from .checkpoint.checkpoint import Checkpoint, architecture_of
from .int8 import Int8Plan
from .reference import ParityObservation
from .views.expert import Expert
from .views.layers import FP16, FP32, Recipe, stages
from .views.prefix import Prefix
from .views.weights import build_views

# The versions of these are in the manifest.
_PACKAGES = [
    "smolvla-edge",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "transformers",
]


@dataclass(frozen=True)
class Candidate:
    """One way to make the graphs of a checkpoint."""

    checkpoint: Checkpoint
    precision: contract.Precision
    target: contract.Target
    int8: Int8Plan | None
    pinned: frozenset[str] = frozenset()  # stages that stay in float32, by `prefix.` or `expert.`

    def views(self) -> tuple[Prefix, Expert]:
        """The two views with their weights, to be exported."""
        if self.int8 is not None:
            return self.int8.views(self.pinned)
        arch, tensors = architecture_of(self.checkpoint), self.checkpoint.tensors
        return build_views(arch, tensors, self.recipe, self.pinned)

    @property
    def recipe(self) -> Recipe:
        if self.int8 is not None:
            return self.int8.recipe
        return replace(FP16 if self.precision == "fp16" else FP32, ort=self.target == "cpu")

    def manifest(self, folder: Path) -> contract.Manifest:
        """The manifest of the graphs in `folder`; files, parity and the judgement are empty."""
        checkpoint, arch = self.checkpoint, architecture_of(self.checkpoint)
        config, processors = checkpoint.config, checkpoint.processors
        prefix = graph.describe_graph(folder / "prefix.onnx")
        expert = graph.describe_graph(folder / "expert.onnx")
        pad = tokens.pad_id(
            checkpoint.tokenizer,
            tokens.read_tokenizer(checkpoint.tokenizer),
            getattr(checkpoint.vlm.text_config, "pad_token_id", None),
        )
        return contract.Manifest(
            format=contract.FORMAT,
            version=contract.VERSION,
            source=contract.WeightsSource(
                checkpoint.name, checkpoint.revision, checkpoint.weights_sha256, checkpoint.demo
            ),
            files={},
            prefix=prefix,
            expert=expert,
            cache_bytes=sum(t.bytes for t in prefix.outputs if t.name != "prefix_mask"),
            cameras=checkpoint.cameras,
            image_size=arch.vision.image_size,
            tokens=contract.Tokens(arch.token_length, pad),
            state=contract.Vector(config.state_dim, config.max_state_dim, processors.state),
            action=contract.Vector(config.action_dim, config.max_action_dim, processors.action),
            joints=checkpoint.joints,
            sampling=config.sampling,
            units=None,  # no LeRobot file records them
            fps=checkpoint.fps,
            precision=self.precision,
            target=self.target,
            parity={},
            pinned=tuple(sorted(self.pinned)),
            int8=None if self.int8 is None else self.int8.manifest,
            float16_largest=None,
            built_with={d.name: d.version for d in distributions() if d.name in _PACKAGES},
        )


@dataclass(frozen=True)
class Built:
    """The graphs of a candidate, loaded; and the stages that could still be pinned, by graph."""

    policy: Policy
    free: dict[str, set[str]]


@dataclass(frozen=True)
class Judgement:
    """retry: the candidate to try instead, None where the judged one is good enough."""

    retry: Candidate | None
    reason: str = ""
    float16_largest: float | None = None
    int8: contract.Int8Record | None = None


def build(candidate: Candidate, folder: Path, progress: Progress) -> Built:
    """Write the graphs of `candidate` to `folder`, which holds the tokenizer, and load them."""
    prefix, expert = candidate.views()
    arch, recipe = prefix.arch, candidate.recipe
    progress.stage("exporting prefix.onnx")
    example = graph.prefix_example(arch)
    graph.export_graph(prefix, example, folder / "prefix.onnx", candidate.target)
    progress.stage("exporting expert.onnx")
    example = graph.expert_example(arch, recipe)
    graph.export_graph(expert, example, folder / "expert.onnx", candidate.target)
    if candidate.target == "portable":
        write_camera_graph(folder / CAMERA_GRAPH, arch.vision.image_size)
    free = {"prefix": stages(prefix), "expert": stages(expert)}
    return Built(
        Policy.load(Bundle(folder, candidate.manifest(folder), digest=""), device="cpu"), free
    )


def judge(
    candidate: Candidate,
    built: Built,
    observations: Sequence[ParityObservation],
    progress: Progress,
) -> Judgement:
    """Measure the float16 ranges, and INT8's gate, of what `build` made.

    Raises RangeError and GateError where no other candidate can help.
    """
    largest = None
    if candidate.recipe.matmul == torch.float16:
        progress.stage("measuring float16 ranges")
        largest, too_large = _measure_ranges(candidate, built, observations)
        if too_large:
            return Judgement(
                replace(candidate, pinned=candidate.pinned | too_large),
                f"keeping in float32, too large for float16: {', '.join(sorted(too_large))}",
            )
    plan = candidate.int8
    if plan is None:
        return Judgement(None, float16_largest=largest)
    try:
        return Judgement(None, float16_largest=largest, int8=plan.judged(built.policy, progress))
    except GateError as e:
        if len(plan.groups) == 1:
            raise GateError(f"{e}. No bundle was written; a looser gate needs --gate FILE") from e
        return Judgement(
            replace(candidate, int8=plan.without_last(), pinned=frozenset()),
            f"{e}; leaving {plan.manifest.groups[-1]} in float",
        )


def _measure_ranges(
    candidate: Candidate, built: Built, observations: Sequence[ParityObservation]
) -> tuple[float, frozenset[str]]:
    """-> the largest magnitude of a float16 tensor, and the stages that come too near the limit."""
    policy = built.policy
    runs = [(policy.preprocessor.feeds(o.images, o.state, o.task), o.noise) for o in observations]
    ranges = dict(zip(built.free, policy_ranges(policy, runs), strict=True))
    too_large: set[str] = set()
    for name, tensors in ranges.items():
        free = {s for s in built.free[name] if f"{name}.{s}" not in candidate.pinned}
        over = stages_to_pin(policy.bundle.folder / f"{name}.onnx", tensors, free)
        too_large |= {f"{name}.{stage}" for stage in over}
    largest = max(value for tensors in ranges.values() for value in tensors.values())
    return largest, frozenset(too_large)
