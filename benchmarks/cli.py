"""smolvla-bench: is it fast enough here, is it still the same policy, and what to give up to make it faster."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast, get_args

import typer

from ..core import command, extras
from ..core.errors import BenchError
from ..core.files import write_whole
from ..quantize.int8.gate import Gate, read_gate
from ..runtime import CheckFailed
from ..runtime.budget.roofline import find_board
from ..runtime.bundle.manifest import Precision
from ..runtime.robot.chunks import Chunking
from .page import TITLE, as_json, html, into_readme, markdown
from .report import sections
from .result import FORMAT, Result, write

app = command.new_app()
_BUNDLE = typer.Option("bundle", help="Bundle folder.")
_DEVICE = typer.Option("auto", help="auto, cpu, cuda or jetson.")
_VLM = typer.Option(
    None, help="Folder with the VLM's config.json and tokenizer, where the checkpoint has none."
)
_GATE = typer.Option(
    None, help="A gate.toml that says how far from the reference is too far.  [default: see README]"
)
_FRAMES = typer.Option(8, min=2, help="Observations to judge on.")
_TURNS = typer.Option(30, min=2, help="Timed runs of each.")
_SECONDS = typer.Option(
    60.0, min=0.0, help="Fewer runs where they take longer than this, but at least three."
)
_WARMUP = typer.Option(3, min=0, help="Runs thrown away before.")
_DEBUG = typer.Option(False, "--debug", help="Show tracebacks.")


@app.callback()
def bench(version: bool | None = command.version_option()) -> None:
    """Measure a policy on this machine. Each measurement is written as JSON, and `report` draws it.

    Exit status: 0 done, 1 a check failed, 2 something in the input is wrong.
    """
    command.terminate_like_interrupt()


@app.command()
def latency(
    bundle: list[str] = typer.Option(
        ["bundle"], help="Bundle folder; give it again for each to compare."
    ),
    reference: str | None = typer.Option(
        None, help="Their checkpoint: timed in turns with them, in PyTorch."
    ),
    vlm: str | None = _VLM,
    lerobot: str | None = typer.Option(
        None,
        help="A Python that has lerobot 0.4.4 and this package (make lerobot-env).  [default: this one where it "
        "has; else this project's torch views]",
    ),
    compiled: bool = typer.Option(
        False, "--compile", help="The reference through torch.compile as well."
    ),
    device: str = _DEVICE,
    board: list[str] = typer.Option(
        [], help="A Jetson to project to as well, e.g. 'orin nano super'; repeatable."
    ),
    turns: int = _TURNS,
    seconds: float = _SECONDS,
    warmup: int = _WARMUP,
    output: Path = typer.Option(Path("latency.json"), help="The result."),
    debug: bool = _DEBUG,
) -> None:
    """How long a chunk takes: bundles and the PyTorch reference in turns, by stage, against 30 ms."""
    from . import latency as lat

    _require(output, seconds=seconds)
    given = lat.Reference(reference, vlm, lerobot, compiled) if reference else None
    if given is None and (vlm or lerobot or compiled):
        raise BenchError(
            "--vlm, --lerobot and --compile belong to --reference: name the checkpoint"
        )
    boards, effort = [find_board(name) for name in board], lat.Effort(warmup, turns, seconds)
    r = lat.measure(list(dict.fromkeys(bundle)), given, device, boards, effort, _say())
    _finish(output, r)


@app.command()
def accuracy(
    reference: str = typer.Option(..., help="The bundle's checkpoint."),
    bundle: str = _BUNDLE,
    observations: str = typer.Option(
        "synthetic", help="LeRobot dataset, folder of smolvla-run --record, or synthetic."
    ),
    frames: int = _FRAMES,
    gate: Path | None = _GATE,
    vlm: str | None = _VLM,
    device: str = _DEVICE,
    output: Path = typer.Option(Path("accuracy.json"), help="The result."),
    debug: bool = _DEBUG,
) -> None:
    """Whether it is still the same policy: errors beside a servo tick, the seeds' spread, and mistakes on purpose."""
    _require(output)
    extras.require_modules(extras.EXPORT + extras.DATASET, "export")
    from . import accuracy as acc
    from .latency import Reference

    judge = acc.Judge(observations, frames, read_gate(gate) if gate else Gate())
    r = acc.measure(bundle, Reference(reference, vlm), judge, device, _say())
    _finish(output, r)
    if r.comparisons[0].missed:
        raise CheckFailed(f"the gate is not met: {', '.join(r.comparisons[0].missed[:8])}")
    if not r.passed:
        blind = [c.name for c in r.comparisons[1:] if not c.missed]
        raise CheckFailed(
            f"the gate is also met with {', '.join(blind)}: these observations cannot tell, give others"
        )


@app.command()
def frontier(
    reference: str = typer.Option(..., help="The checkpoint."),
    steps: str = typer.Option("1,2,4,5,10", help="Denoise steps."),
    precisions: str = typer.Option("fp32,fp16,int8", help="Of fp32, fp16, int8."),
    cameras: str | None = typer.Option(
        None, help="How many of the policy's cameras, e.g. 1,2.  [default: all]"
    ),
    calibration: str = typer.Option(
        "synthetic", help="LeRobot dataset, folder of smolvla-run --record, or synthetic."
    ),
    budget_ms: float | None = typer.Option(
        None, min=0.0, help="Recommend what is closest within it."
    ),
    work: Path = typer.Option(
        Path("frontier"), help="Bundles and finished cells are kept here: start again to go on."
    ),
    frames: int = _FRAMES,
    gate: Path | None = _GATE,
    vlm: str | None = _VLM,
    device: str = _DEVICE,
    turns: int = _TURNS,
    seconds: float = _SECONDS,
    warmup: int = _WARMUP,
    output: Path = typer.Option(Path("frontier.json"), help="The result."),
    debug: bool = _DEBUG,
) -> None:
    """What to give up to be faster: latency against error for steps, precision and cameras."""
    _require(output, seconds=seconds, budget_ms=budget_ms or 0.0)
    extras.require_modules(extras.EXPORT + extras.DATASET, "export")
    from . import accuracy as acc
    from . import frontier as front
    from .latency import Effort, Reference

    names = list(dict.fromkeys(precisions.split(",")))
    if wrong := [n for n in names if n not in get_args(Precision)]:
        raise BenchError(
            f"--precisions has {wrong[0]!r}, expected {', '.join(get_args(Precision))}"
        )
    grid = front.Grid(
        _numbers("steps", steps),
        tuple(cast(list[Precision], names)),
        _numbers("cameras", cameras) if cameras else (),
    )
    judge = acc.Judge(calibration, frames, read_gate(gate) if gate else Gate())
    effort = Effort(warmup, turns, seconds)
    r = front.measure(
        Reference(reference, vlm), grid, judge, device, budget_ms, effort, work, _say()
    )
    _finish(output, r)


@app.command()
def control(
    bundle: str = _BUNDLE,
    fps: list[float] = typer.Option([30.0], help="Control rate; give it again for each to try."),
    seconds: float = typer.Option(60.0, min=1.0, help="Of each run."),
    chunking: Chunking = typer.Option("async", help="sync, async or rtc."),
    device: str = _DEVICE,
    output: Path = typer.Option(Path("control.json"), help="The result."),
    debug: bool = _DEBUG,
) -> None:
    """Whether the control loop is on time beside the policy, on the virtual arm."""
    from . import control as loop

    _require(output, **{f"fps {i}": value for i, value in enumerate(fps, 1)})
    r = loop.measure(bundle, device, fps, seconds, chunking)
    _finish(output, r)


@app.command()
def report(
    results: list[Path] = typer.Argument(..., help="What the other commands wrote."),
    output: Path = typer.Option(
        Path("report.html"), help="The page; .md and .tables.json go beside it."
    ),
    debug: bool = _DEBUG,
) -> None:
    """One HTML page of plots and tables from results; the same tables as Markdown and JSON."""
    if output.suffix != ".html":
        raise BenchError(f"--output is {output}, expected a name that ends in .html")
    beside = output.with_suffix(".md"), output.with_suffix(".tables.json")
    _require_free(TITLE, output, *beside)
    found = sections(results)
    texts = html(found), f"<!-- {TITLE} -->\n{markdown(found)}", as_json(found)
    for path, text in zip((output, *beside), texts, strict=True):
        write_whole(path, text.encode())
    print(f"report   {output}")


@app.command()
def table(
    results: Path = typer.Option(Path("benchmarks/results"), help="Folder of results."),
    readme: Path = typer.Option(Path("README.md"), help="Where the table is."),
    check: bool = typer.Option(False, "--check", help="Write nothing: is it up to date?"),
    debug: bool = _DEBUG,
) -> None:
    """Write the README's numbers from the results."""
    if not (found := sorted(results.glob("*.json"))):
        raise BenchError(
            f"{results} holds no results: start this from the checkout, or name them with --results"
        )
    try:
        before = readme.read_text()
    except (OSError, ValueError) as e:
        raise BenchError(f"{readme} is no text to write to: {e}") from e
    after = into_readme(before, sections(found), str(readme))
    if check and before != after:
        raise CheckFailed(f"{readme} does not say what {results} does: smolvla-bench table")
    if before != after:
        write_whole(readme, after.encode())


def _require(output: Path, **numbers: float) -> None:
    """What would otherwise be found out after everything was measured. Raises BenchError."""
    _require_free(FORMAT, output)
    if wrong := [
        f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)
    ]:
        raise BenchError(f"{', '.join(wrong)}: expected a finite number")


def _require_free(mark: str, *outputs: Path) -> None:
    """Where nothing is yet, or something older of the kind that has `mark` near its beginning. Raises BenchError."""
    for output in outputs:
        if not output.absolute().parent.is_dir():
            raise BenchError(f"--output {output}: there is no folder {output.absolute().parent}")
        if output.is_symlink() or output.exists():
            with suppress(OSError):
                if (
                    output.is_file()
                    and not output.is_symlink()
                    and mark.encode() in output.read_bytes()[:300]
                ):
                    continue
            raise BenchError(
                f"--output {output} is there and was not written by this command: give another name"
            )


def _say() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise BenchError(f"--{name} is {text!r}, expected whole numbers such as 1,2,4") from None


def _finish(output: Path, r: Result) -> None:
    """Write the result, and print what a report says of it, but for the machine and settings."""
    write(output, r)
    print(f"\n{markdown(sections([output])[:-1])}\nresult   {output}")


def main() -> None:
    """Entry point of `smolvla-bench`."""
    command.require_linux()
    command.run(app)
