"""Deployment settings: `robot.toml`, overridden by flags. What is missing is listed once, with the way to give it."""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.errors import SettingsError
from ...core.strict import decode
from ..bundle.manifest import Manifest
from ..policy.preprocessing import EXAMPLE_TASK
from .chunks import Chunking

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Guarding = Literal["hold", "soft", "off"]
SIM, AUTO = "sim", "auto"
DEFAULT_FPS = 30.0


@dataclass(frozen=True)
class Settings:
    """One deployment. None means: not said anywhere."""

    bundle: str = "bundle"
    device: str = "auto"
    backend: str | None = None
    port: str | None = None
    units: str | None = None
    calibration: str | None = None
    task: str | None = None
    fps: float | None = None
    seconds: float | None = None
    steps: int | None = None
    seed: int | None = None
    chunking: Chunking = "sync"
    guardian: Guarding = "soft"
    i_know_the_unit: bool = False
    record: str | None = None
    cameras: dict[str, str] = dataclasses.field(default_factory=dict)
    limits: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        return self.port == SIM

    def check_values(self) -> None:
        """Raises SettingsError with every value that cannot be."""
        wrong = []
        if self.fps is not None and not 0 < self.fps <= 200:
            wrong.append(f"fps is {self.fps}, expected above 0 and at most 200")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            wrong.append(f"seconds is {self.seconds}, expected above 0")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            wrong.append(f"steps is {self.steps}, expected 1 to 1000")
        if self.seed is not None and self.seed < 0:
            wrong.append(f"seed is {self.seed}, expected 0 or more")
        if wrong:
            raise SettingsError("settings cannot be used: " + "; ".join(wrong))


def read_settings(path: Path, *, required: bool) -> Settings:
    """Read `robot.toml`. An absent file is empty settings unless `required`. Raises SettingsError."""
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if required:
            raise SettingsError(f"{path} is not there: write it, or leave --config out") from None
        return Settings()
    except OSError as e:
        raise SettingsError(f"{path} cannot be read: {e.strerror or e}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingsError(f"{path} is not TOML: {e}") from e
    problems: list[str] = []
    settings = decode(Settings, raw, problems)
    if settings is None:
        known = ", ".join(f.name for f in dataclasses.fields(Settings))
        raise SettingsError(f"{path}: {'; '.join(problems)} (known fields: {known})")
    return settings


def parse_cameras(pairs: Sequence[str]) -> dict[str, str]:
    """`front=/dev/video0` as often as there are cameras. Raises SettingsError."""
    cameras: dict[str, str] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not (name and equals and source):
            raise SettingsError(
                f"--camera {pair!r}, expected NAME=SOURCE such as front=/dev/video0"
            )
        if name in cameras:
            raise SettingsError(f"camera '{name}' is given twice")
        cameras[name] = source
    return cameras


def override(settings: Settings, **flags: Any) -> Settings:
    """`settings` with every flag that was given (is not None) in their place."""
    return dataclasses.replace(settings, **{k: v for k, v in flags.items() if v is not None})


def require_complete(
    settings: Settings, manifest: Manifest | None, problems: Sequence[str]
) -> None:
    """Raises one SettingsError that lists `problems` and every setting missing for a real arm, and prints a complete
    command and the file that would hold it. manifest: None where the bundle itself is one of the problems."""
    wanted = {
        "port": "the serial port of the arm, or 'sim'",
        "units": "degrees or range_m100_100: what the policy was trained with; no file records it",
        "calibration": "a LeRobot calibration file, or the id of one",
        "task": "the instruction",
    }  # an empty string is a shell variable that was not set
    missing = [f"{name} ({why})" for name, why in wanted.items() if not getattr(settings, name)]
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
    headline = f"the arm on {settings.port} cannot be run" if settings.port else "no arm was named"
    listed = "\n  ".join(found)
    if not missing:
        raise SettingsError(f"{headline}:\n  {listed}")
    full = dataclasses.replace(
        settings,
        port=settings.port or "/dev/ttyACM0",
        units=settings.units or "degrees",
        calibration=settings.calibration or "my_arm",
        task=settings.task or EXAMPLE_TASK,
        cameras={n: settings.cameras.get(n, f"/dev/video{2 * i}") for i, n in enumerate(names)},
    )
    raise SettingsError(
        f"{headline}:\n  {listed}\n"
        f"A complete command (--port sim, the virtual arm, needs only --bundle):\n  {_as_command(full)}\n"
        f"The same settings in ./robot.toml:\n{_as_toml(full)}"
    )


def _as_command(s: Settings) -> str:
    words = ["smolvla-run", "--bundle", s.bundle, "--device", s.device, "--port", str(s.port)]
    words += ["--units", str(s.units), "--calibration", str(s.calibration)]
    for name, source in s.cameras.items():
        words += ["--camera", f"{name}={source}"]
    return shlex.join([*words, "--task", str(s.task)])


def _as_toml(s: Settings) -> str:
    lines = [
        f"{n} = {toml(getattr(s, n))}"
        for n in ("bundle", "device", "port", "units", "calibration", "task")
    ]
    lines += ["[cameras]", *(f"{toml(n)} = {toml(source)}" for n, source in s.cameras.items())]
    return "\n".join("  " + line for line in lines)


def toml(value: object) -> str:
    """JSON's strings and numbers are TOML's too, but for halves of characters."""
    return json.dumps(value, ensure_ascii=False)


def refusals(manifest: Manifest, joints: Sequence[str]) -> list[str]:
    """Why this bundle must not move a real arm with these joints, in order; empty when it may."""
    found = []
    if manifest.source.demo:
        found.append("it is a demo: its weights are random")
    for name, vector in (("state", manifest.state), ("action", manifest.action)):
        if not vector.normalization.active:
            found.append(
                f"no statistics match its {name}, so its outputs are not joint angles (fine-tune it first)"
            )
        if vector.dim != len(joints):
            found.append(f"its {name} has {vector.dim} values, the arm has {len(joints)} joints")
    if manifest.joints is not None and tuple(manifest.joints) != tuple(joints):
        found.append(
            f"it was trained on the joints {', '.join(manifest.joints)}, the arm has {', '.join(joints)}"
        )
    return found


def choose_fps(settings: Settings, manifest: Manifest) -> tuple[float, str]:
    """-> control rate in Hz and the reason in words."""
    if settings.fps is not None:
        return settings.fps, f"{settings.fps:g} fps: as asked"
    if manifest.fps is not None:
        return manifest.fps, f"{manifest.fps:g} fps: the rate of the training data"
    return DEFAULT_FPS, (
        f"{DEFAULT_FPS:g} fps: assumed, the bundle does not record the training rate "
        "(a policy trained at 15 fps would run at double speed; say --fps)"
    )
