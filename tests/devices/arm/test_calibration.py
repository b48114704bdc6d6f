"""Calibration files as LeRobot writes them."""

import json
import os
from pathlib import Path

import pytest

from smolvla_edge.core.errors import CalibrationError
from smolvla_edge.devices.arm.calibration import (
    JOINT_NAMES,
    Calibration,
    JointCalibration,
    calibration_path,
    load_calibration,
)
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION

GOOD = {
    name: {
        "id": number,
        "drive_mode": 0,
        "homing_offset": -100 * number,
        "range_min": 700,
        "range_max": 3300,
    }
    for number, name in enumerate(JOINT_NAMES, start=1)
}


def umask():
    current = os.umask(0)
    os.umask(current)
    return current


def refuse(*arguments):
    raise OSError("the disk is full")


def changed(**joints):
    data = json.loads(json.dumps(GOOD))
    for name, values in joints.items():
        data[name].update(values)
    return data


def test_a_file_is_read_and_written_back_unchanged(tmp_path):
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(GOOD, indent=4))
    calibration = load_calibration(path)
    assert calibration.joints[1] == JointCalibration(2, 0, -200, 700, 3300)
    copy = tmp_path / "copy.json"
    calibration.save(copy)
    assert copy.read_text() == path.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arm.json", "copy.json"]


def test_the_file_is_byte_for_byte_lerobot_s(tmp_path):
    # Made by lerobot 0.4.4: draccus.dump(calibration, file, indent=4).
    first = """{
    "shoulder_pan": {
        "id": 1,
        "drive_mode": 0,
        "homing_offset": -709,
        "range_min": 701,
        "range_max": 3301
    },
    "shoulder_lift": {
"""
    last = """        "range_max": 3480
    }
}"""
    path = tmp_path / "made/on/demand/arm.json"
    VIRTUAL_CALIBRATION.save(path)
    text = path.read_text()
    assert text.startswith(first) and text.endswith(last) and len(text.splitlines()) == 6 * 7 + 2
    assert path.stat().st_mode & 0o077 == 0o066 & ~umask()


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "arm.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk"):
        VIRTUAL_CALIBRATION.save(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_order_of_the_file_does_not_matter(tmp_path):
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(dict(reversed(GOOD.items()))))
    assert [joint.id for joint in load_calibration(path).joints] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("joint", "values", "complaint"),
    [
        ("shoulder_pan", {"id": 2}, "shoulder_pan: id 2, expected 1"),
        ("gripper", {"drive_mode": 2}, "gripper: drive_mode 2"),
        ("elbow_flex", {"homing_offset": 2048}, "elbow_flex: homing_offset 2048"),
        ("elbow_flex", {"homing_offset": -2048}, "elbow_flex: homing_offset -2048"),
        ("wrist_flex", {"range_min": -1}, "wrist_flex: range -1 to 3300"),
        ("wrist_flex", {"range_max": 4096}, "wrist_flex: range 700 to 4096"),
        ("wrist_flex", {"range_max": 700}, "wrist_flex: range 700 to 700"),
        ("wrist_flex", {"range_max": 799}, "range 700 to 799, expected 100 ticks or more"),
        ("wrist_roll", {"range_min": 1.5}, "expected integers for id, drive_mode"),
        ("wrist_roll", {"range_min": True}, "expected integers for id, drive_mode"),
        ("wrist_roll", {"speed": 1}, "expected integers for id, drive_mode"),
    ],
)
def test_a_value_that_is_not_sane_is_named(joint, values, complaint):
    with pytest.raises(CalibrationError) as error:
        Calibration.from_dict(changed(**{joint: values}), "here")
    assert complaint in str(error.value)


def test_a_full_turn_of_the_wrist_is_sane():
    Calibration.from_dict(changed(wrist_roll={"range_min": 0, "range_max": 4095}), "here")


def test_all_problems_are_told_at_once():
    data = changed(shoulder_pan={"id": 9}, elbow_flex={"extra": 1}, gripper={"homing_offset": 5000})
    del data["wrist_roll"]
    del data["wrist_flex"]["range_max"]
    data["tail"] = {}
    with pytest.raises(CalibrationError) as error:
        Calibration.from_dict(data, "here")
    for part in (
        "unknown joint 'tail'",
        "shoulder_pan: id 9",
        "elbow_flex: {",
        "wrist_flex: {",
        "wrist_roll: None, expected integers for id, drive_mode, homing_offset, range_min, range_max",
        "gripper: homing_offset 5000",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, text):
    path = tmp_path / "arm.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=r"arm\.json"):
        load_calibration(path)


@pytest.mark.parametrize("robot", ["so101_follower", "so_follower", "so100_follower"])
@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("HF_LEROBOT_CALIBRATION", ""),
        ("HF_LEROBOT_HOME", "calibration"),
        ("HF_HOME", "lerobot/calibration"),
        ("XDG_CACHE_HOME", "huggingface/lerobot/calibration"),
    ],
)
def test_an_id_is_found_where_lerobot_saves_it(tmp_path, robot, variable, below):
    folder = tmp_path / below / "robots" / robot
    folder.mkdir(parents=True)
    VIRTUAL_CALIBRATION.save(folder / "blue.json")
    found = load_calibration("blue", {variable: str(tmp_path)})
    assert found.joints == VIRTUAL_CALIBRATION.joints
    assert found.source == str(folder / "blue.json")


def test_an_id_found_twice_is_refused_with_both_places(tmp_path):
    paths = [
        tmp_path / "robots" / robot / "blue.json" for robot in ("so101_follower", "so_follower")
    ]
    for path in paths:
        path.parent.mkdir(parents=True)
        VIRTUAL_CALIBRATION.save(path)
    with pytest.raises(CalibrationError) as error:
        load_calibration("blue", {"HF_LEROBOT_CALIBRATION": str(tmp_path)})
    assert all(str(path) in str(error.value) for path in paths)


def test_an_id_found_nowhere_tells_where_it_was_looked_for(tmp_path):
    with pytest.raises(CalibrationError) as error:
        load_calibration("blue", {"HF_HOME": str(tmp_path)})
    for robot in ("so101_follower", "so_follower", "so100_follower"):
        assert str(tmp_path / "lerobot/calibration/robots" / robot / "blue.json") in str(
            error.value
        )


def test_a_new_id_is_saved_where_lerobot_looks_and_an_old_one_where_it_is(tmp_path):
    environ = {"HF_LEROBOT_CALIBRATION": str(tmp_path)}
    assert calibration_path("blue", environ) == tmp_path / "robots/so_follower/blue.json"
    old = tmp_path / "robots/so101_follower/blue.json"
    VIRTUAL_CALIBRATION.save(old)
    assert calibration_path("blue", environ) == old
    VIRTUAL_CALIBRATION.save(tmp_path / "robots/so_follower/blue.json")
    with pytest.raises(CalibrationError, match="several calibrations"):
        calibration_path("blue", environ)


@pytest.mark.parametrize("robot_id", ["", "a/b", "blue.json"])
def test_an_id_is_a_plain_name(tmp_path, robot_id):
    with pytest.raises(CalibrationError, match="no robot id"):
        calibration_path(robot_id, {"HF_HOME": str(tmp_path)})


@pytest.mark.parametrize("text", ["", "nowhere/blue", "nowhere.json"])
def test_a_missing_file_is_not_taken_for_an_id(text, tmp_path):
    with pytest.raises(CalibrationError, match="no calibration file"):
        load_calibration(text, {"HF_HOME": str(tmp_path)})
