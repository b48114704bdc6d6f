"""The dialogue of smolvla-calibrate: a person moves the arm by hand while its motors are off.

Nothing is written to a servo or a file before the person agrees. The input is lines, so it can be a
pipe. The end of the input, like Ctrl-C, leaves everything as it was.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

from ...core import command
from ...core.errors import ArmError, SettingsError, listed
from ...devices.arm.calibration import (
    IDS,
    JOINT_NAMES,
    Calibration,
    calibration_path,
    load_calibration,
)
from ...devices.arm.eeprom import configuration, differences
from ...devices.arm.homing import FULL_TURN_JOINT, Sweep, write_calibration
from ...devices.arm.inspection import inspect
from ...devices.bus.bus import FeetechBus
from ...devices.bus.port import find_port
from ...devices.bus.sts3215 import TICKS_PER_TURN, Register

READ_PERIOD_S = 0.02
TERMINAL_PERIOD_S, LOG_PERIOD_S = 0.1, 1.0


def calibrate_arm(
    port: str,
    robot_id: str | None,
    output: Path | None,
    restore: str | None,
    yes: bool,
    force: bool,
) -> str:
    """Write a calibration to the servos: from a sweep, or the saved one `restore` (file or id).

    A sweep is saved in `output`, or in LeRobot's folder under `robot_id`. Exactly one of the three
    is given. Returns the port that was used. Raises DeviceError, SettingsError if the file exists,
    KeyboardInterrupt if the person declines.
    """
    path = output if robot_id is None else calibration_path(robot_id)
    if path is not None and path.exists() and not force:
        raise SettingsError(f"{path} exists already: give another name, or --force to overwrite it")
    known = None if restore is None else load_calibration(restore)
    if port == "auto":
        port, reason = find_port()
        print(reason)
    with FeetechBus(port) as bus:
        try:
            calibration, wanted = _agreed(bus, known, path, yes)
        except KeyboardInterrupt:
            print("nothing was changed: servos and files are as they were", flush=True)
            raise
        # A calibration must be written completely, which takes half a second: ignore signals.
        # A blocked signal would go to another thread.
        for number in command.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if path is not None:
            # Save first: a full disk must fail before a servo is changed. --restore can write the
            # file to a servo that refused it.
            calibration.save(path)
            print(f"saved {path}; --restore {path} writes it to the servos again", flush=True)
        print(f"{len(write_calibration(bus, wanted))} EPROM registers written", flush=True)
        problems = inspect(bus, calibration).problems
        if problems:
            raise ArmError(
                listed("the calibration was written, but the arm is not ready:", problems)
            )
    return port


def _agreed(
    bus: FeetechBus, known: Calibration | None, path: Path | None, yes: bool
) -> tuple[Calibration, dict[int, dict[Register, int]]]:
    """Show the changes and ask. Returns the calibration and {id: {register: EPROM value}}."""
    findings = inspect(bus, None)
    for warning in findings.warnings:
        print(f"warning: {warning}")
    if findings.problems:
        raise ArmError(
            listed(f"the arm on {bus.path} is refused, nothing was written:", findings.problems)
        )
    calibration = known or _sweep(bus, str(path))
    print(f"\n   {'joint':<14} {'offset':>6} {'min':>6} {'max':>6} {'degrees':>8}")
    for name, joint in zip(JOINT_NAMES, calibration.joints, strict=True):
        low, high = joint.range_min, joint.range_max
        span_deg = (high - low) * 360 / TICKS_PER_TURN
        print(f"   {name:<14} {joint.homing_offset:>6} {low:>6} {high:>6} {span_deg:>8.0f}")
    wanted = {
        i: configuration(i, findings.values[i]) | calibration.joints[i - 1].registers for i in IDS
    }
    changes = differences(findings.values, wanted)
    print(
        "\nchanges in the servos' EPROM:",
        *(map(str, changes) if changes else ["none"]),
        sep="\n   ",
    )
    if known:
        print(
            "note: if a servo was replaced or taken off its horn, its angle has changed: "
            "calibrate anew."
        )
    if (changes or path) and not yes:
        to_file = f" and to {path}" if path else ""
        answer = _ask(f"\nHands off the arm. Type y and press ENTER to write this{to_file}:")
        if answer not in ("y", "yes"):
            raise KeyboardInterrupt
    return calibration, wanted


def _sweep(bus: FeetechBus, source: str) -> Calibration:
    _ask(
        "The motors are off and stay off. You move the arm. Nothing is written before you agree.\n"
        "1. Move every joint to about the middle of its travel. Open the gripper halfway.\n"
        f"   Hold the wrist straight: the middle of {FULL_TURN_JOINT} is where it is now.\n"
        "   Then press ENTER."
    )
    sweep = Sweep(bus)
    print(
        f"2. Move every joint but {FULL_TURN_JOINT} slowly from stop to stop. Then press ENTER.",
        flush=True,
    )
    rewrite = sys.stdout.isatty()
    back, next_s = "", 0.0
    while _line(READ_PERIOD_S) is None:
        sweep.follow()
        if time.monotonic() >= next_s:
            rows = [f"   {'joint':<14} {'min':>6} {'now':>6} {'max':>6}"]
            for name, t in zip(JOINT_NAMES, sweep.travels, strict=True):
                rows.append(f"   {name:<14} {t.low:>6} {t.position:>6} {t.high:>6}")
            print(back + "\n".join(rows), flush=True)
            back = f"\x1b[{len(rows)}A" if rewrite else ""
            next_s = time.monotonic() + (TERMINAL_PERIOD_S if rewrite else LOG_PERIOD_S)
    return sweep.calibration(source)


def _ask(prompt: str) -> str:
    print(prompt, flush=True)
    return _line(None) or ""


def _line(wait_s: float | None) -> str | None:
    """The next line of input; None if no line begins within `wait_s`.

    Raises KeyboardInterrupt at the end of the input.
    """
    if not select.select([0], [], [], wait_s)[0]:
        return None
    line = b""
    while not line.endswith(b"\n"):
        # One byte at a time from the descriptor: select does not see what a file object buffers.
        byte = os.read(0, 1)
        if not byte:
            raise KeyboardInterrupt
        line += byte
    return line.decode(errors="replace").strip().lower()
