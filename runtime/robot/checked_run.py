"""A run, with everything checked that can be checked before the hardware is opened.

Of the bundle only the manifest is read here, and its files are hashed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...core.errors import SettingsError, SmolVLAError, listed
from ...devices.arm.calibration import JOINT_NAMES, Calibration, load_calibration
from ...devices.arm.limits import Limits
from ...devices.arm.units import Units
from ...devices.bus.port import find_port
from ..bundle.bundle import Bundle
from ..bundle.manifest import Manifest
from ..engines.backend import choose
from ..policy.preprocessing import EXAMPLE_TASK
from .preflight import refusals, units_evidence, wrong_widths
from .settings import AUTO, Settings, descriptions
from .settings_text import as_command, as_toml

T = TypeVar("T")
DEFAULT_FPS = 30.0
SLOWEST_FPS = 3.0  # the guardian would take a slower loop for one that hangs
SLOWEST_ARM_FPS = 5.0  # at a lower rate a real arm moves in jerks
NO_JUMP_LIMIT_DEG = 360.0


@dataclass(frozen=True)
class CheckedRun:
    """What `check` found: settings, bundle and arm fit together."""

    settings: Settings
    bundle: Bundle
    units: Units
    limits: Limits
    calibration: Calibration | None  # None: the virtual arm has its own
    port: str
    task: str
    fps: float


def check(settings: Settings, words: Sequence[str] = ()) -> CheckedRun:
    """words: the options given that are no settings, for the complete command in the error.

    Raises one SettingsError with everything that is missing or wrong.
    """
    problems: list[str] = []

    def attempt(call: Callable[..., T], *arguments: object) -> T | None:
        """None where the call raises, which is one more problem."""
        try:
            return call(*arguments)
        except SmolVLAError as e:
            problems.append(str(e))
            return None

    attempt(choose, settings.device, settings.backend)
    print(f"checking {settings.bundle}", flush=True)  # the first time, every file is hashed
    bundle = attempt(Bundle.open, settings.bundle)
    units = attempt(_units, settings.units) if settings.units else None
    limits = attempt(_limits, settings.limits)
    calibration, port = None, settings.port or ""
    if settings.simulated:
        units = units or Units.DEGREES
        _check_virtual(settings, bundle, problems)
    else:
        if bundle is not None and (reasons := refusals(bundle.manifest, JOINT_NAMES)):
            raise SettingsError(
                f"the bundle {settings.bundle} must not move a real arm: {'; '.join(reasons)}. "
                "Run it on the virtual arm: --port sim"
            )
        if bundle is not None and units is not None:
            problems += _units_problems(bundle.manifest, units, settings.i_know_the_unit)
        if settings.calibration:
            calibration = attempt(load_calibration, settings.calibration)
        if settings.port == AUTO:
            found = attempt(find_port)
            if found is not None:
                port, why = found
                print(why)
        _require_complete(settings, bundle.manifest if bundle else None, problems, words)
    # A bundle, units or limits that cannot be used are among the problems.
    assert bundle is not None
    assert units is not None
    assert limits is not None
    if settings.simulated and bundle.manifest.source.demo and "jump_deg" not in settings.limits:
        print("note: the weights are random; the virtual arm slows large jumps, it rejects none")
        limits = _limits(settings.limits | {"jump_deg": NO_JUMP_LIMIT_DEG})
    fps, reason = choose_fps(settings, bundle.manifest)
    slowest = SLOWEST_FPS if settings.simulated else SLOWEST_ARM_FPS
    if fps < slowest:
        arm = "the virtual arm" if settings.simulated else "a real arm"
        raise SettingsError(f"{fps:g} fps is too slow for {arm}, expected at least {slowest:g}")
    task = settings.task or EXAMPLE_TASK
    print(f"task: {task!r}, in {units.value}\n{reason}")
    return CheckedRun(settings, bundle, units, limits, calibration, port, task, fps)


def _check_virtual(settings: Settings, bundle: Bundle | None, problems: Sequence[str]) -> None:
    """Raises SettingsError where the virtual arm cannot run it."""
    ignored = [n for n in ("calibration", "cameras") if getattr(settings, n)]
    if ignored:
        print(f"note: the virtual arm has its own {' and '.join(ignored)}, yours are not used")
    found = list(problems)
    if bundle is not None and (wrong := wrong_widths(bundle.manifest, JOINT_NAMES)):
        found.append(
            f"the bundle {settings.bundle} is not for this arm: {'; '.join(wrong)}. "
            "Give a bundle of a policy that was trained on an SO-101"
        )
    if found:
        raise SettingsError("; ".join(found))


def _require_complete(
    settings: Settings, manifest: Manifest | None, problems: Sequence[str], words: Sequence[str]
) -> None:
    """Raises one SettingsError with `problems` and every setting that a real arm needs and that is
    missing; it shows a complete command, and the robot.toml that does the same.

    manifest: None where the bundle itself is one of the problems.
    """
    # An empty string is a shell variable that is not set.
    needed = {
        name: description
        for name, description in descriptions().items()
        if description.needed and not getattr(settings, name)
    }
    missing = [f"{name} ({description.needed})" for name, description in needed.items()]
    names = [c.name for c in manifest.cameras] if manifest else list(settings.cameras) or ["NAME"]
    missing += [f"camera '{n}'" for n in names if n not in settings.cameras and manifest]
    unknown = [n for n in settings.cameras if n not in names]
    found = list(problems)
    if missing:
        found.append("missing " + ", ".join(missing))
    if unknown:
        found.append(
            f"the bundle has no camera {', '.join(map(repr, unknown))}, it has {', '.join(names)}"
        )
    sources = list(settings.cameras.values())
    found += [
        f"two cameras share {x}" for x in sorted({x for x in sources if sources.count(x) > 1})
    ]
    if not found:
        return
    headline = f"the arm on {settings.port} cannot run" if settings.port else "no arm is named"
    text = listed(f"{headline}:", found)
    if missing:
        examples: dict[str, Any] = {n: description.example for n, description in needed.items()}
        cameras = {n: settings.cameras.get(n, f"/dev/video{2 * i}") for i, n in enumerate(names)}
        complete = dataclasses.replace(settings, cameras=cameras, **examples)
        toml = "".join(f"  {line}\n" for line in as_toml(complete).splitlines())
        text += (
            "\nA complete command (--port sim, the virtual arm, needs only --bundle):\n"
            f"  {as_command(complete, words)}\nThe same settings in ./robot.toml:\n{toml}"
        )
    raise SettingsError(text.rstrip())


def _units(name: str) -> Units:
    try:
        return Units(name)
    except ValueError:
        raise SettingsError(f"units is {name!r}, expected degrees or range_m100_100") from None


def _units_problems(manifest: Manifest, units: Units, known: bool) -> list[str]:
    """What speaks against `units`. known: the user is sure where the statistics are not."""
    if manifest.units is not None:
        if manifest.units == units.value:
            return []
        return [f"units is {units.value}, but the bundle was trained in {manifest.units}"]
    seen, why = units_evidence(
        (manifest.state.normalization, manifest.action.normalization), JOINT_NAMES
    )
    if not seen:
        if known:
            return []
        return [
            f"units is {units.value}, and the training statistics cannot confirm it ({why}). "
            "Look the units up where the data was recorded, then give --i-know-the-unit"
        ]
    if seen != units.value:
        return [f"units is {units.value}, but the training statistics say otherwise: {why}"]
    print(f"the training statistics confirm the units: {why}")
    return []


def _limits(given: dict[str, float]) -> Limits:
    """Limits of robot.toml, where every number is read as a float."""
    known = set(Limits.__dataclass_fields__)
    if unknown := set(given) - known:
        raise SettingsError(
            f"unknown limits {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))})"
        )
    whole: dict[str, Any] = {
        k: int(v) for k, v in given.items() if k.endswith("_ticks") and v.is_integer()
    }
    return Limits(**given | whole)


def choose_fps(settings: Settings, manifest: Manifest) -> tuple[float, str]:
    """-> control rate in Hz and the reason in words."""
    if settings.fps is not None:
        return settings.fps, f"{settings.fps:g} fps: as asked"
    if manifest.fps is not None:
        return manifest.fps, f"{manifest.fps:g} fps: the rate of the training data"
    return DEFAULT_FPS, (
        f"{DEFAULT_FPS:g} fps: assumed, the bundle does not record the training rate "
        "(a policy trained at 15 fps would run at double speed; give --fps)"
    )
