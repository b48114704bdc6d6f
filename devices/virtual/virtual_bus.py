"""Virtual servos behind one protocol: request bytes in, answer bytes out. No port, no clock.

A virtual servo has what a host can see of an STS3215 on the bus. Without torque it stands still.
Two facts are assumed, because nobody has shown them on a real servo: the firmware clamps goals to
the position limits (the register keeps the written value), and Present_Position is angle -
Homing_Offset modulo a turn, as LeRobot's users report (its #3373, #3587).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from ...core.errors import BusError
from ..arm.calibration import Calibration, JointCalibration
from ..arm.eeprom import configuration
from ..bus import frames
from ..bus.frames import Instruction
from ..bus.sts3215 import NO_LOAD_TICKS_PER_S, TICKS_PER_TURN, Register, decode, encode

LONGEST_STEP_S = 0.01
MEMORY_BYTES = 128
# Values of a 7.4 V servo without a default in the vendor's table. LeRobot sets the others.
VARIANT_VALUES = {
    Register.FIRMWARE_MAJOR_VERSION: 3,
    Register.FIRMWARE_MINOR_VERSION: 10,
    Register.MAX_VOLTAGE_LIMIT: 80,
    Register.MIN_VOLTAGE_LIMIT: 40,
    Register.PHASE: 12,
    Register.PRESENT_VOLTAGE: 74,
    Register.PRESENT_TEMPERATURE: 30,
}
ACCELERATION_UNIT = 100
# A simple motor without a load: duty in proportion to speed (25 % at 90 deg/s, at most half of the
# torque limit), and little current (0.3 A).
LOAD_PER_TICK_S, LOAD_SHARE, CURRENT_PER_LOAD = 250 / 1024, 0.5, 0.2


class VirtualServo:
    """A servo calibrated as `joint` says; it starts at `pose` (raw ticks) with torque off."""

    def __init__(self, joint: JointCalibration, pose: int) -> None:
        self.id = joint.id
        self._memory = bytearray(MEMORY_BYTES)
        values = (
            VARIANT_VALUES
            | configuration(self.id, VARIANT_VALUES)
            | joint.registers
            | {Register.ID: self.id}
        )
        for register in Register:
            self.set_register(register, values.get(register, register.default or 0))
        self.set_register(Register.PRESENT_POSITION, pose)

    @property
    def position(self) -> float:
        """Exact position, raw ticks: the angle of the shaft less the offset, modulo a turn."""
        return (self._angle - self.peek(Register.HOMING_OFFSET)) % TICKS_PER_TURN

    def peek(self, register: Register) -> int:
        return decode(register, bytes(self._memory[register.address : register.end]))

    def set_register(self, register: Register, value: int) -> None:
        """Set any register, as no host can. Present_Position moves the servo there."""
        self._memory[register.address : register.end] = encode(register, value)
        if register is Register.PRESENT_POSITION:
            self._angle, self._velocity = float(value + self.peek(Register.HOMING_OFFSET)), 0.0
            self._show(0.0, 0.0)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes from `address`; addresses that do not exist read 0."""
        return bytes(self._memory[address : address + size]).ljust(size, b"\0")

    def write(self, address: int, data: bytes) -> None:
        self._memory[address : address + len(data)] = data

    def advance(self, dt_s: float) -> None:
        """Move for `dt_s` and update the Present registers."""
        distance = self._distance()
        speed_limit = min(abs(self.peek(Register.GOAL_VELOCITY)), NO_LOAD_TICKS_PER_S)
        # 0 means no limit; 254 is as good as none.
        acceleration = (self.peek(Register.ACCELERATION) or 254) * ACCELERATION_UNIT
        wanted = math.copysign(
            min(speed_limit, math.sqrt(2 * acceleration * abs(distance))), distance
        )
        gain = acceleration * dt_s
        self._velocity += min(gain, max(-gain, wanted - self._velocity))
        step = self._velocity * dt_s
        if distance == 0 or (step * distance >= 0 and abs(step) >= abs(distance)):
            step, self._velocity = distance, 0.0
        self._angle += step
        load = LOAD_SHARE * min(1000, self.peek(Register.TORQUE_LIMIT))
        load = min(load, max(-load, self._velocity * LOAD_PER_TICK_S))
        self._show(load, abs(load) * CURRENT_PER_LOAD)

    def _distance(self) -> float:
        """Ticks to the goal, within the limits; 0 for a servo without torque."""
        if not (self.peek(Register.TORQUE_ENABLE) == 1 and self.peek(Register.TORQUE_LIMIT) > 0):
            return 0.0
        low, high = self.peek(Register.MIN_POSITION_LIMIT), self.peek(Register.MAX_POSITION_LIMIT)
        goal = self.peek(Register.GOAL_POSITION)
        return (min(high, max(low, goal)) if low < high else goal) - self.position

    def _show(self, load: float, current: float) -> None:
        """Update the Present registers. load: 0.1 %. current: units of 6.5 mA."""
        velocity = round(self._velocity)
        for register, value in (
            (Register.PRESENT_POSITION, round(self.position) % TICKS_PER_TURN),
            (Register.PRESENT_VELOCITY, velocity),
            (Register.PRESENT_LOAD, round(load)),
            (Register.PRESENT_CURRENT, round(current)),
            (Register.MOVING, int(velocity != 0)),
        ):
            self._memory[register.address : register.end] = encode(register, value)


def servos_at(
    calibration: Calibration,
    pose: Sequence[int] | None,
    make: Callable[[JointCalibration, int], VirtualServo] = VirtualServo,
) -> list[VirtualServo]:
    """The six servos at `pose`, [6] raw ticks; in the middle of each range if None."""
    pose = pose or [(joint.range_min + joint.range_max) // 2 for joint in calibration.joints]
    return [make(joint, at) for joint, at in zip(calibration.joints, pose, strict=True)]


class VirtualBus:
    """The servos on one line. The caller passes the time as `now_s`, in seconds."""

    def __init__(self, servos: Iterable[VirtualServo], now_s: float) -> None:
        self.servos = {servo.id: servo for servo in servos}
        self._parser = frames.instruction_parser()
        self._answers = b""
        self._now_s = now_s

    def advance(self, now_s: float) -> None:
        """Let the servos move up to `now_s`."""
        left = now_s - self._now_s
        self._now_s = now_s
        while left > 0:
            step = min(left, LONGEST_STEP_S)
            left -= step
            for servo in self.servos.values():
                servo.advance(step)

    def receive(self, data: bytes) -> None:
        """Take bytes from the host."""
        for frame in self._parser.feed(data):
            with suppress(IndexError, ValueError, BusError):  # malformed requests have no effect
                self._obey(frame)

    def due(self) -> bytes:
        """Answers since the last call."""
        data, self._answers = self._answers, b""
        return data

    def _obey(self, frame: frames.Frame) -> None:
        broadcast, params = frame.id == frames.BROADCAST_ID, frame.params
        addressed = [servo for servo in self.servos.values() if broadcast or servo.id == frame.id]
        if frame.code == Instruction.PING:
            for servo in addressed:
                self._answer(servo, b"")
        elif frame.code == Instruction.READ:
            address, size = params
            for servo in [] if broadcast else addressed:
                self._answer(servo, servo.read(address, size))
        elif frame.code == Instruction.WRITE:
            for servo in addressed:
                self._write(servo, params[0], params[1:])
                if not broadcast and servo.peek(Register.RESPONSE_STATUS_LEVEL):
                    self._answer(servo, b"")
        elif frame.code == Instruction.SYNC_READ:
            address, size = params[:2]
            for servo in [self.servos[i] for i in params[2:] if i in self.servos]:
                self._answer(servo, servo.read(address, size))
        elif frame.code == Instruction.SYNC_WRITE:
            address, size = params[:2]
            if len(params[2:]) % (size + 1):
                raise ValueError("length")
            for start in range(2, len(params), size + 1):
                if params[start] in self.servos:
                    self._write(
                        self.servos[params[start]], address, params[start + 1 : start + 1 + size]
                    )

    def _write(self, servo: VirtualServo, address: int, data: bytes) -> None:
        servo.write(address, data)

    def _answer(self, servo: VirtualServo, params: bytes) -> None:
        self._answers += frames.build(servo.id, 0, params)
