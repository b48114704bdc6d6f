"""The settings of a deployment: `robot.toml`, overridden by options.

The fields of Settings are the only description of them. The options of smolvla-run
(commands/options.py), the reader and the writer of robot.toml, the printed command
(settings_text.py) and the draft of smolvla-doctor are made from it. So a new setting is a new
field.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.errors import SettingsError
from ...core.strict import decode
from ..policy.preprocessing import EXAMPLE_TASK
from .chunks import Chunking

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Guarding = Literal["hold", "soft", "off"]
SIM, AUTO = "sim", "auto"


@dataclass(frozen=True)
class Description:
    """What is known of a setting beside its name, type and default.

    help: of the option; empty: the setting is in robot.toml only. default_text: where the default
    is not the value of the field. allowed: which values, and the same in words. needed: what a real
    arm needs it for; example: the value to show then. metavar: of the option, and for a table
    `NAME=VALUE`, of an option that is given once for each entry. option: another name for it.
    """

    help: str = ""
    default_text: str = ""
    allowed: tuple[Callable[[Any], bool], str] | None = None
    needed: str = ""
    example: str = ""
    metavar: str | None = None
    option: str = ""


def _setting(default: Any, text: str = "", **more: Any) -> Any:
    metadata = {"description": Description(text, **more)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """One deployment, checked on construction. None: not given anywhere."""

    bundle: str = _setting("bundle", "Bundle folder.")
    device: str = _setting("auto", "cpu, cuda, jetson, or auto: CUDA where it is there, else CPU.")
    backend: str | None = _setting(
        None,
        "One backend of the device, such as tensorrt, ort-cuda or ort-cpu, and no other.",
        default_text="the device's first that works",
    )
    port: str | None = _setting(
        None,
        "Serial port of the arm, auto, or sim: the virtual arm, which needs no other setting.",
        needed="the serial port of the arm, or 'sim'",
        example="/dev/ttyACM0",
    )
    units: str | None = _setting(
        None,
        "degrees (LeRobot 0.4.4 on) or range_m100_100 (before), as the policy was trained.",
        needed="degrees or range_m100_100: what the policy was trained with; no file records it",
        example="degrees",
    )
    calibration: str | None = _setting(
        None,
        "LeRobot calibration file, or the id the arm was calibrated under.",
        needed="a LeRobot calibration file, or the id of one",
        example="my_arm",
    )
    task: str | None = _setting(
        None, "The instruction.", needed="the instruction", example=EXAMPLE_TASK
    )
    fps: float | None = _setting(
        None,
        "Control rate in Hz.",
        default_text="the training data's, else 30",
        allowed=(lambda v: 0 < v <= 200, "above 0 and at most 200"),
    )
    seconds: float | None = _setting(
        None,
        "Stop this long after the first action.",
        default_text="Ctrl-C; with --rehearse 10",
        allowed=(lambda v: 0 < v < math.inf, "above 0"),
    )
    steps: int | None = _setting(
        None,
        "Denoise steps.",
        default_text="the checkpoint's",
        allowed=(lambda v: 1 <= v <= 1000, "1 to 1000"),
    )
    seed: int | None = _setting(
        None, "Seed of the noise.", default_text="random", allowed=(lambda v: v >= 0, "0 or more")
    )
    # RUF009: ruff cannot see that _setting returns a dataclass field.
    chunking: Chunking = _setting(  # noqa: RUF009
        "sync",
        "How chunks are joined: sync holds between them, async blends them, "
        "rtc lets the policy continue the last one.",
    )
    guardian: Guarding = _setting(  # noqa: RUF009
        "soft", "Action if this program crashes or hangs: soft (lower the torque first), off, hold."
    )
    i_know_the_unit: bool = _setting(
        False, "Run although the training statistics cannot confirm --units."
    )
    record: str | None = _setting(
        None, "Keep everything that the policy gets and answers, in a new folder.", metavar="DIR"
    )
    log_mb: float = _setting(
        200.0,
        "Limit in MB for the logs of all runs together; the oldest are deleted.",
        allowed=(lambda v: 1 <= v <= 1e6, "1 to 1000000"),
    )
    cameras: dict[str, str] = _setting(  # noqa: RUF009
        {},
        "Once for each camera: /dev/videoN, a number, csi:N, a picture or a video.",
        metavar="NAME=SOURCE",
        option="--camera",
    )
    limits: dict[str, float] = _setting({})  # noqa: RUF009

    def __post_init__(self) -> None:
        """Raises SettingsError with every value out of its range."""
        wrong = []
        for name, description in descriptions().items():
            value = getattr(self, name)
            if value is None or description.allowed is None:
                continue
            allows, expected = description.allowed
            if not allows(value):
                wrong.append(f"{name} is {value}, expected {expected}")
        if wrong:
            raise SettingsError("settings cannot be used: " + "; ".join(wrong))

    @property
    def simulated(self) -> bool:
        return self.port == SIM


def descriptions() -> dict[str, Description]:
    """Every setting, in the order of the fields."""
    return {f.name: f.metadata["description"] for f in dataclasses.fields(Settings)}


def read_settings(path: Path, *, required: bool) -> Settings:
    """Read `robot.toml`. An absent file is default settings unless `required`.

    Raises SettingsError.
    """
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
    try:
        settings = decode(Settings, raw, problems)
    except SettingsError as e:
        raise SettingsError(f"{path}: {e}") from e
    if settings is None:
        known = ", ".join(descriptions())
        raise SettingsError(f"{path}: {'; '.join(problems)} (known fields: {known})")
    return settings


def override(settings: Settings, **given: Any) -> Settings:
    """`settings` with every value that was given (is not None); tables are merged."""
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = getattr(settings, name) | value
    return dataclasses.replace(settings, **values)


def parse_table(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """`front=/dev/video0` and more -> a table. Raises SettingsError."""
    table: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise SettingsError(
                f"{option} {pair!r}, expected NAME=SOURCE such as front=/dev/video0"
            )
        if name in table:
            raise SettingsError(f"{option.removeprefix('--')} '{name}' is given twice")
        table[name] = value
    return table
