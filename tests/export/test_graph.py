"""What may be in an exported graph."""

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from smolvla_edge.core.errors import GraphError
from smolvla_edge.export.checkpoint.checkpoint import architecture_of, load_checkpoint
from smolvla_edge.export.graph import FORBIDDEN, ORT_OPERATORS, check_graph, describe_graph
from support.paths import DATA


def save_toy(path, op, *, kind=TensorProto.FLOAT, domain="", shape=(2,)):
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], domain=domain)],
        "toy",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)


@pytest.mark.parametrize(
    ("toy", "message"),
    [
        ({"op": "IsNaN"}, "operator IsNaN"),
        ({"op": "Relu", "kind": TensorProto.DOUBLE}, "float64 tensor"),
        ({"op": "FastGelu", "domain": "com.microsoft"}, "com.microsoft::FastGelu"),
        ({"op": "Relu", "shape": ("n",)}, "dynamic shape of x"),
    ],
)
def test_what_breaks_the_contract_is_named(tmp_path, toy, message):
    save_toy(tmp_path / "toy.onnx", **toy)
    with pytest.raises(GraphError, match=message):
        check_graph(tmp_path / "toy.onnx")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", ["tiny", "tiny_variant"])
@pytest.mark.parametrize("name", ["prefix.onnx", "expert.onnx"])
def test_exported_graphs_keep_the_contract(export_case, case, precision, name):
    path = export_case(case, precision) / name
    check_graph(path)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert not FORBIDDEN & {n.op_type for n in model.graph.node}
    assert model.ir_version <= 10


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_the_target_cpu_holds_onnx_runtimes_own_operators(export_case, precision):
    bundles = {target: export_case("tiny", precision, target) for target in ("portable", "cpu")}
    found = set()
    for name in ("prefix.onnx", "expert.onnx"):
        path = bundles["cpu"] / name
        check_graph(path, "cpu")
        with pytest.raises(GraphError, match=r"com\.microsoft::RotaryEmbedding"):
            check_graph(path)
        found |= {
            n.op_type for n in onnx.load(path, load_external_data=False).graph.node if n.domain
        }
        stages = (describe_graph(bundle / name).stages for bundle in bundles.values())
        assert (
            len({tuple((stage, work.flops) for stage, work in found.items()) for found in stages})
            == 1
        )
    assert found == ORT_OPERATORS - {"DynamicQuantizeMatMul"}  # that is INT8's


def test_an_operator_that_was_not_measured_is_refused_for_the_cpu_too(tmp_path):
    save_toy(tmp_path / "toy.onnx", "QuickGelu", domain="com.microsoft")
    with pytest.raises(GraphError, match=r"com\.microsoft::QuickGelu"):
        check_graph(tmp_path / "toy.onnx", "cpu")


def test_onnx_runtime_fuses_every_rms_norm(export_case, tmp_path):
    """The written-out form is one that ONNX Runtime and TensorRT know."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    path = export_case("tiny", "fp32") / "expert.onnx"
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    operators = [n.op_type for n in optimised.graph.node]
    assert "ReduceMean" not in operators
    # Two in each of four layers, one after
    assert sum("SimplifiedLayerNorm" in name for name in operators) == 9


def test_nothing_of_the_prefix_is_recomputed_in_a_step(export_case):
    """The expert graph holds no projection of a cross layer's keys and values."""
    checkpoint = load_checkpoint(str(DATA / "tiny" / "checkpoint"))
    arch = architecture_of(checkpoint)
    expert = describe_graph(export_case("tiny", "fp32") / "expert.onnx")
    tokens, width, kv, q = (
        arch.config.chunk_size,
        arch.expert_width,
        arch.kv_width,
        arch.q_width,
    )
    selves = sum(map(arch.is_self, range(arch.layers)))
    layer = 2 * q * width + 3 * arch.expert_intermediate * width  # q, o and the gated MLP
    gemm = arch.layers * layer + selves * 2 * kv * width
    gemm += 2 * width * width  # time MLP: action half, out
    gemm += 2 * arch.config.max_action_dim * width  # actions in and out
    keys = arch.layers * arch.prefix_tokens + selves * tokens
    attention = 2 * q * keys
    once = width * width  # the time half of the MLP: one row
    assert expert.flops == 2 * (tokens * (gemm + attention) + once)


def test_vision_is_what_depends_on_the_images_alone(export_case):
    arch = architecture_of(load_checkpoint(str(DATA / "tiny" / "checkpoint")))
    text, cameras, vision_layers = (
        arch.text,
        arch.cameras,
        arch.vision.num_hidden_layers,
    )
    patches, width, wide = (
        arch.patches,
        arch.vision.hidden_size,
        arch.vision.hidden_size * arch.vlm.scale_factor**2,
    )
    tower = 3 * arch.vision.patch_size**2 * width
    tower += vision_layers * (4 * width**2 + 2 * width * arch.vision.intermediate_size)
    connector = wide * text.hidden_size
    stages = describe_graph(export_case("tiny", "fp32") / "prefix.onnx").stages
    vision, language = stages["vision"], stages["language"]
    image_tokens = patches // arch.vlm.scale_factor**2
    assert vision.gemm == {"float32": 2 * cameras * (patches * tower + image_tokens * connector)}
    assert vision.attention == cameras * vision_layers * 4 * patches**2 * width
    assert vision.weights == {"float32": tower + connector}
    q, kv = arch.q_width, arch.kv_width
    layer = text.hidden_size * (2 * q + 2 * kv + 3 * text.intermediate_size)
    weights = (
        arch.layers - 1
    ) * layer + 2 * kv * text.hidden_size  # of the last layer keys and values only
    crosses = arch.layers - sum(map(arch.is_self, range(arch.layers)))
    weights += crosses * 2 * kv**2 + arch.config.max_state_dim * text.hidden_size
    assert language.weights == {"float32": weights}  # token embeddings are looked up, not read
    assert language.attention == (arch.layers - 1) * 4 * arch.prefix_tokens**2 * q


def test_an_empty_camera_costs_nothing(export_case):
    """tiny_variant has one camera and one empty slot: only the real one is an input."""
    graph = describe_graph(export_case("tiny_variant", "fp32") / "prefix.onnx")
    assert {t.name: t.shape for t in graph.inputs}["images"] == (1, 3, 128, 128)
