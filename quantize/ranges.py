"""How close a graph's float16 tensors come to the largest float16.

ONNX Runtime computes float16 in float32 on a CPU, so equal outputs there prove nothing about overflow. Made a
graph output, every intermediate is rounded to float16 as a GPU would store it: squares and sums that overflow come
out as infinity.
"""

import tempfile
from collections.abc import Iterable, Mapping
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


def policy_ranges(policy: Policy, feeds: Feeds, noise: NDArray[np.float32]) -> dict[str, dict[str, float]]:
    """`float16_ranges` of both graphs of a bundle: the prefix on `feeds`, the expert at its first and last step.

    The policy's cache must be the one that `feeds` filled. noise: [1, chunk_size, max_action_dim].
    """
    actions, nothing = policy.denoise(noise), np.zeros_like(noise)
    steps = policy.steps(policy.manifest.sampling.num_steps)
    cache = policy.graphs.cache()
    expert = [
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
        for x, step in ((noise, steps[0]), (actions, steps[-1]))
    ]
    m, path = policy.manifest, policy.bundle.path
    return {
        m.prefix.file: float16_ranges(path(m.prefix.file), [feeds]),
        m.expert.file: float16_ranges(path(m.expert.file), expert),
    }


def require_headroom(graph: str, largest: Mapping[str, float]) -> None:
    """Raises RangeError that names every tensor beyond FLOAT16_MAX / HEADROOM, largest first."""
    limit = FLOAT16_MAX / HEADROOM
    over = sorted(((v, n) for n, v in largest.items() if not v <= limit), reverse=True)
    if over:
        shown = ", ".join(f"{n} {v:.0f}" for v, n in over[:8])
        raise RangeError(
            f"{graph} is not safe in float16: {len(over)} tensors exceed {limit:.0f} ({shown}). "
            "Export with --precision fp32"
        )
