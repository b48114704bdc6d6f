"""Results become sections: a heading, sentences, a plot, a table. page.py renders them.

What comes from a result names its file and field with a JSON pointer, such as
`latency.json#/runners/0/chunk_ms/p50`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..core.strict import encode
from . import plots
from .result import Accuracy, ColdStart, Control, Frontier, Latency, read

LOOP = {
    "period error, ms": "/period_error_ms",
    "tick late by, ms": "/late_ms",
    "work in a tick, ms": "/busy_ms",
    "read the arm, ms": "/read_ms",
    "take pictures, ms": "/capture_ms",
    "age of the oldest picture, ms": "/picture_age_ms",
    "command the arm, ms": "/write_ms",
    "request to chunk, ms": "/chunk_ms",
    "step between chunks, degrees": "/seams_deg",
}
# Shown elsewhere than under the settings.
SHOWN = {"command", "enters", "made", "rates", "reason", "recommended", "skipped", "stages"}
Columns = Mapping[str, str]  # head -> field below the pointer of a row
Row = tuple[str, str]  # its name, and the pointer of what it shows


@dataclass(frozen=True)
class Cell:
    text: str
    field: str | None = None  # FILE#/json/pointer; None: text of the report


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]  # the last cell of a short row fills the rest


@dataclass(frozen=True)
class Section:
    heading: str
    table: Table | None = None
    sentences: tuple[Cell, ...] = ()
    plot: Callable[[], str] | None = None  # -> SVG
    command: Cell | None = None  # a result begins here; this command made it


class ResultFile:
    """A result, and its fields as cells."""

    def __init__(self, path: Path) -> None:
        """Raises ResultError."""
        self.path, self.result = path, read(path)
        self._raw = encode(self.result)

    def at(self, pointer: str) -> Any:
        """The field; None where it, or what it belongs to, is null or absent."""
        value = self._raw
        for key in pointer.split("/")[1:]:
            if isinstance(value, list):
                value = value[int(key)]
            elif value is not None:
                value = value.get(key)
        return value

    def rows(self, pointer: str, name: str = "{key}") -> list[Row]:
        """The members of the list or table at `pointer`. name: a format of their key and fields."""
        held, rows = self.at(pointer), []
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            if value is not None:
                known = {"key": key} | (value if isinstance(value, dict) else {})
                rows.append((name.format_map(known), f"{pointer}/{key}"))
        return rows

    def cells(self, *pointers: str) -> tuple[Cell, ...]:
        return tuple(Cell(text(self.at(pointer)), f"{self.path}#{pointer}") for pointer in pointers)

    def table(self, columns: Columns, rows: Iterable[Row], times: Columns | None = None) -> Table:
        """times: columns that a row shows only if its field `noise` is null."""
        made, times = [], times or {}
        for name, pointer in rows:
            noisy = times and self.at(f"{pointer}/noise")
            shown = [*columns.values(), *(["/noise"] if noisy else times.values())]
            made.append((Cell(name), *self.cells(*(pointer + field for field in shown))))
        return Table(("", *columns, *times), tuple(made))


def text(value: object) -> str:
    """A field for people: numbers have three digits or are whole."""
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(map(text, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.3g}" if isinstance(value, int) and value >= 1e6 else str(value)


def _columns(*names: str) -> dict[str, str]:
    return {name: f"/{name}" for name in names}


TIMES = _columns("p50", "p95", "p99", "max")


def sections(paths: Sequence[Path]) -> list[Section]:
    """The sections of each result; its machine and settings are the last. Raises ResultError."""
    return [section for path in paths for section in _sections(ResultFile(path))]


def _sections(file: ResultFile) -> Iterator[Section]:
    result = file.result
    device = [pointer for name, pointer in file.rows("/machine") if name in ("gpu", "board")]
    machine = file.cells("/machine/cpu", *device, "/made")
    heading = f"{type(result).__name__}: {file.path}"
    yield Section(heading, sentences=machine, command=file.cells("/command")[0])
    if isinstance(result, Latency):
        yield from _latency(file, result)
    elif isinstance(result, Accuracy):
        yield from _accuracy(file, result)
    elif isinstance(result, Frontier):
        yield from _frontier(file, result)
    elif isinstance(result, Control):
        yield from _control(file, result)
    yield Section("Machine and settings", file.table({"value": ""}, _settings(file)))


def _settings(file: ResultFile, pointer: str = "", name: str = "") -> Iterator[Row]:
    """All that is not a measurement."""
    for key, at in file.rows(pointer):
        value = file.at(at)
        if key in SHOWN or isinstance(value, list):
            continue
        if isinstance(value, dict):
            yield from _settings(file, at, f"{name}{key} ")
        else:
            yield name + key, at


def _latency(file: ResultFile, result: Latency) -> Iterator[Section]:
    rows = file.rows("/runners", "{name}")
    bundles = [
        (runner, row[1])
        for runner, row in zip(result.runners, rows, strict=True)
        if runner.kind == "bundle"
    ]
    columns = {name: f"/chunk_ms{field}" for name, field in TIMES.items()}
    columns |= {"(p95 - p5) / p50": "/chunk_ms/spread", "p50 per action": "/action_ms"}
    if any(runner.energy_j is not None for runner in result.runners):
        columns["joules per chunk"] = "/energy_j"
    targets = [verdict.target_ms for runner, _ in bundles for verdict in runner.verdicts]
    line = (targets[0], f"target {targets[0]:g} ms") if targets else None
    dots = [(r.name, r.chunk_ms.values, _said(r.chunk_ms.p50, r.noise)) for r in result.runners]
    yield Section(
        "Milliseconds per chunk",
        file.table({}, rows, columns),
        file.cells("/reference"),
        partial(plots.strips, dots, "milliseconds per chunk, every turn", line=line),
    )
    if targets:
        verdicts = [(r.name, row) for r, at in bundles for _, row in file.rows(f"{at}/verdicts")]
        why = Cell(
            "Measured: on this machine. Projected: computed from the bundle's operations and bytes "
            "for that board; nothing ran on the board."
        )
        yield Section("Target", file.table({"": "/kind", "result": "/text"}, verdicts), (why,))
    if result.ratios:
        why = Cell(
            "Both sides of a ratio ran in the same turn. Noise of the machine affects both, so "
            "trust the ratios more than the times."
        )
        dots = [
            (f"{r.runner} / {r.against}", r.values, _said(r.p50, r.noise)) for r in result.ratios
        ]
        ratios = file.rows("/ratios", "{runner} / {against}")
        plot = partial(plots.strips, dots, "speed ratio, every turn", line=(1.0, "same speed"))
        table = file.table({}, ratios, _columns("p50", "min", "max"))
        yield Section("Speed ratio in each turn", table, (why,), plot)
    for runner, at in bundles:
        if runner.stages_ms and not runner.noise:
            why = Cell(
                "preprocess + prefix + denoise are the chunk. The other stages are parts of these."
            )
            dots = [(n, times.values, text(times.p50)) for n, times in runner.stages_ms.items()]
            plot = partial(plots.strips, dots, "milliseconds, every turn", log=True)
            table = file.table(TIMES, file.rows(f"{at}/stages_ms"))
            yield Section(f"Milliseconds of each stage: {runner.name}", table, (why,), plot)
    yield Section("What ran", file.table({"": "/note"}, rows))
    limits = [
        (f"{r.name}, {stage}", row)
        for r, at in bundles
        for stage, row in file.rows(f"{at}/limits", "{stage}")
    ]
    if limits:
        columns = {"operations": "/flops", "of them INT8": "/int8_flops", "bytes": "/bytes"}
        columns |= {"compute, ms": "/compute_ms", "memory, ms": "/memory_ms"}
        columns["limit / p50"] = "/share"
        why = Cell(
            "The shortest time that this machine's product and copy rates allow. At a limit / p50 "
            "of 1, the hardware cannot be faster."
        )
        yield Section("Hardware limit", file.table(columns, limits), (why,))
    if result.rates:
        rates = [(f"{kind}, GFLOP/s", at) for kind, at in file.rows("/rates/gflops")]
        rates.append(("copy, GB/s", "/rates/copy_gbs"))
        yield Section("Rates of this machine", file.table({"before": "/0", "after": "/1"}, rates))
    starts = [(r.name, f"{at}/start") for r, at in bundles if r.start]
    if starts:
        names = [field.name for field in fields(ColdStart)]
        yield Section("Cold start, to the second chunk", file.table(_columns(*names), starts))


def _said(value: float, noise: str | None) -> str:
    return "too noisy to say" if noise else text(value)


def _accuracy(file: ResultFile, result: Accuracy) -> Iterator[Section]:
    (_, bundle), *controls = file.rows("/comparisons", "{name}")
    rows = [(result.bundle, bundle), *((f"control: {name}", at) for name, at in controls)]
    columns = {"worst joint, p99 / spread": "/worst", "gripper flips": "/flips"}
    columns["cache, relative L2"] = "/cache"
    passed = "The bundle meets the gate. Every control, which has a deliberate error, fails it."
    failed = "The bundle fails the gate, or a control with a deliberate error meets it: see below."
    verdict = Cell(passed if result.passed else failed)
    table = file.table(columns, rows)
    yield Section("Is it the same policy?", table, (*file.cells("/enters"), verdict))
    yield Section("What fails the gate", file.table({"": "/missed"}, rows))
    columns = _columns("p50", "p99", "max")
    columns |= {"p99, servo ticks": "/ticks", "spread over seeds": "/spread"}
    columns["p99 / spread"] = "/share"
    why = Cell(
        "In robot units. A servo tick is 0.088 degrees. The spread is the standard deviation of "
        "the reference over noise seeds."
    )
    table = file.table(columns, file.rows(f"{bundle}/joints", "{name}"))
    plot = partial(plots.joints, result.comparisons)
    yield Section("Error of each joint", table, (why,), plot)
    last = len(result.comparisons[0].drift) - 1
    shown = sorted({0, last // 4, last // 2, 3 * last // 4, last})
    columns = {f"action {i + 1}": f"/drift/{i}" for i in shown}
    why = Cell("RMS error / spread over seeds of the worst joint.")
    plot = partial(plots.drift, result.comparisons)
    yield Section("Error along the chunk", file.table(columns, rows), (why,), plot)
    yield Section("Largest error of each stage", file.table({"error": ""}, file.rows("/stages")))


def _frontier(file: ResultFile, result: Frontier) -> Iterator[Section]:
    rows = file.rows("/cells", "{precision}, {cameras} cameras, {steps} steps")
    columns = {"worst joint, p99 / spread": "/worst", "cache, relative L2": "/cache"}
    columns["gripper flips"] = "/flips"
    times = {"chunk p50, ms": "/chunk_ms/p50", "p95": "/chunk_ms/p95"}
    measured = [point for point in result.cells if not point.noise]
    best = None if result.recommended is None else result.cells[result.recommended]
    plot = partial(plots.frontier, measured, best, result.budget_ms) if measured else None
    optimal = [row for row, point in zip(rows, result.cells, strict=True) if point.pareto]
    why = Cell(
        "Bundles were timed one after another: the machine alone can cause differences of some "
        "per cent."
    )
    table = file.table(columns, optimal, times)
    heading = "Pareto-optimal settings: none is faster and has less error"
    yield Section(heading, table, (*file.cells("/reason"), why), plot)
    yield Section("All settings", file.table(columns, rows, times))
    if result.skipped:
        yield Section("Settings left out", file.table({"reason": ""}, file.rows("/skipped")))


def _control(file: ResultFile, result: Control) -> Iterator[Section]:
    rows = file.rows("/loops", "{fps:g} Hz")
    columns = {"period error p50, ms": "/period_error_ms/p50", "p99": "/period_error_ms/p99"}
    columns |= {"max": "/period_error_ms/max", "ticks": "/counts/ticks", "missed": "/counts/missed"}
    yield Section("Is the loop on time?", file.table(columns, rows))
    for run, (name, at) in zip(result.loops, rows, strict=True):
        times = [(said, at + field) for said, field in LOOP.items() if file.at(at + field)]
        yield Section(
            f"The loop at {name}", file.table(TIMES, times), plot=partial(plots.loop, run)
        )
        yield Section(f"Counts at {name}", file.table({"": ""}, file.rows(f"{at}/counts")))
