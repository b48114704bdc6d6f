"""Checkpoint -> bundle: build the views, export, describe, prove, and only then move the folder into place."""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..quantize.ranges import policy_ranges, require_headroom
from ..runtime import Bundle, Policy, bundle
from ..runtime.bundle import MANIFEST, manifest_json, sha256_of
from ..runtime.selfcheck import run_selfcheck
from . import graph, lerobot_check, parity, tokens
from .architecture import Architecture
from .checkpoint import Checkpoint
from .errors import ExportError
from .layers import FP16, FP32
from .reference import Observation, Reference, fixed_observations
from .weights import build_views

RECIPES = {"fp32": FP32, "fp16": FP16}
_PACKAGES = ("smolvla-edge", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "transformers")


@dataclass(frozen=True)
class Written:
    """A finished bundle."""

    folder: Path
    manifest: bundle.Manifest


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """All sizes of a checkpoint."""
    special: tuple[int, ...] = ()
    if checkpoint.config.add_image_special_tokens:
        special = tokens.image_special_tokens(tokens.read_tokenizer(checkpoint.tokenizer))
    return Architecture.from_configs(
        checkpoint.config,
        checkpoint.vlm,
        token_length=checkpoint.processors.token_length,
        image_special_tokens=special,
    )


def write_bundle(
    checkpoint: Checkpoint,
    output: Path,
    precision: bundle.Precision,
    *,
    target: bundle.Target = "portable",
    demo: bool = False,
    force: bool = False,
    check_lerobot: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Written:
    """Export `checkpoint` to the folder `output`.

    Nothing appears at `output` unless parity holds, with LeRobot too where `check_lerobot` asks for it. Raises
    ExportError; ParityError when the graphs differ.
    """
    check_output(output, force)
    if target == "cpu" and not hasattr(torch.onnx, "ops"):
        raise ExportError(f"--target cpu needs torch 2.8 or newer, found {torch.__version__}: use --target portable")
    if check_lerobot:
        lerobot_check.require_lerobot()
    arch = architecture_of(checkpoint)
    say("building the views")
    exact = replace(FP32, ort=target == "cpu")  # in torch the same as FP32
    reference = Reference(checkpoint, arch, *build_views(arch, checkpoint.tensors, exact))
    observations = fixed_observations(checkpoint, arch)
    say("running the checkpoint in torch float32 (the reference)")
    expected = [reference.run(o) for o in observations]
    prefix, expert = reference.prefix, reference.expert
    recipe = replace(RECIPES[precision], ort=exact.ort)
    if recipe != exact:
        prefix, expert = build_views(arch, checkpoint.tensors, recipe)

    with _staging(output, force) as folder:
        say("exporting prefix.onnx")
        graph.export_graph(prefix, graph.prefix_example(arch), folder / "prefix.onnx", target)
        say("exporting expert.onnx")
        graph.export_graph(expert, graph.expert_example(arch, recipe), folder / "expert.onnx", target)
        del prefix, expert
        shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
        parity.write_selfcheck(folder / "selfcheck.npz", observations, expected)
        say("hashing")
        manifest = _describe(checkpoint, arch, folder, precision, target, demo)
        (folder / MANIFEST).write_text(manifest_json(manifest))
        say("proving parity through the runtime")
        policy = Policy.load(folder, device="cpu")
        measured = parity.measure(policy, observations, expected)
        parity.require(measured, precision)
        stored = run_selfcheck(policy)
        parity.require({f"self-check {stage}": value for stage, value in stored.items()}, precision)
        if check_lerobot:
            say("comparing with LeRobot")
            measured["lerobot"] = lerobot_check.measure(checkpoint, policy, observations)
            parity.require(measured, precision)
        if recipe.matmul == torch.float16:
            say("measuring float16 ranges")
            manifest = replace(manifest, float16_largest=_float16_largest(policy, observations[-1]))
        manifest = replace(manifest, parity=measured)
        (folder / MANIFEST).write_text(manifest_json(manifest))
        shutil.rmtree(policy.bundle.cache_folder, ignore_errors=True)  # of the manifest without its numbers
        del policy
    return Written(output, Bundle.open(output).manifest)


def _float16_largest(policy: Policy, observation: Observation) -> float:
    """The largest float16 magnitude in either graph; raises RangeError without headroom."""
    feeds = policy.prefill(observation.images, observation.state, observation.task)
    largest = policy_ranges(policy, feeds, observation.noise)
    for name, found in largest.items():
        require_headroom(name, found)
    return max(v for found in largest.values() for v in found.values())


def check_output(output: Path, force: bool) -> None:
    """Raises ExportError when `output` may not be written; called before anything that takes time."""
    if output.name in ("", ".."):
        raise ExportError(f"--output is {str(output)!r}, expected the name of a new folder")
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as e:
        raise ExportError(f"{output} cannot be made: {parent} cannot be written to ({e.strerror})") from e
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise ExportError(f"{output} exists: give another --output, or --force to replace it")
    if output.is_symlink() or not output.is_dir():
        raise ExportError(f"{output} is not a folder, so --force will not replace it: give another --output")
    strangers = _strangers(output)
    if strangers:
        raise ExportError(
            f"{output} holds what no bundle holds ({', '.join(strangers[:5])}), so --force will not replace it: "
            "give another --output, or move these away"
        )


def _strangers(folder: Path) -> list[str]:
    """Names in `folder` that a bundle does not account for."""
    names = sorted(p.name for p in folder.iterdir())
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        known = {MANIFEST, *manifest["files"]} if manifest["format"] == bundle.FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    return [name for name in names if name not in known]


@contextmanager
def _staging(output: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well, and is gone otherwise."""
    root = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    try:
        folder = root / "new"
        folder.mkdir(mode=0o755)
        yield folder
        for file in folder.iterdir():
            file.chmod(0o444)
        check_output(output, force)
        if output.exists():
            output.rename(root / "old")
        try:
            folder.rename(output)
        except BaseException:
            if (root / "old").exists():
                (root / "old").rename(output)
            raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _describe(
    checkpoint: Checkpoint,
    arch: Architecture,
    folder: Path,
    precision: bundle.Precision,
    target: bundle.Target,
    demo: bool,
) -> bundle.Manifest:
    """The manifest, but for the parity numbers."""
    config, around = checkpoint.config, checkpoint.processors
    prefix, expert = (graph.describe_graph(folder / f"{name}.onnx") for name in ("prefix", "expert"))
    files = {path.name: bundle.File(sha256_of(path), path.stat().st_size) for path in sorted(folder.iterdir())}
    tokenizer = tokens.read_tokenizer(checkpoint.tokenizer)
    pad = tokens.pad_id(checkpoint.tokenizer, tokenizer, getattr(checkpoint.vlm.text_config, "pad_token_id", None))
    return bundle.Manifest(
        format=bundle.FORMAT,
        version=bundle.VERSION,
        source=bundle.Source(checkpoint.name, checkpoint.revision, checkpoint.weights_sha256, demo),
        files=files,
        prefix=prefix,
        expert=expert,
        cache_bytes=sum(t.bytes for t in prefix.outputs if t.name != "prefix_mask"),
        cameras=tuple(
            bundle.Camera(name, key) for name, key in zip(around.camera_names, config.cameras, strict=True)
        ),
        image_size=arch.image_size,
        tokens=bundle.Tokens(arch.token_length, pad),
        state=bundle.Vector(config.state_dim, config.max_state_dim, around.state),
        action=bundle.Vector(config.action_dim, config.max_action_dim, around.action),
        joints=checkpoint.joints,
        sampling=bundle.Sampling(
            config.chunk_size, config.n_action_steps, config.num_steps, config.min_period, config.max_period
        ),
        units=None,  # no LeRobot file records them
        fps=checkpoint.fps,
        precision=precision,
        target=target,
        parity={},
        float16_largest=None,
        built_with=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
