"""smolvla-export: a LeRobot SmolVLA checkpoint becomes a bundle."""

import os
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import cast, get_args

import typer

from ..core import command
from ..core.errors import ExportError
from ..quantize.int8.gate import Gate, read_gate
from ..runtime.bundle.manifest import Int8Record, Precision, Target
from ..runtime.engines.backend import require_vnni

app = command.new_app()
_NEEDS = (
    "torch",
    "onnx",
    "onnxscript",
    "safetensors",
    "transformers",
    "huggingface_hub",
    "av",
    "pyarrow",
)


@app.command()
def export(
    checkpoint: str | None = typer.Argument(
        None,
        help="Checkpoint folder, training folder or Hub id.",
        show_default="lerobot/smolvla_base",
    ),
    precision: str = typer.Option(
        "fp32",
        help="fp32, fp16 (float16 weights and cache, float32 where it matters) or int8 (needs --calibration).",
    ),
    target: str = typer.Option(
        "portable", help="portable (runs anywhere) or cpu (faster there, and only there)."
    ),
    output: Path = typer.Option(Path("bundle"), help="Folder of the new bundle."),
    revision: str | None = typer.Option(None, help="Hub branch, tag or commit.  [default: main]"),
    vlm: Path | None = typer.Option(
        None, help="Folder with the VLM's config.json and tokenizer, where the checkpoint has none."
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
        help="Observations for int8: a LeRobot dataset (folder or Hub id), a folder of `smolvla-run --record`, or "
        "`synthetic`.",
    ),
    frames: int = typer.Option(
        16, min=2, help="Observations to calibrate int8 with; a quarter as many judge."
    ),
    gate: Path | None = typer.Option(None, help="gate.toml: how far int8 may be from float32."),
    sensitivity: bool = typer.Option(
        False, "--sensitivity", help="Only measure groups of layers in int8: no bundle."
    ),
    check_lerobot: bool = typer.Option(
        False, "--check-lerobot", help="Compare with LeRobot itself too, where it is installed."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing bundle at --output."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Export a LeRobot SmolVLA checkpoint to a bundle of two ONNX graphs, and prove that they compute the same.

    Exit status: 0 done, 1 parity, gate or audit failed (no bundle is written), 2 something in the input is wrong.
    """
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)

    if demo and checkpoint is not None:
        raise ExportError(
            f"--demo makes a checkpoint of its own: leave out {checkpoint}, or --demo"
        )
    for name, given, known in (
        ("precision", precision, get_args(Precision)),
        ("target", target, get_args(Target)),
    ):
        if given not in known:
            raise ExportError(
                f"--{name} is {given!r}, expected {', '.join(known[:-1])} or {known[-1]}"
            )
    made, runs_on = cast(Precision, precision), cast(Target, target)
    if made == "int8" and calibration is None:
        raise ExportError(
            "--precision int8 needs --calibration: the dataset that the policy was trained with, a folder of "
            "smolvla-run --record, or `synthetic` for a trial"
        )
    if made != "int8" and (calibration or gate or sensitivity):
        raise ExportError(
            f"--calibration, --gate and --sensitivity belong to int8, --precision is {precision}"
        )
    if made == "int8" and runs_on == "cpu":
        require_vnni()
    judged_by = read_gate(gate) if gate else Gate()
    require_extra()
    command.terminate_like_interrupt()  # so that nothing half-written stays behind
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    say("loading torch")
    from .checkpoint.cameras import named_cameras
    from .checkpoint.checkpoint import load_checkpoint
    from .checkpoint.demo import write_demo_checkpoint
    from .int8 import observations_for, plan_int8
    from .writer import check_output, reference_of, write_bundle

    if not sensitivity:
        check_output(output, force)
    with tempfile.TemporaryDirectory(prefix="smolvla-demo-") as temporary:
        source = checkpoint or "lerobot/smolvla_base"
        if demo:
            write_demo_checkpoint(Path(source := f"{temporary}/checkpoint"), say)
        say(f"reading {'the demo checkpoint' if demo else source}")
        trained = named_cameras("--cameras", cameras)
        read = load_checkpoint(source, revision=revision, vlm=vlm, cameras=trained)
        if read.left_out:
            say(read.left_out)
        read = replace(read, name="demo", demo=True) if demo else read
        data = observations_for(read, calibration, frames, say) if calibration else None
        if data and sensitivity:
            print(
                sensitivity_table(
                    plan_int8(reference_of(read, runs_on), data, runs_on, judged_by, say).manifest
                )
            )
            return
        written = write_bundle(
            read,
            output,
            made,
            target=runs_on,
            force=force,
            check_lerobot=check_lerobot,
            calibration=data,
            gate=judged_by,
            say=say,
        )
    say("done")
    m, size = written.manifest, sum(f.bytes for f in written.manifest.files.values())
    kind = f"{m.precision}, target {m.target}"
    print(
        f"bundle      {written.folder}  ({kind}, {size / 1e6:.0f} MB, cache {m.cache_bytes / 1e6:.1f} MB)"
    )
    print(
        f"checkpoint  {m.source.checkpoint}"
        + (f" at {m.source.revision}" if m.source.revision else "")
    )
    print(f"cameras     {', '.join(c.name for c in m.cameras)}")
    print("parity      " + ", ".join(f"{stage} {value:.1e}" for stage, value in m.parity.items()))
    if m.int8:
        print(sensitivity_table(m.int8))
        share = 2 * m.int8.multiply_adds / (m.prefix.flops + m.sampling.num_steps * m.expert.flops)
        print(
            f"int8        {100 * share:.0f} % of the multiply-adds, calibrated with {m.int8.calibration.source}"
        )
    if m.pinned:
        print(f"float32     {', '.join(m.pinned)} (too large for float16)")
    if not (m.state.normalization.active and m.action.normalization.active):
        print(
            "note        no statistics match this checkpoint's state and action, so its outputs are not joint "
            "angles: the bundle runs and can be timed, but is refused on a real arm"
        )


def require_extra() -> None:
    """Raises ExportError where the [export] extra is not installed."""
    if missing := [name for name in _NEEDS if find_spec(name) is None]:
        raise ExportError(
            f"this needs {', '.join(missing)}: install the package with its [export] extra (README)"
        )


def sensitivity_table(int8: Int8Record) -> str:
    """Each group of layers in INT8 alone, and whether it became INT8."""
    rows = [f"{'group alone in int8':<20}{'saves':>9}{'action p99':>12}{'cache L2':>10}"]
    for group, s in int8.sensitivity.items():
        taken = "" if group in int8.groups else "   stays float"
        rows.append(f"{group:<20}{s.saved_ms:>6.1f} ms{s.action_p99:>12.3f}{s.cache:>10.4f}{taken}")
    return "\n".join(
        [*rows, "(saves: computed for the target; action p99: of the worst joint, over its spread)"]
    )


def main() -> None:
    """Entry point of `smolvla-export`."""
    command.require_linux()
    command.run(app)
