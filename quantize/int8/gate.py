"""The gate: how far a policy of lower precision may be from float32, in the policy's own terms.

For another noise the policy gives another chunk. The standard deviation of these chunks is the
spread. An error is judged against that spread, joint by joint. The cache is judged tensor by
tensor, because the final actions alone hide much: with a stale cache they stay nearly the same.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ...core.errors import GateError, QuantizeError
from ...core.progress import SILENT, Progress
from ...core.strict import decode

# One step of the encoder, in true degrees. LeRobot converts with 360 / 4095 (devices/arm/units.py).
TICK_DEG = 360 / 4096
Cache = dict[str, NDArray[Any]]  # key.i and value.i, valid rows only
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """What gate.toml may say; the defaults are the gate without one."""

    # 99th percentile of each joint's error, over its standard deviation across seeds
    action_p99: float = 0.10
    seeds: int = 16
    gripper_flips: int = 0
    cache: float = 0.05  # relative L2 of each key and value tensor

    def __post_init__(self) -> None:
        if not 2 <= self.seeds <= 1000:
            raise QuantizeError(
                f"seeds is {self.seeds}, expected 2 to 1000: a spread needs two chunks"
            )
        for name in ("action_p99", "cache", "gripper_flips"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise QuantizeError(f"{name} is {getattr(self, name)}, expected a number from 0 on")


def read_gate(path: Path) -> Gate:
    """Raises QuantizeError for a file that cannot be read or says something else."""
    problems: list[str] = []
    try:
        gate = decode(Gate, tomllib.loads(path.read_text()), problems)
    except (OSError, ValueError) as e:
        raise QuantizeError(f"the gate {path} cannot be read: {e}") from e
    except QuantizeError as e:
        raise QuantizeError(f"the gate {path} is not valid: {e}") from e
    if gate is None:
        raise QuantizeError(f"the gate {path} is not valid: {'; '.join(problems)}")
    return gate


@dataclass(frozen=True)
class Outputs:
    """What one policy computes: a cache for each observation, and all its chunks.

    chunks: [observations, seeds, chunk, dof] in robot units.
    """

    caches: list[Cache]
    chunks: Array


# The cache of an observation, and what makes a chunk [chunk, dof] of a noise with it.
Prefilled = tuple[Cache, Callable[[Array], Array]]


def outputs_of(
    prefilled: Iterable[Prefilled],
    noises: Sequence[Sequence[Array]],
    progress: Progress = SILENT,
) -> Outputs:
    """prefilled: of each observation, one after the other; noises: of each, one for each seed."""
    caches, chunks = [], []
    for (cache, denoise), seeds in zip(prefilled, noises, strict=True):
        caches.append(cache)
        chunks.append([denoise(noise) for noise in seeds])
        progress.count(len(chunks), len(noises))
    return Outputs(caches, np.array(chunks, np.float32))


@dataclass(frozen=True)
class Errors:
    """How far a policy is from the reference. Per joint, in robot units."""

    p99: tuple[float, ...]
    spread: tuple[float, ...]  # the reference's own standard deviation across seeds
    flips: int | None  # None where no joint is known to be the gripper
    cache: dict[str, float]  # tensor -> relative L2 of the worst observation

    @property
    def action(self) -> float:
        """The worst joint's p99 over its spread."""
        return max(
            (p / max(s, 1e-9) for p, s in zip(self.p99, self.spread, strict=True)), default=0.0
        )

    @property
    def worst_cache(self) -> float:
        return max(self.cache.values())

    def share(self, gate: Gate) -> float:
        """How much of the gate is used up: over 1 it is not met."""
        used = max(
            self.action / max(gate.action_p99, 1e-9), self.worst_cache / max(gate.cache, 1e-9)
        )
        return max(used, float("inf") if (self.flips or 0) > gate.gripper_flips else 0.0)

    def table(self, joints: Sequence[str]) -> str:
        """Each joint's error beside the spread, also in servo ticks (0.088 degrees)."""
        rows = [f"{'joint':<16}{'p99 error':>12}{'ticks':>8}{'spread':>10}{'share':>8}"]
        for name, p99, spread in zip(joints, self.p99, self.spread, strict=True):
            share = p99 / max(spread, 1e-9)
            rows.append(f"{name:<16}{p99:>12.4f}{p99 / TICK_DEG:>8.1f}{spread:>10.3f}{share:>8.3f}")
        worst = max(self.cache, key=lambda name: self.cache[name])
        flips = (
            "no joint is known to be the gripper"
            if self.flips is None
            else f"{self.flips} gripper flips"
        )
        return "\n".join(
            [*rows, f"cache relative L2 at most {self.worst_cache:.4f} ({worst}); {flips}"]
        )


def compare(reference: Outputs, got: Outputs, grippers: Sequence[int], middle: Array) -> Errors:
    """How far `got` is from `reference`. It may hold fewer observations and seeds.

    grippers: their indices in the action; middle: [dof], neither open nor closed, in robot units.
    A flip is a gripper on the other side of the middle, and further from the reference than a
    tenth of the spread: next to the middle the smallest error changes sides.
    """
    spread = np.sqrt(reference.chunks.astype(np.float64).var(axis=1).mean(axis=(0, 1)))
    n, seeds = got.chunks.shape[:2]
    expected = reference.chunks[:n, :seeds]
    difference = np.abs(got.chunks - expected).astype(np.float64)
    p99 = np.nan_to_num(np.percentile(difference, 99, axis=(0, 1, 2)), nan=np.inf)
    across = np.sign(expected - middle) != np.sign(got.chunks - middle)
    flipped = across & (difference > 0.1 * spread)
    flips = int(flipped[..., list(grippers)].sum()) if grippers else None
    cache = {
        name: max(
            relative_l2(a[name], b[name])
            for a, b in zip(reference.caches[:n], got.caches, strict=True)
        )
        for name in reference.caches[0]
    }
    return Errors(tuple(map(float, p99)), tuple(map(float, spread)), flips, cache)


def relative_l2(reference: NDArray[Any], got: NDArray[Any]) -> float:
    """|got - reference| / |reference|; infinite where got is not finite."""
    if not (np.isfinite(got).all() and np.isfinite(reference).all()):
        return float("inf")
    exact = reference.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - exact) / max(np.linalg.norm(exact), 1e-12))


def missed(errors: Errors, gate: Gate, joints: Sequence[str]) -> list[str]:
    """What is over the gate, in words."""
    over = [
        f"{name} {p99:.3f} (at most {gate.action_p99 * spread:.3f})"
        for name, p99, spread in zip(joints, errors.p99, errors.spread, strict=True)
        if not p99 <= gate.action_p99 * spread
    ]
    if errors.worst_cache > gate.cache:
        worst = max(errors.cache, key=lambda name: errors.cache[name])
        more = sum(value > gate.cache for value in errors.cache.values()) - 1
        beside = f" and {more} more tensors of the cache" if more else ""
        over.append(f"{worst} {errors.worst_cache:.3f} (at most {gate.cache}){beside}")
    if (errors.flips or 0) > gate.gripper_flips:
        over.append(f"{errors.flips} gripper flips (at most {gate.gripper_flips})")
    return over


def require(errors: Errors, gate: Gate, joints: Sequence[str]) -> None:
    """Raises GateError that says what is over the gate."""
    over = missed(errors, gate, joints)
    if over:
        more = f" and {len(over) - 8} more" if len(over) > 8 else ""
        raise GateError(f"the gate is not met: {', '.join(over[:8])}{more}")
