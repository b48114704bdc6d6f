"""What smolvla-run can do beside driving: look before it leaps, rehearse, record, replay; and how
it joins chunks."""

import json

import numpy as np
import pytest

from smolvla_edge.devices.bus.sts3215 import Register
from support.running import COMMAND, TASK, assert_limp_and_unharmed, real_port, run

pytestmark = pytest.mark.arm


def edit(folder, change):
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def statistics(**values):
    def change(manifest):
        for vector in ("state", "action"):
            manifest[vector]["normalization"]["statistics"] = values

    return change


def spread(body, gripper=(2.0, 90.0)):
    """min, max, mean and std of joints that range over +-`body`."""
    low, high = [-body] * 5 + [gripper[0]], [body] * 5 + [gripper[1]]
    mean, std = np.mean([low, high], axis=0), np.ptp([low, high], axis=0) / 4
    return statistics(min=low, max=high, mean=mean.tolist(), std=std.tolist())


def test_a_dry_run_shows_the_first_chunk_and_writes_nothing(fresh, export_case, tmp_path):
    done = run(real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--dry-run"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained on" in done.stdout and "shoulder_lift" in done.stdout
    assert "no goal was written" in done.stdout
    assert fresh.goals() == []
    assert [w for w in fresh.writes() if w.value] == []
    assert_limp_and_unharmed(fresh)


def test_a_rehearsal_runs_the_loop_with_the_motors_off_and_writes_a_verdict(
    fresh, tiny_bundle, tmp_path
):
    done = run(real_port(fresh, tiny_bundle, tmp_path, "--rehearse", "--seconds", "6"), tmp_path)
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    checks = {c["name"]: c["passed"] for c in report["checks"]}
    assert (
        checks["the loop ran to its end"]
        and checks["cameras deliver"]
        and checks["chunks are finite"]
    )
    # A policy with random weights is far too fast for the limits, and the rehearsal says so.
    assert not checks["limits change nothing"] and not report["passed"]
    assert done.returncode == 1 and "rehearsal failed" in done.stdout
    assert fresh.goals() == []
    assert [w for w in fresh.writes() if w.value] == []
    assert_limp_and_unharmed(fresh)


def test_a_rehearsal_fails_with_a_frozen_camera(fresh, export_case, tmp_path, start):
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--rehearse", "--seconds", "6")
    process = start(line)
    while "rehearse" and not (seen := process.stdout.readline()).startswith("   0.0 s"):
        assert seen
    fresh.camera("front", "freeze")
    process.communicate(timeout=40)
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    assert process.returncode == 1 and not report["passed"]
    assert not {c["name"]: c["passed"] for c in report["checks"]}["cameras deliver"]


@pytest.mark.parametrize("chunking", ["sync", "async", "rtc"])
def test_a_recording_can_be_computed_again(fresh, export_case, tmp_path, chunking):
    folder = export_case("tiny", "fp32")
    more = ("--seconds", "4", "--record", "episode", "--chunking", chunking, "--seed", "5")
    done = run(real_port(fresh, folder, tmp_path, *more), tmp_path)
    assert done.returncode == 0, done.stderr
    ticks = [
        json.loads(line) for line in (tmp_path / "episode" / "ticks.jsonl").read_text().splitlines()
    ]
    ticks = [t for t in ticks if "goal" in t]
    assert len(ticks) > 100
    seams = [t["seam_deg"] for t in ticks if "seam_deg" in t]
    # Asked for with half of the last one left
    assert len(seams) >= (2 if chunking == "sync" else 4)
    if chunking != "sync":
        assert [t["doing"] for t in ticks if t["t_s"] > 0].count("hold") == 0  # never starved
    replayed = run(
        [COMMAND, "--bundle", folder, "--replay", "episode", "--device", "cpu"], tmp_path
    )
    assert replayed.returncode == 0, replayed.stderr
    assert_limp_and_unharmed(fresh)
    again = run(real_port(fresh, folder, tmp_path, *more), tmp_path)
    assert again.returncode == 2 and "episode" in again.stderr  # never written over


@pytest.mark.parametrize(
    ("change", "units", "message"),
    [
        (
            spread(120.0),
            "range_m100_100",
            "the training statistics say otherwise: shoulder_pan reaches 120.0",
        ),
        (
            spread(100.0),
            "degrees",
            "the training statistics say otherwise: shoulder_pan ends at -100.0 and 100.0",
        ),
        (spread(1.6, (0.0, 1.0)), "degrees", "look like radians"),
        (spread(120.0, (-40.0, 150.0)), "degrees", "the gripper ranges from -40.0 to 150.0"),
        (spread(60.0), "degrees", "give --i-know-the-unit"),
    ],
)
def test_units_that_contradict_the_training_statistics_are_refused(
    fresh, tiny_bundle, tmp_path, change, units, message
):
    edit(tiny_bundle, change)
    line = real_port(fresh, tiny_bundle, tmp_path)
    line[line.index("--units") + 1] = units
    done = run(line, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert fresh.frames_seen() == 0


def test_units_the_statistics_cannot_tell_can_be_vouched_for(fresh, tiny_bundle, tmp_path):
    edit(tiny_bundle, spread(60.0))
    done = run(real_port(fresh, tiny_bundle, tmp_path, "--i-know-the-unit", "--dry-run"), tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_arm_where_the_policy_was_never_trained_is_refused_with_both_ranges(
    fresh, export_case, tmp_path
):
    fresh.set_register(5, Register.PRESENT_POSITION, 2047)  # wrist_roll 0, trained about -102
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--seed", "1")
    line.remove("--allow-far-start")
    done = run(line, tmp_path)
    assert done.returncode == 2
    assert (
        "wrist_roll stands at" in done.stderr and "training has seen -141.3 to -63.5" in done.stderr
    )
    assert "--allow-far-start" in done.stderr
    assert fresh.goals() == []
    assert_limp_and_unharmed(fresh)


def test_cameras_that_changed_places_since_the_last_run_are_refused(fresh, export_case, tmp_path):
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--dry-run")
    assert run(line, tmp_path).returncode == 0
    front, wrist = (fresh.camera_sources[n] for n in ("front", "wrist"))
    swap = {f"front={front}": f"front={wrist}", f"wrist={wrist}": f"wrist={front}"}
    done = run([swap.get(word, word) for word in line], tmp_path)
    assert done.returncode == 2
    assert "swapped since the last run" in done.stderr and "cameras.npz" in done.stderr
    assert run(line, tmp_path).returncode == 0


def test_every_finding_on_arm_and_cameras_is_told_at_once(fresh, export_case, tmp_path):
    fresh.set_register(3, Register.OPERATING_MODE, 1)
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path)
    line = ["wrist=/dev/video99" if word.startswith("wrist=") else word for word in line]
    done = run(line, tmp_path)
    assert done.returncode == 2
    assert "Operating_Mode 1" in done.stderr and "/dev/video99" in done.stderr


def test_the_servos_configuration_is_written_once_and_only_when_asked(fresh, export_case, tmp_path):
    for servo in range(1, 7):
        fresh.set_register(servo, Register.P_COEFFICIENT, 32)
    line = real_port(fresh, export_case("tiny", "fp32"), tmp_path, "--dry-run")
    first = run(line, tmp_path)
    assert "--write-eeprom" in first.stdout and fresh.eprom_writes() == 0
    second = run([*line, "--write-eeprom"], tmp_path)
    assert second.returncode == 0, second.stderr
    assert "P_Coefficient (21)" in second.stdout
    written = fresh.eprom_writes()
    assert written >= 6
    third = run([*line, "--write-eeprom"], tmp_path)
    assert "EPROM: 0 registers written" in third.stdout and fresh.eprom_writes() == written
    assert fresh.violations() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dry-run", "--rehearse"), "exclude each other"),
        (("--chunking", "later"), "later"),
        (("--guardian", "angel"), "angel"),
        (("--record", "/proc/nowhere"), "/proc/nowhere"),
    ],
)
def test_a_wrong_flag_leaves_the_arm_alone(fresh, export_case, tmp_path, flags, message):
    done = run(real_port(fresh, export_case("tiny", "fp32"), tmp_path, *flags), tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert fresh.goals() == []


def test_port_auto_tells_what_there_is(export_case, tmp_path):
    line = [
        COMMAND,
        "--bundle",
        export_case("tiny", "fp32"),
        "--port",
        "auto",
        "--units",
        "degrees",
        "--task",
        TASK,
    ]
    done = run(line, tmp_path)
    assert done.returncode == 2
    assert "--port" in done.stderr
