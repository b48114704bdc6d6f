"""Reads what ONNX Runtime's profiler recorded: the operators of a graph as they ran.

ONNX Runtime optimises a graph and places its operators on providers. A profile holds, for each run
of an operator, the provider, the time, and the types and shapes of its operands.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Shape = Sequence[int]
_ACTIVATIONS_FIRST = (
    "MatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
)
_MAYBE_TRANSPOSED = ("Gemm", "FusedGemm", "FusedMatMul", "QGemm")
# ONNX Runtime's name of a type -> ours, where they differ.
_DTYPES = {"float": "float32", "double": "float64", "uint8": "int8"}


@dataclass(frozen=True)
class OperatorRuns:
    """All runs of an operator in one graph, on one provider, in one precision."""

    graph: str
    operator: str
    provider: str
    precision: str  # of the operands; empty where the operator is no matrix product
    runs: int
    multiply_adds: int
    ms: float


def last_runs(
    graph: str, events: Sequence[dict[str, Any]], runs: int
) -> tuple[list[OperatorRuns], float]:
    """The last `runs` runs of a graph in a profile.

    Returns:
        What they executed, and their whole time in ms, with the time between operators.
    """
    last = sorted((e["ts"], e["dur"]) for e in events if e["name"] == "model_run")[-runs:]
    found: dict[tuple[str, str, str], OperatorRuns] = {}
    for event in events:
        facts = event.get("args", {})
        if event["cat"] != "Node" or "op_name" not in facts or event["ts"] < last[0][0]:
            continue
        inputs = [(kind, shape) for i in facts["input_type_shape"] for kind, shape in i.items()]
        outputs = [shape for o in facts["output_type_shape"] for shape in o.values()]
        operator, count, precision = facts["op_name"], 0, ""
        if inputs and outputs:
            count = multiply_adds(operator, [shape for _, shape in inputs], outputs[0])
        if count and operator == "DynamicQuantizeMatMul":
            precision = "int8"  # it quantizes its own float input
        elif count:
            precision = _DTYPES.get(inputs[0][0], inputs[0][0])
        key = operator, facts["provider"], precision
        before = found.get(key, OperatorRuns(graph, *key, 0, 0, 0.0))
        found[key] = OperatorRuns(
            graph,
            *key,
            runs=before.runs + 1,
            multiply_adds=before.multiply_adds + count,
            ms=before.ms + event["dur"] / 1e3,
        )
    return list(found.values()), sum(duration for _, duration in last) / 1e3


def multiply_adds(operator: str, inputs: Sequence[Shape], output: Shape) -> int:
    """Multiply-adds of one run; 0 where the operator is no matrix product.

    Weights that ONNX Runtime packed at load are missing from `inputs`.
    """
    if operator in _ACTIVATIONS_FIRST:
        return math.prod(output) * inputs[0][-1]
    if operator in _MAYBE_TRANSPOSED:
        # Transposed or not, the first operand holds rows times the length of the sums.
        return math.prod(inputs[0]) * output[-1]
    if operator in ("MultiHeadAttention", "Attention") and len(inputs) > 2 and len(inputs[1]) > 2:
        # query, key, value
        return (math.prod(inputs[0]) + math.prod(output)) * inputs[1][-2]
    if operator == "Attention":
        # ONNX Runtime's own operator first projects its input to query, key and value.
        return 3 * math.prod(inputs[0]) * output[-1] + 2 * math.prod(output) * output[-2]
    return 0
