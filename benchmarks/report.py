"""Results become sections: a heading, sentences, a plot, a table. page.py writes them down.

Whatever comes from a result names its file and field, as a JSON pointer: `latency.json#/runners/0/chunk_ms/p50`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import ResultError
from ..core.strict import encode
from .plots import drift, frontier, joints, loop, strips
from .result import Accuracy, Control, Frontier, Latency, read

TIMES = {name: f"/{name}" for name in ("p50", "p95", "p99", "max")}
STARTS = (
    "python_s",
    "open_s",
    "load_s",
    "first_s",
    "second_s",
    "peak_mb",
    "anonymous_mb",
    "mapped_mb",
    "disk_mb",
)
LOOP = {
    "ms a period is off by": "/period_error_ms",
    "ms a tick is late by": "/late_ms",
    "ms of work in a tick": "/busy_ms",
    "ms to read the arm": "/read_ms",
    "ms to take pictures": "/capture_ms",
    "ms since the oldest picture": "/picture_age_ms",
    "ms to command the arm": "/write_ms",
    "ms from request to chunk": "/chunk_ms",
    "degrees at a seam between chunks": "/seams_deg",
}
SHOWN = (
    "command",
    "enters",
    "made",
    "rates",
    "reason",
    "recommended",
    "skipped",
    "stages",
)  # not as settings
Columns = Mapping[str, str]
Row = tuple[str, str]  # its name, and the pointer of what it shows


@dataclass(frozen=True)
class Cell:
    text: str
    field: str | None = None  # FILE#/json/pointer; None: our words


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]  # the last cell of a short one takes the rest


@dataclass(frozen=True)
class Section:
    heading: str
    table: Table | None = None
    sentences: tuple[Cell, ...] = ()
    plot: Callable[[], str] | None = None  # -> SVG
    command: Cell | None = None  # a result begins here, and this made it
    headline: bool = False  # for the README too


class Source:
    """A result file, and its fields as cells."""

    def __init__(self, path: Path) -> None:
        """Raises ResultError."""
        self.path, self.result = path, read(path)
        self._raw = encode(self.result)

    def at(self, pointer: str) -> Any:
        """The field, or None where it or what it belongs to is null."""
        value = self._raw
        for part in pointer.split("/")[1:]:
            if value is not None:
                key = part.replace("~1", "/").replace("~0", "~")
                try:
                    value = value[int(key) if isinstance(value, list) else key]
                except LookupError as e:
                    raise ResultError(f"{self.path} is not valid: it has no {pointer}") from e
        return value

    def rows(self, pointer: str, name: str = "{key}") -> list[Row]:
        """The members of the list or table at `pointer`; name: what to call them, by their key and fields."""
        held, rows = self.at(pointer), []
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            if value is not None:
                fields = value if isinstance(value, dict) else {}
                escaped = str(key).replace("~", "~0").replace("/", "~1")
                rows.append((name.format_map(fields | {"key": key}), f"{pointer}/{escaped}"))
        return rows

    def cells(self, *pointers: str) -> tuple[Cell, ...]:
        return tuple(Cell(text(self.at(pointer)), f"{self.path}#{pointer}") for pointer in pointers)

    def table(self, columns: Columns, rows: Iterable[Row], times: Columns | None = None) -> Table:
        """columns, times: head -> field below the row's pointer. In place of times that are too noisy only that is
        said."""
        made, times = [], times or {}
        for name, pointer in rows:
            last = ["/noise"] if times and self.at(f"{pointer}/noise") else times.values()
            made.append(
                (
                    Cell(name),
                    *self.cells(*(pointer + field for field in (*columns.values(), *last))),
                )
            )
        return Table(("", *columns, *times), tuple(made))


def text(value: object) -> str:
    """A field, for people: numbers to three digits or whole."""
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(map(text, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.3g}" if isinstance(value, int) and value >= 1e6 else str(value)


def sections(paths: Sequence[Path]) -> list[Section]:
    """Of each result, the machine and settings last. Raises ResultError."""
    return [section for path in paths for section in _sections(Source(path))]


def _sections(s: Source) -> Iterator[Section]:
    result, heading = s.result, f"{type(s.result).__name__}: {s.path}"
    machine = s.cells(
        "/machine/cpu",
        *(at for name, at in s.rows("/machine") if name in ("gpu", "board")),
        "/made",
    )
    yield Section(heading, None, machine, command=s.cells("/command")[0], headline=True)
    if isinstance(result, Latency):
        yield from _latency(s, result)
    elif isinstance(result, Accuracy):
        yield from _accuracy(s, result)
    elif isinstance(result, Frontier):
        yield from _frontier(s, result)
    elif isinstance(result, Control):
        yield from _control(s, result)
    yield Section("Machine and settings", s.table({"value": ""}, _settings(s)))


def _settings(s: Source, pointer: str = "", name: str = "") -> Iterator[Row]:
    """What the result says of itself and its machine, other than measurements."""
    for key, at in s.rows(pointer):
        value = s.at(at)
        if isinstance(value, dict) and key not in SHOWN:
            yield from _settings(s, at, f"{name}{key} ")
        elif not isinstance(value, dict | list) and key not in SHOWN:
            yield name + key, at


def _latency(s: Source, result: Latency) -> Iterator[Section]:
    rows = s.rows("/runners", "{name}")
    bundles = [
        (runner, at)
        for runner, (_, at) in zip(result.runners, rows, strict=True)
        if runner.kind == "bundle"
    ]
    columns = {name: f"/chunk_ms{field}" for name, field in TIMES.items()}
    columns |= {"(p95 - p5) / p50": "/chunk_ms/spread", "p50 an action": "/action_ms"}
    if any(runner.energy_j is not None for runner in result.runners):
        columns["J a chunk"] = "/energy_j"
    verdicts = [(r.name, row) for r, at in bundles for _, row in s.rows(f"{at}/verdicts")]
    targets = [v.target_ms for r, _ in bundles for v in r.verdicts]
    line = (targets[0], f"target {targets[0]:g} ms") if targets else None
    said = ["too noisy to say" if r.noise else text(r.chunk_ms.p50) for r in result.runners]
    dots = [
        (r.name, r.chunk_ms.values, words) for r, words in zip(result.runners, said, strict=True)
    ]
    plot = partial(strips, dots, "milliseconds a chunk, every turn", line=line)
    yield Section(
        "Milliseconds a chunk",
        s.table({}, rows, columns),
        s.cells("/reference"),
        plot,
        headline=True,
    )
    if verdicts:
        why = Cell(
            "Projected: the bundle's operations and bytes as exported for that board, float32 as float16."
        )
        table = s.table({"": "/kind", "on the target": "/text"}, verdicts)
        yield Section(
            "Verdict", table, (why,) * any(len(r.verdicts) > 1 for r, _ in bundles), headline=True
        )
    if result.ratios:
        table = s.table(
            {},
            s.rows("/ratios", "{runner} / {against}"),
            {f: f"/{f}" for f in ("p50", "min", "max")},
        )
        why = Cell(
            "The machine's noise falls on neighbours alike, so these ratios are what to trust."
        )
        said = ["too noisy to say" if r.noise else text(r.p50) for r in result.ratios]
        dots = [
            (f"{r.runner} / {r.against}", r.values, words)
            for r, words in zip(result.ratios, said, strict=True)
        ]
        plot = partial(strips, dots, "times as fast, every turn", line=(1.0, "as fast"))
        yield Section("Times as fast, turn by turn", table, (why,), plot, headline=True)
    for runner, at in bundles:
        if runner.stages_ms and not runner.noise:
            why = Cell("preprocess + prefix + denoise are the chunk; the others are parts of them.")
            dots = [
                (name, times.values, text(times.p50)) for name, times in runner.stages_ms.items()
            ]
            plot = partial(strips, dots, "milliseconds, every turn", log=True)
            table = s.table(TIMES, s.rows(f"{at}/stages_ms"))
            yield Section(f"Milliseconds of each stage: {runner.name}", table, (why,), plot)
    yield Section("What took turns", s.table({"": ""}, [(name, f"{at}/note") for name, at in rows]))
    limits = [
        (f"{r.name}, {stage}", row)
        for r, at in bundles
        for stage, row in s.rows(f"{at}/limits", "{stage}")
    ]
    if limits:
        columns = {"operations": "/flops", "of them INT8": "/int8_flops", "bytes": "/bytes"}
        columns |= {
            "ms to compute": "/compute_ms",
            "ms to read": "/memory_ms",
            "share of p50": "/share",
        }
        why = Cell(
            "What this machine's own product and copy rates allow at best; a share of 1 is the limit."
        )
        yield Section("How far from the limit", s.table(columns, limits), (why,))
    if result.rates:
        rates = [(f"{kind} GFLOP/s", at) for kind, at in s.rows("/rates/gflops")]
        rates.append(("copy GB/s", "/rates/copy_gbs"))
        yield Section("Rates of this machine", s.table({"before": "/0", "after": "/1"}, rates))
    if starts := [(r.name, f"{at}/start") for r, at in bundles if r.start]:
        yield Section(
            "From nothing to the second chunk",
            s.table({name: f"/{name}" for name in STARTS}, starts),
        )


def _accuracy(s: Source, result: Accuracy) -> Iterator[Section]:
    (_, bundle), *controls = s.rows("/comparisons", "{name}")
    rows = [(result.bundle, bundle), *((f"{name}, on purpose", at) for name, at in controls)]
    columns = {
        "worst joint, p99 / spread": "/worst",
        "gripper flips": "/flips",
        "cache, relative L2": "/cache",
    }
    met = "The gate is met, and missed by all that is wrong on purpose: the measure can fail."
    why = Cell(
        met
        if result.passed
        else "The gate is missed, or met by what is wrong on purpose: see below."
    )
    yield Section(
        "Is it the same policy?", s.table(columns, rows), (*s.cells("/enters"), why), headline=True
    )
    yield Section("What misses the gate", s.table({"": "/missed"}, rows))
    columns = {"p50": "/p50", "p99": "/p99", "max": "/max", "servo ticks": "/ticks"}
    columns |= {"spread over seeds": "/spread", "p99 / spread": "/share"}
    why = Cell(
        "In robot units; a servo tick is 0.088 degrees, the spread is the reference's own over noise seeds."
    )
    table = s.table(columns, s.rows(f"{bundle}/joints", "{name}"))
    yield Section("Error of each joint", table, (why,), partial(joints, result.comparisons))
    last = len(result.comparisons[0].drift) - 1
    columns = {
        f"action {i + 1}": f"/drift/{i}"
        for i in sorted({0, last // 4, last // 2, 3 * last // 4, last})
    }
    why = Cell("RMS over the spread over seeds, of the worst joint.")
    yield Section(
        "Error along the chunk", s.table(columns, rows), (why,), partial(drift, result.comparisons)
    )
    yield Section("Worst error of each stage", s.table({"error": ""}, s.rows("/stages")))


def _frontier(s: Source, result: Frontier) -> Iterator[Section]:
    rows = s.rows("/cells", "{precision}, {cameras} cameras, {steps} steps")
    columns = {
        "worst joint, p99 / spread": "/worst",
        "cache, relative L2": "/cache",
        "gripper flips": "/flips",
    }
    times = {"ms a chunk, p50": "/chunk_ms/p50", "p95": "/chunk_ms/p95"}
    measured = [cell for cell in result.cells if not cell.noise]
    best = None if result.recommended is None else result.cells[result.recommended]
    plot = partial(frontier, measured, best, result.budget_ms) if measured else None
    table = s.table(
        columns, [row for row, cell in zip(rows, result.cells, strict=True) if cell.pareto], times
    )
    why = Cell(
        "Not all were timed at the same time: differences of some per cent may be the machine's."
    )
    said = (*s.cells("/reason"), why)
    yield Section("Nothing is both faster and closer than these", table, said, plot, headline=True)
    yield Section("Every setting", s.table(columns, rows, times))
    if result.skipped:
        yield Section("Left out", s.table({"why": ""}, s.rows("/skipped")))


def _control(s: Source, result: Control) -> Iterator[Section]:
    rows = s.rows("/loops", "{fps:g} Hz")
    columns = {"ms a period is off by, p50": "/period_error_ms/p50", "p99": "/period_error_ms/p99"}
    columns |= {"max": "/period_error_ms/max", "ticks": "/counts/ticks", "missed": "/counts/missed"}
    yield Section("Is the loop on time?", s.table(columns, rows), headline=True)
    for run, (name, at) in zip(result.loops, rows, strict=True):
        times = [(said, at + field) for said, field in LOOP.items() if s.at(at + field)]
        yield Section(f"The loop at {name}", s.table(TIMES, times), plot=partial(loop, run))
        yield Section(f"Counted at {name}", s.table({"": ""}, s.rows(f"{at}/counts")))
