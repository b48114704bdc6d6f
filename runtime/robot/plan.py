"""Everything about a run that can be checked before anything but the bundle's manifest is opened."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ...core.errors import DeviceError, SettingsError, SmolVLAError
from ...devices.arm.calibration import JOINT_NAMES, Calibration, load_calibration
from ...devices.arm.limits import Limits
from ...devices.arm.units import Units
from ...devices.bus.port import find_port
from ..bundle.bundle import Bundle
from ..bundle.manifest import Manifest
from ..engines.backend import choose
from ..policy.preprocessing import EXAMPLE_TASK
from . import settings
from .preflight import units_evidence
from .settings import Settings

T = TypeVar("T")
SLOWEST_FPS = 3.0  # the guardian would take a slower loop for a frozen one
SLOWEST_ARM_FPS = 5.0  # below, a real arm would stand still most of the time and creep in between
NO_JUMP_LIMIT_DEG = 360.0


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
            print(
                f"note: the virtual arm brings its own {' and '.join(ignored)}, yours are not used"
            )
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
        print(
            "note: this policy asks for wild jumps; on the virtual arm they are slowed, not rejected"
        )
        limits = _limits(chosen.limits | {"jump_deg": NO_JUMP_LIMIT_DEG})
    fps, reason = settings.choose_fps(chosen, bundle.manifest)
    slowest = SLOWEST_FPS if chosen.simulated else SLOWEST_ARM_FPS
    if fps < slowest:
        arm = "the virtual arm" if chosen.simulated else "a real arm"
        raise SettingsError(f"{fps:g} fps is too slow for {arm}, expected at least {slowest:g}")
    task = chosen.task or EXAMPLE_TASK
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
    seen, why = units_evidence(
        (manifest.state.normalization, manifest.action.normalization), JOINT_NAMES
    )
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
        raise SettingsError(
            f"unknown limits {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))})"
        )
    whole: dict[str, Any] = {
        k: int(v) for k, v in given.items() if k.endswith("_ticks") and v.is_integer()
    }
    return Limits(**given | whole)
