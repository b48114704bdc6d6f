"""Do the exported graphs, run by the shipped runtime, compute what the checkpoint computes?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ParityError
from ..runtime import Policy
from ..runtime.policy.selfcheck import TOLERANCE, error
from .reference import ParityObservation, Stages

_QUANTIZED = ("cache", "velocity", "actions", "chunk")
_SAMPLES = 64  # cache entries per tensor and instruction in the self-check


def measure(
    policy: Policy, observations: Sequence[ParityObservation], expected: Sequence[Stages]
) -> tuple[dict[str, float], list[Stages]]:
    """-> the worst error of each stage over all observations, and what the policy computed.

    The second has the form of `expected`: an INT8 bundle must compute it on every machine. Errors
    are max abs over max(1, max abs reference). 'actions' is the max abs on normalised actions. The
    cache is compared at valid positions: nothing reads the others.
    """
    worst: dict[str, float] = {}
    answers = []

    def record(stage: str, value: float) -> None:
        worst[stage] = max(worst.get(stage, 0.0), value)

    for observation, want in zip(observations, expected, strict=True):
        feeds = policy.prefill(observation.images, observation.state, observation.task)
        record("images", error(feeds["images"], want.images))
        tokens = feeds["tokens"][feeds["token_mask"]]
        record("tokens", 0.0 if np.array_equal(tokens, want.tokens) else float("inf"))
        record("state", error(feeds["state"], want.state))
        cache = policy.graphs.cache()
        record(
            "cache", 0.0 if np.array_equal(cache["prefix_mask"][0], want.valid) else float("inf")
        )
        kept = {name: cache[name].astype(np.float32) for name in want.cache}
        for name, reference in want.cache.items():
            record("cache", error(kept[name][:, :, want.valid], reference[:, :, want.valid]))
        velocities: list[NDArray[np.float32]] = []
        actions = policy.denoise(observation.noise, velocities=velocities)
        chunk = policy.robot_units(actions)
        record("velocity", error(np.stack(velocities), want.velocity))
        difference = np.abs(actions - want.actions).max()
        record("actions", float(difference) if np.isfinite(difference) else float("inf"))
        record("chunk", error(chunk, want.chunk))
        answers.append(replace(want, cache=kept, actions=actions, chunk=chunk))
    return worst, answers


def require(measured: dict[str, float], precision: str) -> None:
    """Raises ParityError that names every stage over the precision's tolerance, in their order.

    The gate judges what comes after the first layer of INT8 instead.
    """
    limit = TOLERANCE[precision]
    judged = (
        measured
        if precision != "int8"
        else {k: v for k, v in measured.items() if k not in _QUANTIZED}
    )
    over = [f"{stage} {value:.2e}" for stage, value in judged.items() if not value <= limit]
    if over:
        raise ParityError(
            f"the graphs do not compute what the checkpoint computes: {', '.join(over)} "
            f"(tolerance {limit:.0e} for {precision}). The first stage in this list causes the "
            "others. No bundle was written"
        )


def write_selfcheck(
    path: Path, observations: Sequence[ParityObservation], expected: Sequence[Stages]
) -> None:
    """Store what runtime/policy/selfcheck.py replays."""
    first = observations[0]
    data: dict[str, NDArray[Any]] = {f"image.{name}": image for name, image in first.images.items()}
    data |= {
        "state": first.state,
        "noise": first.noise,
        "task": np.array([o.task for o in observations]),
    }
    rng = np.random.default_rng(0)
    for i, stages in enumerate(expected):
        shape = next(iter(stages.cache.values())).shape  # [1, K, P, D], the same for every layer
        where = np.flatnonzero(np.broadcast_to(stages.valid[None, None, :, None], shape))
        data[f"where.{i}"] = rng.choice(where, min(_SAMPLES, len(where)), replace=False).astype(
            np.int32
        )
        for name, tensor in stages.cache.items():
            data[f"{name}.{i}"] = tensor.ravel()[data[f"where.{i}"]]
        data[f"actions.{i}"], data[f"chunk.{i}"] = stages.actions, stages.chunk
    np.savez_compressed(path, **data)  # type: ignore[arg-type]  # numpy types **kwds as bool
