"""smolvla-audit: in which precision a bundle is really computed on this machine."""

import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Column, Table

from ...core import command
from ...core.errors import CheckFailed
from ..bundle.bundle import Bundle
from ..bundle.manifest import Precision
from ..policy.audit import CUDA, OrtAudit, TrtAudit, audit, contradictions

FILE_WIDTH = 160  # columns of a table that does not go to a terminal

app = command.new_app()


@app.command("audit")
def show(
    bundle: Path = typer.Option(Path("bundle"), help="Bundle folder."),
    device: str = typer.Option(
        "auto", help="cpu, cuda, jetson, or auto: CUDA where it is available, else CPU."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Show in which precision this device computes a bundle, and compare it with the label.

    Exit status: 0 done, 1 the bundle's label is not true, 2 the input is wrong.
    """
    opened = Bundle.open(bundle)
    label = opened.manifest.precision
    found = audit(opened, device)
    print(f"label     {label}")
    for line in _facts(found, label):
        print(line)
    terminal = sys.stdout.isatty()
    Console(width=None if terminal else FILE_WIDTH, markup=False, highlight=False).print(
        _operators(found) if isinstance(found, OrtAudit) else _layers(found)
    )
    problems = contradictions(found, label)
    if problems:
        raise CheckFailed(
            f"bundle {bundle} is not what it says: {'; '.join(problems)}. Export it again"
        )


def _facts(found: OrtAudit | TrtAudit, label: Precision) -> Iterator[str]:
    if isinstance(found, TrtAudit):
        for graph, layers in found.layers.items():
            if not layers:
                yield f"note      TensorRT does not tell the precision of the layers of {graph}"
        return
    for provider, shares in found.shares().items():
        told = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        yield f"computed  {provider}: {told} of the multiply-adds"
    yield (
        f"counted   {found.multiply_adds / 1e9:.6g} G multiply-adds a chunk, "
        f"by the manifest {found.expected / 1e9:.6g} G"
    )
    if label == "int8" and found.claimed_int8 == 0:
        yield "note      Q/DQ round to 8 bits, but the products are float: only TensorRT fuses them"
    elsewhere = found.elsewhere()
    if elsewhere:
        names = ", ".join(f"{name} {count}" for name, count in elsewhere.items())
        yield (
            f"note      {sum(elsewhere.values())} runs are not on {found.provider} ({names}): "
            "CUDA graphs are not possible"
        )
    if CUDA in found.shares():
        yield f"note      on {CUDA} ms is the host's time, not the GPU's"


def _layers(found: TrtAudit) -> Table:
    table = Table("engine", "precision", Column("layers", justify="right"), box=None)
    for graph, layers in found.layers.items():
        for dtype, count in sorted(layers.items()):
            table.add_row(graph, dtype, str(count))
    return table


def _operators(found: OrtAudit) -> Table:
    numbers = [Column(name, justify="right") for name in ("runs", "G multiply-adds", "ms", "%")]
    table = Table("graph", "operator", "precision", "provider", *numbers, box=None)
    for o in found.operators:
        table.add_row(
            o.graph,
            o.operator,
            o.precision or "-",
            o.provider,
            str(o.runs),
            f"{o.multiply_adds / 1e9:.4f}",
            f"{o.ms:.2f}",
            f"{100 * o.ms / found.chunk_ms:.1f}",
        )
    return table


def main() -> None:
    """Entry point of `smolvla-audit`."""
    command.require_linux()
    command.run(app)
