"""Does this bundle compute on this machine what the checkpoint computed where it was exported?

`selfcheck.npz` holds one observation, three instructions (short, padded, full-length), the actions that the
checkpoint answers, normalised and in robot units, and a sample of every KV tensor: actions hide a stale cache. An
INT8 bundle holds its own answers instead: how far they are from the checkpoint's was judged at export.
"""

import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Manifest
from .errors import BundleError
from .policy import Policy

FILE = "selfcheck.npz"
# Largest error that is still this policy, by precision; actions are normalised, of order 1.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 5e-2}


def error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |got - expected| / max(1, max |expected|); infinite where got is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    reference = expected.astype(np.float64)
    return float(np.abs(got.astype(np.float64) - reference).max() / max(1.0, np.abs(reference).max()))


def run_selfcheck(policy: Policy) -> dict[str, float]:
    """-> worst error over the instructions of 'cache', 'actions', 'chunk'. Raises BundleError for a damaged file."""
    path, m = policy.bundle.path(FILE), policy.manifest
    try:
        with np.load(path, allow_pickle=False) as file:
            data = dict(file)
        images = {c.name: data[f"image.{c.name}"] for c in m.cameras}
        worst = {"cache": 0.0, "actions": 0.0, "chunk": 0.0}
        for i, task in enumerate(data["task"]):
            policy.prefill(images, data["state"], str(task))
            cache = policy.graphs.cache()
            for name in _kv_names(m):
                got = cache[name].ravel()[data[f"where.{i}"]]
                worst["cache"] = max(worst["cache"], error(got, data[f"{name}.{i}"]))
            actions = policy.denoise(data["noise"])
            worst["actions"] = max(worst["actions"], error(actions, data[f"actions.{i}"]))
            worst["chunk"] = max(worst["chunk"], error(policy.robot_units(actions), data[f"chunk.{i}"]))
    except (OSError, KeyError, IndexError, zipfile.BadZipFile) as e:
        raise BundleError(f"{path} is damaged ({e!r}): export the checkpoint again") from e
    return worst


def _kv_names(manifest: Manifest) -> list[str]:
    return [t.name for t in manifest.prefix.outputs if t.name != "prefix_mask"]
