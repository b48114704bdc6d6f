"""The audit: what a bundle stores, what ONNX Runtime ran, and which labels that refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from typer.testing import CliRunner

from smolvla_edge.runtime import Bundle, CheckFailed
from smolvla_edge.runtime.policy.audit import (
    CPU,
    CUDA,
    TENSORRT,
    Audit,
    Row,
    app,
    audit,
    contradictions,
    last_runs,
    multiply_adds,
    stored_weights,
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
    """An audit of what these events tell, as much as the manifest would expect."""
    rows, ms = last_runs("prefix", [run_at(0), *events], 1)
    stored = {"prefix": {"float16": 10}}
    return Audit(provider, tuple(rows), ms, sum(row.multiply_adds for row in rows), stored, (0, 0))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A product of [3, 64] and [64, 8] that onnxruntime.quantization made int8: its file and its profile."""
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
    return folder / "int8.onnx", json.loads(Path(session.end_profiling()).read_text())


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_is_what_its_label_says_and_no_other_label_is_believed(
    precision, target, export_case
):
    found = audit(Bundle.open(export_case("tiny", precision, target)))
    assert found.multiply_adds == pytest.approx(found.expected, rel=1e-3)
    assert sum(found.shares()[CPU].values()) == pytest.approx(1)
    assert {n.graph for n in found.rows if n.precision} == {"prefix", "expert"}
    assert 0 < sum(n.ms for n in found.rows) <= found.chunk_ms
    assert ("MultiHeadAttention" in {n.operator for n in found.rows if n.precision}) == (
        target == "cpu"
    )
    assert found.elsewhere() == {}
    assert contradictions(found, precision) == []
    other = "fp16" if precision == "fp32" else "fp32"
    assert any(f"labelled {other}, but stored are" in text for text in contradictions(found, other))
    (refused,) = contradictions(found, "int8")
    assert refused.startswith("labelled int8, but stored are float")


def test_what_is_stored_is_what_onnx_reads(export_case):
    folder = export_case("tiny", "fp16")
    for name in ("prefix.onnx", "expert.onnx"):
        found: dict[str, int] = {}
        for t in onnx.load(folder / name, load_external_data=False).graph.initializer:
            kind = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}.get(t.data_type)
            if kind and len(t.dims) > 1:
                found[kind] = found.get(kind, 0) + math.prod(t.dims)
        assert stored_weights(folder / name) == found
        assert found["float16"] > 10 * found["float32"]


def test_a_dynamically_quantized_product_counts_as_int8(quantized):
    file, events = quantized
    rows, ms = last_runs("prefix", events, 1)
    (product,) = [n for n in rows if n.precision]
    assert (product.precision, product.multiply_adds) == ("int8", 3 * 64 * 8)
    assert stored_weights(file) == {"int8": 64 * 8}
    found = Audit(
        CPU,
        tuple(rows),
        ms,
        product.multiply_adds,
        {"prefix": stored_weights(file)},
        (512, 3 * 64 * 8),
    )
    assert contradictions(found, "int8") == []
    assert len(contradictions(found, "fp32")) == 2  # stored and computed


def test_less_int8_than_the_manifest_claims_is_not_int8():
    small = event("MatMulInteger", [[4, 8], [8, 4]], [[4, 4]], kind="uint8")
    large = event("MatMul", [[4, 10], [10, 4]], [[4, 4]])
    ran = replace(simulated(CPU, small, large), stored={"prefix": {"int8": 32, "float32": 40}})
    (refused,) = contradictions(replace(ran, claimed=(32, 288)), "int8")
    assert "float32 55.6 %, int8 44.4 % of the multiply-adds" in refused
    (refused,) = contradictions(replace(ran, claimed=(31, 128)), "int8")
    assert "stored are float32 55.6 %, int8 44.4 % of the weights" in refused
    assert contradictions(replace(ran, claimed=(32, 128)), "int8") == []


def test_only_the_last_runs_count():
    runs = [run_at(ts) for ts in (0, 10_000, 20_000)]
    events = [event("MatMul", [[4, 8]], [[4, 4]], ts=ts + 100) for ts in (0, 10_000, 20_000)]
    rows, ms = last_runs("expert", [*runs, *events], 2)
    assert (rows, ms) == ([Row("expert", "MatMul", CPU, "float32", 2, 256, 4.0)], 16)


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


def test_float32_on_cuda_is_no_float16_and_strangers_are_named():
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


def test_what_tensorrt_does_inside_is_not_invented():
    taken = [event(f"TRTKernel_graph_{i}", [[4, 8]], [[4, 4]], TENSORRT) for i in (0, 1, 0)]
    found = simulated(TENSORRT, *taken, event("MemcpyToHost", [[4]], [[4]], TENSORRT))
    found = replace(found, expected=10**9)
    assert (found.untold, found.multiply_adds, found.shares()) == (2, 0, {})
    assert contradictions(found, "fp16") == []


def test_the_command_prints_both_truths(export_case):
    folder = str(export_case("tiny", "fp16", "cpu"))
    done = CliRunner().invoke(app, ["--bundle", folder, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "stored    prefix: float16 98.0 %" in done.output
    assert f"computed  {CPU}: float" in done.output
    assert "note" not in done.output
    rows = done.output.splitlines()[done.output.splitlines().index("") + 2 :]
    times = [float(row.split()[-2]) for row in rows]
    assert times == sorted(times, reverse=True) and times[0] > 0


def test_the_command_refuses_a_bundle_that_does_other_work_than_its_manifest_says(tiny_bundle):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest["expert"]["stages"]["expert"]["gemm"]["float32"] *= 2
    (tiny_bundle / "manifest.json").write_text(json.dumps(manifest))
    done = CliRunner().invoke(app, ["--bundle", str(tiny_bundle), "--device", "cpu"])
    assert isinstance(done.exception, CheckFailed)
    assert "is not what it says: a chunk has 0." in str(done.exception)
    assert "counted   0.219223 G multiply-adds a chunk" in done.output
