"""One description of the settings: options, robot.toml, the complete command and the draft
agree."""

import dataclasses
import shlex

import pytest
from typer.main import get_command

from smolvla_edge.core.errors import SettingsError
from smolvla_edge.runtime.commands.options import given
from smolvla_edge.runtime.commands.run import app
from smolvla_edge.runtime.robot.checked_run import check
from smolvla_edge.runtime.robot.settings import Settings, descriptions, override, read_settings
from smolvla_edge.runtime.robot.settings_text import as_command, as_toml

EVERY = Settings(
    bundle="my bundle",
    device="cpu",
    backend="ort-cpu",
    port="/dev/ttyACM7",
    units="range_m100_100",
    calibration="left's arm",
    task='say "é😀" and \\ wait',
    fps=15.0,
    seconds=2.5,
    steps=3,
    seed=7,
    chunking="rtc",
    guardian="hold",
    i_know_the_unit=True,
    record="runs/one",
    log_mb=12.5,
    cameras={"front cam": "/dev/video0", "wrist": "csi:1"},
    limits={"speed_deg_s": 45.0, "margin_ticks": 12.0},
)


def parsed(command):
    """What smolvla-run makes of a command line, without robot.toml."""
    words = shlex.split(command)
    assert words[0] == "smolvla-run"
    options = get_command(app).make_context(words[0], words[1:]).params
    known = {name: value for name, value in options.items() if name in descriptions()}
    return override(Settings(), **given(known)), options


def test_the_example_gives_every_setting_a_value_that_is_not_the_default():
    default = Settings()
    for field in dataclasses.fields(Settings):
        assert getattr(EVERY, field.name) != getattr(default, field.name)


def test_every_setting_is_found_in_the_printed_command_and_robot_toml(tmp_path):
    settings, _ = parsed(as_command(EVERY))
    assert settings == dataclasses.replace(EVERY, limits={})  # limits have no option
    (tmp_path / "robot.toml").write_text(as_toml(EVERY))
    assert read_settings(tmp_path / "robot.toml", required=True) == EVERY


def test_the_error_for_a_missing_setting_shows_all_that_was_given(tmp_path, export_case):
    words = ["--rehearse", "--config", "other.toml"]
    incomplete = dataclasses.replace(
        EVERY,
        bundle=str(export_case("tiny", "fp32")),
        task=None,
        calibration=None,
        cameras={"front": "/dev/video8"},
    )
    with pytest.raises(SettingsError, match=r"missing calibration .*, task .*'wrist'") as e:
        check(incomplete, words)
    command, toml = str(e.value).split("needs only --bundle):\n")[1].split("\nThe same settings")
    complete = dataclasses.replace(
        incomplete,
        task="Pick up the red cube.",
        calibration="my_arm",
        cameras={"front": "/dev/video8", "wrist": "/dev/video2"},
    )
    found, options = parsed(command)
    assert found == dataclasses.replace(complete, task=found.task, limits={})
    assert (options["rehearse"], str(options["config"])) == (True, "other.toml")
    (tmp_path / "robot.toml").write_text(toml.split("robot.toml:\n")[1])
    assert read_settings(tmp_path / "robot.toml", required=True) == dataclasses.replace(
        complete, task=found.task
    )


def test_only_what_is_not_the_default_is_shown():
    assert as_command(Settings(fps=15.0)) == "smolvla-run --bundle bundle --fps 15.0"
    assert as_toml(Settings(fps=15.0)) == 'bundle = "bundle"\nfps = 15.0\n'


def test_what_is_wanted_is_a_comment_in_its_table_and_replaces_a_value(tmp_path):
    text = as_toml(
        Settings(port="auto", cameras={"front": "0"}),
        {"": {"port": ("/dev/ttyACM0", "no arm")}, "cameras": {"wrist": ("1", "found: none")}},
    )
    assert '# port = "/dev/ttyACM0"  # no arm' in text.splitlines()
    assert text.splitlines()[-1] == '# "wrist" = "1"  # found: none'
    (tmp_path / "robot.toml").write_text(text)
    assert read_settings(tmp_path / "robot.toml", required=True) == Settings(cameras={"front": "0"})


def test_options_override_robot_toml_and_cameras_are_merged():
    stored = Settings(fps=7.0, cameras={"front": "0", "wrist": "1"})
    _, options = parsed("smolvla-run")
    known = {name: value for name, value in options.items() if name in descriptions()}
    assert override(stored, **given(known)) == stored  # nothing was given
    changed = override(stored, fps=9.0, cameras={"wrist": "2"})
    assert (changed.fps, changed.cameras) == (9.0, {"front": "0", "wrist": "2"})


def test_every_value_out_of_range_is_named():
    with pytest.raises(SettingsError) as e:
        Settings(fps=0.0, seconds=-1.0, steps=0, seed=-1, log_mb=0.5)
    for name in ("fps is 0.0", "seconds is -1.0", "steps is 0", "seed is -1", "log_mb is 0.5"):
        assert name in str(e.value)
