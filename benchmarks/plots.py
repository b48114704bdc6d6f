"""The plots of the report, one function each: numbers -> inline SVG. Needs matplotlib ([bench]).

Colours are CSS variables of the page, so a plot follows the light or dark theme. Text stays text.
"""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from io import StringIO
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec
from warnings import catch_warnings, simplefilter

import numpy as np
from numpy.typing import NDArray

from ..core.errors import BenchError
from ..quantize.int8.gate import TICK_DEG
from .result import Comparison, FrontierPoint, LoopRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
INK, FAINT, *SERIES = (f"#fe000{i}" for i in range(6))  # stand for var(--p0) ... var(--p5)
WIDTH_IN, ROW_IN, MARGIN_IN = 7.2, 0.28, 0.7
FLOOR = 1e-7  # a logarithmic axis shows smaller values, and 0, here
STYLE: Any = {
    "font.size": 8, "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False,
    "axes.grid": True,
    "grid.linewidth": 0.5, "axes.spines.right": False, "axes.spines.top": False,
    "figure.facecolor": "none", "axes.facecolor": "none",
    "grid.color": FAINT, "axes.edgecolor": FAINT,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "text.parse_math": False,  # a name can contain dollar signs
    "svg.fonttype": "none", "svg.hashsalt": "smolvla-edge",
}  # fmt: skip


def _plot(draw: "Callable[Concatenate[Figure, P], str]") -> Callable[P, str]:
    """`draw` draws on a figure and returns its title. The decorated function returns the SVG."""

    @wraps(draw)
    def svg(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError as e:
            raise BenchError(
                f"plots need matplotlib ({e}): pip install 'smolvla-edge[bench]'"
            ) from e
        file = StringIO()
        with rc_context(STYLE), catch_warnings():
            simplefilter("ignore", UserWarning)  # missing glyphs: the browser draws the text
            figure = Figure(layout="constrained")
            title = draw(figure, *args, **kwargs)
            figure.savefig(file, format="svg", metadata={"Title": title, "Date": None})
        unwanted = r' width="\S+pt" height="\S+pt"|<metadata>.*</metadata>|(?<=<g) id="\S+"'
        text = re.sub(unwanted, "", file.getvalue(), flags=re.DOTALL)
        return re.sub(r"#fe000(\d)", r"var(--p\1)", text[text.index("<svg") :])

    return svg


def _axes(figure: "Figure", height_in: float, number: int = 1) -> "list[Axes]":
    figure.set_size_inches(WIDTH_IN, height_in)
    return list(figure.subplots(number, sharex=True, squeeze=False)[:, 0])


def _names(ax: "Axes", names: Sequence[str]) -> None:
    """One row per name, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def _line(ax: "Axes", x: float, name: str, color: str = SERIES[1], *, bottom: bool = False) -> None:
    """A vertical line; its name is at the top or at the bottom."""
    ax.axvline(x, color=color, linestyle="--")
    at = (x, 0 if bottom else 1)
    ax.annotate(name, at, (3, 3), ("data", "axes fraction"), "offset points", color=color)


def _log(ax: "Axes", which: str) -> None:
    """Make axis x or y logarithmic, with whole decades."""
    ax.set(**{f"{which}scale": "log"})
    low, high = np.log10(getattr(ax, f"get_{which}lim")())
    ax.set(**{f"{which}lim": (10.0 ** np.floor(low), 10.0 ** np.ceil(high))})
    getattr(ax, f"{which}axis").set_major_formatter("{x:g}")


def _legend(figure: "Figure") -> None:
    figure.legend(loc="outside upper left", ncols=5, columnspacing=1.4)


@_plot
def strips(
    figure: "Figure",
    rows: Sequence[tuple[str, Sequence[float], str]],
    unit: str,
    log: bool = False,
    line: tuple[float, str] | None = None,
) -> str:
    """rows: name, measurements, label. A dot for each measurement, a bar for the median."""
    (ax,) = _axes(figure, len(rows) * ROW_IN + MARGIN_IN)
    for y, (_, values, said) in enumerate(rows):
        v = np.maximum(values, FLOOR if log else -np.inf)
        ax.plot(v, y + 0.2 * np.sin(2.4 * np.arange(len(v))), ".", color=SERIES[0], alpha=0.5)
        ax.vlines(float(np.median(v)), y - 0.36, y + 0.36, color=INK, linewidth=1.6)
        ax.annotate(said, (float(v.max()), y), (6, 0), textcoords="offset points", va="center")
    _names(ax, [name for name, *_ in rows])
    ax.set_xlabel(unit)
    if log:
        _log(ax, "x")
    else:
        ax.set_xlim(left=0)
    if line:
        _line(ax, *line)
    return f"every measurement of {', '.join(name for name, *_ in rows)}"


@_plot
def joints(figure: "Figure", comparisons: Sequence[Comparison]) -> str:
    """The error of each joint beside a servo tick, the spread over seeds, and the controls."""
    bundle, *controls = comparisons
    y = np.arange(len(bundle.joints))
    (ax,) = _axes(figure, len(y) * ROW_IN + MARGIN_IN)

    def errors(field: str, of: Comparison = bundle) -> NDArray[np.float64]:
        return np.maximum([getattr(joint, field) for joint in of.joints], FLOOR)

    ax.hlines(
        y, errors("p50"), errors("max"), color=SERIES[0], linewidth=4, alpha=0.4, label="p50 to max"
    )
    ax.plot(errors("p99"), y, "o", color=SERIES[0], label="p99")
    ax.vlines(errors("spread"), y - 0.3, y + 0.3, color=INK, linewidth=2, label="spread over seeds")
    for i, control in enumerate(controls):
        name = "" if i else "p99 of controls (deliberate errors)"
        ax.plot(errors("p99", control), y, "x", color=SERIES[1], label=name)
    ticked = y[[joint.ticks is not None for joint in bundle.joints]]
    if len(ticked):
        x, low, high = [TICK_DEG] * len(ticked), ticked - 0.5, ticked + 0.5
        ax.vlines(x, low, high, color=SERIES[2], linestyle="--", label="servo tick")
    _names(ax, [joint.name for joint in bundle.joints])
    _log(ax, "x")
    ax.set_xlabel("error, robot units (degrees for joints with a tick)")
    _legend(figure)
    return "error of each joint"


@_plot
def drift(figure: "Figure", comparisons: Sequence[Comparison]) -> str:
    """RMS error along the chunk."""
    (ax,) = _axes(figure, 2.4)
    for i, comparison in enumerate(comparisons):
        ax.plot(
            np.maximum(comparison.drift, FLOOR),
            color=SERIES[i % len(SERIES)],
            label=comparison.name,
        )
    _log(ax, "y")
    ax.set_xlabel("action of the chunk")
    ax.set_ylabel("RMS error / spread over seeds")
    _legend(figure)
    return "error along the chunk"


@_plot
def frontier(
    figure: "Figure",
    points: Sequence[FrontierPoint],
    recommended: FrontierPoint | None,
    budget_ms: float | None,
) -> str:
    """Latency against error. A line per precision and cameras, the steps beside its points."""
    (ax,) = _axes(figure, 3.4)
    lines: dict[tuple[str, int], list[FrontierPoint]] = {}
    for point in sorted(points, key=lambda point: point.steps):
        lines.setdefault((point.precision, point.cameras), []).append(point)
    precisions = list(dict.fromkeys(precision for precision, _ in lines))
    most = max(point.cameras for point in points)
    for (precision, cameras), line in lines.items():
        look: dict[str, Any] = {"color": SERIES[precisions.index(precision) % len(SERIES)]}
        places = [(point.chunk_ms.p50, max(point.worst, 1e-3)) for point in line]
        name, dashes = f"{precision}, {cameras} cameras", "-" if cameras == most else ":"
        ax.plot(*zip(*places, strict=True), linestyle=dashes, label=name, **look)
        for point, at in zip(line, places, strict=True):
            fill, size = ("full", 6) if point.pareto else ("none", 4)
            ax.plot(*at, "o", fillstyle=fill, markersize=size, **look)
            ax.annotate(str(point.steps), at, (5, 3), textcoords="offset points", **look)
            if point == recommended:
                ax.plot(*at, "o", color=INK, fillstyle="none", markersize=12)
                ax.annotate("recommended", at, (-8, -11), textcoords="offset points", ha="right")
    ax.set_xlim(left=0)
    _log(ax, "y")
    ax.set_ylim(bottom=7e-4)
    ax.set_xlabel("chunk p50, ms (numbers are steps; filled: Pareto-optimal)")
    ax.set_ylabel("worst joint, p99 / spread (0.001: or less)")
    if budget_ms is not None:
        _line(ax, budget_ms, f"budget {budget_ms:g} ms", INK, bottom=True)
    _legend(figure)
    return "latency against error"


@_plot
def loop(figure: "Figure", run: LoopRun) -> str:
    """The share of ticks, or chunks, that take longer than a time."""
    (ax,) = _axes(figure, 2.6)
    measured = {
        "period error": run.period_error_ms,
        "tick late by": run.late_ms,
        "work in a tick": run.busy_ms,
        "request to chunk": run.chunk_ms,
    }
    for color, (name, times) in zip(SERIES, measured.items(), strict=True):
        if times:
            values = np.maximum(np.sort(times.values), 1e-3)
            share = 1 - np.arange(len(values)) / len(values)
            ax.step(values, share, where="post", color=color, label=name)
    _line(ax, 1e3 / run.fps, "period")
    _log(ax, "x")
    _log(ax, "y")
    ax.set_xlabel("milliseconds")
    ax.set_ylabel("share that takes longer")
    _legend(figure)
    return f"times of the loop at {run.fps:g} Hz"
