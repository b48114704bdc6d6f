"""Checkpoint -> bundle, from top to bottom: refuse, load, try candidates, prove, write."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from ..core.errors import AuditError, ExportError, GateError
from ..core.files import sha256_of
from ..core.progress import SILENT, Progress
from ..quantize.int8.gate import Gate
from ..quantize.observations.calibration import CalibrationSet
from ..runtime import Bundle
from ..runtime.bundle import manifest as contract
from ..runtime.bundle.manifest import MANIFEST, manifest_json, parse_manifest
from ..runtime.engines.backend import require_vnni
from ..runtime.policy.audit import audit, contradictions
from ..runtime.policy.selfcheck import FILE, run_selfcheck
from . import lerobot_check, parity
from .candidates import Candidate, build, judge
from .checkpoint.checkpoint import Checkpoint
from .int8 import plan_int8
from .output import staging
from .reference import fixed_observations, reference_of
from .stored import stored_contradictions


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
    progress: Progress = SILENT,
) -> Bundle:
    """Export `checkpoint` to the folder `output`.

    Nothing appears at `output` unless the graphs compute what the checkpoint computes (INT8: within
    the gate), and unless the audit agrees with the label.

    Args:
        checkpoint: what `load_checkpoint` read.
        output: the folder of the new bundle.
        precision: fp32, fp16 or int8.
        target: portable, or cpu, which only ONNX Runtime's CPU provider runs.
        force: replace a bundle that is at `output`.
        check_lerobot: compare with LeRobot too.
        calibration: the observations for INT8, and for nothing else.
        gate: how far INT8 may be from float32.
        progress: shows the stages.

    Returns:
        The new bundle.

    Raises:
        ExportError: the export cannot start, or one of its kinds: ParityError, AuditError.
        QuantizeError: GateError, RangeError.
    """
    _refuse(precision, target, check_lerobot, calibration)
    with staging(output, force) as folder:
        # What must come out: the checkpoint's own answer in torch.
        progress.stage("building the views")
        reference = reference_of(checkpoint, target)
        observations = fixed_observations(checkpoint, reference.arch)
        progress.stage("running the checkpoint in torch float32 (the reference)")
        expected = [reference.run(observation) for observation in observations]
        plan = None
        if calibration is not None:
            plan = plan_int8(reference, calibration, target, gate, progress)
            if not plan.groups:
                raise GateError(
                    "no group of layers can be INT8 within the gate (--sensitivity shows each): "
                    "use fp16, or a looser gate with --gate FILE"
                )
        del reference

        # The graphs: try candidates until one is within float16's range and the gate.
        shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
        candidate = Candidate(checkpoint, precision, target, plan)
        while True:
            built = build(candidate, folder, progress)
            judgement = judge(candidate, built, observations, progress)
            if judgement.retry is None:
                break
            progress.note(judgement.reason)
            candidate = judgement.retry
            del built  # the next candidate writes over its files

        # The proof, through the runtime that ships.
        policy = built.policy
        progress.stage("proving parity through the runtime")
        measured, own = parity.measure(policy, observations, expected)
        parity.require(measured, precision)
        parity.write_selfcheck(folder / FILE, observations, expected if plan is None else own)
        replayed = run_selfcheck(policy)
        parity.require({f"self-check {name}": value for name, value in replayed.items()}, precision)
        if check_lerobot:
            progress.stage("comparing with LeRobot")
            measured["lerobot"] = lerobot_check.measure(checkpoint, policy, observations)
            parity.require(measured, precision)
        progress.stage("auditing the precision that the graphs run in")
        wrong = contradictions(audit(policy.bundle), precision)
        wrong += stored_contradictions(policy.bundle)
        if wrong:
            raise AuditError(
                f"the graphs do not run as {precision}: {'; '.join(wrong)}. No bundle was written"
            )

        # The manifest comes last: a folder without one is no bundle.
        progress.stage("hashing")
        files = {
            path.name: contract.File(sha256_of(path), path.stat().st_size)
            for path in folder.iterdir()
        }
        manifest = replace(
            policy.manifest,
            files=files,
            parity=measured,
            float16_largest=judgement.float16_largest,
            int8=judgement.int8,
        )
        text = manifest_json(manifest)
        parse_manifest(json.loads(text), output / MANIFEST)
        (folder / MANIFEST).write_text(text)
        del built, policy
    return Bundle.open(output)


def _refuse(
    precision: contract.Precision,
    target: contract.Target,
    check_lerobot: bool,
    calibration: CalibrationSet | None,
) -> None:
    """Raises ExportError or BackendError for what cannot be exported, whatever the checkpoint
    is."""
    int8 = precision == "int8"
    if int8 and target == "cpu":
        require_vnni()
    if (int8 or target == "cpu") and not hasattr(torch.onnx, "ops"):
        option = "--target cpu" if target == "cpu" else "--precision int8"
        raise ExportError(
            f"{option} needs torch 2.8 or newer, found {torch.__version__}: update torch, or leave "
            "the option out"
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
            "--check-lerobot needs lerobot beside this package: "
            "pip install 'lerobot[smolvla]==0.4.4'"
        )
