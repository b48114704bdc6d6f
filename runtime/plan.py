"""Everything about a run that can be checked before anything but the bundle's manifest is opened; and what the
training statistics say before anything moves: do the units fit, is the arm where the policy knows it?

No LeRobot file records the units of a dataset, so the numbers are asked (state and action, body joints first, the
gripper last). Statistics may hold min and max, or mean and standard deviation only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..devices.calibration import JOINT_NAMES, Calibration, load_calibration
from ..devices.errors import DeviceError
from ..devices.limits import Limits
from ..devices.port import find_port
from ..devices.units import Units
from . import settings
from .backend import choose
from .bundle import Bundle, Manifest
from .errors import SettingsError, SmolVLAError
from .normalization import Normalization
from .settings import Settings

T = TypeVar("T")
SLOWEST_FPS = 3.0  # the guardian would take a slower loop for a frozen one
SLOWEST_ARM_FPS = 5.0  # below, a real arm would stand still most of the time and creep in between
NO_JUMP_LIMIT_DEG = 360.0
SPREAD = 5.0  # standard deviations that count as known territory
SLACK = 5.0  # robot units beyond it: a joint that never moved in training has no spread, yet never stands the same
RANGE_END, TOUCHES = 100.5, 99.5
RADIANS = 7.0

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """A run of which everything that can be checked was checked."""

    settings: Settings
    bundle: Bundle
    units: Units
    limits: Limits
    calibration: Calibration | None  # None: the virtual arm brings its own
    port: str
    task: str
    fps: float


def check(chosen: Settings) -> Plan:
    """Raises one SettingsError with everything that is missing or wrong."""
    problems: list[str] = []

    def tried(call: Callable[..., T], *arguments: object) -> T | None:
        """What `call` gives; None where it raises, which is one more problem."""
        try:
            return call(*arguments)
        except (SmolVLAError, DeviceError) as e:
            problems.append(str(e))
            return None

    tried(choose, chosen.device, chosen.backend)
    print(f"checking {chosen.bundle}", flush=True)  # the first time, every file is hashed
    bundle = tried(Bundle.open, chosen.bundle)
    units = tried(_units, chosen.units) if chosen.units else None
    limits = tried(_limits, chosen.limits)
    calibration = None
    port = chosen.port or ""
    if chosen.simulated:
        units = units or Units.DEGREES
        ignored = [n for n in ("calibration", "cameras") if getattr(chosen, n)]
        if ignored:
            print(f"note: the virtual arm brings its own {' and '.join(ignored)}, yours are not used")
        if problems:
            raise SettingsError("; ".join(problems))
    else:
        if bundle is not None and (reasons := settings.refusals(bundle.manifest, JOINT_NAMES)):
            raise SettingsError(
                f"the bundle {chosen.bundle} must not move a real arm: {'; '.join(reasons)}. "
                "Run it on the virtual arm: --port sim"
            )
        if bundle is not None and units is not None:
            problems += _units_problems(bundle.manifest, units, chosen.i_know_the_unit)
        if chosen.calibration:
            calibration = tried(load_calibration, chosen.calibration)
        if chosen.port == settings.AUTO and (found := tried(find_port)) is not None:
            port = found[0]
            print(f"port {port}: {found[1]}")
        settings.require_complete(chosen, bundle.manifest if bundle else None, problems)
    assert bundle is not None  # one that does not open is a problem above, and so are the next two
    assert units is not None
    assert limits is not None
    foreign = bundle.manifest.source.demo or bundle.manifest.action.dim != len(JOINT_NAMES)
    if chosen.simulated and foreign and "jump_deg" not in chosen.limits:
        print("note: this policy asks for wild jumps; on the virtual arm they are slowed, not rejected")
        limits = _limits(chosen.limits | {"jump_deg": NO_JUMP_LIMIT_DEG})
    fps, reason = settings.choose_fps(chosen, bundle.manifest)
    slowest = SLOWEST_FPS if chosen.simulated else SLOWEST_ARM_FPS
    if fps < slowest:
        arm = "the virtual arm" if chosen.simulated else "a real arm"
        raise SettingsError(f"{fps:g} fps is too slow for {arm}, expected at least {slowest:g}")
    task = chosen.task or settings.EXAMPLE_TASK
    print(f"task: {task!r}, in {units.value}\n{reason}")
    return Plan(chosen, bundle, units, limits, calibration, port, task, fps)


def _units(name: str) -> Units:
    try:
        return Units(name)
    except ValueError:
        raise SettingsError(f"units is {name!r}, expected degrees or range_m100_100") from None


def _units_problems(manifest: Manifest, units: Units, sure: bool) -> list[str]:
    if manifest.units is not None:
        wrong = manifest.units != units.value
        return [f"units is {units.value}, but the bundle was trained in {manifest.units}"] * wrong
    seen, why = units_evidence((manifest.state.normalization, manifest.action.normalization), JOINT_NAMES)
    if not seen:
        if sure:
            return []
        return [
            f"units is {units.value}, and the training statistics cannot confirm it ({why}). "
            "Look the units up where the data was recorded, then say --i-know-the-unit"
        ]
    if seen != units.value:
        return [f"units is {units.value}, but the training statistics say otherwise: {why}"]
    print(f"the training statistics confirm the units: {why}")
    return []


def _limits(given: dict[str, float]) -> Limits:
    """Limits of robot.toml. TOML gives every number as a float; ticks are counted in whole ones."""
    known = set(Limits.__dataclass_fields__)
    if unknown := set(given) - known:
        raise SettingsError(f"unknown limits {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))})")
    whole: dict[str, Any] = {k: int(v) for k, v in given.items() if k.endswith("_ticks") and v.is_integer()}
    return Limits(**given | whole)


def units_evidence(normalizations: Sequence[Normalization], joints: Sequence[str]) -> tuple[str, str]:
    """What units the statistics look like: degrees, range_m100_100, other, or "" where they fit either; and why."""
    extremes = [found for n in normalizations if (found := _pair(n, "min", "max"))]
    # The root mean square: some value was at least as large.
    reached = [np.hypot(*found) for n in normalizations if (found := _pair(n, "mean", "std"))]
    reached += [np.maximum(np.abs(low), np.abs(high)) for low, high in extremes]
    if not reached:
        return "", "there are no statistics"
    largest = np.max(reached, axis=0)
    if largest.max() < RADIANS:
        return "other", f"nothing is larger than {largest.max():.2f}: they look like radians"
    low, high = np.zeros_like(largest), np.zeros_like(largest)
    if extremes:
        low, high = np.min([e[0] for e in extremes], axis=0), np.max([e[1] for e in extremes], axis=0)
    if low[-1] < -1 or high[-1] > 101:
        return "other", f"the gripper ranges from {low[-1]:.1f} to {high[-1]:.1f}, expected 0 to 100"
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
    """Compare where the arm is, [dim], with the training range and the first chunk, [rows, dim]. jump: how far the
    first target may be away, [dim]; all in robot units. -> a table, one line a joint, and why not to start here."""
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
            problems.append(f"{name} stands at {position[i]:.1f}, training has seen {low:.1f} to {high:.1f}")
        if abs(first - position[i]) > jump[i]:
            problems.append(f"{name} would go from {position[i]:.1f} to {first:.1f}, the limit is {jump[i]:.0f}")
    return "\n".join(lines), problems
