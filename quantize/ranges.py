"""How close a graph's float16 tensors come to the largest float16.

ONNX Runtime computes float16 in float32 on a CPU, so equal outputs there prove nothing about overflow. Here the
largest magnitude of every intermediate is taken as it is computed, before it would be rounded: squares and sums that
no float16 holds show as numbers beyond its limit.
"""

import ast
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from ..runtime import Policy
from ..runtime.preprocessing import Feeds
from .errors import RangeError

FLOAT16_MAX = 65504.0
PROBE = "float16_range."
HEADROOM = 4.0  # a tensor may use a quarter of the range: other observations reach further than the ones tried


def float16_ranges(path: Path, runs: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """-> largest magnitude of every float16 tensor of the graph at `path` over all `runs` (feeds by input name).

    Infinite for a tensor that holds a NaN. Empty for a graph without float16.
    """
    model = onnx.load(path, load_external_data=False)
    produced = {name for node in model.graph.node for name in node.output}
    half = [
        v.name
        for v in (*model.graph.value_info, *model.graph.output)
        if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 and v.name in produced
    ]
    if not half:
        return {}
    # Two numbers each, taken right behind its producer: all tensors at once would need many gigabytes.
    numbers: dict[str, list[str]] = {}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for name in set(node.output) & set(half):
            wide, size, top, total = (f"{PROBE}{len(numbers)}.{part}" for part in ("wide", "size", "top", "total"))
            nodes.append(onnx.helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.FLOAT))
            nodes.append(onnx.helper.make_node("Abs", [wide], [size]))
            nodes.append(onnx.helper.make_node("ReduceMax", [size], [top], keepdims=0))
            nodes.append(onnx.helper.make_node("ReduceSum", [size], [total], keepdims=0))  # a maximum passes NaN over
            numbers[name] = [top, total]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, []) for pair in numbers.values() for n in pair
    )
    largest = dict.fromkeys(numbers, 0.0)
    # Beside the original, so that both read the same weights.
    with tempfile.NamedTemporaryFile(suffix=".onnx", dir=path.parent) as probe:
        probe.write(model.SerializeToString())
        probe.flush()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # as listed
        session = onnxruntime.InferenceSession(probe.name, options, providers=["CPUExecutionProvider"])
        for feeds in runs:
            found = iter(session.run(None, dict(feeds)))
            for name, top, total in zip(numbers, found, found, strict=True):
                largest[name] = max(largest[name], float(top) if np.isfinite(total) else float("inf"))
    return largest


def policy_ranges(policy: Policy, runs: Sequence[tuple[Feeds, NDArray[np.float32]]]) -> list[dict[str, float]]:
    """`float16_ranges` of the prefix and the expert over `runs`: preprocessed observations, each with its noise
    [1, chunk_size, max_action_dim]. The expert is looked at in its first and last step."""
    steps = policy.steps(policy.manifest.sampling.num_steps)
    expert: list[dict[str, NDArray[Any]]] = []
    for feeds, noise in runs:
        policy.graphs.prefill(feeds)
        cache, nothing = policy.graphs.cache(), np.zeros_like(noise)
        expert += [
            {
                "noisy_actions": x,
                "time_embedding": step.embedding,
                "time": step.time,
                "dt": step.dt,
                "prev_chunk": nothing,
                "prev_weights": nothing[:, :, :1],
                "guidance": step.guidance,
                **cache,
            }
            for x, step in ((noise, steps[0]), (policy.denoise(noise), steps[-1]))
        ]
    m, path = policy.manifest, policy.bundle.path
    prefix = float16_ranges(path(m.prefix.file), [feeds for feeds, _ in runs])
    return [prefix, float16_ranges(path(m.expert.file), expert)]


def stages_to_pin(path: Path, largest: Mapping[str, float], stages: Collection[str]) -> set[str]:
    """Those of `stages` (module paths) in whose nodes of the graph at `path` a tensor goes beyond the headroom.

    Raises RangeError for a tensor of no stage. The exporter writes the modules around each node as its metadata.
    """
    model = onnx.load(path, load_external_data=False)
    made_in = {name: _modules(node) for node in model.graph.node for name in node.output}
    found = set()
    for tensor in _beyond(largest):
        inside = [module for module in made_in[tensor] if module in stages]
        if not inside:
            require_headroom(path.name, {tensor: largest[tensor]})
        found.add(inside[-1])
    return found


def _modules(node: onnx.NodeProto) -> list[str]:
    """Paths of the torch modules around a node, outermost first."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    return [str(name) for name in ast.literal_eval(scopes)]


def _beyond(largest: Mapping[str, float]) -> dict[str, float]:
    return {name: v for name, v in largest.items() if not v <= FLOAT16_MAX / HEADROOM}


def require_headroom(graph: str, largest: Mapping[str, float]) -> None:
    """Raises RangeError that names every tensor beyond FLOAT16_MAX / HEADROOM, largest first."""
    limit = FLOAT16_MAX / HEADROOM
    over = sorted(((v, n) for n, v in _beyond(largest).items()), reverse=True)
    if over:
        shown = ", ".join(f"{n} {v:.0f}" for v, n in over[:8])
        raise RangeError(
            f"{graph} is not safe in float16: {len(over)} tensors exceed {limit:.0f} ({shown}). "
            "Export with --precision fp32"
        )
