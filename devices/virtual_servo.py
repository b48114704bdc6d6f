"""One virtual STS3215: its registers, its motion, and what it objects to.

Only as much of a servo as a host can see on the bus. Torque off means that it stands still, wherever it is.
"""

from __future__ import annotations

import math

from .calibration import JointCalibration
from .sts3215 import (
    FORBIDDEN_WRITES,
    NO_LOAD_TICKS_PER_S,
    PHASE_ZERO_SPEED_IS_MAX,
    TORQUE_ENABLE_RECENTRE,
    Register,
    decode,
    encode,
)

MEMORY_BYTES = 128
# Values of a 7.4 V servo where the vendor's table names no default.
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
# A goal counts as the present position within this many ticks.
SAME_TICKS = 5
# First address behind the EPROM, and the factory area, which is as lasting.
EPROM_END = 40
FACTORY_START = 80


class VirtualServo:
    """A servo calibrated as `joint` says; it starts in the middle of its range with torque off."""

    def __init__(self, servo_id: int, joint: JointCalibration) -> None:
        self.id = servo_id
        self.error = 0
        self._pending: tuple[int, bytes] | None = None
        self._memory = bytearray(MEMORY_BYTES)
        for register in Register:
            self.poke(register, VARIANT_VALUES.get(register, register.default or 0))
        self.poke(Register.ID, servo_id)
        self.poke(Register.HOMING_OFFSET, joint.homing_offset)
        self.poke(Register.MIN_POSITION_LIMIT, joint.range_min)
        self.poke(Register.MAX_POSITION_LIMIT, joint.range_max)
        self._lasting = bytes(self._memory)
        self._velocity = 0.0  # ticks/s
        self._position = 0.0  # ticks, after the homing offset
        self.poke(Register.PRESENT_POSITION, (joint.range_min + joint.range_max) // 2)

    @property
    def position(self) -> float:
        """Exact position, raw ticks."""
        return self._position

    def peek(self, register: Register) -> int:
        return decode(register, bytes(self._memory[register.address : register.end]))

    def poke(self, register: Register, value: int) -> None:
        """Set any register from outside, as no bus can; Present_Position moves the servo there."""
        self._memory[register.address : register.end] = encode(register, value)
        if register is Register.PRESENT_POSITION:
            self._position, self._velocity = float(value), 0.0

    def registers(self) -> dict[str, int]:
        """Every register by name."""
        return {register.name: self.peek(register) for register in Register}

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes from `address`; addresses that do not exist read 0."""
        return bytes(self._memory[address : address + size]).ljust(size, b"\0")

    def objections(self, address: int, data: bytes) -> list[str]:
        """What a careful host would not have written to this servo now."""
        written = {
            r: decode(r, data[r.address - address : r.end - address])
            for r in Register
            if address <= r.address and r.end <= address + len(data)
        }
        found = [f"write to {register}" for register in written if register in FORBIDDEN_WRITES]
        found += [f"write to read-only {register}" for register in written if not register.writable]
        energised = self.peek(Register.TORQUE_ENABLE) == 1
        if energised and (address < EPROM_END or address + len(data) > FACTORY_START):
            found.append(f"EPROM write at {address} while energised")
        torque = written.get(Register.TORQUE_ENABLE)
        if torque is not None and torque not in (0, 1):
            found.append(f"Torque_Enable set to {torque}")
        goal = written.get(Register.GOAL_POSITION, self.peek(Register.GOAL_POSITION))
        off_by = abs(goal - round(self._position))
        if torque == 1 and not energised and off_by > SAME_TICKS:
            found.append(f"torque on with goal {goal} at position {round(self._position)}")
        if Register.GOAL_POSITION in written and self._outside(goal) > self._outside(self._position) + SAME_TICKS:
            found.append(f"goal {goal} beyond the limits")
        return [f"servo {self.id}: {what}" for what in found]

    def write(self, address: int, data: bytes) -> None:
        """Take the bytes where registers are writable. EPROM bytes last only while Lock is 0."""
        torque = self.peek(Register.TORQUE_ENABLE)
        offset = self.peek(Register.HOMING_OFFSET)
        unlocked = self.peek(Register.LOCK) == 0
        lasting = bytearray(self._lasting)
        for register in Register:
            for at in range(max(address, register.address), min(address + len(data), register.end)):
                if not register.writable:
                    continue
                self._memory[at] = data[at - address]
                if register.area != "SRAM" and unlocked:
                    lasting[at] = data[at - address]
        self._lasting = bytes(lasting)
        if self.peek(Register.TORQUE_ENABLE) == TORQUE_ENABLE_RECENTRE:
            self.poke(Register.TORQUE_ENABLE, torque)
        # Present = actual - offset.
        self._position += offset - self.peek(Register.HOMING_OFFSET)

    def prepare(self, address: int, data: bytes) -> None:
        """Keep a write until `act`."""
        self._pending = (address, data)
        self.poke(Register.ASYNC_WRITE_FLAG, 1)

    def act(self) -> tuple[int, bytes] | None:
        """Hand out the kept write, once."""
        pending, self._pending = self._pending, None
        self.poke(Register.ASYNC_WRITE_FLAG, 0)
        return pending

    def reboot(self) -> None:
        """Lose power and come back: torque off, volatile registers as at power-up, goal at the position."""
        position = self._position
        offset = self.peek(Register.HOMING_OFFSET)
        self._memory[:] = self._lasting
        self._pending = None
        self._velocity = 0.0
        self._position = position + offset - self.peek(Register.HOMING_OFFSET)
        self.poke(Register.GOAL_POSITION, round(self._position))
        self.poke(Register.TORQUE_LIMIT, self.peek(Register.MAX_TORQUE_LIMIT))

    def advance(self, dt_s: float) -> None:
        """Move on by `dt_s` and bring the Present registers up to date."""
        energised = self.peek(Register.TORQUE_ENABLE) == 1 and self.peek(Register.TORQUE_LIMIT) > 0
        distance = self.peek(Register.GOAL_POSITION) - self._position if energised else 0.0
        speed_limit = float(abs(self.peek(Register.GOAL_VELOCITY)))
        if speed_limit == 0 and self.peek(Register.PHASE) & PHASE_ZERO_SPEED_IS_MAX:
            speed_limit = NO_LOAD_TICKS_PER_S
        speed_limit = min(speed_limit, NO_LOAD_TICKS_PER_S)
        # 0 means no limit; 254 is as good as none.
        acceleration = (self.peek(Register.ACCELERATION) or 254) * ACCELERATION_UNIT
        wanted = math.copysign(min(speed_limit, math.sqrt(2 * acceleration * abs(distance))), distance)
        gain = acceleration * dt_s
        self._velocity += min(gain, max(-gain, wanted - self._velocity))
        step = self._velocity * dt_s
        if not energised or (step * distance >= 0 and abs(step) >= abs(distance)):
            step, self._velocity = distance, 0.0
        self._position += step
        self._show(distance)

    def _show(self, distance: float) -> None:
        position = min(32767, max(-32767, round(self._position)))
        velocity = round(self._velocity)
        load = round(min(1000.0, max(-1000.0, 4 * distance)))
        limit = self.peek(Register.TORQUE_LIMIT)
        load = min(limit, max(-limit, load))
        for register, value in (
            (Register.PRESENT_POSITION, position),
            (Register.PRESENT_VELOCITY, velocity),
            (Register.PRESENT_LOAD, load),
            (Register.PRESENT_CURRENT, abs(load) // 4),
            (Register.MOVING, int(velocity != 0)),
            (Register.STATUS, self.error),
        ):
            self._memory[register.address : register.end] = encode(register, value)

    def _outside(self, ticks: float) -> float:
        """How far a position lies outside the limits, in ticks."""
        low, high = self.peek(Register.MIN_POSITION_LIMIT), self.peek(Register.MAX_POSITION_LIMIT)
        return max(low - ticks, ticks - high, 0.0)
