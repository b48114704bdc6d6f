"""Checks of an arm before anything is written to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...core.errors import BusError, BusLost
from ..bus.bus import FeetechBus
from ..bus.sts3215 import MODEL_NUMBER, PHASE_MULTI_TURN, Register, error_names
from .calibration import IDS, Calibration, joint_label
from .eeprom import configuration, differences

# A joint can rest a little outside its calibrated range: backlash, and soft stops.
OUT_OF_RANGE_TICKS = 50
ERROR_ADVICE = "Check supply, load and temperature, then power the arm off and on"
# Protection limits and baud rate. LeRobot leaves them at their factory values.
_FACTORY = (
    Register.BAUD_RATE,
    Register.MAX_TEMPERATURE_LIMIT,
    Register.MAX_TORQUE_LIMIT,
    Register.UNLOADING_CONDITION,
    Register.PROTECTION_CURRENT,
    Register.PROTECTIVE_TORQUE,
    Register.PROTECTION_TIME,
    Register.OVERLOAD_TORQUE,
)


@dataclass(frozen=True)
class Findings:
    """`problems` forbid to energise the arm, `warnings` do not.

    values: {id: registers 0 to 70} of every servo that answered.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    values: Mapping[int, Mapping[Register, int]]


def inspect(bus: FeetechBus, calibration: Calibration | None) -> Findings:
    """Read all six servos and compare them with the calibration. BusLost when the port is gone.

    calibration None: the EPROM is about to be written. Its values are not judged, but the arm must
    be limp.
    """
    problems: list[str] = []
    values: dict[int, Mapping[Register, int]] = {}
    absent = []
    for servo_id in IDS:
        reply = bus.ping(servo_id)
        if reply is None:
            absent.append(servo_id)
            continue
        error, answers = reply
        found = [f"{answers} servos share id {servo_id}"] if answers > 1 else []
        try:
            fixed = bus.read_block(servo_id, Register.FIRMWARE_MAJOR_VERSION, Register.VELOCITY_I)
            live = bus.read_block(servo_id, Register.TORQUE_ENABLE, Register.PRESENT_CURRENT)
        except BusLost:
            raise
        except BusError as silent:
            found.append(str(silent))
        else:
            values[servo_id] = {**fixed.values, **live.values}
            if bits := error | fixed.error | live.error | live.values[Register.STATUS]:
                found.append(f"reports {', '.join(error_names(bits))}. {ERROR_ADVICE}")
            found += _servo_problems(servo_id, values[servo_id], calibration)
        problems += [f"{joint_label(servo_id)}: {problem}" for problem in found]
    if absent:
        answered = ", ".join(joint_label(i) for i in IDS if i not in absent) or "none"
        garbled = bus.counters["bad_checksums"] or bus.counters["stray_bytes"]
        hint = "; bytes came garbled: two servos may share an id." if garbled else "."
        missing = f"no answer from {', '.join(map(joint_label, absent))} (found: {answered})"
        problems.insert(
            0, f"{missing}. Check power and the cable before the first one missing{hint}"
        )
    energised = [joint_label(i) for i, v in values.items() if v[Register.TORQUE_ENABLE]]
    on = [
        f"{label} is energised already, until a run ends or its power is off" for label in energised
    ]
    known = {i: v for i, v in values.items() if v[Register.MODEL_NUMBER] == MODEL_NUMBER}
    warnings = list(_warnings(known))
    if calibration is None:
        return Findings((*problems, *on), tuple(warnings), values)
    changes = differences(known, {i: configuration(i, v) for i, v in known.items()})
    if changes:
        names = ", ".join(dict.fromkeys(str(change.register) for change in changes))
        warnings.append(
            f"EPROM is not as LeRobot sets it up: {names}. --write-eeprom writes it, once"
        )
    return Findings(tuple(problems), (*on, *warnings), values)


def _warnings(values: Mapping[int, Mapping[Register, int]]) -> Iterator[str]:
    major, minor = Register.FIRMWARE_MAJOR_VERSION, Register.FIRMWARE_MINOR_VERSION
    firmware = {i: f"{v[major]}.{v[minor]}" for i, v in values.items()}
    if len(set(firmware.values())) > 1:
        yield f"firmware differs: {', '.join(f'{joint_label(i)} {v}' for i, v in firmware.items())}"
    if silent := [
        joint_label(i) for i, v in values.items() if v[Register.RESPONSE_STATUS_LEVEL] == 0
    ]:
        yield f"writes are not acknowledged by {', '.join(silent)}; they are read back instead"
    odd = [
        f"{joint_label(i)} {register} {v[register]}, not {register.default}"
        for i, v in values.items()
        for register in _FACTORY
        if v[register] != register.default and register not in configuration(i, v)
    ]
    if odd:
        yield f"set otherwise than in the factory: {'; '.join(odd)}"


def _servo_problems(
    servo_id: int, values: Mapping[Register, int], calibration: Calibration | None
) -> list[str]:
    if (model := values[Register.MODEL_NUMBER]) != MODEL_NUMBER:
        # The other registers of another model mean something else.
        return [f"model {model}, expected {MODEL_NUMBER} (STS3215)"]
    problems = []
    volt, low, high = (
        values[r] / 10
        for r in (Register.PRESENT_VOLTAGE, Register.MIN_VOLTAGE_LIMIT, Register.MAX_VOLTAGE_LIMIT)
    )
    if not low <= volt <= high:
        problems.append(
            f"supply {volt} V, expected {low} to {high} V. Use the supply made for this servo"
        )
    if calibration is None:
        return problems
    joint = calibration.joints[servo_id - 1]
    if mode := values[Register.OPERATING_MODE]:
        problems.append(f"Operating_Mode {mode}, expected 0 (position). Try --write-eeprom")
    if values[Register.PHASE] & PHASE_MULTI_TURN:
        problems.append("multi-turn feedback is on (Phase bit 4). Clear it with --write-eeprom")
    problems += [
        f"{register} is {values[register]} in the servo, {expected} in {calibration.source}. "
        "Give the calibration of this arm, calibrate again, or write this one with "
        "smolvla-calibrate --restore"
        for register, expected in joint.registers.items()
        if values[register] != expected
    ]
    present = values[Register.PRESENT_POSITION]
    low_raw, high_raw = joint.range_min - OUT_OF_RANGE_TICKS, joint.range_max + OUT_OF_RANGE_TICKS
    if not low_raw <= present <= high_raw:
        problems.append(f"position {present}, expected {low_raw} to {high_raw}. Move it by hand")
    return problems
