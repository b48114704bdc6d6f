"""The audit: what an engine ran, and which labels that contradicts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from smolvla_edge.runtime import Bundle
from smolvla_edge.runtime.engines.ort_profile import OperatorRuns, last_runs, multiply_adds
from smolvla_edge.runtime.policy.audit import (
    CPU,
    CUDA,
    OrtAudit,
    TrtAudit,
    audit,
    contradictions,
)


def event(operator, inputs, output, provider=CPU, ts=0, kind="float"):
    shapes = {
        "input_type_shape": [{kind: s} for s in inputs],
        "output_type_shape": [{kind: s} for s in output],
    }
    return {"cat": "Node", "name": f"{operator}_kernel_time", "ts": ts, "dur": 2000} | {
        "args": {"op_name": operator, "provider": provider, **shapes}
    }


def run_at(ts):
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": 8000}


def simulated(provider, *events):
    """An audit of these events, which are as much as the manifest expects."""
    operators, ms = last_runs("prefix", [run_at(0), *events], 1)
    return OrtAudit(provider, tuple(operators), ms, sum(o.multiply_adds for o in operators), 0)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A product of [3, 64] and [64, 8] that onnxruntime.quantization made int8: its profile."""
    folder = tmp_path_factory.mktemp("quantized")
    weight = numpy_helper.from_array(
        np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32), "w"
    )
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", [3, 64]), ("y", [3, 8]))
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight]
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        folder / "float.onnx",
    )
    quantize_dynamic(folder / "float.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=[CPU])
    for _ in range(3):
        session.run(None, {"x": np.ones((3, 64), np.float32)})
    return json.loads(Path(session.end_profiling()).read_text())


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_computes_what_its_manifest_says(precision, target, export_case):
    found = audit(Bundle.open(export_case("tiny", precision, target)))
    assert found.multiply_adds == pytest.approx(found.expected, rel=1e-3)
    assert sum(found.shares()[CPU].values()) == pytest.approx(1)
    assert {o.graph for o in found.operators if o.precision} == {"prefix", "expert"}
    assert 0 < sum(o.ms for o in found.operators) <= found.chunk_ms
    products = {o.operator for o in found.operators if o.precision}
    assert ("MultiHeadAttention" in products) == (target == "cpu")
    assert found.elsewhere() == {}
    assert contradictions(found, precision) == []


def test_a_dynamically_quantized_product_counts_as_int8(quantized):
    operators, ms = last_runs("prefix", quantized, 1)
    (product,) = [o for o in operators if o.precision]
    assert (product.precision, product.multiply_adds) == ("int8", 3 * 64 * 8)
    count = product.multiply_adds
    found = OrtAudit(CPU, tuple(operators), ms, count, claimed_int8=count)
    assert contradictions(found, "int8") == []
    (refused,) = contradictions(found, "fp32")
    assert "labelled fp32, but computed on CPUExecutionProvider were int8 100.0 %" in refused


def test_less_int8_than_the_manifest_claims_is_not_int8():
    small = event("MatMulInteger", [[4, 8], [8, 4]], [[4, 4]], kind="uint8")
    large = event("MatMul", [[4, 10], [10, 4]], [[4, 4]])
    ran = simulated(CPU, small, large)
    (refused,) = contradictions(replace(ran, claimed_int8=288), "int8")
    assert "float32 55.6 %, int8 44.4 % of the multiply-adds" in refused
    assert contradictions(replace(ran, claimed_int8=128), "int8") == []


def test_only_the_last_runs_count():
    runs = [run_at(ts) for ts in (0, 10_000, 20_000)]
    events = [event("MatMul", [[4, 8]], [[4, 4]], ts=ts + 100) for ts in (0, 10_000, 20_000)]
    operators, ms = last_runs("expert", [*runs, *events], 2)
    assert (operators, ms) == ([OperatorRuns("expert", "MatMul", CPU, "float32", 2, 256, 4.0)], 16)


@pytest.mark.parametrize(
    ("operator", "inputs", "output", "expected"),
    [
        ("MatMul", [[2, 4, 8]], [2, 4, 16], 2 * 4 * 8 * 16),  # weights packed at load are not told
        ("MatMul", [[4, 8], [2, 8, 16]], [2, 4, 16], 2 * 4 * 8 * 16),
        ("Gemm", [[8, 4], [8, 16], [16]], [4, 16], 4 * 8 * 16),  # transposed
        ("FusedMatMul", [[1, 2, 8, 4], [1, 2, 8, 16]], [1, 2, 4, 16], 2 * 4 * 8 * 16),
        ("QLinearMatMul", [[4, 8], [1], [1], [8, 16]], [4, 16], 4 * 8 * 16),
        ("MultiHeadAttention", [[1, 5, 8], [1, 7, 8], [1, 7, 8]], [1, 5, 8], 2 * 5 * 7 * 8),
        ("Attention", [[1, 2, 5, 4], [1, 2, 7, 4], [1, 2, 7, 4]], [1, 2, 5, 4], 2 * 2 * 5 * 7 * 4),
        ("Attention", [[1, 5, 8], [8, 24], [24]], [1, 5, 8], 5 * 8 * 24 + 2 * 5 * 5 * 8),
        ("Softmax", [[4, 8]], [4, 8], 0),
    ],
)
def test_multiply_adds_follow_from_shapes(operator, inputs, output, expected):
    assert multiply_adds(operator, inputs, output) == expected


def test_float32_on_cuda_is_no_float16_and_operators_elsewhere_are_named():
    product = event("MatMul", [[4, 8]], [[4, 4]], CUDA)
    stray = event("Gather", [[4, 8], [1]], [[1, 8]], CPU)
    found = simulated(CUDA, product, stray, stray)
    assert found.elsewhere() == {"Gather": 2}
    assert any(
        text.startswith(f"labelled fp16, but computed on {CUDA}")
        for text in contradictions(found, "fp16")
    )
    half = event("MatMul", [[4, 8]], [[4, 8]], CUDA, kind="float16")
    assert contradictions(simulated(CUDA, product, half), "fp16") == []


def test_every_engine_is_held_against_the_label():
    found = TrtAudit({"prefix.onnx": {"float16": 9}, "expert.onnx": {"float32": 4, "float16": 5}})
    assert contradictions(found, "fp16") == []
    assert contradictions(found, "fp32") == [
        "the engine of prefix.onnx is not fp32: it has 9 layers in float16",
        "the engine of expert.onnx is not fp32: it has 5 layers in float16, 4 layers in float32",
    ]
    assert contradictions(TrtAudit({"prefix.onnx": {}}), "int8") == []
