"""smolvla-bench: latency, accuracy, frontier and control of a policy on this machine."""

import math
import time
from collections.abc import Callable
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
from . import page
from .report import sections
from .result import Result, write

app = command.new_app()
_BUNDLE = typer.Option("bundle", help="Bundle folder.")
_DEVICE = typer.Option("auto", help="auto, cpu, cuda or jetson.")
_VLM = typer.Option(
    None, help="Folder with the VLM's config.json and tokenizer, if the checkpoint has none."
)
_GATE = typer.Option(
    None, help="gate.toml with the largest allowed errors.  [default: see docs/int8.md]"
)
_FRAMES = typer.Option(8, min=2, help="Observations to compare on.")
_TURNS = typer.Option(30, min=2, help="Timed runs of each.")
_SECONDS = typer.Option(
    60.0, min=0.0, help="Fewer runs if they take longer than this, but at least three."
)
_WARMUP = typer.Option(3, min=0, help="Runs before, not counted.")
_OBSERVATIONS = "LeRobot dataset, folder of smolvla-run --record, or synthetic."
_OUTPUT = "Result file."
_DEBUG = typer.Option(False, "--debug", help="Show tracebacks.")


@app.callback()
def bench(version: bool | None = command.version_option()) -> None:
    """Measure a policy on this machine. Each command writes JSON; `report` makes a page of it.

    Exit status: 0 done, 1 a check failed, 2 an input is wrong.
    """
    command.terminate_like_interrupt()


@app.command()
def latency(
    bundle: list[str] = typer.Option(["bundle"], help="Bundle folder; repeat to compare several."),
    reference: str | None = typer.Option(
        None, help="The bundles' checkpoint: PyTorch runs it in turns with them."
    ),
    vlm: str | None = _VLM,
    lerobot: str | None = typer.Option(
        None,
        help="A Python with lerobot 0.4.4 and this package (make lerobot-env).  [default: this "
        "Python if it has lerobot; else this project's torch views]",
    ),
    compiled: bool = typer.Option(
        False, "--compile", help="Time the reference with torch.compile too."
    ),
    device: str = _DEVICE,
    board: list[str] = typer.Option(
        [], help="Also project to this Jetson, e.g. 'orin nano super'; repeatable."
    ),
    turns: int = _TURNS,
    seconds: float = _SECONDS,
    warmup: int = _WARMUP,
    output: Path = typer.Option(Path("latency.json"), help=_OUTPUT),
    debug: bool = _DEBUG,
) -> None:
    """Time per chunk and stage: bundles and the PyTorch reference in turns, against 30 ms."""
    from . import latency as lat

    _require(output, seconds=seconds)
    given = lat.ReferenceOptions(reference, vlm, lerobot, compiled) if reference else None
    if given is None and (vlm or lerobot or compiled):
        raise BenchError("--vlm, --lerobot and --compile need --reference")
    boards, effort = [find_board(name) for name in board], lat.Effort(warmup, turns, seconds)
    names = list(dict.fromkeys(bundle))
    _finish(output, lat.measure(names, given, device, boards, effort, _say()))


@app.command()
def accuracy(
    reference: str = typer.Option(..., help="The bundle's checkpoint."),
    bundle: str = _BUNDLE,
    observations: str = typer.Option("synthetic", help=_OBSERVATIONS),
    frames: int = _FRAMES,
    gate: Path | None = _GATE,
    vlm: str | None = _VLM,
    device: str = _DEVICE,
    output: Path = typer.Option(Path("accuracy.json"), help=_OUTPUT),
    debug: bool = _DEBUG,
) -> None:
    """Is the bundle still the same policy? Its error beside that of deliberate mistakes."""
    _require(output)
    extras.require_modules(extras.EXPORT + extras.DATASET, "export")
    from . import accuracy as acc
    from .latency import ReferenceOptions

    judge = acc.Judge(observations, frames, read_gate(gate) if gate else Gate())
    result = acc.measure(bundle, ReferenceOptions(reference, vlm), judge, device, _say())
    _finish(output, result)
    failure = acc.failure(result)
    if failure:
        raise CheckFailed(failure)


@app.command()
def frontier(
    reference: str = typer.Option(..., help="The checkpoint."),
    steps: str = typer.Option("1,2,4,5,10", help="Denoise steps."),
    precisions: str = typer.Option("fp32,fp16,int8", help="Any of fp32, fp16, int8."),
    cameras: str | None = typer.Option(
        None, help="Numbers of cameras, e.g. 1,2: the policy's first ones.  [default: all]"
    ),
    trained_cameras: str | None = typer.Option(
        None, help="The cameras that training had, as --cameras of smolvla-export."
    ),
    calibration: str = typer.Option("synthetic", help=_OBSERVATIONS),
    budget_ms: float | None = typer.Option(
        None, min=0.0, help="Recommend the setting with the least error within this time."
    ),
    work: Path = typer.Option(
        Path("frontier"), help="Folder of bundles and finished settings: run again to continue."
    ),
    frames: int = _FRAMES,
    gate: Path | None = _GATE,
    vlm: str | None = _VLM,
    device: str = _DEVICE,
    turns: int = _TURNS,
    seconds: float = _SECONDS,
    warmup: int = _WARMUP,
    output: Path = typer.Option(Path("frontier.json"), help=_OUTPUT),
    debug: bool = _DEBUG,
) -> None:
    """What to give up for speed: latency against error for steps, precision and cameras."""
    _require(output, seconds=seconds, budget_ms=budget_ms or 0.0)
    extras.require_modules(extras.EXPORT + extras.DATASET, "export")
    from ..export.checkpoint.cameras import named_cameras
    from . import accuracy as acc
    from . import frontier as front
    from .latency import Effort, ReferenceOptions

    names = list(dict.fromkeys(precisions.split(",")))
    wrong = [name for name in names if name not in get_args(Precision)]
    if wrong:
        known = ", ".join(get_args(Precision))
        raise BenchError(f"--precisions has {wrong[0]!r}, expected {known}")
    grid = front.Grid(
        _numbers("steps", steps),
        tuple(cast(list[Precision], names)),
        _numbers("cameras", cameras) if cameras else (),
    )
    judge = acc.Judge(calibration, frames, read_gate(gate) if gate else Gate())
    effort = Effort(warmup, turns, seconds)
    trained = named_cameras("--trained-cameras", trained_cameras)
    given = ReferenceOptions(reference, vlm, cameras=trained)
    _finish(output, front.measure(given, grid, judge, device, budget_ms, effort, work, _say()))


@app.command()
def control(
    bundle: str = _BUNDLE,
    fps: list[float] = typer.Option([30.0], help="Control rate; repeat to try several."),
    seconds: float = typer.Option(60.0, min=1.0, help="Of each run."),
    chunking: Chunking = typer.Option("async", help="sync, async or rtc."),
    device: str = _DEVICE,
    output: Path = typer.Option(Path("control.json"), help=_OUTPUT),
    debug: bool = _DEBUG,
) -> None:
    """Is the control loop on time while the policy computes? On the virtual arm."""
    from . import control as loop

    _require(output, **{f"fps {i}": value for i, value in enumerate(fps, 1)})
    _finish(output, loop.measure(bundle, device, fps, seconds, chunking))


@app.command()
def report(
    results: list[Path] = typer.Argument(..., help="Result files of the other commands."),
    output: Path = typer.Option(
        Path("report.html"), help="The page; .md and .tables.json are written beside it."
    ),
    debug: bool = _DEBUG,
) -> None:
    """One HTML page of plots and tables; the same tables as Markdown and JSON."""
    if output.suffix != ".html":
        raise BenchError(f"--output is {output}, expected a name that ends in .html")
    _require(output)
    found = sections(results)
    for suffix, render in (
        (".html", page.html), (".md", page.markdown), (".tables.json", page.as_json)
    ):  # fmt: skip
        write_whole(output.with_suffix(suffix), render(found).encode())
    print(f"report   {output}")


def _require(output: Path, **numbers: float) -> None:
    """Refuse before anything is measured. Raises BenchError."""
    if not output.absolute().parent.is_dir():
        raise BenchError(f"--output {output}: there is no folder {output.absolute().parent}")
    if output.exists() and not output.is_file():
        raise BenchError(f"--output {output} is not a file")
    wrong = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if wrong:
        raise BenchError(f"{', '.join(wrong)}: expected a finite number")


def _say() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise BenchError(f"--{name} is {text!r}, expected whole numbers such as 1,2,4") from None


def _finish(output: Path, result: Result) -> None:
    """Write the result; print its report without the machine and settings."""
    write(output, result)
    page.show(sections([output])[:-1])
    print(f"result   {output}")


def main() -> None:
    """Entry point of `smolvla-bench`."""
    command.require_linux()
    command.run(app)
