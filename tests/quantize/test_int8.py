"""INT8: the layers as their operators compute them, smoothing, rounding, the plan, and bundles."""

import json
import re
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from smolvla_edge.core.board import has_vnni
from smolvla_edge.core.errors import ExportError, GateError, ObservationsError
from smolvla_edge.core.progress import SILENT, Progress
from smolvla_edge.export import int8, writer
from smolvla_edge.export.candidates import Candidate, build, judge
from smolvla_edge.export.checkpoint.checkpoint import load_checkpoint
from smolvla_edge.export.held_out import grippers_of
from smolvla_edge.export.reference import fixed_observations, reference_of
from smolvla_edge.export.sites import quantizable
from smolvla_edge.export.stored import stored_contradictions, stored_weights
from smolvla_edge.export.writer import write_bundle
from smolvla_edge.quantize.int8 import smoothing
from smolvla_edge.quantize.int8.gate import Errors, Gate
from smolvla_edge.quantize.int8.linear import Dynamic, Quantized, Static
from smolvla_edge.quantize.int8.plan import MACHINES, Cost, choose, order
from smolvla_edge.quantize.int8.rounding import compensated, nearest
from smolvla_edge.runtime import BackendError, Bundle, Policy
from smolvla_edge.runtime.bundle.manifest import manifest_json
from smolvla_edge.runtime.engines import backend
from smolvla_edge.runtime.engines.ort import EXACT_INT8
from smolvla_edge.runtime.policy.audit import audit, contradictions
from smolvla_edge.runtime.policy.selfcheck import TOLERANCE, run_selfcheck
from support.paths import DATA
from support.recordings import record

GRAPHS = ("prefix.onnx", "expert.onnx")
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


@pytest.fixture
def parts():
    """A layer [24 -> 16] with everything that one can have: bias, factor, an outlier channel."""
    weight, factor = random(16, 24), torch.rand(24, generator=GENERATOR) + 0.5
    factor[5] = 0
    rounded, scale = nearest(weight)
    return Quantized(
        rounded, scale, random(16), torch.tensor(4.0), factor, torch.tensor([5]), random(1, 16)
    )


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint(str(DATA / "tiny" / "checkpoint"))


# Exact products of DynamicQuantizeMatMul on an x86 CPU without VNNI; no effect on other CPUs.
EXACT_DYNAMIC = ("session.x64quantprecision", "1")


def in_onnxruntime(module, x, tmp_path):
    """-> what ONNX Runtime computes of the exported module, and the operators that it ran."""
    path = tmp_path / "layer.onnx"
    torch.onnx.export(module, (x,), str(path), dynamo=True, opset_version=20, verbose=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that an optimised graph is for this machine only
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    for entry in (EXACT_INT8, EXACT_DYNAMIC):
        options.add_session_config_entry(*entry)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], operators


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("kind", [Dynamic, Static])
def test_a_layer_computes_in_torch_what_its_operators_compute(kind, parts, tmp_path):
    module, x = kind(parts).eval(), random(1, 7, 24)
    (got, _), expected = in_onnxruntime(module, x, tmp_path), module(x).numpy()
    step = float(parts.scale.max()) * 8 / 255  # a rounding that falls the other way
    assert np.abs(got - expected).max() < 2 * step
    assert np.abs(got - expected).mean() < 1e-5
    plain = x @ (parts.rounded * parts.scale[:, None] * parts.factor).T + parts.bias
    plain += x[..., 5:6] @ parts.outlier_weight
    # It does round, and by no more than it should
    assert 1e-3 < np.abs(expected - plain.numpy()).max() < 0.5


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_a_static_layer_is_exact_on_every_cpu(parts, tmp_path):
    """Without a bias ONNX Runtime would fuse Q/DQ and product to one of integers."""
    module, x = Static(replace(parts, bias=None, outliers=None, outlier_weight=None)), random(7, 24)
    got, operators = in_onnxruntime(module.eval(), x, tmp_path)
    assert sorted(operators) == ["DequantizeLinear", "MatMul", "Mul", "QuantizeLinear"]
    assert np.abs(got - module(x).numpy()).max() < 1e-5


def test_compensated_rounding_keeps_products_that_nearest_loses():
    # Activations that depend on each other, as real ones do
    weight, mixing = (
        random(32, 48),
        random(12, 48),
    )
    x = random(500, 12) @ mixing + 0.05 * random(500, 48)
    errors = []
    for rounded, scale in (nearest(weight), compensated(weight, x.T @ x)):
        assert rounded.abs().max() <= 127
        assert torch.equal(rounded, rounded.round())
        errors.append(float((x @ (rounded * scale[:, None] - weight).T).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_a_weight_that_is_exact_in_int8_stays_as_it_is():
    whole = torch.randint(-127, 128, (8, 16), generator=GENERATOR).float()
    whole[:, 0] = 127
    rounded, scale = compensated(whole * 2**-7, torch.eye(16))
    assert torch.equal(rounded * scale[:, None], whole * 2**-7)


def test_smoothing_leaves_a_silent_channel_alone_and_is_never_wild():
    largest, weight = torch.tensor([1.0, 0.0, 1e-9, 1e9]), torch.ones(2, 4)
    found = smoothing.scales(largest, weight, 1.0)
    assert found[1] == 1
    assert 1e-3 <= found.min() < found.max() <= 1e3


@pytest.fixture(scope="module")
def smoothed():
    """Views with massive activations before and after smoothing, and their INT8 layers."""
    checkpoint = load_checkpoint(str(DATA / "tiny_outliers" / "checkpoint"))
    data = int8.observations_for(checkpoint, "synthetic", 4, SILENT)
    after = reference_of(checkpoint, "portable")
    model = quantizable(after.prefix, after.expert)
    layers, costs = int8.quantize_groups(model, after, data.calibration, "cpu", SILENT)
    return reference_of(checkpoint, "portable"), after, layers, costs


def test_smoothing_changes_nothing_in_float(smoothed):
    before, after, _, _ = smoothed
    o = fixed_observations(before.checkpoint, before.arch)[1]
    expected, got = before.run(o), after.run(o)
    assert np.abs(got.actions - expected.actions).max() < 1e-4
    weights = [r.prefix.layers[1].mlp.down_proj.weight for r in (before, after)]
    assert not torch.allclose(*weights)  # it did something


def test_every_site_is_a_linear_of_its_view_and_none_is_named_twice(smoothed):
    model = quantizable(smoothed[0].prefix, smoothed[0].expert)
    names = [name for site in model.sites for name in site.linears]
    assert len(set(names)) == len(names)
    floats = {n for n, m in model.module.named_modules() if type(m).__name__ == "Linear"} - set(
        names
    )
    assert {n.split(".")[1] for n in floats} == {
        "state_proj", "cross", "action_in_proj", "time_mlp_actions", "time_mlp_time", "action_time_mlp_out",
        "action_out_proj",
    }  # fmt: skip


def prefix_error(smoothed, layers):
    before, after, _, _ = smoothed
    o = fixed_observations(before.checkpoint, before.arch)[1]
    _, mask, exact = before.prefill(o)
    with quantizable(after.prefix, after.expert).replaced(layers):
        _, _, got = after.prefill(o)
    pairs = [(got[name][:, :, mask[0]], exact[name][:, :, mask[0]]) for name in exact]
    return max(float((g - e).norm() / e.norm()) for g, e in pairs)


def test_a_massive_channel_is_multiplied_in_float(smoothed, monkeypatch):
    path = "prefix.vision_model.layers.1.mlp.fc2"  # of weight 80, planted
    layer = smoothed[2]["vision early"][path]
    assert layer.outliers.tolist() == [11]
    assert prefix_error(smoothed, {path: layer}) < 0.01
    monkeypatch.setattr(smoothing, "OUTLIER", float("inf"))
    checkpoint = smoothed[0].checkpoint
    data = int8.observations_for(checkpoint, "synthetic", 4, SILENT)
    views = reference_of(checkpoint, "portable")
    model = quantizable(views.prefix, views.expert)
    naive, _ = int8.quantize_groups(model, views, data.calibration, "cpu", SILENT)
    assert naive["vision early"][path].outliers is None
    assert prefix_error(smoothed, {path: naive["vision early"][path]}) > 0.03


def test_costs_count_every_token_once(smoothed):
    costs = smoothed[3]
    arch = smoothed[0].arch
    assert {c.rows for c in costs["vision early"]} == {arch.cameras * arch.patches}
    assert {c.rows for c in costs["language late"]} == {arch.prefix_tokens}
    assert {(c.rows, c.runs) for c in costs["expert MLP"]} == {(arch.config.chunk_size, 10)}


def errors(action, cache):
    return Errors((action,), (1.0,), 0, {"key.0": cache})


def test_groups_are_taken_by_time_saved_for_their_error_as_far_as_the_gate_allows():
    alone = {
        "a": (1.0, errors(0.05, 0.0)),
        "b": (3.0, errors(0.05, 0.0)),
        "c": (0.5, errors(0.01, 0.0)),
    }
    gate = Gate()
    assert order(alone, gate) == ["b", "c", "a"]
    assert choose(
        order(alone, gate), lambda g: errors(sum(alone[x][1].action for x in g), 0.0), gate
    ) == ["b", "c"]
    assert choose(order(alone, gate), lambda g: errors(0.1, 0.05), gate) == ["b", "c", "a"]
    assert choose(["a"], lambda g: errors(0.0, 0.051), gate) == []


def test_what_streams_its_weights_saves_bytes_and_what_computes_saves_operations():
    board, _ = MACHINES["portable"]
    expert, vision = Cost(50, 720 * 2048, 10), Cost(2048, 768 * 3072, 1)
    assert expert.saved_s("portable") == pytest.approx(10 * 720 * 2048 / board.gb_s / 1e9)
    assert vision.saved_s("portable") == pytest.approx(
        vision.multiply_adds / board.float_tflops / 1e12
    )


def test_a_portable_bundle_is_exact_on_every_cpu(export_case, monkeypatch):
    folder, session, set_to = export_case("tiny", "int8"), onnxruntime.InferenceSession, []

    def spy(path, options, **kwargs):
        set_to.append(options.get_session_config_entry(EXACT_INT8[0]))
        return session(path, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    Policy.load(folder, "cpu")
    assert set_to == ["1", "1"]  # prefix and expert


@pytest.mark.parametrize("target", [pytest.param("cpu", marks=pytest.mark.needs_vnni), "portable"])
def test_a_bundle_is_int8_as_its_manifest_says(export_case, target):
    opened = Bundle.open(export_case("tiny", "int8", target))
    record = opened.manifest.int8
    assert record is not None
    assert record.groups
    assert record.gate_is_default
    assert record.found["action_p99"] <= 0.1
    assert record.found["cache"] <= 0.05
    assert record.calibration.kind == "synthetic"
    m = opened.manifest
    stages = [*m.prefix.stages.values(), *[m.expert.stages["expert"]] * m.sampling.num_steps]
    assert sum(work.gemm.get("int8", 0) for work in stages) == 2 * record.multiply_adds
    found = audit(opened)
    assert contradictions(found, "int8") == []
    assert stored_contradictions(opened) == []
    if target == "cpu":
        ran = sum(o.multiply_adds for o in found.operators if o.precision == "int8")
        assert ran == record.multiply_adds > 0.6 * found.multiply_adds
    else:  # rounded by Q/DQ, multiplied in float
        assert found.shares() == {"CPUExecutionProvider": {"float32": 1.0}}
        names = ("QuantizeLinear", "DequantizeLinear")
        ran = {(o.graph, o.operator) for o in found.operators if o.operator in names}
        assert ran == set(product(("prefix", "expert"), names))
    assert max(run_selfcheck(Policy.load(opened, "cpu")).values()) < TOLERANCE["int8"] / 10


@pytest.fixture
def relabelled(export_case, tmp_path):
    """(precision, target) -> a float bundle whose manifest claims what an INT8 one does."""

    def relabel(precision, target):
        copy = tmp_path / "bundle"
        shutil.copytree(export_case("tiny", precision, target), copy)
        claims = json.loads((export_case("tiny", "int8") / "manifest.json").read_text())
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").chmod(0o644)
        (copy / "manifest.json").write_text(
            json.dumps(manifest | {"precision": "int8", "int8": claims["int8"]})
        )
        return copy

    return relabel


def test_a_relabelled_float16_graph_is_refused(relabelled):
    (text,) = stored_contradictions(Bundle.open(relabelled("fp16", "portable")))
    assert re.search(r"stored are float16 9\d\.\d %, float32 \d\.\d % of the weights$", text)


@pytest.mark.needs_vnni
def test_a_relabelled_float32_graph_is_refused(relabelled):
    opened = Bundle.open(relabelled("fp32", "cpu"))
    text = " ".join(contradictions(audit(opened), "int8") + stored_contradictions(opened))
    assert "stored are float32 100.0 %" in text
    assert "computed on CPUExecutionProvider were float32 100.0 %" in text


def test_the_exporter_refuses_what_the_audit_contradicts(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(
        writer, "contradictions", lambda *_: ["labelled fp32, but computed otherwise"]
    )
    with pytest.raises(ExportError, match="labelled fp32, but computed otherwise"):
        write_bundle(tiny, tmp_path / "bundle", "fp32")
    assert not (tmp_path / "bundle").exists()


def test_a_gate_that_no_group_meets_is_an_error(tiny, tmp_path):
    data = int8.observations_for(tiny, "synthetic", 2, SILENT)
    gate = Gate(action_p99=1e-4, seeds=2)
    given = {"target": "portable", "calibration": data, "gate": gate}
    with pytest.raises(GateError, match="no group of layers can be INT8 within the gate"):
        write_bundle(tiny, tmp_path / "bundle", "int8", **given)
    assert list(tmp_path.iterdir()) == []


def test_graphs_over_the_gate_lose_the_group_that_was_taken_last(tiny, tmp_path):
    """The plan is made by simulation. What the graphs compute decides."""
    data = int8.observations_for(tiny, "synthetic", 2, SILENT)
    gate = Gate(action_p99=10.0, cache=10.0, gripper_flips=10_000, seeds=2)
    plan = int8.plan_int8(reference_of(tiny, "portable"), data, "portable", gate, SILENT)
    first, last, *_ = plan.groups
    while len(plan.groups) > 2:
        plan = plan.without_last()
    observations = fixed_observations(tiny, plan.smoothed[0].arch)
    shutil.copyfile(tiny.tokenizer, tmp_path / "tokenizer.json")
    two = Candidate(tiny, "int8", "portable", plan)
    built = build(two, tmp_path, SILENT)
    stored = [stored_weights(tmp_path / name).get("int8", 0) for name in GRAPHS]
    assert sum(stored) == plan.manifest.weights

    accepted = judge(two, built, observations, SILENT)
    assert accepted.retry is None
    assert accepted.int8.found["cache"] > 0

    strict = replace(two, int8=replace(plan, gate=Gate(action_p99=0.0, cache=0.0, seeds=2)))
    refused = judge(strict, built, observations, SILENT)
    assert refused.reason.endswith(f"leaving {last} in float")
    assert refused.retry.int8.manifest.groups == (first,)
    assert 0 < refused.retry.int8.manifest.weights < plan.manifest.weights
    with pytest.raises(GateError, match=r"joint 0 .* \(at most 0\.000\).*No bundle was written"):
        judge(refused.retry, built, observations, SILENT)


def test_a_single_frame_to_calibrate_with_is_too_few(tiny, tmp_path):
    folder = record(tmp_path / "run", chunks=2)
    with pytest.raises(
        ObservationsError, match="leaves 1 frame to calibrate with, expected at least 2"
    ):
        int8.observations_for(tiny, str(folder), 2, SILENT)


@pytest.mark.parametrize(
    ("task", "message"),
    [("word " * 99, "tokens long, this bundle takes 48"), ("\n", "expected an")],
)
def test_an_instruction_the_policy_would_refuse_is_refused_at_once(tiny, tmp_path, task, message):
    folder = record(tmp_path / "run", task=task, chunks=4)
    with pytest.raises(ObservationsError, match=f"{folder}: the task is .*{message}"):
        int8.observations_for(tiny, str(folder), 4, SILENT)


def test_every_gripper_is_judged(tiny):
    assert grippers_of(tiny) == [5]  # an SO-101's last
    names = ("left_gripper", "a", "b", "c", "right_gripper", "d")
    assert grippers_of(replace(tiny, joints=names)) == [0, 4]
    assert grippers_of(replace(tiny, joints=("a", "b", "c", "d", "e", "f"))) == []


def test_a_cpu_whose_products_overflow_is_refused(export_case, relabelled, monkeypatch):
    monkeypatch.setattr(backend, "has_vnni", lambda: False)
    with pytest.raises(BackendError, match="This CPU has no VNNI"):
        Policy.load(relabelled("fp32", "cpu"), "cpu")
    Policy.load(export_case("tiny", "fp32", "cpu"), "cpu")
    portable = Policy.load(export_case("tiny", "int8"), "cpu")
    assert "exact, but not fast" in portable.graphs.reason


def test_int8_for_a_cpu_whose_products_overflow_is_refused_before_calibration(
    tiny, monkeypatch, tmp_path
):
    monkeypatch.setattr(backend, "has_vnni", lambda: False)
    said = []
    with pytest.raises(BackendError, match="For a GPU, export with --precision int8 --target port"):
        write_bundle(
            tiny, tmp_path / "bundle", "int8", target="cpu", progress=Progress(said.append)
        )
    assert said == []


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags\t\t: fma avx2", False),
        ("x86_64", "flags\t\t: avx2 avx_vnni", True),
        ("x86_64", "flags\t\t: avx512f avx512_vnni", True),
        ("aarch64", "Features\t: asimd", True),
    ],
)
def test_what_overflows_is_an_x86_without_vnni(monkeypatch, tmp_path, machine, flags, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert has_vnni(tmp_path) is expected


def test_a_bundle_without_its_int8_record_is_refused(export_case, tmp_path):
    opened = Bundle.open(export_case("tiny", "int8"))
    raw = json.loads(manifest_json(opened.manifest)) | {"int8": None}
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(Exception, match="precision is int8, but int8 is missing"):
        Bundle.open(tmp_path)
