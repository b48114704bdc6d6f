"""Checks that a bundle computes on this machine what the checkpoint computed at export.

`selfcheck.npz` holds one observation, three instructions (short, padded, full-length), and the
checkpoint's actions for them, normalised and in robot units. It also holds a sample of every KV
tensor, because actions alone can hide a wrong cache. An INT8 bundle holds its own actions instead:
the export's gate has compared them with the checkpoint's.
"""

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.errors import BundleError, CheckFailed
from ..bundle.bundle import Bundle
from ..bundle.manifest import Precision
from ..engines.graphs import Array, Graphs

Picture = NDArray[np.uint8]

FILE = "selfcheck.npz"
# The largest accepted error, by precision. Normalised actions are of order 1.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 5e-2}


def error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |got - expected| / max(1, max |expected|); infinite where got is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    reference = expected.astype(np.float64)
    return float(
        np.abs(got.astype(np.float64) - reference).max() / max(1.0, np.abs(reference).max())
    )


class Subject(Protocol):
    """What the self-check runs: a Policy, or anything that answers like one."""

    bundle: Bundle
    graphs: Graphs

    def prefill(self, images: Mapping[str, Picture], state: Array, task: str) -> object:
        """Fill the KV cache from an observation."""

    def denoise(self, noise: Array) -> Array:
        """Solve from `noise` against the current cache; -> normalised actions."""

    def robot_units(self, actions: Array) -> Array:
        """Normalised actions -> robot units."""


def run_selfcheck(subject: Subject) -> dict[str, float]:
    """-> stage -> largest error over the instructions, in the order of computation.

    The stages are every tensor of the cache, the normalised `actions`, and the `chunk` in robot
    units. Raises BundleError for a damaged file.
    """
    m = subject.bundle.manifest
    kv = [t.name for t in m.prefix.outputs if t.name != "prefix_mask"]
    stages = (*kv, "actions", "chunk")
    data = _read(subject.bundle, stages)
    images = {c.name: data[f"image.{c.name}"] for c in m.cameras}
    worst = dict.fromkeys(stages, 0.0)
    for i, task in enumerate(data["task"]):
        subject.prefill(images, data["state"], str(task))
        cache = subject.graphs.cache()
        actions = subject.denoise(data["noise"])
        got = {name: cache[name].ravel()[data[f"where.{i}"]] for name in kv}
        got |= {"actions": actions, "chunk": subject.robot_units(actions)}
        for stage in stages:
            worst[stage] = max(worst[stage], error(got[stage], data[f"{stage}.{i}"]))
    return worst


def _read(bundle: Bundle, stages: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The arrays of the file. Raises BundleError where it is damaged or one is missing."""
    path = bundle.path(FILE)
    try:
        with np.load(path, allow_pickle=False) as file:
            data = dict(file)
        wanted = ["state", "noise", *(f"image.{c.name}" for c in bundle.manifest.cameras)]
        wanted += [f"{name}.{i}" for i in range(len(data["task"])) for name in ("where", *stages)]
        missing = [name for name in wanted if name not in data]
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as e:
        raise BundleError(f"{path} is damaged ({e!r}): export the checkpoint again") from e
    if missing:
        names = ", ".join(missing[:5])
        raise BundleError(f"{path} does not have {names}: export the checkpoint again")
    return data


def summary(errors: dict[str, float]) -> dict[str, float]:
    """run_selfcheck's errors, with the largest of the cache's tensors as `cache`."""
    ends = {stage: errors[stage] for stage in ("actions", "chunk")}
    return {"cache": max(e for stage, e in errors.items() if stage not in ends)} | ends


def require(precision: Precision, errors: dict[str, float]) -> None:
    """Raises CheckFailed that names the first stage with too large an error."""
    limit = TOLERANCE[precision]
    over = {stage: value for stage, value in errors.items() if not value <= limit}
    if over:
        stage, value = next(iter(over.items()))
        wider = " Try a bundle of --precision fp32, or" if precision != "fp32" else " Try"
        raise CheckFailed(
            f"self-check failed: {stage} is the first to differ from its checkpoint, by "
            f"{value:.2e} (at most {limit:.0e}), {len(over)} of {len(errors)} stages do; "
            f"actions by {errors['actions']:.2e}.{wider} another --backend"
        )
