"""Checkpoint -> bundle: build the views, export, describe, prove, and only then move the folder into place."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch

from ..core.errors import AuditError, ExportError, GateError
from ..core.files import sha256_of
from ..quantize.int8.gate import Gate
from ..quantize.observations.calibration import CalibrationSet
from ..quantize.ranges import policy_ranges, stages_to_pin
from ..runtime import Bundle, Policy
from ..runtime.bundle import manifest as contract
from ..runtime.bundle.manifest import CAMERA_GRAPH, MANIFEST, manifest_json, parse_manifest
from ..runtime.engines.backend import require_vnni
from ..runtime.policy.audit import audit, contradictions
from ..runtime.policy.selfcheck import FILE, run_selfcheck
from . import graph, lerobot_check, parity
from .camera_graph import write_camera_graph
from .checkpoint import tokens
from .checkpoint.architecture import Architecture
from .checkpoint.checkpoint import Checkpoint
from .int8 import Int8, plan_int8
from .reference import Observation, Reference, fixed_observations
from .stored import stored_contradictions
from .views.expert import Expert
from .views.layers import FP16, FP32, stages
from .views.prefix import Prefix
from .views.weights import build_views

_PACKAGES = (
    "smolvla-edge",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "transformers",
)


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """All sizes of a checkpoint."""
    special: tuple[int, ...] = ()
    if checkpoint.config.add_image_special_tokens:
        special = tokens.image_special_tokens(tokens.read_tokenizer(checkpoint.tokenizer))
    return Architecture(
        checkpoint.config,
        checkpoint.vlm,
        len(checkpoint.cameras),
        checkpoint.processors.token_length,
        special,
    )


def reference_of(checkpoint: Checkpoint, target: contract.Target) -> Reference:
    """The checkpoint's float32 views, such as they are exported for `target`; in torch they compute the same."""
    recipe = replace(FP32, ort=target == "cpu")
    return Reference(
        checkpoint, *build_views(architecture_of(checkpoint), checkpoint.tensors, recipe)
    )


def write_bundle(
    checkpoint: Checkpoint,
    output: Path,
    precision: contract.Precision,
    *,
    target: contract.Target = "portable",
    force: bool = False,
    check_lerobot: bool = False,
    calibration: CalibrationSet | None = None,
    gate: Gate = Gate(),
    say: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export `checkpoint` to the folder `output`.

    calibration, gate: of INT8, which needs the first. Nothing appears at `output` unless parity holds (INT8: the
    gate), with LeRobot too where `check_lerobot` asks for it, and unless the audit agrees with the label. Raises
    ExportError, ParityError or GateError when the graphs differ too much.
    """
    check_output(output, force)
    int8 = precision == "int8"
    if int8 and target == "cpu":
        require_vnni()
    if (int8 or target == "cpu") and not hasattr(torch.onnx, "ops"):
        option = "--target cpu" if target == "cpu" else "--precision int8"
        raise ExportError(
            f"{option} needs torch 2.8 or newer, found {torch.__version__}: update it, or leave it out"
        )
    if int8 != (calibration is not None):
        raise ExportError(
            "INT8, and nothing else, needs calibration data: a dataset, a recording, or `synthetic`"
        )
    if int8 and check_lerobot:
        raise ExportError(
            "--check-lerobot is for fp32 and fp16: INT8 is judged against float32, by the gate"
        )
    if check_lerobot and find_spec("lerobot") is None:
        raise ExportError(
            "--check-lerobot needs lerobot beside this package: pip install 'lerobot[smolvla]==0.4.4'"
        )
    say("building the views")
    reference = reference_of(checkpoint, target)
    arch = reference.arch
    observations = fixed_observations(checkpoint, arch)
    say("running the checkpoint in torch float32 (the reference)")
    expected = [reference.run(o) for o in observations]
    plan = None if calibration is None else plan_int8(reference, calibration, target, gate, say)
    if plan is not None and not plan.manifest.groups:
        raise GateError(
            "no group of layers can be INT8 within the gate (--sensitivity shows each): use fp16, or a looser gate "
            "with --gate FILE"
        )
    recipe = replace(FP16 if precision == "fp16" else FP32, ort=target == "cpu")
    floats = partial(build_views, arch, checkpoint.tensors, recipe)
    del reference

    with _staging(output, force) as folder:
        shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
        describe = partial(_describe, checkpoint, arch, folder, precision, target)
        while True:
            make = floats if plan is None else plan.views
            policy = _export(make, partial(describe, plan), folder, target, observations, say)
            if plan is None:
                break
            try:
                policy.bundle.manifest = replace(policy.manifest, int8=plan.judged(policy, say))
                break
            except GateError as e:
                if len(plan.groups) == 1:
                    raise GateError(
                        f"{e}. No bundle was written; a looser gate needs --gate FILE"
                    ) from e
                say(f"{e}; leaving {plan.manifest.groups[-1]} in float")
                plan = plan.fewer()
                del policy
        say("proving parity through the runtime")
        measured, own = parity.measure(policy, observations, expected)
        parity.require(measured, precision)
        parity.write_selfcheck(folder / FILE, observations, expected if plan is None else own)
        parity.require(
            {f"self-check {stage}": value for stage, value in run_selfcheck(policy).items()},
            precision,
        )
        if check_lerobot:
            say("comparing with LeRobot")
            measured["lerobot"] = lerobot_check.measure(checkpoint, policy, observations)
            parity.require(measured, precision)
        say("auditing")
        wrong = contradictions(audit(policy.bundle), precision)
        wrong += stored_contradictions(policy.bundle)
        if wrong:
            raise AuditError(
                f"the graphs are not what they would be labelled: {'; '.join(wrong)}. No bundle was written"
            )
        say("hashing")
        files = {
            path.name: contract.File(sha256_of(path), path.stat().st_size)
            for path in folder.iterdir()
        }
        manifest = manifest_json(replace(policy.manifest, files=files, parity=measured))
        parse_manifest(json.loads(manifest), output / MANIFEST)  # raises before there is a bundle
        (folder / MANIFEST).write_text(manifest)
        del policy
    return Bundle.open(output)


def _export(
    make: Callable[[set[str]], tuple[Prefix, Expert]],
    describe: Callable[[set[str]], contract.Manifest],
    folder: Path,
    target: contract.Target,
    observations: list[Observation],
    say: Callable[[str], None],
) -> Policy:
    """Write the graphs, as often as it takes until nothing comes near float16's limit; -> them, loaded. make,
    describe: views and manifest, from the stages that stay in float32. Raises RangeError where that cannot help."""
    pinned: set[str] = set()
    while True:
        views = make(pinned)
        arch, recipe = views[0].arch, views[0].recipe
        examples = graph.prefix_example(arch), graph.expert_example(arch, recipe)
        for name, view, example in zip(("prefix", "expert"), views, examples, strict=True):
            say(f"exporting {name}.onnx")
            graph.export_graph(view, example, folder / f"{name}.onnx", target)
        if target == "portable":
            write_camera_graph(folder / CAMERA_GRAPH, arch.vision.image_size)
        policy = Policy.load(Bundle(folder, describe(pinned), digest=""), device="cpu")
        if recipe.matmul != torch.float16:
            return policy
        say("measuring float16 ranges")
        runs = [
            (policy.preprocessor.feeds(o.images, o.state, o.task), o.noise) for o in observations
        ]
        ranges, more = policy_ranges(policy, runs), set[str]()
        for name, view, largest in zip(("prefix", "expert"), views, ranges, strict=True):
            free = {stage for stage in stages(view) if f"{name}.{stage}" not in pinned}
            more |= {
                f"{name}.{stage}" for stage in stages_to_pin(folder / f"{name}.onnx", largest, free)
            }
        if not more:
            reached = max(v for largest in ranges for v in largest.values())
            policy.bundle.manifest = replace(policy.manifest, float16_largest=reached)
            return policy
        say(f"keeping in float32, too large for float16: {', '.join(sorted(more))}")
        pinned |= more


def check_output(output: Path, force: bool) -> None:
    """Raises ExportError when `output` may not be written; called before anything that takes time."""
    if output.name in ("", ".."):
        raise ExportError(f"--output is {str(output)!r}, expected the name of a new folder")
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as e:
        raise ExportError(
            f"{output} cannot be made: {parent} cannot be written to ({e.strerror})"
        ) from e
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise ExportError(f"{output} exists: give another --output, or --force to replace it")
    if output.is_symlink() or not output.is_dir():
        raise ExportError(
            f"{output} is not a folder, so --force will not replace it: give another --output"
        )
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
        known = {MANIFEST, *manifest["files"]} if manifest["format"] == contract.FORMAT else set()
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
    precision: contract.Precision,
    target: contract.Target,
    plan: Int8 | None,
    pinned: set[str],
) -> contract.Manifest:
    """The manifest, but for hashes and measurements."""
    config, around = checkpoint.config, checkpoint.processors
    prefix, expert = (
        graph.describe_graph(folder / f"{name}.onnx") for name in ("prefix", "expert")
    )
    tokenizer = tokens.read_tokenizer(checkpoint.tokenizer)
    pad = tokens.pad_id(
        checkpoint.tokenizer, tokenizer, getattr(checkpoint.vlm.text_config, "pad_token_id", None)
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
        state=contract.Vector(config.state_dim, config.max_state_dim, around.state),
        action=contract.Vector(config.action_dim, config.max_action_dim, around.action),
        joints=checkpoint.joints,
        sampling=config.sampling,
        units=None,  # no LeRobot file records them
        fps=checkpoint.fps,
        precision=precision,
        target=target,
        parity={},
        pinned=tuple(sorted(pinned)),
        int8=None if plan is None else plan.manifest,
        float16_largest=None,
        built_with={d.name: d.version for d in distributions() if d.name in _PACKAGES},
    )
