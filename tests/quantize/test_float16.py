"""float16 with trained activations, judged by ranges and by an evaluator that computes in float16.

ONNX Runtime computes float16 in float32 on a CPU, so it cannot be the judge here. torch's half
arithmetic rounds every intermediate to float16.
"""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from smolvla_edge.core.errors import RangeError
from smolvla_edge.core.progress import Progress
from smolvla_edge.export.checkpoint.checkpoint import architecture_of, load_checkpoint
from smolvla_edge.export.graph import export_graph, prefix_example
from smolvla_edge.export.reference import TorchReference, fixed_observations
from smolvla_edge.export.views.layers import FP16, FP32, Recipe
from smolvla_edge.export.views.weights import build_views
from smolvla_edge.export.writer import write_bundle
from smolvla_edge.quantize.ranges import FLOAT16_MAX, HEADROOM, float16_ranges, require_headroom
from smolvla_edge.runtime.policy.selfcheck import TOLERANCE
from support.paths import DATA

NAIVE = Recipe(torch.float16, torch.float16, torch.float16)
MLP = "model.vlm_with_expert.vlm.model.text_model.layers.{}.mlp."


@pytest.fixture(scope="module")
def spiked():
    """tiny_outliers with its language spike in layer 1 instead of layer 3.

    Only keys and values of the last layer are read, so only an earlier spike is normalised again.
    """
    checkpoint = load_checkpoint(str(DATA / "tiny_outliers" / "checkpoint"))
    tensors = dict(checkpoint.tensors)
    for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        tensors[MLP.format(1) + name] = tensors[MLP.format(3) + name]
    arch = architecture_of(checkpoint)
    observation = fixed_observations(checkpoint, arch)[-1]

    def run(recipe):
        views = build_views(arch, tensors, recipe)
        return TorchReference(checkpoint, *views).run(observation), views[0]

    return run, arch


def textbook_layer_norm(self, x):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.eps) * self.weight
        + self.bias
    )


def feeds_of(stages, arch):
    ids = np.zeros((1, arch.token_length), np.int32)
    ids[0, : len(stages.tokens)] = stages.tokens
    mask = np.arange(arch.token_length)[None] < len(stages.tokens)
    return {"images": stages.images, "tokens": ids, "token_mask": mask, "state": stages.state}


def test_typed_float16_computed_in_float16_stays_within_tolerance(spiked):
    run, _ = spiked
    expected, _ = run(FP32)
    got, _ = run(FP16)
    assert np.abs(got.actions - expected.actions).max() < TOLERANCE["fp16"]


def test_naive_float16_fails_the_evaluator_and_the_range_pass(spiked, monkeypatch, tmp_path):
    run, arch = spiked
    expected, _ = run(FP32)
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", textbook_layer_norm)
    got, prefix = run(NAIVE)
    valid = expected.valid
    worst = max(
        np.abs(got.cache[n][:, :, valid].astype(np.float32) - t[:, :, valid]).max()
        / np.abs(t).max()
        for n, t in expected.cache.items()
    )
    assert not worst < 10 * TOLERANCE["fp16"]
    export_graph(prefix, prefix_example(arch), tmp_path / "prefix.onnx")
    largest = float16_ranges(tmp_path / "prefix.onnx", [feeds_of(expected, arch)])
    with pytest.raises(RangeError, match="not safe in float16"):
        require_headroom("prefix.onnx", largest)


def test_typed_float16_passes_the_range_pass_on_the_same_spike(spiked, tmp_path):
    run, arch = spiked
    expected, _ = run(FP32)
    _, prefix = run(FP16)
    export_graph(prefix, prefix_example(arch), tmp_path / "prefix.onnx")
    largest = float16_ranges(tmp_path / "prefix.onnx", [feeds_of(expected, arch)])
    require_headroom("prefix.onnx", largest)
    assert max(largest.values()) > 1000  # the spike is really there


def amplified(checkpoint, layer, factor):
    """The same policy with a larger product inside one gated MLP, which the next weight
    reverses."""
    tensors = dict(checkpoint.tensors)
    tensors[MLP.format(layer) + "up_proj.weight"] = (
        tensors[MLP.format(layer) + "up_proj.weight"].float() * factor
    )
    tensors[MLP.format(layer) + "down_proj.weight"] = (
        tensors[MLP.format(layer) + "down_proj.weight"].float() / factor
    )
    return replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("target", ["portable", "cpu"])
def test_a_stage_too_large_for_float16_is_kept_in_float32_and_reported(
    target, export_case, tmp_path
):
    checkpoint = amplified(load_checkpoint(str(DATA / "tiny_outliers" / "checkpoint")), 1, 2**12)
    said = []
    manifest = write_bundle(
        checkpoint, tmp_path / "bundle", "fp16", target=target, progress=Progress(said.append)
    ).manifest
    assert manifest.pinned == ("prefix.layers.1.mlp",)
    assert manifest.float16_largest < FLOAT16_MAX / HEADROOM
    assert "keeping in float32, too large for float16: prefix.layers.1.mlp" in said
    plain = export_case("tiny_outliers", "fp16", target) / "prefix.onnx.data"
    weights = [t for name, t in checkpoint.tensors.items() if name.startswith(MLP.format(1))]
    grown = (tmp_path / "bundle" / "prefix.onnx.data").stat().st_size - plain.stat().st_size
    assert grown == sum(2 * t.numel() for t in weights) > 0
    assert all(value < TOLERANCE["fp16"] for value in manifest.parity.values())


def test_a_cache_too_large_for_float16_is_refused(tmp_path):
    checkpoint = load_checkpoint(str(DATA / "tiny" / "checkpoint"))
    name = "model.vlm_with_expert.vlm.model.text_model.layers.0.self_attn.v_proj.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].float() * 2**14
    with pytest.raises(
        RangeError, match=r"prefix.onnx is not safe in float16.*value\.0.*--precision fp32"
    ):
        write_bundle(checkpoint, tmp_path / "bundle", "fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_square_that_overflows_is_seen_although_the_output_is_small(tmp_path):
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Reciprocal", ["square"], ["y"]),
    ]
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes,
        "square",
        [helper.make_tensor_value_info("x", half, [2])],
        [helper.make_tensor_value_info("y", half, [2])],
        value_info=[helper.make_tensor_value_info("square", half, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "square.onnx")
    small = float16_ranges(tmp_path / "square.onnx", [{"x": np.float16([3, 100])}])
    assert small["square"] == 10000
    large = float16_ranges(tmp_path / "square.onnx", [{"x": np.float16([3, 300])}])
    assert large["square"] == 90000.0  # 300 squared: no float16
    with pytest.raises(RangeError, match="square"):
        require_headroom("square.onnx", large)
    lost = float16_ranges(tmp_path / "square.onnx", [{"x": np.float16([3, np.nan])}])
    assert lost["square"] == float("inf")  # a NaN is no small number


def test_the_float16_bundle_is_typed_and_half_the_size(export_case):
    bundles = {p: export_case("tiny", p) for p in ("fp32", "fp16")}
    sizes = {p: (folder / "prefix.onnx.data").stat().st_size for p, folder in bundles.items()}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    model = onnx.load(bundles["fp16"] / "prefix.onnx", load_external_data=False)
    kinds = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    assert {kinds[n] for n in kinds if n != "prefix_mask"} == {TensorProto.FLOAT16}
    stored = {
        t.name: t.data_type
        for t in model.graph.initializer
        if len(t.dims) == 2 and min(t.dims) > 32
    }
    assert TensorProto.FLOAT16 in stored.values()
