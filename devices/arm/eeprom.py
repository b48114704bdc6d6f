"""Writes to the servos' EPROM: only what differs, read back, and locked again.

EPROM wears out. LeRobot writes its whole configuration at every connect. Here, a second call writes
nothing. No other module writes EPROM registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...core.errors import ArmError, listed
from ..bus.bus import FeetechBus
from ..bus.sts3215 import MODEL_NUMBER, PHASE_MULTI_TURN, Register, encode
from .calibration import IDS, joint_label

# Source: lerobot 0.4.4 `SO101Follower.configure`. The gripper's limits keep its motor from burning
# while it holds something.
_EVERY_SERVO = {
    Register.RETURN_DELAY_TIME: 0,
    Register.P_COEFFICIENT: 16,
    Register.D_COEFFICIENT: 32,
    Register.I_COEFFICIENT: 0,
    Register.OPERATING_MODE: 0,
}
_GRIPPER = {
    Register.MAX_TORQUE_LIMIT: 500,
    Register.PROTECTION_CURRENT: 250,
    Register.OVERLOAD_TORQUE: 25,
}


@dataclass(frozen=True)
class Change:
    """One EPROM register that differs, or that differed and was written."""

    id: int
    register: Register
    had: int
    wanted: int

    def __str__(self) -> str:
        return f"{joint_label(self.id)}: {self.register} {self.had} -> {self.wanted}"


def configuration(servo_id: int, values: Mapping[Register, int]) -> dict[Register, int]:
    """The EPROM values that LeRobot sets on this servo, without the calibration.

    values: what the servo holds now. Phase keeps its value except bit 4 (LeRobot 0.6): with
    multi-turn feedback, positions leave 0 to 4095.
    """
    wanted = {**_EVERY_SERVO, Register.PHASE: values[Register.PHASE] & ~PHASE_MULTI_TURN}
    return wanted | _GRIPPER if servo_id == IDS[-1] else wanted


def differences(
    found: Mapping[int, Mapping[Register, int]], wanted: Mapping[int, Mapping[Register, int]]
) -> list[Change]:
    """What `write_differences` would write, in order of id and address.

    found, wanted: {id: {register: value}}.
    """
    return [
        Change(servo_id, register, found[servo_id][register], value)
        for servo_id, registers in sorted(wanted.items())
        for register, value in sorted(registers.items(), key=lambda item: item[0].address)
        if found[servo_id][register] != value
    ]


def write_differences(
    bus: FeetechBus, wanted: Mapping[int, Mapping[Register, int]]
) -> list[Change]:
    """Bring the EPROM registers of each servo to `wanted`, {id: {register: value}}.

    Returns every write. Nothing is written if a servo is energised, is no STS3215, or cannot hold a
    value. ArmError if a write does not take; every servo is locked again. A second call continues.
    """
    found = {
        i: bus.read_block(i, Register.FIRMWARE_MAJOR_VERSION, Register.LOCK).values for i in wanted
    }
    problems = []
    for servo_id, values in found.items():
        label, model = joint_label(servo_id), values[Register.MODEL_NUMBER]
        if model != MODEL_NUMBER:
            problems.append(f"{label}: model {model}, expected {MODEL_NUMBER}")
        if values[Register.TORQUE_ENABLE]:
            problems.append(f"{label} is energised. Support the arm, switch its power off and on")
        for register, value in wanted[servo_id].items():
            assert register.area == "EPROM", register
            try:
                encode(register, value)
            except ArmError as error:
                problems.append(f"{label}: {error}")
    if problems:
        raise ArmError(listed(f"the EPROM of the arm on {bus.path} was not written:", problems))
    changes = differences(found, wanted)
    for servo_id in dict.fromkeys(change.id for change in changes):
        try:
            # While Lock is 1, what is written is lost at power-off.
            write_verified(bus, servo_id, Register.LOCK, 0)
            for change in changes:
                if change.id == servo_id:
                    write_verified(bus, servo_id, change.register, change.wanted)
        finally:
            write_verified(bus, servo_id, Register.LOCK, 1)
    return changes


def write_verified(bus: FeetechBus, servo_id: int, register: Register, value: int) -> None:
    """Write, then read back. ArmError if the servo holds another value."""
    bus.write(servo_id, register, value)
    reads = bus.read(servo_id, register).value
    if reads != value:
        raise ArmError(
            f"{joint_label(servo_id)} did not take {register}: {value} was written, it reads "
            f"{reads}. Power the arm off and on, then try again."
        )
