"""Checks before anything moves: may this bundle move this arm, do the units fit, and is the arm
inside the range seen in training?

No LeRobot file records the units of a dataset. The training statistics of state and action show
them (body joints first, the gripper last). Statistics can hold min and max, or mean and standard
deviation only.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from ..bundle.normalization import Normalization

SPREAD = 5.0  # standard deviations that count as seen in training
# Robot units beyond it: a joint that never moved in training has no spread.
SLACK = 5.0
RANGE_END, TOUCHES = 100.5, 99.5
RADIANS = 7.0

Vector = NDArray[np.float64]


def refusals(manifest: Manifest, joints: Sequence[str]) -> list[str]:
    """Why this bundle must not move a real arm with these joints; empty when it may."""
    found = []
    if manifest.source.demo:
        found.append("it is a demo: its weights are random")
    for name, vector in (("state", manifest.state), ("action", manifest.action)):
        if not vector.normalization.active:
            found.append(
                f"no statistics match its {name}, so its outputs are not joint angles "
                "(fine-tune it first)"
            )
    found += wrong_widths(manifest, joints)
    if manifest.joints is not None and tuple(manifest.joints) != tuple(joints):
        found.append(
            f"it was trained on the joints {', '.join(manifest.joints)}, "
            f"the arm has {', '.join(joints)}"
        )
    return found


def wrong_widths(manifest: Manifest, joints: Sequence[str]) -> list[str]:
    """Vectors of the policy that have not one value for each joint."""
    vectors = {"state": manifest.state.dim, "action": manifest.action.dim}
    return [
        f"its {name} has {dim} values, the arm has {len(joints)} joints"
        for name, dim in vectors.items()
        if dim != len(joints)
    ]


def units_evidence(
    normalizations: Sequence[Normalization], joints: Sequence[str]
) -> tuple[str, str]:
    """What units the statistics look like: degrees, range_m100_100, other, or "" where they fit
    either; and why."""
    extremes = [found for n in normalizations if (found := _pair(n, "min", "max"))]
    # The root mean square: some value was at least as large.
    reached = [np.hypot(*found) for n in normalizations if (found := _pair(n, "mean", "std"))]
    reached += [np.maximum(np.abs(low), np.abs(high)) for low, high in extremes]
    if not reached:
        return "", "there are no statistics"
    widths = sorted({len(vector) for vector in reached})
    if widths != [len(joints)]:
        sizes = " and ".join(map(str, widths))
        return "other", f"the statistics are of {sizes} values, the arm has {len(joints)} joints"
    largest = np.max(reached, axis=0)
    if largest.max() < RADIANS:
        return "other", f"nothing is larger than {largest.max():.2f}: they look like radians"
    low, high = np.zeros_like(largest), np.zeros_like(largest)
    if extremes:
        low, high = (
            np.min([e[0] for e in extremes], axis=0),
            np.max([e[1] for e in extremes], axis=0),
        )
    if low[-1] < -1 or high[-1] > 101:
        return (
            "other",
            f"the gripper ranges from {low[-1]:.1f} to {high[-1]:.1f}, expected 0 to 100",
        )
    body = largest[:-1]
    if (body > RANGE_END).any():
        joint = int(body.argmax())
        return "degrees", f"{joints[joint]} reaches {body[joint]:.1f}, which -100 to 100 cannot"
    touching = (low[:-1] <= -TOUCHES) & (high[:-1] >= TOUCHES)
    if touching.any():
        joint = int(touching.argmax())
        return "range_m100_100", f"{joints[joint]} ends at {low[joint]:.1f} and {high[joint]:.1f}"
    return "", "the numbers fit degrees and -100 to 100 alike"


def seen_range(n: Normalization) -> tuple[Vector, Vector] | None:
    """-> (low, high), [dim] each, of what training has seen; None without statistics."""
    ranges = []
    if extremes := _pair(n, "min", "max"):
        ranges.append(extremes)
    if moments := _pair(n, "mean", "std"):
        mean, std = moments
        ranges.append((mean - SPREAD * std, mean + SPREAD * std))
    if not ranges:
        return None
    return np.min([r[0] for r in ranges], axis=0), np.max([r[1] for r in ranges], axis=0)


def _pair(n: Normalization, first: str, second: str) -> tuple[Vector, Vector] | None:
    s = n.statistics
    return (np.array(s[first]), np.array(s[second])) if first in s and second in s else None


def preflight(
    joints: Sequence[str],
    position: Vector,
    state: Normalization,
    first_chunk: NDArray[np.float32],
    jump: Vector,
) -> tuple[str, list[str]]:
    """Compare where the arm is, [dim], with the training range and the first chunk, [rows, dim].
    jump: how far the first target may be away, [dim]; all in robot units. -> a table, one line a
    joint, and why not to start here."""
    known = seen_range(state)
    problems = []
    lines = [f"{'':<16}{'now':>9}{'trained on':>20}{'first target':>14}{'first chunk':>20}"]
    for i, name in enumerate(joints):
        low, high = (float(known[0][i]), float(known[1][i])) if known else (-np.inf, np.inf)
        first, reach = float(first_chunk[0, i]), first_chunk[:, i]
        trained = f"{low:.1f} to {high:.1f}" if known else "not known"
        planned = f"{reach.min():.1f} to {reach.max():.1f}"
        lines.append(f"{name:<16}{position[i]:>9.1f}{trained:>20}{first:>14.1f}{planned:>20}")
        if not low - SLACK <= position[i] <= high + SLACK:
            problems.append(
                f"{name} stands at {position[i]:.1f}, training has seen {low:.1f} to {high:.1f}"
            )
        if abs(first - position[i]) > jump[i]:
            problems.append(
                f"{name} would go from {position[i]:.1f} to {first:.1f}, the limit is {jump[i]:.0f}"
            )
    return "\n".join(lines), problems
