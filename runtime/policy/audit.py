"""smolvla-audit: in which precision a bundle is stored, and in which it is really computed on this machine.

A label is a claim. What is stored is read from the graphs' files; what is computed, from ONNX Runtime's own profile
of the graphs as it optimised and placed them: the types and shapes each operator was given. So float16 graphs on most
CPUs show as stored in float16, computed in float32.
"""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ...core import command
from ...core.errors import CheckFailed
from ..bundle.bundle import Bundle
from ..bundle.manifest import Precision
from ..engines.backend import PROVIDER, choose_for
from ..engines.ort import OrtGraphs
from .policy import Policy
from .sampling import RealTimeChunking
from .selfcheck import run_selfcheck

FLOPS_TOLERANCE = 0.02
CPU, CUDA, TENSORRT = (PROVIDER[name] for name in ("ort-cpu", "ort-cuda", "ort-tensorrt"))
Shape = Sequence[int]
_ACTIVATIONS_FIRST = (
    "MatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
)
_MAYBE_TRANSPOSED = ("Gemm", "FusedGemm", "FusedMatMul", "QGemm")
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "uint8": "int8",
}  # as a profile calls them; others stay
_NARROW = ("float16", "bfloat16", "int8")
# Numbers in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.dims and .data_type; then DataType's.
_GRAPH, _INITIALIZER, _DIMS, _DATA_TYPE = 7, 5, 1, 2
_NO_WEIGHTS = (6, 7, 9)  # int32, int64, bool: shapes, indices, masks
_STORED = {1: "float32", 2: "int8", 3: "int8", 10: "float16", 16: "bfloat16"}

app = command.new_app()


@dataclass(frozen=True)
class Row:
    """All runs of an operator in one graph, provider and precision: of its operands as computed, "" where it is no
    matrix product."""

    graph: str
    operator: str
    provider: str
    precision: str
    runs: int
    multiply_adds: int
    ms: float


@dataclass(frozen=True)
class Audit:
    """One chunk of a bundle, as ONNX Runtime ran it."""

    provider: str  # the one that was asked for
    rows: tuple[Row, ...]  # the slowest first
    chunk_ms: float  # of both graphs, operators and what is between them
    expected: int  # multiply-adds of a chunk, by the manifest
    stored: dict[str, dict[str, int]]  # graph -> dtype -> values of its matrices
    claimed: tuple[
        int, int
    ]  # weights, and multiply-adds of a chunk on this device, that the manifest calls INT8

    @property
    def multiply_adds(self) -> int:
        return sum(row.multiply_adds for row in self.rows)

    @property
    def untold(self) -> int:
        """Subgraphs that TensorRT took whole, of which a profile holds no operators."""
        return sum(
            row.provider == TENSORRT and not row.operator.startswith("Memcpy") for row in self.rows
        )

    def shares(self) -> dict[str, dict[str, float]]:
        """provider -> precision -> share of all multiply-adds that were seen."""
        found: dict[str, Counter[str]] = {}
        for row in self.rows:
            if row.precision:
                found.setdefault(row.provider, Counter())[row.precision] += row.multiply_adds
        total = max(self.multiply_adds, 1)
        return {
            provider: {p: n / total for p, n in kinds.most_common()}
            for provider, kinds in found.items()
        }

    def elsewhere(self) -> dict[str, int]:
        """operator -> its runs on another provider than the one asked for. A CUDA graph allows none."""
        found: Counter[str] = Counter()
        for row in self.rows:
            if row.provider != self.provider:
                found[row.operator] += row.runs
        return dict(found.most_common())


def audit(bundle: Bundle, device: str = "cpu") -> Audit:
    """Run the self-check's instructions under ONNX Runtime's profiler; the last one counts, the others warm up.

    Raises BundleError for a damaged self-check, BackendError for the device.
    """
    m = bundle.manifest
    graphs = {"prefix": m.prefix, "expert": m.expert}
    runs = {"prefix": 1, "expert": m.sampling.num_steps}
    rows: list[Row] = []
    chunk_ms = 0.0
    with tempfile.TemporaryDirectory(prefix="smolvla-audit-") as folder:
        backend = next(b for b in choose_for(bundle, device).backends if b in PROVIDER)
        sessions = OrtGraphs(bundle, backend, profile=Path(folder))
        run_selfcheck(Policy(bundle, sessions, RealTimeChunking(), None))
        for name, profile in zip(graphs, sessions.end_profiling(), strict=True):
            more, ms = last_runs(name, json.loads(profile.read_text()), runs[name])
            rows += more
            chunk_ms += ms
    # A portable INT8 bundle claims integer products on TensorRT only: here they are float (`EXACT_INT8`).
    counts = m.target == "cpu" and sessions.provider == CPU
    return Audit(
        provider=sessions.provider,
        rows=tuple(sorted(rows, key=lambda row: -row.ms)),
        chunk_ms=chunk_ms,
        expected=sum(g.flops * runs[name] for name, g in graphs.items()) // 2,
        stored={name: stored_weights(bundle.path(g.file)) for name, g in graphs.items()},
        claimed=(m.int8.weights, m.int8.multiply_adds if counts else 0) if m.int8 else (0, 0),
    )


def last_runs(graph: str, events: Sequence[dict[str, Any]], runs: int) -> tuple[list[Row], float]:
    """-> what the last `runs` runs of a graph in a profile executed, and how long they took in ms."""
    last = sorted((e["ts"], e["dur"]) for e in events if e["name"] == "model_run")[-runs:]
    rows: dict[tuple[str, str, str], Row] = {}
    for e in events:
        told = e.get("args", {})
        if e["cat"] != "Node" or "op_name" not in told or e["ts"] < last[0][0]:
            continue
        inputs = [(kind, shape) for i in told["input_type_shape"] for kind, shape in i.items()]
        outputs = [shape for o in told["output_type_shape"] for shape in o.values()]
        operator, count, precision = told["op_name"], 0, ""
        if inputs and outputs:
            count = multiply_adds(operator, [shape for _, shape in inputs], outputs[0])
        if count:
            kind = (
                inputs[0][0] if operator != "DynamicQuantizeMatMul" else "int8"
            )  # it quantizes its input itself
            precision = _DTYPES.get(kind, kind)
        key = operator, told["provider"], precision
        row = rows.get(key, Row(graph, *key, 0, 0, 0.0))
        rows[key] = Row(
            graph, *key, row.runs + 1, row.multiply_adds + count, row.ms + e["dur"] / 1e3
        )
    return list(rows.values()), sum(duration for _, duration in last) / 1e3


def multiply_adds(operator: str, inputs: Sequence[Shape], output: Shape) -> int:
    """Of one run; 0 where it is no matrix product. Weights that were packed at load are missing from `inputs`."""
    if operator in _ACTIVATIONS_FIRST:
        return math.prod(output) * inputs[0][-1]
    if (
        operator in _MAYBE_TRANSPOSED
    ):  # in any order, the first operand holds rows times the length of the sums
        return math.prod(inputs[0]) * output[-1]
    if operator in ("MultiHeadAttention", "Attention") and len(inputs) > 2 and len(inputs[1]) > 2:
        # query, key, value
        return (math.prod(inputs[0]) + math.prod(output)) * inputs[1][-2]
    if (
        operator == "Attention"
    ):  # ONNX Runtime's own: projects its input to query, key and value first
        return 3 * math.prod(inputs[0]) * output[-1] + 2 * math.prod(output) * output[-2]
    return 0


def stored_weights(path: Path) -> dict[str, int]:
    """dtype -> how many values the matrices of an ONNX file have in it. Signed or not, 8-bit integers are int8.

    Read without the onnx package: protobuf holds few kinds of things."""
    found: Counter[str] = Counter()
    for graph in _values(memoryview(path.read_bytes()), _GRAPH):
        for tensor in _values(graph, _INITIALIZER):
            dims = [*_values(tensor, _DIMS)]
            kind = next(_values(tensor, _DATA_TYPE))
            if len(dims) > 1 and kind not in _NO_WEIGHTS:
                found[_STORED.get(kind, f"ONNX type {kind}")] += math.prod(dims)
    return dict(found)


def _values(message: memoryview, wanted: int) -> Iterator[Any]:
    """Every value of one field: an integer, or the bytes of a message or string."""
    at = 0
    while at < len(message):
        key, at = _integer(message, at)
        value: int | memoryview
        if key & 7 == 0:
            value, at = _integer(message, at)
        else:
            size, at = _integer(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        if key >> 3 == wanted:
            yield value


def _integer(message: memoryview, at: int) -> tuple[int, int]:
    """A varint: seven bits a byte, lowest first, the eighth says that more follow. -> (the integer, where it ends)"""
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at


def contradictions(found: Audit, label: Precision) -> list[str]:
    """What the audit says against the label fp32, fp16 or int8, and against the manifest's count; empty when nothing
    does."""
    ran, weights = Counter[str](), Counter[str]()
    for row in found.rows:
        ran[row.precision] += row.multiply_adds
    for kinds in found.stored.values():
        weights.update(kinds)
    computed = f"labelled {label}, but computed on {found.provider} were {_percents(ran)} of the multiply-adds seen"
    stored = f"labelled {label}, but stored are {_percents(weights)} of the weights"
    off = abs(found.multiply_adds - found.expected) > FLOPS_TOLERANCE * found.expected
    checks = [
        (
            off and not found.untold,
            f"a chunk has {found.expected / 1e9:.6g} G multiply-adds by the manifest, "
            f"{found.multiply_adds / 1e9:.6g} G were seen to run",
        ),
        (label == "fp32" and any(weights[p] for p in _NARROW), stored),
        (label == "fp32" and any(ran[p] for p in _NARROW), computed),
        (label == "fp16" and 2 * weights["float16"] < weights.total(), stored),
        (label == "fp16" and found.provider == CUDA and 2 * ran["float32"] > ran.total(), computed),
        (label == "int8" and (not found.claimed[0] or weights["int8"] != found.claimed[0]), stored),
        (label == "int8" and ran["int8"] < found.claimed[1] * (1 - FLOPS_TOLERANCE), computed),
    ]
    return [text for fails, text in checks if fails]


def _percents(counts: Counter[str]) -> str:
    total = max(counts.total(), 1)
    return (
        ", ".join(f"{name} {100 * n / total:.1f} %" for name, n in counts.most_common() if n)
        or "none"
    )


@app.command("audit")
def show(
    bundle: Path = typer.Option(Path("bundle"), help="Bundle folder."),
    device: str = typer.Option(
        "auto", help="cpu, cuda, jetson, or auto: CUDA where it is there, else CPU."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Tell in which precision a bundle is stored, and in which it is computed on this device.

    Exit status: 0 done, 1 that contradicts the bundle's label, 2 something in the input is wrong.
    """
    opened = Bundle.open(bundle)
    found, label = audit(opened, device), opened.manifest.precision
    print("\n".join(_lines(found, label)))
    if wrong := contradictions(found, label):
        raise CheckFailed(
            f"bundle {bundle} is not what it says: {'; '.join(wrong)}. Export it again"
        )


def _lines(found: Audit, label: str) -> list[str]:
    lines = [f"label     {label}"]
    lines += [
        f"stored    {g}: {_percents(Counter(kinds))} of the weights"
        for g, kinds in found.stored.items()
    ]
    for provider, kinds in found.shares().items():
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in kinds.items())
        lines.append(f"computed  {provider}: {shares} of the multiply-adds seen")
    counted, expected = found.multiply_adds / 1e9, found.expected / 1e9
    lines.append(
        f"counted   {counted:.6g} G multiply-adds a chunk, by the manifest {expected:.6g} G"
    )
    # What a reader would otherwise take for more than it is.
    if found.untold:
        lines.append(
            f"note      TensorRT runs {found.untold} subgraphs as its own: not told by ONNX Runtime"
        )
    elif found.claimed[0] and not found.claimed[1]:
        lines.append(
            "note      Q/DQ round to 8 bits here, but the products are float: only TensorRT multiplies integers"
        )
    if elsewhere := found.elsewhere():
        names = ", ".join(f"{name} {count}" for name, count in elsewhere.items())
        lines.append(
            f"note      not on {found.provider}: {sum(elsewhere.values())} runs ({names}), so no CUDA graph"
        )
    if CUDA in found.shares():
        lines.append(
            f"note      on {CUDA} ms are the host's share, and float32 may be TF32: neither is told"
        )
    lines.append(
        f"\ngraph   {'operator':<30}{'precision':<10}{'provider':<26}{'runs':>5}{'G mul-adds':>12}{'ms':>10}{'%':>6}"
    )
    for row in found.rows:
        lines.append(
            f"{row.graph:<8}{row.operator:<29} {row.precision or '-':<10}{row.provider:<26}{row.runs:>5}"
            f"{row.multiply_adds / 1e9:>12.4f}{row.ms:>10.2f}{100 * row.ms / found.chunk_ms:>6.1f}"
        )
    return lines


def main() -> None:
    """Entry point of `smolvla-audit`."""
    command.require_linux()
    command.run(app)
