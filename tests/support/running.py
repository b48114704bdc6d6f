"""smolvla-run as a child process, on the virtual arm's port as on a real one."""

import subprocess
import sys
import time
from pathlib import Path

from smolvla_edge.devices.bus.sts3215 import Register

TASK = "Pick up the red cube and place it on the plate."
COMMAND = Path(sys.executable).with_name("smolvla-run")
SERVOS = range(1, 7)


# Where the tiny policy's training has the arm on average.
POSE = (1981, 1581, 2604, 2858, 883, 2086)
# Its weights are random: it asks for jumps of any size.
WILD = "[limits]\njump_deg = 360\n"


def real_port(arm, folder, tmp_path, *more):
    """The line a user types for a real arm, on the virtual one's port."""
    line = ["--bundle", folder, "--device", "cpu", "--port", arm.port, "--units", "degrees"]
    line += ["--calibration", tmp_path / "my_arm.json", "--task", TASK, "--allow-far-start"]
    for name, source in arm.camera_sources.items():
        line += ["--camera", f"{name}={source}"]
    return [str(x) for x in (COMMAND, *line, *more)]


def run(line, cwd, timeout=60):
    return subprocess.run(
        [str(x) for x in line], capture_output=True, text=True, cwd=cwd, timeout=timeout
    )


def assert_limp_and_unharmed(arm):
    assert [arm.registers(i)[Register.TORQUE_ENABLE] for i in SERVOS] == [0] * 6
    assert arm.violations() == []


def wait_for_goals(arm, process, count=40, limit_s=30.0):
    """Until the arm has been told to move `count` times."""
    until = time.monotonic() + limit_s
    while len(arm.goals()) < count * 6:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
