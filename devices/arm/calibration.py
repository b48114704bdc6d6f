"""LeRobot calibration files of an SO-101 follower.

One JSON object: joint name -> id, drive_mode, homing_offset, range_min, range_max. All values are
integers. Positions are raw ticks after the homing offset. The servos hold offset and range
themselves; the file is a copy to compare with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ...core.errors import CalibrationError, listed
from ...core.files import write_whole
from ..bus.sts3215 import ENCODER_MAX, Register

JOINT_NAMES = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
IDS = tuple(range(1, len(JOINT_NAMES) + 1))
# LeRobot renamed the robot in 0.4.3; an SO-100 arm has the same joints.
ROBOT_NAMES = ("so101_follower", "so_follower", "so100_follower")
MAX_OFFSET = 2047
MIN_SPAN = 100


def joint_label(servo_id: int) -> str:
    """'elbow_flex (3)', as messages name a joint."""
    return f"{JOINT_NAMES[servo_id - 1]} ({servo_id})"


@dataclass(frozen=True)
class JointCalibration:
    """One joint. Positions and offset are raw ticks. drive_mode 1 inverts the range units."""

    id: int
    drive_mode: int
    homing_offset: int
    range_min: int
    range_max: int

    @property
    def registers(self) -> dict[Register, int]:
        """What the servo holds of it, in its EPROM."""
        return {
            Register.HOMING_OFFSET: self.homing_offset,
            Register.MIN_POSITION_LIMIT: self.range_min,
            Register.MAX_POSITION_LIMIT: self.range_max,
        }


@dataclass(frozen=True)
class Calibration:
    """All six joints, in the order of JOINT_NAMES. source: where it comes from, for messages.

    Checked on construction: CalibrationError lists all problems.
    """

    joints: tuple[JointCalibration, ...]
    source: str

    def __post_init__(self) -> None:
        problems = [
            problem
            for name, joint in zip(JOINT_NAMES, self.joints, strict=True)
            for problem in _joint_problems(name, joint)
        ]
        if problems:
            raise CalibrationError(_refusal(self.source, problems))

    @classmethod
    def from_dict(cls, data: object, source: str) -> Calibration:
        """From the parsed JSON of a calibration file."""
        if not isinstance(data, dict):
            raise CalibrationError(_refusal(source, ["not a JSON object of six joints"]))
        keys = tuple(field.name for field in fields(JointCalibration))
        problems = [f"unknown joint {name!r}" for name in data if name not in JOINT_NAMES]
        joints = []
        for name in JOINT_NAMES:
            entry = data.get(name)
            if (
                isinstance(entry, dict)
                and {*entry} == {*keys}
                and {*map(type, entry.values())} == {int}
            ):
                joints.append(JointCalibration(**entry))
                problems += _joint_problems(name, joints[-1])
            else:
                problems.append(f"{name}: {entry!r}, expected integers for {', '.join(keys)}")
        if problems:
            raise CalibrationError(_refusal(source, problems))
        return cls(tuple(joints), source)

    @property
    def registers(self) -> dict[int, dict[Register, int]]:
        """What each servo holds of it, {id: {register: value}}."""
        return {joint.id: joint.registers for joint in self.joints}

    def to_dict(self) -> dict[str, dict[str, int]]:
        """The content of a calibration file."""
        return {name: asdict(joint) for name, joint in zip(JOINT_NAMES, self.joints, strict=True)}

    def save(self, path: str | Path) -> None:
        """Write the file in LeRobot's format (indent 4, five keys). Make missing folders."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.to_dict(), indent=4).encode())


def load_calibration(
    path_or_id: str | Path, environ: Mapping[str, str] = os.environ
) -> Calibration:
    """Read a calibration from a file, or by the robot id under which LeRobot saved it.

    An id is looked up in LeRobot's calibration folder for each of ROBOT_NAMES. environ: holds
    HF_LEROBOT_CALIBRATION, HF_LEROBOT_HOME, HF_HOME and XDG_CACHE_HOME, as LeRobot reads them.
    CalibrationError if none or several are found, or if the file is not plausible.
    """
    text = str(path_or_id)
    given = Path(text).expanduser()
    if not given.is_file() and (not text or given.suffix == ".json" or len(given.parts) != 1):
        raise CalibrationError(
            f"no calibration file {text!r}. Give an existing file or a robot id."
        )
    path = given if given.is_file() else _saved(text, environ)
    if path is None:
        head = (
            f"no calibration for id {text!r}. Make one (smolvla-calibrate --id {text}) or give a "
            "file. None at:"
        )
        raise CalibrationError(listed(head, _places(text, environ)))
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read calibration {path}: {error}.") from error
    return Calibration.from_dict(data, str(path))


def calibration_path(robot_id: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The file of `robot_id`. Without one, the file that LeRobot 0.4.3 and later would write."""
    if not robot_id or Path(robot_id).name != robot_id or robot_id.endswith(".json"):
        raise CalibrationError(
            f"{robot_id!r} is no robot id: give a plain name, without folder or .json."
        )
    return _saved(robot_id, environ) or _places(robot_id, environ)[ROBOT_NAMES.index("so_follower")]


def saved_calibrations(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Every calibration file of such an arm in LeRobot's folder."""
    folder = _calibration_folder(environ) / "robots"
    return [path for robot in ROBOT_NAMES for path in sorted((folder / robot).glob("*.json"))]


def _places(robot_id: str, environ: Mapping[str, str]) -> list[Path]:
    return [
        _calibration_folder(environ) / "robots" / robot / f"{robot_id}.json"
        for robot in ROBOT_NAMES
    ]


def _saved(robot_id: str, environ: Mapping[str, str]) -> Path | None:
    found = [place for place in _places(robot_id, environ) if place.is_file()]
    if len(found) > 1:
        raise CalibrationError(
            listed(f"several calibrations for id {robot_id!r}; give the file you mean:", found)
        )
    return found[0] if found else None


def _calibration_folder(environ: Mapping[str, str]) -> Path:
    if environ.get("HF_LEROBOT_CALIBRATION"):
        return Path(environ["HF_LEROBOT_CALIBRATION"]).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(environ.get("HF_LEROBOT_HOME") or f"{home}/lerobot").expanduser() / "calibration"


def _joint_problems(name: str, joint: JointCalibration) -> list[str]:
    problems = []
    if joint.id != IDS[JOINT_NAMES.index(name)]:
        problems.append(f"id {joint.id}, expected {IDS[JOINT_NAMES.index(name)]}")
    if joint.drive_mode not in (0, 1):
        problems.append(f"drive_mode {joint.drive_mode}, expected 0 or 1")
    if abs(joint.homing_offset) > MAX_OFFSET:
        problems.append(
            f"homing_offset {joint.homing_offset}, expected -{MAX_OFFSET} to {MAX_OFFSET}"
        )
    low, high = joint.range_min, joint.range_max
    if not 0 <= low <= high - MIN_SPAN <= ENCODER_MAX - MIN_SPAN:
        problems.append(
            f"range {low} to {high}, expected {MIN_SPAN} ticks or more within 0 to {ENCODER_MAX}"
        )
    return [f"{name}: {problem}" for problem in problems]


def _refusal(source: str, problems: list[str]) -> str:
    return listed(
        f"calibration {source} cannot be used. Calibrate the arm again (smolvla-calibrate).",
        problems,
    )
