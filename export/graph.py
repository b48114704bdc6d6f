"""A view -> an ONNX file, and what may be in it."""

import contextlib
import io
import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from ..core.errors import GraphError
from ..quantize.ranges import SCOPES
from ..runtime.bundle import manifest as contract
from ..runtime.bundle.manifest import Work
from .checkpoint.architecture import Architecture
from .views.layers import Recipe

OPSET = 20
IR_VERSION = 10  # ONNX Runtime 1.22 and TensorRT 10.3 read it
# Slow or unreadable on TensorRT 10.3, or a sign that something was exported badly.
FORBIDDEN = {
    "ScatterND",
    "ScatterElements",
    "IsNaN",
    "NonZero",
    "Loop",
    "If",
    "Scan",
    "SequenceConstruct",
}
# What the target `cpu` may hold beside standard operators.
ORT_OPERATORS = {"MultiHeadAttention", "FastGelu", "RotaryEmbedding", "DynamicQuantizeMatMul"}


@dataclass(frozen=True)
class Example:
    """Inputs a view is traced with, by name and in order."""

    inputs: dict[str, Tensor]
    outputs: list[str]


def cache_names(arch: Architecture) -> list[str]:
    """key.0, value.0, key.1, ..."""
    return [f"{kind}.{i}" for i in range(arch.layers) for kind in ("key", "value")]


def prefix_example(arch: Architecture) -> Example:
    inputs = {
        "images": torch.zeros(arch.cameras, 3, arch.vision.image_size, arch.vision.image_size),
        "tokens": torch.zeros(1, arch.token_length, dtype=torch.int32),
        "token_mask": torch.ones(1, arch.token_length, dtype=torch.bool),
        "state": torch.zeros(1, arch.config.max_state_dim),
    }
    return Example(inputs, ["prefix_mask", *cache_names(arch)])


def expert_example(arch: Architecture, recipe: Recipe) -> Example:
    inputs = {
        "noisy_actions": torch.zeros(arch.noise_shape),
        "time_embedding": torch.zeros(1, arch.expert_width),
        "time": torch.ones(1),
        "dt": torch.full((1,), -0.1),
        "prev_chunk": torch.zeros(arch.noise_shape),
        "prev_weights": torch.zeros(1, arch.config.chunk_size, 1),
        "guidance": torch.zeros(1),
        "prefix_mask": torch.ones(1, arch.prefix_tokens, dtype=torch.bool),
    }
    kv = (1, arch.text.num_key_value_heads, arch.prefix_tokens, arch.head_dim)
    inputs |= {name: torch.zeros(kv, dtype=recipe.matmul) for name in cache_names(arch)}
    return Example(inputs, ["velocity", "next_actions"])


def export_graph(
    view: nn.Module, example: Example, path: Path, target: contract.Target = "portable"
) -> None:
    """Trace `view`, made for `target`. Write `path`, and its weights to `<path>.data`.

    Raises GraphError.
    """
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            program = torch.onnx.export(
                view,
                tuple(example.inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example.inputs),
                output_names=example.outputs,
                external_data=True,
                verbose=False,
            )
            assert program is not None  # dynamo=True without a path always returns a program
            program.model.ir_version = IR_VERSION
            # A bundle holds no source paths or class names: equal weights give equal graphs. The
            # range pass of float16 reads the scopes.
            for node in program.model.graph:
                scopes = node.metadata_props.get(SCOPES)
                node.metadata_props.clear()
                if scopes is not None:
                    node.metadata_props[SCOPES] = scopes
            program.save(str(path), external_data=True)
    except OSError as e:
        raise GraphError(f"{path.name} cannot be written: {e}. Is the disk full?") from e
    except torch.onnx.errors.OnnxExporterError as e:
        raise GraphError(f"torch.onnx could not export {path.name}: {e}") from e
    finally:
        quiet.setLevel(level)
    check_graph(path, target)


def check_graph(path: Path, target: contract.Target = "portable") -> None:
    """Raises GraphError that lists every operator, dtype and shape that the bundle forbids."""
    model = onnx.load(path, load_external_data=False)
    allowed = {("com.microsoft", name) for name in ORT_OPERATORS} if target == "cpu" else set()
    foreign = {
        (n.domain, n.op_type) for n in model.graph.node if n.domain not in ("", "ai.onnx")
    } - allowed
    problems = {f"operator {domain}::{name}" for domain, name in foreign}
    problems |= {f"operator {n.op_type}" for n in model.graph.node if n.op_type in FORBIDDEN}
    problems |= {
        f"opset {o.version}"
        for o in model.opset_import
        if o.domain == "" and not 18 <= o.version <= 20
    }
    problems |= {f"functions {f.name}" for f in model.functions}
    typed = {t.name: t.data_type for t in model.graph.initializer}
    for v in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        typed[v.name] = v.type.tensor_type.elem_type
        if any(not d.HasField("dim_value") for d in v.type.tensor_type.shape.dim):
            problems.add(f"dynamic shape of {v.name}")
    problems |= {
        f"float64 tensor {name}" for name, kind in typed.items() if kind == TensorProto.DOUBLE
    }
    if problems:
        raise GraphError(f"{path.name} breaks the bundle's contract: {', '.join(sorted(problems))}")


def describe_graph(path: Path) -> contract.Graph:
    """Signature and cost of an exported graph, for the manifest."""
    model = onnx.load(path, load_external_data=False)
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for v in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        shapes[v.name] = tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
    return contract.Graph(
        file=path.name,
        inputs=tuple(_tensor(v) for v in model.graph.input),
        outputs=tuple(_tensor(v) for v in model.graph.output),
        stages=_stages(model.graph, shapes),
    )


def _stages(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Work]:
    """Matrix products by stage.

    Products that depend only on the images are vision. The rest of the prefix is language. A weight
    that is used twice is read once.
    """
    inputs = {v.name for v in graph.input}
    matrices = {t.name: _dtype(t.data_type) for t in graph.initializer if len(t.dims) > 1}
    # Tensor -> the inputs and matrices behind it
    made_of = {name: {name} for name in (*inputs, *matrices)}
    stages = ("vision", "language") if "images" in inputs else ("expert",)
    gemm, read = ({stage: Counter[str]() for stage in stages} for _ in range(2))
    attention, seen = Counter[str](), set[str]()
    for node in graph.node:
        operands = [made_of.get(name, set()) for name in node.input]
        made = set[str]().union(*operands)
        made_of |= dict.fromkeys(node.output, made)
        flops = _flops(node, shapes)
        if not flops:
            continue
        stage = stages[0] if made & inputs == {"images"} else stages[-1]
        weights = {name for operand in operands[:2] if not operand & inputs for name in operand}
        if not weights:
            attention[stage] += flops
            continue
        gemm[stage][matrices[next(iter(weights))]] += flops
        for name in weights - seen:
            read[stage][matrices[name]] += math.prod(shapes[name])
        seen |= weights
    return {stage: Work(dict(gemm[stage]), attention[stage], dict(read[stage])) for stage in stages}


def _tensor(value: onnx.ValueInfoProto) -> contract.Tensor:
    kind = value.type.tensor_type
    dtype = cast(contract.Dtype, _dtype(kind.elem_type))  # parse_manifest refuses others
    return contract.Tensor(value.name, dtype, tuple(d.dim_value for d in kind.shape.dim))


def _dtype(kind: int) -> str:
    return onnx.helper.tensor_dtype_to_np_dtype(kind).name


def _flops(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """2 x multiply-adds of one operator's matrix products; 0 where it has none."""
    if node.op_type == "MultiHeadAttention":
        batch, n, width = shapes[node.input[0]]
        return 4 * batch * n * n * width
    if node.op_type not in ("MatMul", "Gemm", "DynamicQuantizeMatMul"):
        return 0
    # No view transposes its activation.
    return 2 * shapes[node.input[0]][-1] * math.prod(shapes[node.output[0]])
