"""What the portable graphs hold is what TensorRT 10.3's parser takes and fuses, by its
documentation: none is here.

Operators, standard domain, opset and static shapes are the exporter's own check (export/graph.py).
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from support.paths import DATA

# ONNX's name: TensorRT's, where they differ
TYPES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
}
CASES = [
    ("tiny", "fp32"),
    ("tiny", "fp16"),
    ("tiny_variant", "fp32"),
    ("tiny_variant", "fp16"),
    ("tiny", "int8"),
]


def types_of(graph):
    """{tensor: its type} of everything whose type is written down."""
    given = {t.name: t.data_type for t in graph.initializer}
    given |= {
        v.name: v.type.tensor_type.elem_type
        for v in (*graph.input, *graph.output, *graph.value_info)
    }
    names = {name: TensorProto.DataType.Name(kind) for name, kind in given.items()}
    return {name: TYPES.get(kind, kind) for name, kind in names.items()}


def refused(graph):
    """What the parser or a strongly typed network does not take. Inputs are enough: outputs are
    inputs of others."""
    lines = (DATA / "tensorrt_operators.txt").read_text().splitlines()
    table = {
        name: types.split() for name, _, types in (x.partition(":") for x in lines if x[0] != "#")
    }
    types, constants, found = types_of(graph), {t.name for t in graph.initializer}, set()
    for node in graph.node:
        op = node.op_type
        inputs = [
            (i, name, types.get(name, "no type")) for i, name in enumerate(node.input) if name
        ]
        if len(node.output) > 1 and op != "Split":
            found.add(f"{op} with {len(node.output)} outputs")
        for i, name, kind in inputs:
            if kind == "INT64" and i > 0:  # a shape, axes or indices
                if name not in constants and op != "Gather":
                    found.add(f"{op} with input {i} computed")
            elif kind == "INT64" and op != "Cast":
                found.add(f"{op} of INT64")
            elif kind not in table.get(op, []) and not (
                i > 0 and op in ("QuantizeLinear", "DequantizeLinear")
            ):
                found.add(f"{op} of {kind}")
        if len({kind for _, _, kind in inputs if kind in TYPES.values()}) > 1:
            found.add(f"{op} of mixed types")
    return found


def misplaced(graph):
    """What keeps INT8 from running as INT8.

    Source: docs.nvidia.com/deeplearning/tensorrt, Working with Quantized Types (symmetric;
    activations per tensor, weights per channel; Q/DQ layer-placement recommendations: all inputs of
    a weighted operation, no output, no bias), and the parser's own checks in onnx-tensorrt
    (onnxOpImporters.cpp, QuantDequantLinearHelper).
    """
    types, found = types_of(graph), set()
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    nodes = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in nodes:
        x, *rest = node.input
        if len(rest) < 2 or any(name not in constants for name in rest):
            found.add("scale or zero point not constant")
            continue
        scale, zero = (constants[name] for name in rest)
        users = [n for n in graph.node if node.output[0] in n.input]
        dequantizes, weight = node.op_type == "DequantizeLinear", constants.get(x)
        axis = next((a.i for a in node.attribute if a.name == "axis"), None)
        problems = {
            "zero point": zero.dtype != np.int8 or zero.shape != scale.shape or zero.any(),
            "scale": not (np.isfinite(scale) & (scale > 0)).all(),
            "activation not per tensor": weight is None and scale.ndim,
            "weight not INT8": weight is not None and weight.dtype != np.int8,
            "weight not per output channel": weight is not None
            and (weight.ndim != 2 or axis != 1 or scale.shape != weight.shape[1:]),  # of [in, out]
            "type of a DequantizeLinear": dequantizes and types[node.output[0]] != types[rest[0]],
            "not a pair": (
                not dequantizes
                and any((u.op_type, *u.input[1:]) != ("DequantizeLinear", *rest) for u in users)
            )
            or (
                dequantizes
                and weight is None
                and (x not in makers or makers[x].op_type != "QuantizeLinear")
            ),
            "not at a product": dequantizes
            and any(
                u.op_type not in ("MatMul", "Gemm") or node.output[0] in u.input[2:] for u in users
            ),
            "one input of a product": dequantizes
            and any(
                name not in makers or makers[name] not in nodes
                for u in users
                for name in u.input[:2]
            ),
        }
        found |= {what for what, wrong in problems.items() if wrong}
    return found


def graphs(folder):
    return [onnx.load(folder / name).graph for name in ("prefix.onnx", "expert.onnx")]


@pytest.mark.parametrize(("case", "precision"), CASES)
def test_the_parser_takes_every_operator_with_its_types(export_case, case, precision):
    for graph in graphs(export_case(case, precision)):
        assert refused(graph) == set()


def test_int8_is_where_it_fuses(export_case):
    for graph in graphs(export_case("tiny", "int8")):
        assert misplaced(graph) == set()
        assert sum(node.op_type == "DequantizeLinear" for node in graph.node) > 2


@pytest.mark.parametrize(
    ("toy", "problem"),
    [
        ("(float[2] x) => (float[2] y) { y = DynamicThing (x) }", "DynamicThing of FP32"),
        ("(int64[2] x) => (int64[2] y) { y = Neg (x) }", "Neg of INT64"),
        ("(int32[2] x) => (int32[2] y) { y = Sigmoid (x) }", "Sigmoid of INT32"),
        ("(float[2] x, float16[2] e) => (float[2] y) { y = Pow (x, e) }", "Pow of mixed types"),
        (
            "(float[2] x, int64[1] s) => (float[2] y) { y = Reshape (x, s) }",
            "Reshape with input 1 computed",
        ),
        ("(float[2] x) => (float[2] y) { h = Relu (x) y = Relu (h) }", "Relu of no type"),
        (
            "(float[2] x) => (float[2] y) { y, m = LayerNormalization (x, x) }",
            "LayerNormalization with 2 outputs",
        ),
    ],
)
def test_what_the_parser_does_not_take_is_found(toy, problem):
    assert refused(parser.parse_graph(f"toy {toy}")) == {problem}


GOOD = """toy (float[3, 2] x) => (float[3, 2] y)
<float s = {0.5}, int8 z = {0}, int8[2, 2] w = {1, 2, 3, 4}, float[2] ws = {0.5, 0.25}, int8[2] wz = {0, 0},
 int8[3, 2] q, float[3, 2] d, float[2, 2] v, float[2] b = {1, 2}>
{ q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) v = DequantizeLinear <axis = 1> (w, ws, wz)
  y = MatMul (d, v) }"""


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ("", "", None),
        ("int8 z = {0}", "int8 z = {3}", "zero point"),
        ("int8 z = {0}", "uint8 z = {0}", "zero point"),
        ("float s = {0.5}", "float s = {0}", "scale"),
        (
            "float s = {0.5}, int8 z = {0}",
            "float[3] s = {1, 1, 1}, int8[3] z = {0, 0, 0}",
            "activation not per tensor",
        ),
        ("axis = 1", "axis = 0", "weight not per output channel"),
        ("(q, s, z)", "(q, ws, wz)", "not a pair"),
        ("(x, s, z)", "(x, x, z)", "scale or zero point not constant"),
        ("float[2] ws = {0.5, 0.25}", "float16[2] ws = {1, 1}", "type of a DequantizeLinear"),
        ("MatMul (d, v)", "Add (d, v)", "not at a product"),
        ("MatMul (d, v)", "Gemm (d, v, v)", "not at a product"),
        ("MatMul (d, v)", "MatMul (x, v)", "one input of a product"),
    ],
)
def test_int8_out_of_place_is_found(good, bad, problem):
    found = misplaced(parser.parse_graph(GOOD.replace(good, bad) if good else GOOD))
    assert found == set() if problem is None else problem in found
