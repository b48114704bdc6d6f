"""smolvla-run end to end: the installed command, a real bundle, and the virtual arm behind a serial
port."""

import json
import shlex
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from smolvla_edge.devices.bus.sts3215 import Register
from support.running import (
    COMMAND,
    SERVOS,
    WILD,
    assert_limp_and_unharmed,
    real_port,
    run,
    wait_for_goals,
)

pytestmark = pytest.mark.arm


def test_the_virtual_arm_needs_no_settings_and_really_moves(export_case, tmp_path):
    (tmp_path / "robot.toml").write_text(WILD)
    done = run(
        [COMMAND, "--bundle", export_case("tiny", "fp32"), "--port", "sim", "--seconds", "2"],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    moves = [line for line in done.stdout.splitlines() if "shoulder_lift=" in line]
    assert len({line.split("shoulder_lift=")[1] for line in moves}) > 1
    assert "chunk, as the loop saw it" in done.stdout
    assert "rejected: 0 malformed, 0 too old, 0 jumps" in done.stdout
    (log,) = [
        line.removeprefix("log: ") for line in done.stdout.splitlines() if line.startswith("log: ")
    ]
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    assert {"write": "Torque_Enable (40)", "id": 6, "value": 1} in lines
    ticks = [line for line in lines if "goal" in line]
    assert len(ticks) >= 50 and {"run", "park"} <= {t["doing"] for t in ticks}
    measured = {"t_s", "queued", "late_ms", "read_ms", "write_ms", "missed", "goal", "position"}
    assert all(measured <= set(tick) for tick in ticks)
    assert all(len(t["goal"]) == 6 and len(t["temperature"]) == 6 for t in ticks)


def test_a_policy_with_other_joints_is_refused_on_the_virtual_arm_too(export_case, tmp_path):
    folder = export_case("tiny_variant", "fp32")
    done = run([COMMAND, "--bundle", folder, "--port", "sim", "--seconds", "1"], tmp_path)
    assert done.returncode == 2
    assert "its action has 14 values, the arm has 6 joints" in done.stderr
    assert "starting the virtual arm" not in done.stdout


def test_a_run_on_a_port_ends_limp_and_within_every_limit(fresh, export_case, tmp_path):
    done = run(
        real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--seconds", "2", "--seed", "1"),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert_limp_and_unharmed(fresh)
    by_servo = {i: [g.raw for g in fresh.goals() if g.id == i] for i in SERVOS}
    spans = {i: max(goals) - min(goals) for i, goals in by_servo.items()}
    assert max(spans.values()) > 100  # it did move
    for joint in fresh.calibration.joints:
        assert all(joint.range_min <= raw <= joint.range_max for raw in by_servo[joint.id])
        # Fastest limit of a joint: 200 % of its range a second; longest step: two periods.
        fastest = max(90 * 4095 / 360, 2.0 * (joint.range_max - joint.range_min)) * 2 / 30 + 1
        steps = [
            abs(b - a) for a, b in zip(by_servo[joint.id], by_servo[joint.id][1:], strict=False)
        ]
        assert max(steps) <= fastest


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP],
    ids=lambda n: n.name,
)
def test_a_signal_switches_every_motor_off_and_exits_130(
    fresh, export_case, tmp_path, start, number
):
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    process = start(line)
    wait_for_goals(fresh, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "switching the motors off" in out
    assert_limp_and_unharmed(fresh)


def test_a_run_in_the_background_of_a_shell_is_interruptible_too(
    fresh, export_case, tmp_path, start
):
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    process = start(line, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    wait_for_goals(fresh, process, count=5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert_limp_and_unharmed(fresh)


def test_a_servo_that_falls_silent_ends_the_run_with_every_other_motor_off(
    fresh, export_case, tmp_path, start
):
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    process = start(line)
    wait_for_goals(fresh, process)
    fresh.inject("mute", servo_id=3, count=-1)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1, err
    assert "elbow_flex" in err
    assert_limp_and_unharmed(fresh)


def test_one_lost_answer_does_not_end_the_run(fresh, export_case, tmp_path, start):
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--seconds", "2")
    process = start(line)
    wait_for_goals(fresh, process, count=10)
    fresh.inject("mute", servo_id=3, count=1)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert_limp_and_unharmed(fresh)


def test_a_camera_that_is_frozen_at_the_start_leaves_the_motors_off(fresh, export_case, tmp_path):
    """The picture stays in place but nobody draws a new one: its time of capture gives it away."""
    frozen = {}
    for name, source in fresh.camera_sources.items():
        copy = tmp_path / f"{name}.frame"
        copy.write_bytes(Path(source.removeprefix("sim:")).read_bytes())
        frozen[name] = f"sim:{copy}"
    time.sleep(0.6)
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    line = [w.replace(fresh.camera_sources["wrist"], frozen["wrist"]) for w in line]
    done = run(line, tmp_path, timeout=30)
    assert done.returncode == 1
    assert "camera 'wrist': stalled" in done.stderr
    assert fresh.goals() == []
    assert_limp_and_unharmed(fresh)


def edit(folder, change):
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["source"].update(demo=True), "its weights are random"),
        (
            lambda m: m["state"]["normalization"].update(statistics={}),
            "no statistics match its state",
        ),
        (
            lambda m: m["action"]["normalization"].update(statistics={}),
            "no statistics match its action",
        ),
        (
            lambda m: m.update(joints=["a", "b", "c", "d", "e", "f"]),
            "it was trained on the joints a, b, c, d, e, f",
        ),
    ],
)
def test_bundles_that_must_not_move_an_arm_are_refused_before_the_port_is_touched(
    fresh, tiny_bundle, tmp_path, change, message
):
    edit(tiny_bundle, change)
    done = run(real_port(fresh, tiny_bundle, tmp_path, "--seconds", "1"), tmp_path)
    assert done.returncode == 2
    assert "must not move a real arm" in done.stderr
    assert message in done.stderr
    assert fresh.frames_seen() == 0


def test_a_bundle_with_other_than_six_joints_is_refused_on_a_port(fresh, export_case, tmp_path):
    line = real_port(fresh, export_case("tiny_variant", "fp32"), tmp_path)
    line = [w for w in line if not w.startswith(("front=", "wrist=")) and w != "--camera"]
    done = run([*line, "--camera", f"top={fresh.camera_sources['front']}"], tmp_path)
    assert done.returncode == 2
    assert "its action has 14 values, the arm has 6 joints" in done.stderr
    assert fresh.frames_seen() == 0


def test_a_policy_that_answers_infinity_never_switches_a_motor_on(fresh, tiny_bundle, tmp_path):
    edit(
        tiny_bundle,
        lambda m: m["action"]["normalization"]["statistics"].update(
            std=[3e38] * 6, mean=[3e38] * 6
        ),
    )
    done = run(real_port(fresh, tiny_bundle, tmp_path), tmp_path)
    assert done.returncode == 1
    assert "not finite" in done.stderr
    assert fresh.goals() == []
    assert_limp_and_unharmed(fresh)


def test_a_calibration_of_another_arm_is_refused_and_nothing_is_written(
    fresh, export_case, tmp_path
):
    raw = json.loads((tmp_path / "my_arm.json").read_text())
    raw["elbow_flex"]["homing_offset"] += 40
    (tmp_path / "my_arm.json").write_text(json.dumps(raw))
    done = run(real_port(fresh, export_case("tiny", "fp32"), tmp_path), tmp_path)
    assert done.returncode == 2
    assert "elbow_flex" in done.stderr
    assert fresh.goals() == []
    assert_limp_and_unharmed(fresh)


def test_everything_that_is_missing_is_listed_with_a_command_and_a_file_that_work(
    fresh, export_case, tmp_path
):
    (tmp_path / "bundle").symlink_to(export_case("tiny", "fp32"))
    done = run([COMMAND, "--device", "cpu", "--port", fresh.port], tmp_path)
    assert done.returncode == 2
    for missing in ("units", "calibration", "task", "camera 'front'", "camera 'wrist'"):
        assert missing in done.stderr
    assert fresh.frames_seen() == 0

    command = next(x for x in done.stderr.splitlines() if x.startswith("  smolvla-run "))
    words = shlex.split(command)[1:]
    known = {
        "/dev/video0": fresh.camera_sources["front"],
        "/dev/video2": fresh.camera_sources["wrist"],
    }
    known["my_arm"] = str(tmp_path / "my_arm.json")
    for old, new in known.items():
        words = [w.replace(old, new) for w in words]
    # What a random policy asks for first may be anywhere.
    more = ["--seconds", "0.5", "--allow-far-start"]
    assert run([COMMAND, *words, *more], tmp_path).returncode == 0

    toml = done.stderr.split("robot.toml:\n")[1]
    for old, new in known.items():
        toml = toml.replace(old, new)
    (tmp_path / "robot.toml").write_text(toml)
    short = run([COMMAND, "--device", "cpu", "--port", fresh.port, *more], tmp_path)
    assert short.returncode == 0, short.stderr
    assert_limp_and_unharmed(fresh)


@pytest.mark.parametrize("empty", ["--units", "--task", "--calibration"])
def test_an_empty_flag_is_a_missing_one(fresh, export_case, tmp_path, empty):
    """As a script with an unset variable would give it."""
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    line[line.index(empty) + 1] = ""
    done = run(line, tmp_path)
    assert done.returncode == 2
    assert empty.removeprefix("--") in done.stderr
    assert fresh.frames_seen() == 0


def test_one_camera_cannot_be_two(fresh, export_case, tmp_path):
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    line = [w.replace(fresh.camera_sources["wrist"], fresh.camera_sources["front"]) for w in line]
    done = run(line, tmp_path)
    assert done.returncode == 2
    assert "two cameras share" in done.stderr


def test_a_still_picture_on_an_arm_is_pointed_out(fresh, export_case, tmp_path):
    cv2.imwrite(str(tmp_path / "still.png"), np.zeros((48, 64, 3), np.uint8))
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--seconds", "0.5")
    line = [w.replace(fresh.camera_sources["wrist"], str(tmp_path / "still.png")) for w in line]
    done = run(line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: camera 'wrist' is a file" in done.stdout


def test_other_units_than_the_bundle_records_are_refused(fresh, tiny_bundle, tmp_path):
    edit(tiny_bundle, lambda m: m.update(units="range_m100_100"))
    done = run(real_port(fresh, tiny_bundle, tmp_path), tmp_path)
    assert done.returncode == 2
    assert "units is degrees, but the bundle was trained in range_m100_100" in done.stderr


def test_a_rate_too_slow_for_an_arm_is_refused(fresh, export_case, tmp_path):
    done = run(real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--fps", "1"), tmp_path)
    assert done.returncode == 2
    assert "too slow for a real arm" in done.stderr
    assert fresh.frames_seen() == 0


def test_a_refused_start_says_that_motors_are_on_already(fresh, export_case, tmp_path):
    fresh.set_register(2, Register.TORQUE_ENABLE, 1)
    raw = json.loads((tmp_path / "my_arm.json").read_text())
    raw["elbow_flex"]["homing_offset"] += 40
    (tmp_path / "my_arm.json").write_text(json.dumps(raw))
    done = run(real_port(fresh, export_case("tiny", "fp32"), tmp_path), tmp_path)
    assert done.returncode == 2
    assert "shoulder_lift (2) is energised already" in done.stderr
    assert "elbow_flex" in done.stderr


def test_jetson_without_tensorrt_is_told_together_with_what_else_is_missing(tmp_path):
    done = run([COMMAND, "--device", "jetson", "--port", "/dev/ttyACM0"], tmp_path)
    assert done.returncode == 2
    assert "tensorrt needs the Python module" in done.stderr
    assert "--device cpu" in done.stderr
    assert "make one with smolvla-export" in done.stderr
    assert "units" in done.stderr


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("unit = 'degrees'", "unknown field unit"),
        ("fps = 'fast'", "fps is 'fast', expected float"),
        ("seed = 1.5", "seed is 1.5, expected int"),
        ("fps = 0", "fps is 0"),
        ("[limits]\nspeed_deg_s = -1", "speed_deg_s is -1"),
        ("[limits]\nwarp = 9", "unknown limits warp"),
        ("[limits]\nmargin_ticks = inf", "margin_ticks is inf"),
        ("[limits]\nspeed_deg_s = 1e12", "from 1 to 298.9"),
        (f"fps = {'9' * 400}", "expected float"),
        ("fps =", "is not TOML"),
    ],
)
def test_a_wrong_robot_toml_is_refused(export_case, tmp_path, toml, message):
    (tmp_path / "robot.toml").write_text(toml)
    done = run(
        [COMMAND, "--bundle", export_case("tiny", "fp32"), "--port", "sim", "--seconds", "1"],
        tmp_path,
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_flags_override_robot_toml(export_case, tmp_path):
    (tmp_path / "robot.toml").write_text("port = '/dev/nowhere'\nfps = 7\ntask = 'Fold.'")
    done = run(
        [
            COMMAND,
            "--bundle",
            export_case("tiny", "fp32"),
            "--port",
            "sim",
            "--fps",
            "50",
            "--seconds",
            "0.5",
        ],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "50 fps: as asked" in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--camera", "front"], "expected NAME=SOURCE"),
        (["--camera", "a=1", "--camera", "a=2"], "given twice"),
        (["--config", "nowhere.toml"], "nowhere.toml is not there"),
        (["--task", "pick the cube " * 40], "tokens long"),
        (["--units", "radians"], "expected degrees or range_m100_100"),
        (["--seconds", "-1"], "seconds is -1"),
        (["--surprise"], "--surprise"),
        (["--task", "caf\udce9"], "the task is"),
        (["--config", "robot.toml"], "robot.toml is not there"),
    ],
)
def test_a_wrong_flag_exits_2_with_an_error_line(export_case, tmp_path, more, message):
    done = run([COMMAND, "--bundle", export_case("tiny", "fp32"), "--port", "sim", *more], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_the_self_check_tells_a_good_bundle_from_a_changed_one(tiny_bundle, tmp_path):
    assert run([COMMAND, "--bundle", tiny_bundle, "--self-check"], tmp_path).returncode == 0
    edit(tiny_bundle, lambda m: m["state"]["normalization"].update(mode="IDENTITY"))
    done = run([COMMAND, "--bundle", tiny_bundle, "--self-check"], tmp_path)
    assert done.returncode == 1
    assert "self-check failed: key.0 is the first to differ from its checkpoint" in done.stderr


def test_no_torch_is_loaded_in_the_process_that_drives_the_arm(fresh, export_case, tmp_path, start):
    """Read from the running process, not from its source."""
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    process = start(line)
    wait_for_goals(fresh, process, count=5)
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert "onnxruntime" in mapped
    assert "libtorch" not in mapped
