"""smolvla-calibrate: homing offsets and ranges of an arm that is moved by hand. Its motors are never switched on.

Nothing is written, to the servos or to a file, before the person has seen it and agreed. Input is lines, so a pipe
can stand in for the person; its end, like Ctrl-C, leaves everything as it was.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

import typer

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

app = command.new_app()


@app.command()
def calibrate(
    port: str = typer.Option("auto", help="Serial port of the arm, or auto."),
    robot_id: str | None = typer.Option(
        None, "--id", metavar="NAME", help="Save in LeRobot's folder under this id."
    ),
    output: Path | None = typer.Option(
        None, metavar="FILE.json", help="Save in this file instead."
    ),
    restore: str | None = typer.Option(
        None, metavar="FILE_OR_ID", help="Write this calibration to servos that lost theirs."
    ),
    yes: bool = typer.Option(False, "--yes", help="Write without asking."),
    force: bool = typer.Option(
        False, "--force", help="Overwrite a calibration file that is there."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Calibrate an SO-101 arm by hand, and set its servos up as LeRobot does.

    Exit status: 0 done, 2 something is wrong, 130 interrupted or declined.
    """
    command.terminate_like_interrupt()
    if sum(given is not None for given in (robot_id, output, restore)) != 1:
        raise SettingsError(
            "give one of --id NAME, --output FILE.json (where to save) and --restore FILE_OR_ID"
        )
    path = output if robot_id is None else calibration_path(robot_id)
    if path is not None and path.exists() and not force:
        raise SettingsError(
            f"{path} is there already: give another name, or --force to overwrite it"
        )
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
        # Half a calibration is none, and writing takes half a second. Blocked, a signal would reach another thread.
        for number in command.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if path is not None:
            # First: a disk can fail before a servo is changed, and --restore finishes what a servo refused.
            calibration.save(path)
            print(f"saved {path}; --restore {path} writes it to the servos again", flush=True)
        print(f"{len(write_calibration(bus, wanted))} EPROM registers written", flush=True)
        if problems := inspect(bus, calibration).problems:
            raise ArmError(
                listed("the calibration was written, but the arm is not ready:", problems)
            )
    print(f"done: smolvla-run --port {port} --calibration {robot_id or output or restore}")


def _agreed(
    bus: FeetechBus, known: Calibration | None, path: Path | None, yes: bool
) -> tuple[Calibration, dict[int, dict[Register, int]]]:
    """The calibration, `known` or from a sweep, and what the person agreed to have in the EPROM of each servo."""
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
            "note: a servo that was replaced, or taken off its horn, stands at another angle now: calibrate anew."
        )
    if (changes or path) and not yes:
        to_file = f" and to {path}" if path else ""
        if _ask(f"\nHands off the arm. Type y and press ENTER to write this{to_file}:") not in (
            "y",
            "yes",
        ):
            raise KeyboardInterrupt
    return calibration, wanted


def _sweep(bus: FeetechBus, source: str) -> Calibration:
    _ask(
        "The motors are off and stay off: you move the arm. Nothing is written before you agree.\n"
        "1. Place every joint about the middle of its travel, the gripper half open. Have the wrist straight: where\n"
        f"   {FULL_TURN_JOINT} is now becomes its middle. Then press ENTER."
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
    """The next line of input, or None when none begins within `wait_s`. KeyboardInterrupt at the end of the input."""
    if not select.select([0], [], [], wait_s)[0]:
        return None
    line = b""
    while not line.endswith(b"\n"):
        # Straight from the descriptor, and no more than the line: select does not see what a file object holds back.
        byte = os.read(0, 1)
        if not byte:
            raise KeyboardInterrupt
        line += byte
    return line.decode(errors="replace").strip().lower()


def main() -> None:
    """Entry point of `smolvla-calibrate`."""
    command.require_linux()
    command.run(app)
