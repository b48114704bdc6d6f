"""Find homing offsets and ranges while a person moves the limp arm, and write them.

The encoder is a circle of 4096 ticks: Present = encoder - Homing_Offset, modulo a turn. Readings
are followed around the circle, so the seam from 4095 to 0 may lie inside the travel. The new offset
puts the middle of the travel at 2047, so the seam is as far outside as possible. A wrist that turns
all the way has no middle: as with LeRobot, the middle is where the person put it, and its range is
the full turn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from ...core.errors import ArmError, CalibrationError, listed
from ..bus.bus import FeetechBus
from ..bus.sts3215 import ENCODER_MAX, TICKS_PER_TURN, Register
from .calibration import (
    IDS,
    JOINT_NAMES,
    MAX_OFFSET,
    MIN_SPAN,
    Calibration,
    JointCalibration,
    joint_label,
)
from .eeprom import Change, write_differences

MIDDLE = ENCODER_MAX // 2
FULL_TURN_JOINT = "wrist_roll"
# A longer step could also be a shorter one in the other direction.
LONGEST_STEP = TICKS_PER_TURN // 4
# A limp arm sinks a little between two readings.
AT_REST_TICKS = 50
SETTLE_S = 0.1


@dataclass
class Travel:
    """The path of one joint, in ticks without a seam. Its first position counts as 2047.

    encoder: its last reading, 0 to 4095.
    """

    encoder: int
    position: int = MIDDLE
    low: int = MIDDLE
    high: int = MIDDLE

    def follow(self, encoder: int) -> None:
        """Take the next reading. CalibrationError if the step is too long to know its direction."""
        step = _around(encoder - self.encoder)
        if abs(step) > LONGEST_STEP:
            raise CalibrationError(
                f"moved {step} ticks between two readings, expected {LONGEST_STEP} at most"
            )
        self.encoder = encoder
        self.position += step
        self.low, self.high = min(self.low, self.position), max(self.high, self.position)

    def calibration(self, servo_id: int) -> JointCalibration:
        """Offset and range from the travel so far. CalibrationError if the travel is too short or a
        full turn.
        """
        full_turn = JOINT_NAMES[servo_id - 1] == FULL_TURN_JOINT
        span = self.high - self.low
        if not full_turn and not MIN_SPAN <= span < ENCODER_MAX - 1:
            raise CalibrationError(
                f"moved {span} ticks, expected {MIN_SPAN} or more, and less than a turn (4096)"
            )
        middle = MIDDLE if full_turn else (self.low + self.high) // 2
        encoder = self.encoder + middle - self.position
        # -2048 does not fit into the register. One tick beside the middle does no harm.
        offset = max(-MAX_OFFSET, _around(encoder - MIDDLE))
        shift = (encoder - offset) % TICKS_PER_TURN - middle
        low, high = (0, ENCODER_MAX) if full_turn else (self.low + shift, self.high + shift)
        return JointCalibration(servo_id, 0, offset, low, high)


class Sweep:
    """Follows all six joints from their first position. BusError if a servo does not answer."""

    def __init__(self, bus: FeetechBus) -> None:
        self._bus = bus
        self._offsets = {i: bus.read(i, Register.HOMING_OFFSET).value for i in IDS}
        self.travels = [Travel(encoder) for encoder in self._encoders()]

    def follow(self) -> None:
        """Read all joints once. CalibrationError names a joint that moved too fast."""
        for servo_id, travel, encoder in zip(IDS, self.travels, self._encoders(), strict=True):
            try:
                travel.follow(encoder)
            except CalibrationError as error:
                raise CalibrationError(
                    f"{joint_label(servo_id)} {error}. Start again, slower."
                ) from error

    def calibration(self, source: str) -> Calibration:
        """The calibration. CalibrationError lists the joints that moved too little or too far."""
        joints, problems = [], []
        for servo_id, travel in zip(IDS, self.travels, strict=True):
            try:
                joints.append(travel.calibration(servo_id))
            except CalibrationError as error:
                problems.append(f"{joint_label(servo_id)} {error}")
        if problems:
            raise CalibrationError(
                listed("move every joint from stop to stop. Start again:", problems)
            )
        return Calibration(tuple(joints), source)

    def _encoders(self) -> list[int]:
        register = Register.PRESENT_POSITION
        blocks = self._bus.sync_read(IDS, register)
        present = (
            blocks[i].values[register] if i in blocks else self._bus.read(i, register).value
            for i in IDS
        )
        return [(p + self._offsets[i]) % TICKS_PER_TURN for i, p in zip(IDS, present, strict=True)]


def write_calibration(
    bus: FeetechBus, wanted: Mapping[int, Mapping[Register, int]]
) -> list[Change]:
    """`write_differences`, then a check that the servos report the expected positions.

    The arm must not move. ArmError lists each servo that reports another position.
    """
    before = {
        i: bus.read_block(i, Register.HOMING_OFFSET, Register.PRESENT_POSITION).values
        for i in wanted
    }
    changes = write_differences(bus, wanted)
    time.sleep(SETTLE_S)
    problems = []
    for servo_id, values in before.items():
        encoder = values[Register.PRESENT_POSITION] + values[Register.HOMING_OFFSET]
        expected = (encoder - wanted[servo_id][Register.HOMING_OFFSET]) % TICKS_PER_TURN
        present = bus.read(servo_id, Register.PRESENT_POSITION).value
        on_scale = -AT_REST_TICKS <= present <= ENCODER_MAX + AT_REST_TICKS
        if abs(_around(present - expected)) > AT_REST_TICKS or not on_scale:
            problems.append(
                f"{joint_label(servo_id)} reports position {present}, expected {expected}"
            )
    if problems:
        head = (
            "the calibration was written, but the positions do not match it. Did the arm move? "
            "Switch its power off and on, then try again:"
        )
        raise ArmError(listed(head, problems))
    return changes


def _around(ticks: int) -> int:
    """The shorter way around the circle: -2048 to 2047."""
    return (ticks + TICKS_PER_TURN // 2) % TICKS_PER_TURN - TICKS_PER_TURN // 2
