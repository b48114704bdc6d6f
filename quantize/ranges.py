"""How close a graph's float16 tensors come to the largest float16.

ONNX Runtime computes float16 in float32 on a CPU, so equal outputs there prove nothing about overflow. Made a
graph output, every intermediate is rounded to float16 as a GPU would store it: squares and sums that overflow come
out as infinity.
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
HEADROOM = 4.0  # a tensor may use a quarter of the range: other observations reach further than the ones tried


def float16_ranges(path: Path, runs: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """-> largest magnitude of every float16 tensor of the graph at `path` over all `runs` (feeds by input name).

    Infinite for a tensor that overflowed or holds a NaN. Empty for a graph without float16.
    """
    model = onnx.load(path, load_external_data=False)
    known = {o.name for o in model.graph.output}
    inner = [
        v
        for v in model.graph.value_info
        if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 and v.name not in known
    ]
    produced = {name for node in model.graph.node for name in node.output}
    model.graph.output.extend(v for v in inner if v.name in produced)
    largest: dict[str, float] = {}
    # Beside the original, so that both read the same weights.
    with tempfile.NamedTemporaryFile(suffix=".onnx", dir=path.parent) as probe:
        probe.write(model.SerializeToString())
        probe.flush()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(probe.name, options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs() if o.type == "tensor(float16)"]
        for feeds in runs:
            for name, value in zip(names, session.run(names, dict(feeds)) if names else [], strict=True):
                top = float(np.abs(value).max()) if np.isfinite(value).all() else float("inf")
                largest[name] = max(largest.get(name, 0.0), top)
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
