"""smolvla-export: a LeRobot SmolVLA checkpoint becomes a bundle."""

import os
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import typer

from ..quantize.errors import QuantizeError
from ..runtime import SmolVLAError, command
from .errors import ExportError, ParityError

app = command.new_app()
_NEEDS = ("torch", "onnx", "onnxscript", "safetensors", "transformers", "huggingface_hub")


@app.command()
def export(
    checkpoint: str | None = typer.Argument(
        None, help="Checkpoint folder, training folder or Hub id.", show_default="lerobot/smolvla_base"
    ),
    precision: str = typer.Option("fp32", help="fp32 or fp16 (float16 weights and cache, float32 where it matters)."),
    target: str = typer.Option("portable", help="portable (runs anywhere) or cpu (faster there, and only there)."),
    output: Path = typer.Option(Path("bundle"), help="Folder of the new bundle."),
    revision: str | None = typer.Option(None, help="Hub branch, tag or commit.  [default: main]"),
    vlm: Path | None = typer.Option(
        None, help="Folder with the VLM's config.json and tokenizer, where the checkpoint has none."
    ),
    demo: bool = typer.Option(False, "--demo", help="Full-size random weights instead of CHECKPOINT: runs offline."),
    check_lerobot: bool = typer.Option(
        False, "--check-lerobot", help="Compare with LeRobot itself too, where it is installed."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing bundle at --output."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Export a LeRobot SmolVLA checkpoint to a bundle of two ONNX graphs, and prove that they compute the same.

    Exit status: 0 done, 1 parity failed (no bundle is written), 2 something in the input is wrong.
    """
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)

    if demo and checkpoint is not None:
        raise ExportError(f"--demo makes a checkpoint of its own: leave out {checkpoint}, or --demo")
    checkpoint = checkpoint or "lerobot/smolvla_base"
    if precision == "int8":
        raise ExportError("--precision int8 is not there yet: use fp32 or fp16")
    if precision not in ("fp32", "fp16"):
        raise ExportError(f"--precision is {precision!r}, expected fp32 or fp16")
    if target not in ("portable", "cpu"):
        raise ExportError(f"--target is {target!r}, expected portable or cpu")
    if missing := [name for name in _NEEDS if find_spec(name) is None]:
        raise ExportError(
            f"exporting needs {', '.join(missing)}: install this package with its [export] extra (README)"
        )
    command.terminate_like_interrupt()  # so that nothing half-written stays behind
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    say("loading torch")
    from .checkpoint import load_checkpoint
    from .demo import write_demo_checkpoint
    from .writer import check_output, write_bundle

    check_output(output, force)
    with tempfile.TemporaryDirectory(prefix="smolvla-demo-") as temporary:
        if demo:
            write_demo_checkpoint(Path(temporary) / "checkpoint", say)
        say(f"reading {'the demo checkpoint' if demo else checkpoint}")
        source = load_checkpoint(
            str(Path(temporary) / "checkpoint") if demo else checkpoint, revision=revision, vlm=vlm
        )
        if demo:
            source = replace(source, name="demo")
        written = write_bundle(
            source,
            output,
            "fp16" if precision == "fp16" else "fp32",
            target="cpu" if target == "cpu" else "portable",
            demo=demo,
            force=force,
            check_lerobot=check_lerobot,
            say=say,
        )
    m = written.manifest
    size = sum(f.bytes for f in m.files.values())
    say("done")
    kind = f"{m.precision}, target {m.target}"
    print(f"bundle      {written.folder}  ({kind}, {size / 1e6:.0f} MB, cache {m.cache_bytes / 1e6:.1f} MB)")
    print(f"checkpoint  {m.source.checkpoint}" + (f" at {m.source.revision}" if m.source.revision else ""))
    print(f"cameras     {', '.join(c.name for c in m.cameras)}")
    print("parity      " + ", ".join(f"{stage} {value:.1e}" for stage, value in m.parity.items()))
    if m.pinned:
        print(f"float32     {', '.join(m.pinned)} (too large for float16)")
    if not (m.state.normalization.active and m.action.normalization.active):
        print(
            "note        no statistics match this checkpoint's state and action, so its outputs are not joint "
            "angles: the bundle runs and can be timed, but is refused on a real arm"
        )


def main() -> None:
    """Entry point of `smolvla-export`."""
    command.require_linux()
    command.run(app, mistakes=(ExportError, QuantizeError, SmolVLAError), failures=(ParityError,))
