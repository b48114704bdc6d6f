"""How close a graph's float16 tensors come to the largest float16.

ONNX Runtime computes float16 in float32 on a CPU, so equal outputs there prove nothing about
overflow. Here the largest magnitude of every intermediate is taken before it is rounded to float16:
squares and sums that are too large for float16 show as numbers beyond its limit.
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

from ..core.errors import RangeError
from ..runtime import Policy
from ..runtime.engines.graphs import Feeds

FLOAT16_MAX = 65504.0
SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules that made it
PROBE = "float16_range."
HEADROOM = 4.0  # a tensor may use a quarter of the range: other observations can reach further


def float16_ranges(path: Path, runs: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """-> the largest magnitude of every float16 tensor of the graph at `path` over all `runs`.

    runs: feeds by input name. The result is infinite for a tensor with a NaN, and empty for a graph
    without float16.
    """
    model = onnx.load(path, load_external_data=False)
    half = {
        v.name
        for v in (*model.graph.value_info, *model.graph.output)
        if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    }
    # Two numbers each, taken right after its producer: all tensors at once need many gigabytes.
    numbers: dict[str, list[str]] = {}
    nodes, make = [], onnx.helper.make_node
    for node in model.graph.node:
        nodes.append(node)
        for name in half & set(node.output):
            wide, size, top, total = (
                f"{PROBE}{len(numbers)}.{part}" for part in ("wide", "size", "top", "total")
            )
            nodes += [
                make("Cast", [name], [wide], to=onnx.TensorProto.FLOAT),
                make("Abs", [wide], [size]),
            ]
            nodes.append(make("ReduceMax", [size], [top], keepdims=0))
            # ReduceMax can ignore a NaN; a sum cannot.
            nodes.append(make("ReduceSum", [size], [total], keepdims=0))
            numbers[name] = [top, total]
    if not numbers:
        return {}
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [])
        for pair in numbers.values()
        for n in pair
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
        session = onnxruntime.InferenceSession(
            probe.name, options, providers=["CPUExecutionProvider"]
        )
        for feeds in runs:
            found = iter(session.run(None, dict(feeds)))
            for name, top, total in zip(numbers, found, found, strict=True):
                largest[name] = max(
                    largest[name], float(top) if np.isfinite(total) else float("inf")
                )
    return largest


def policy_ranges(
    policy: Policy, runs: Sequence[tuple[Feeds, NDArray[np.float32]]]
) -> list[dict[str, float]]:
    """`float16_ranges` of the prefix and of the expert, in its first and its last step.

    runs: preprocessed observations, each with its noise [1, chunk_size, max_action_dim].
    """
    steps = policy.steps(policy.manifest.sampling.num_steps)
    expert: list[dict[str, NDArray[Any]]] = []
    for feeds, noise in runs:
        policy.graphs.prefill(feeds)
        cache, nothing = policy.graphs.cache(), np.zeros_like(noise)
        expert += [
            {
                "noisy_actions": x,
                "prev_chunk": nothing,
                "prev_weights": nothing[:, :, :1],
                **step,
                **cache,
            }
            for x, step in ((noise, steps[0]), (policy.denoise(noise), steps[-1]))
        ]
    m, path = policy.manifest, policy.bundle.path
    prefix = float16_ranges(path(m.prefix.file), [feeds for feeds, _ in runs])
    return [prefix, float16_ranges(path(m.expert.file), expert)]


def stages_to_pin(path: Path, largest: Mapping[str, float], stages: Collection[str]) -> set[str]:
    """Those of `stages` (module paths) in which a tensor of the graph at `path` has no headroom.

    Raises RangeError for tensors of no stage. The exporter writes the modules of each node into the
    node's metadata.
    """
    model = onnx.load(path, load_external_data=False)
    around: dict[str, str] = {}  # tensor -> the innermost stage it is made in
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "[]")
        inside = [module for module in ast.literal_eval(scopes) if module in stages]
        if inside:
            around |= dict.fromkeys(node.output, str(inside[-1]))
    require_headroom(path.name, {name: v for name, v in largest.items() if name not in around})
    return {around[name] for name in _beyond(largest)}


def _beyond(largest: Mapping[str, float]) -> dict[str, float]:
    return {name: v for name, v in largest.items() if not v <= FLOAT16_MAX / HEADROOM}


def require_headroom(graph: str, largest: Mapping[str, float]) -> None:
    """Raises RangeError that names every tensor beyond FLOAT16_MAX / HEADROOM, largest first."""
    over = sorted(((v, name) for name, v in _beyond(largest).items()), reverse=True)
    if over:
        shown = ", ".join(f"{name} {v:.0f}" for v, name in over[:8])
        raise RangeError(
            f"{graph} is not safe in float16: {len(over)} tensors exceed "
            f"{FLOAT16_MAX / HEADROOM:.0f} ({shown}). Export with --precision fp32"
        )
