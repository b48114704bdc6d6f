"""smolvla-export: a LeRobot SmolVLA checkpoint becomes a bundle."""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import typer

from ..core import command, extras
from ..core.errors import ExportError
from ..core.progress import Progress, print_table
from ..quantize.int8.gate import Gate, read_gate
from ..quantize.observations.calibration import kind_of
from ..runtime.bundle.bundle import Bundle
from ..runtime.bundle.manifest import Int8Record, Precision, Target
from ..runtime.engines.backend import require_vnni
from .output import require_output

app = command.new_app()


@app.command()
def export(
    checkpoint: str | None = typer.Argument(
        None,
        help="Checkpoint folder, training folder or Hub id.",
        show_default="lerobot/smolvla_base",
    ),
    precision: str = typer.Option(
        "fp32",
        help="fp32, fp16 (float16 weights and KV cache, float32 where the range needs it) or int8 "
        "(needs --calibration).",
    ),
    target: str = typer.Option(
        "portable",
        help="portable (runs on every device) or cpu (faster on a CPU, runs only there).",
    ),
    output: Path = typer.Option(Path("bundle"), help="Folder of the new bundle."),
    revision: str | None = typer.Option(None, help="Hub branch, tag or commit.  [default: main]"),
    vlm: Path | None = typer.Option(
        None, help="Folder with the VLM's config.json and tokenizer, if the checkpoint has none."
    ),
    cameras: str | None = typer.Option(
        None,
        help="The robot's names of the cameras that training had, e.g. front,wrist, where the "
        "checkpoint does not say.",
    ),
    demo: bool = typer.Option(
        False, "--demo", help="Full-size random weights instead of CHECKPOINT: runs offline."
    ),
    calibration: str | None = typer.Option(
        None,
        help="Observations for int8: a LeRobot dataset (folder or Hub id), a folder of "
        "`smolvla-run --record`, or `synthetic`.",
    ),
    frames: int = typer.Option(
        16, min=2, help="Observations to calibrate int8 with. A quarter as many judge it."
    ),
    gate: Path | None = typer.Option(None, help="gate.toml: how far int8 may be from float32."),
    sensitivity: bool = typer.Option(
        False, "--sensitivity", help="Only measure groups of layers in int8. Write no bundle."
    ),
    check_lerobot: bool = typer.Option(
        False, "--check-lerobot", help="Compare with LeRobot too, if it is installed."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing bundle at --output."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Export a LeRobot SmolVLA checkpoint to two ONNX graphs, and prove that they compute the same.

    Exit status: 0 done, 1 parity, gate or audit failed (no bundle is written), 2 wrong input.
    """
    if demo and checkpoint is not None:
        raise ExportError(
            f"--demo makes a checkpoint of its own: leave out {checkpoint}, or --demo"
        )
    for name, value, known in (
        ("precision", precision, get_args(Precision)),
        ("target", target, get_args(Target)),
    ):
        if value not in known:
            raise ExportError(
                f"--{name} is {value!r}, expected {', '.join(known[:-1])} or {known[-1]}"
            )
    checked_precision, checked_target = cast(Precision, precision), cast(Target, target)
    if precision == "int8" and calibration is None:
        raise ExportError(
            "--precision int8 needs --calibration: the dataset that the policy was trained with, "
            "a folder of smolvla-run --record, or `synthetic` for a trial"
        )
    if precision != "int8" and (calibration or gate or sensitivity):
        raise ExportError(
            f"--calibration, --gate and --sensitivity belong to int8, --precision is {precision}"
        )
    if precision == "int8" and target == "cpu":
        require_vnni()
    checked_gate = read_gate(gate) if gate else Gate()
    needs_dataset = calibration is not None and kind_of(calibration) == "dataset"
    extras.require_modules(extras.EXPORT + (extras.DATASET if needs_dataset else ()), "export")
    if not sensitivity:
        require_output(output, force)
    command.terminate_like_interrupt()  # so that nothing half-written stays
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    with Progress() as progress, tempfile.TemporaryDirectory(prefix="smolvla-demo-") as temporary:
        progress.stage("loading torch")
        from .checkpoint.cameras import named_cameras
        from .checkpoint.checkpoint import load_checkpoint
        from .checkpoint.demo import write_demo_checkpoint
        from .int8 import observations_for, plan_int8
        from .reference import reference_of
        from .writer import write_bundle

        source = checkpoint or "lerobot/smolvla_base"
        if demo:
            source = f"{temporary}/checkpoint"
            write_demo_checkpoint(Path(source), progress)
        is_folder = Path(source).expanduser().is_dir()
        progress.stage(
            f"reading {'the demo checkpoint' if demo else source}", own_bar=not is_folder
        )
        trained = named_cameras("--cameras", cameras)
        loaded = load_checkpoint(source, revision=revision, vlm=vlm, cameras=trained)
        if loaded.left_out:
            progress.note(loaded.left_out)
        if demo:
            loaded = replace(loaded, name="demo", demo=True)
        data = observations_for(loaded, calibration, frames, progress) if calibration else None
        if data is not None and sensitivity:
            reference = reference_of(loaded, checked_target)
            plan = plan_int8(reference, data, checked_target, checked_gate, progress)
        else:
            written = write_bundle(
                loaded,
                output,
                checked_precision,
                target=checked_target,
                force=force,
                check_lerobot=check_lerobot,
                calibration=data,
                gate=checked_gate,
                progress=progress,
            )
        progress.note("done")
    if sensitivity:
        print_sensitivity(plan.manifest)
    else:
        print_summary(written)


def print_summary(bundle: Bundle) -> None:
    """What was written, and what to know of it."""
    m = bundle.manifest
    size_mb = sum(file.bytes for file in m.files.values()) / 1e6
    revision = f" at {m.source.revision}" if m.source.revision else ""
    parity = ", ".join(f"{stage} {value:.1e}" for stage, value in m.parity.items())
    rows = [
        (
            "bundle",
            f"{bundle.folder}  ({m.precision}, target {m.target}, {size_mb:.0f} MB, "
            f"cache {m.cache_bytes / 1e6:.1f} MB)",
        ),
        ("checkpoint", m.source.checkpoint + revision),
        ("cameras", ", ".join(camera.name for camera in m.cameras)),
        ("parity", parity),
    ]
    if m.int8:
        chunk = m.prefix.flops + m.sampling.num_steps * m.expert.flops
        share = 100 * 2 * m.int8.multiply_adds / chunk
        source = m.int8.calibration.source
        rows.append(("int8", f"{share:.0f} % of the multiply-adds, calibrated with {source}"))
    if m.pinned:
        rows.append(("float32", f"{', '.join(m.pinned)} (too large for float16)"))
    if not (m.state.normalization.active and m.action.normalization.active):
        rows.append(
            (
                "note",
                "no statistics match this checkpoint's state and action, so its outputs are not "
                "joint angles: the bundle runs and can be timed, but is refused on a real arm",
            )
        )
    if m.int8:
        print_sensitivity(m.int8)
    print_table((), rows)


def print_sensitivity(int8: Int8Record) -> None:
    """Each group of layers in INT8 alone, and whether the plan takes it."""
    rows = [
        (
            group,
            f"{s.saved_ms:.1f} ms",
            f"{s.action_p99:.3f}",
            f"{s.cache:.4f}",
            "int8" if group in int8.groups else "stays float",
        )
        for group, s in int8.sensitivity.items()
    ]
    print_table(("group alone in int8", "saves", "action p99", "cache L2", "plan"), rows)
    print("saves: computed for the target. action p99: of the worst joint, over its spread.")


def main() -> None:
    """Entry point of `smolvla-export`."""
    command.require_linux()
    command.run(app)
