"""smolvla-calibrate: the arithmetic around the encoder's seam, and the whole command against the
virtual arm."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smolvla_edge.core.errors import ArmError, CalibrationError
from smolvla_edge.devices.arm.calibration import IDS, load_calibration
from smolvla_edge.devices.arm.homing import Travel, write_calibration
from smolvla_edge.devices.arm.inspection import inspect
from smolvla_edge.devices.bus.bus import FeetechBus
from smolvla_edge.devices.bus.sts3215 import Register
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION

pytestmark = pytest.mark.arm

COMMAND = Path(sys.executable).with_name("smolvla-calibrate")
MIDDLE = (2001, 2025, 2000, 2027, 2047, 2748)
ELBOW, ROLL = 3, 5


def travel(start, *ways, step=500):
    """A joint that begins at encoder `start` and is moved by each of `ways` ticks in turn."""
    moved = Travel(start)
    at = start
    for way in ways:
        for _ in range(abs(way) // step):
            at += step if way > 0 else -step
            moved.follow(at % 4096)
        at += way - int(way / step) * step
        moved.follow(at % 4096)
    return moved


@pytest.mark.parametrize("ways", [(300, -900), (-1500, 2600), (0, 4000), (100, -101)])
def test_wherever_the_seam_lies_the_range_is_the_same_and_the_seam_outside(ways):
    span = max(ways[0], 0, sum(ways)) - min(ways[0], 0, sum(ways))
    for start in range(4096):
        joint = travel(start, *ways).calibration(ELBOW)
        lowest = start + min(ways[0], 0, sum(ways))
        # Present, as the servo reports it from now on, at both ends of the travel.
        assert (lowest - joint.homing_offset) % 4096 == joint.range_min
        assert (lowest + span - joint.homing_offset) % 4096 == joint.range_max
        assert joint.range_max - joint.range_min == span
        assert abs((joint.range_min + joint.range_max) / 2 - 2047) <= 1
        assert abs(joint.homing_offset) <= 2047


def test_the_pose_that_a_person_guesses_does_not_matter():
    assert travel(3000, 200, -1200).calibration(ELBOW) == travel(2500, 700, -1200).calibration(
        ELBOW
    )


def test_wrist_roll_turns_all_the_way_around_the_pose_it_was_placed_in():
    for start in range(4096):
        joint = travel(start, 1000, -500).calibration(ROLL)
        assert (joint.range_min, joint.range_max) == (0, 4095)
        assert abs(joint.homing_offset) <= 2047
        # At encoder 4095 LeRobot's offset would be 2048, which does not fit.
        assert (start - joint.homing_offset) % 4096 == (2046 if start == 4095 else 2047)


@pytest.mark.parametrize("ways", [(99,), (50, -99), (4094,), (3000, -3000, -2000)])
def test_a_joint_that_was_hardly_moved_or_went_all_the_way_round_is_refused(ways):
    with pytest.raises(CalibrationError, match=r"moved \d+ ticks"):
        travel(4000, *ways).calibration(ELBOW)


def test_a_joint_too_fast_to_follow_is_refused():
    moved = Travel(4000)
    moved.follow(4000 + 1024 - 4096)
    with pytest.raises(CalibrationError, match="1025 ticks between two readings"):
        moved.follow(4000 + 2049 - 4096)


@pytest.fixture
def raw(virtual):
    """The arm as its servos come: no offset, no limits. The elbow's seam lies in the middle of its
    travel."""
    for servo_id, middle in zip(IDS, MIDDLE, strict=True):
        for register, value in (
            (Register.HOMING_OFFSET, 0),
            (Register.MIN_POSITION_LIMIT, 0),
            (Register.MAX_POSITION_LIMIT, 4095),
            (Register.LOCK, 1),
        ):
            virtual.set_register(servo_id, register, value)
        place(virtual, servo_id, 4095 if servo_id == ELBOW else middle)
    return virtual


def place(virtual, servo_id, encoder):
    virtual.set_register(servo_id, Register.PRESENT_POSITION, encoder % 4096)


def state(virtual):
    """Everything that a calibration might write."""
    return [{r: v for r, v in virtual.registers(i).items() if r.writable} for i in IDS]


class Person:
    """Runs the command and answers it."""

    def __init__(self, virtual, *more, **options):
        self.virtual = virtual
        self.output = ""
        line = [str(x) for x in (COMMAND, "--port", virtual.port, *more)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(line, **pipes, **options)

    def wait_for(self, text, limit_s=60.0):
        until = time.monotonic() + limit_s
        stdout = self.process.stdout.fileno()
        while text not in self.output:
            assert time.monotonic() < until, self.output
            if select.select([stdout], [], [], 0.1)[0]:
                data = os.read(stdout, 65536)
                assert data, self.output
                self.output += data.decode()

    def say(self, line=""):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def move(self, ends, step=400):
        """Every joint from its start up and down by `ends`, as the command sees it."""
        starts = [self.virtual.registers(i)[Register.PRESENT_POSITION] for i in IDS]
        up, down = ends
        way = [*range(0, up, step), up, *range(up, down, -step), down, *range(down, 0, step), 0]
        for offset in way:
            for servo_id, start in zip(IDS, starts, strict=True):
                place(self.virtual, servo_id, start + offset)
            # Two more requests: the second began after the joints were placed.
            seen, until = self.virtual.frames_seen(), time.monotonic() + 30
            while self.virtual.frames_seen() < seen + 2:
                assert self.process.poll() is None and time.monotonic() < until, self.output
                time.sleep(0.005)

    def sweep(self, ends=(1100, -900)):
        self.wait_for("Then press ENTER.")
        self.say()
        self.wait_for("2. Move every joint")
        self.move(ends)
        self.say()
        self.wait_for("Type y and press ENTER")

    def leave(self, limit_s=60.0):
        """-> exit status"""
        rest, _ = self.process.communicate(timeout=limit_s)
        self.output += rest.decode()
        return self.process.returncode


@pytest.fixture
def person(raw):
    """Starts the command; whatever still runs at the end of the test is killed."""
    started = []

    def start(*more, **options):
        started.append(Person(raw, *more, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_an_arm_is_calibrated_through_a_pipe(raw, person, tmp_path):
    someone = person("--id", "blue", env={**os.environ, "HF_LEROBOT_CALIBRATION": str(tmp_path)})
    someone.sweep()
    assert raw.writes() == []
    assert "elbow_flex (3): Homing_Offset (31) 0 -> -1948" in someone.output
    someone.say("y")
    assert someone.leave() == 0, someone.output

    calibration = load_calibration(tmp_path / "robots/so_follower/blue.json")
    elbow = calibration.joints[ELBOW - 1]
    # Encoder 3195 to 5195: the middle, 4195, is 99 after the seam.
    assert (elbow.homing_offset, elbow.range_min, elbow.range_max) == (99 - 2047, 1047, 3047)
    roll = calibration.joints[ROLL - 1]
    assert (roll.homing_offset, roll.range_min, roll.range_max) == (0, 0, 4095)
    for joint in calibration.joints:
        registers = raw.registers(joint.id)
        assert {r: registers[r] for r in joint.registers} == joint.registers
        assert registers[Register.LOCK] == 1 and registers[Register.RETURN_DELAY_TIME] == 0
    assert not any(w.register is Register.TORQUE_ENABLE for w in raw.writes())
    assert raw.violations() == []
    with FeetechBus(raw.port) as bus:
        findings = inspect(bus, calibration)
        assert findings.problems == findings.warnings == ()

    written = raw.eprom_writes()
    again = person("--restore", tmp_path / "robots/so_follower/blue.json")
    assert again.leave() == 0, again.output
    assert "0 EPROM registers written" in again.output
    assert raw.eprom_writes() == written


def test_an_arm_that_has_offsets_and_counts_turns_is_calibrated_anew(virtual, tmp_path):
    virtual.set_register(ELBOW, Register.PHASE, 0x1C)
    virtual.set_register(ELBOW, Register.PRESENT_POSITION, 4095 + 58 - 200)
    someone = Person(virtual, "--output", tmp_path / "arm.json", "--yes")
    someone.wait_for("Then press ENTER.")
    someone.say()
    someone.wait_for("2. Move every joint")
    someone.move((1100, -900))
    someone.say()
    assert someone.leave() == 0, someone.output
    joints = load_calibration(tmp_path / "arm.json").joints
    # Pan had position 2001 at offset -709, which is encoder 1292; the middle of its travel is 100
    # further.
    assert joints[0].homing_offset == 1292 + 100 - 2047
    assert {(j.range_min, j.range_max) for j in joints} == {(1047, 3047), (0, 4095)}
    assert virtual.registers(ELBOW)[Register.PHASE] == 0x0C
    with FeetechBus(virtual.port) as bus:
        assert inspect(bus, load_calibration(tmp_path / "arm.json")).problems == ()


def test_ctrl_c_while_it_is_written_leaves_a_whole_calibration(raw, person, tmp_path):
    raw.inject("delay", 1, count=-1, value=0.002)
    someone = person("--output", tmp_path / "arm.json")
    someone.sweep()
    someone.say("y")
    someone.wait_for("saved")
    someone.process.send_signal(signal.SIGINT)
    assert someone.leave() == 0, someone.output
    with FeetechBus(raw.port) as bus:
        assert inspect(bus, load_calibration(tmp_path / "arm.json")).problems == ()


@pytest.mark.parametrize("way_out", ["Ctrl-C", "end of input"])
@pytest.mark.parametrize(
    "prompt", ["Then press ENTER.", "2. Move every joint", "Type y and press ENTER"]
)
def test_leaving_before_it_is_written_changes_nothing(raw, person, tmp_path, prompt, way_out):
    before = state(raw)
    someone = person("--output", tmp_path / "arm.json")
    someone.wait_for("Then press ENTER.")
    if prompt != "Then press ENTER.":
        someone.say()
        someone.wait_for("2. Move every joint")
    if prompt == "Type y and press ENTER":
        someone.move((700, -700))
        someone.say()
        someone.wait_for(prompt)
    if way_out == "Ctrl-C":
        someone.process.send_signal(signal.SIGINT)
    assert someone.leave() == 130, someone.output
    assert "nothing was changed" in someone.output
    assert state(raw) == before
    assert raw.writes() == [] and list(tmp_path.iterdir()) == []


def test_whoever_does_not_say_yes_changes_nothing(raw, person, tmp_path):
    someone = person("--output", tmp_path / "arm.json")
    someone.sweep()
    someone.say()
    assert someone.leave() == 130, someone.output
    assert raw.writes() == [] and list(tmp_path.iterdir()) == []


def test_a_joint_that_was_not_moved_is_named_and_nothing_written(raw, person, tmp_path):
    someone = person("--output", tmp_path / "arm.json", "--yes")
    someone.wait_for("Then press ENTER.")
    someone.say()
    someone.wait_for("2. Move every joint")
    place(raw, 1, 2001 + 500)
    someone.say()
    assert someone.leave() == 2
    for name in ("shoulder_lift (2)", "elbow_flex (3)", "wrist_flex (4)", "gripper (6)"):
        assert f"{name} moved 0 ticks" in someone.output
    assert "wrist_roll" not in someone.output.split("error:")[1]
    assert raw.writes() == [] and list(tmp_path.iterdir()) == []


def test_an_energised_arm_is_refused_with_everything_else_that_is_wrong(raw, person, tmp_path):
    raw.set_register(1, Register.TORQUE_ENABLE, 1)
    raw.set_register(4, Register.MODEL_NUMBER, 2825)
    someone = person("--output", tmp_path / "arm.json")
    assert someone.leave() == 2
    for part in (
        "nothing was written",
        "shoulder_pan (1) is energised",
        "wrist_flex (4): model 2825",
    ):
        assert part in someone.output
    assert raw.writes() == []


def test_a_file_that_is_there_is_not_overwritten_unless_forced(raw, person, tmp_path):
    path = tmp_path / "arm.json"
    path.write_text("old")
    someone = person("--output", path)
    assert someone.leave() == 2
    assert "--force" in someone.output and path.read_text() == "old"
    forced = person("--output", path, "--force", "--yes")
    forced.wait_for("Then press ENTER.")
    forced.say()
    forced.wait_for("2. Move every joint")
    forced.move((700, -700))
    forced.say()
    assert forced.leave() == 0, forced.output
    assert load_calibration(path).joints[0].range_max == 2747


def test_it_must_be_said_where_to_save(person):
    someone = person()
    assert someone.leave() == 2
    assert "--id NAME" in someone.output


def test_a_servo_that_lost_its_calibration_gets_it_back(virtual, person, tmp_path):
    # After `raw`, every servo has; all of it comes back from the file.
    VIRTUAL_CALIBRATION.save(tmp_path / "arm.json")
    for servo_id, middle in zip(IDS, MIDDLE, strict=True):
        place(virtual, servo_id, middle + VIRTUAL_CALIBRATION.joints[servo_id - 1].homing_offset)
    before = state(virtual)
    someone = person("--restore", tmp_path / "arm.json")
    someone.wait_for("Type y and press ENTER")
    assert "gripper (6): Homing_Offset (31) 0 -> 207" in someone.output
    assert "calibrate anew" in someone.output
    assert state(virtual) == before
    someone.say("y")
    assert someone.leave() == 0, someone.output
    assert [virtual.registers(i)[Register.PRESENT_POSITION] for i in IDS] == list(MIDDLE)
    with FeetechBus(virtual.port) as bus:
        assert inspect(bus, VIRTUAL_CALIBRATION).problems == ()


def test_on_a_terminal_the_table_is_rewritten_in_place_and_ctrl_d_leaves(raw, tmp_path):
    ours, theirs = pty.openpty()
    line = [COMMAND, "--port", raw.port, "--output", tmp_path / "arm.json"]
    process = subprocess.Popen(
        line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown = b""
    try:
        for text, answer in (
            (b"Then press ENTER.", b"\n"),
            (b"\x1b[7A   joint", b"\x04"),
            (b"nothing was changed", b""),
        ):
            until = time.monotonic() + 60
            while text not in shown:
                assert time.monotonic() < until, shown
                if select.select([ours], [], [], 0.1)[0]:
                    shown += os.read(ours, 65536)
            os.write(ours, answer)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_hiccup_during_the_sweep_costs_nothing_and_a_silent_servo_ends_it(raw, person, tmp_path):
    someone = person("--output", tmp_path / "arm.json")
    someone.wait_for("Then press ENTER.")
    someone.say()
    someone.wait_for("2. Move every joint")
    raw.inject("mute", 2, count=2)
    raw.inject("corrupt", 4, count=1)
    someone.move((300, -300))
    raw.inject("mute", 2, count=-1)
    someone.process.wait(60)
    assert someone.leave() == 2, someone.output
    assert "servo 2" in someone.output and "did not answer" in someone.output
    assert raw.writes() == []


def test_a_servo_that_stays_locked_is_told_and_the_file_is_kept_for_later(raw, person, tmp_path):
    raw.inject("lost_write", 2, count=-1, value=Register.LOCK.address)
    someone = person("--output", tmp_path / "arm.json")
    someone.sweep()
    someone.say("y")
    assert someone.leave() == 2
    assert "shoulder_lift (2) did not take Lock (55)" in someone.output
    assert f"--restore {tmp_path / 'arm.json'}" in someone.output
    assert [raw.registers(i)[Register.HOMING_OFFSET] for i in IDS[1:]] == [0] * 5
    raw.inject("lost_write", 2, count=0, value=Register.LOCK.address)
    again = person("--restore", tmp_path / "arm.json", "--yes")
    assert again.leave() == 0, again.output


def test_positions_that_do_not_follow_from_the_offset_are_told(virtual):
    # As with multi-turn feedback: the elbow is a turn away from where the arithmetic has it.
    virtual.force(ELBOW, Register.PRESENT_POSITION, 6106)
    wanted = {ELBOW: {Register.HOMING_OFFSET: -68}}
    with (
        FeetechBus(virtual.port) as bus,
        pytest.raises(ArmError, match=r"elbow_flex \(3\) reports position 6106"),
    ):
        write_calibration(bus, wanted)
