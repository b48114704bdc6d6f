"""What is found on an arm before anything is written to it."""

from __future__ import annotations

from dataclasses import dataclass

from .bus import BlockReading, FeetechBus
from .calibration import JOINT_NAMES, Calibration
from .errors import BusError, BusLost
from .sts3215 import MODEL_NUMBER, PHASE_MULTI_TURN, Register, error_names

IDS = tuple(range(1, len(JOINT_NAMES) + 1))
# A joint may rest a little beyond its calibrated range: backlash, and stops that give.
OUT_OF_RANGE_TICKS = 50
ERROR_ADVICE = "Check supply, load and temperature, then power the arm off and on"


@dataclass(frozen=True)
class Findings:
    """`problems` forbid to energise the arm, `warnings` do not."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def joint_label(servo_id: int) -> str:
    """'elbow_flex (3)', as messages name a joint."""
    return f"{JOINT_NAMES[servo_id - 1]} ({servo_id})"


def inspect(bus: FeetechBus, calibration: Calibration) -> Findings:
    """Ask all six servos and compare them with the calibration. Only reads; BusLost when the port is gone."""
    problems: list[str] = []
    warnings: list[str] = []
    firmware: dict[str, str] = {}
    absent = []
    for servo_id in IDS:
        reply = bus.ping(servo_id)
        if reply is None:
            absent.append(servo_id)
            continue
        if reply.answers > 1:
            problems.append(f"{joint_label(servo_id)}: {reply.answers} servos share id {servo_id}")
        try:
            fixed = bus.read_block(servo_id, Register.FIRMWARE_MAJOR_VERSION, Register.VELOCITY_I)
            live = bus.read_block(servo_id, Register.TORQUE_ENABLE, Register.PRESENT_CURRENT)
        except BusLost:
            raise
        except BusError as error:
            problems.append(f"{joint_label(servo_id)}: {error}")
            continue
        if bits := reply.error | fixed.error | live.error:
            problems.append(f"{joint_label(servo_id)}: reports {', '.join(error_names(bits))}. {ERROR_ADVICE}")
        problems += [f"{joint_label(servo_id)}: {p}" for p in _servo_problems(servo_id, calibration, fixed, live)]
        if live.values[Register.TORQUE_ENABLE]:
            warnings.append(f"{joint_label(servo_id)} is energised already, until a run ends or its power is off")
        major, minor = (fixed.values[r] for r in (Register.FIRMWARE_MAJOR_VERSION, Register.FIRMWARE_MINOR_VERSION))
        firmware[joint_label(servo_id)] = f"{major}.{minor}"
    if absent:
        found = ", ".join(joint_label(i) for i in IDS if i not in absent) or "none"
        garbled = bus.counters.bad_checksums or bus.counters.stray_bytes
        problems.insert(
            0,
            f"no answer from {', '.join(map(joint_label, absent))} (found: {found}). "
            "Check power and the cable before the first one missing"
            + ("; bytes came garbled: two servos may share an id." if garbled else "."),
        )
    if len(set(firmware.values())) > 1:
        warnings.append(f"firmware differs: {', '.join(f'{n} {v}' for n, v in firmware.items())}")
    return Findings(tuple(problems), tuple(warnings))


def _servo_problems(servo_id: int, calibration: Calibration, fixed: BlockReading, live: BlockReading) -> list[str]:
    joint = calibration.joints[servo_id - 1]
    values = {**fixed.values, **live.values}
    model, mode = values[Register.MODEL_NUMBER], values[Register.OPERATING_MODE]
    if model != MODEL_NUMBER:
        # The other registers of another model mean something else.
        return [f"model {model}, expected {MODEL_NUMBER} (STS3215)"]
    problems = []
    if mode != 0:
        problems.append(f"Operating_Mode {mode}, expected 0 (position)")
    if values[Register.PHASE] & PHASE_MULTI_TURN:
        problems.append("multi-turn feedback is on (Phase bit 4); LeRobot 0.6 or later clears it")
    problems += [
        f"{register} is {values[register]} in the servo, {expected} in {calibration.source}. "
        "Give the calibration of this arm, or calibrate again"
        for register, expected in (
            (Register.HOMING_OFFSET, joint.homing_offset),
            (Register.MIN_POSITION_LIMIT, joint.range_min),
            (Register.MAX_POSITION_LIMIT, joint.range_max),
        )
        if values[register] != expected
    ]
    volt, low, high = (
        values[r] / 10 for r in (Register.PRESENT_VOLTAGE, Register.MIN_VOLTAGE_LIMIT, Register.MAX_VOLTAGE_LIMIT)
    )
    if not low <= volt <= high:
        problems.append(f"supply {volt} V, expected {low} to {high} V. Use the supply made for this servo")
    present = values[Register.PRESENT_POSITION]
    low_raw, high_raw = joint.range_min - OUT_OF_RANGE_TICKS, joint.range_max + OUT_OF_RANGE_TICKS
    if not low_raw <= present <= high_raw:
        problems.append(f"position {present}, expected {low_raw} to {high_raw}. Move it by hand")
    return problems
