"""One virtual STS3215: its registers, its motion, and what it objects to.

Only as much of a servo as a host can see on the bus. Torque off means that it stands still, wherever it is.

What nobody has proven on a real servo is assumed here as everybody does: the firmware clamps goals to the
position limits (the register keeps what was written), and Present_Position is angle - Homing_Offset modulo a turn,
as LeRobot's users report (its #3373, #3587).
"""

from __future__ import annotations

import math
from collections.abc import Collection

from .calibration import JointCalibration
from .eeprom import configuration
from .sts3215 import FORBIDDEN_WRITES, NO_LOAD_TICKS_PER_S, TICKS_PER_TURN, Register, decode, encode

MEMORY_BYTES = 128
# Values of a 7.4 V servo where the vendor's table names no default; the rest is as LeRobot sets it up.
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
# A crude motor. Moving freely it needs duty for its speed (25 % at 90 deg/s, at most half of what it may) and
# little current against its own voltage (0.3 A). Blocked it pushes in proportion to the error, fully from 9
# degrees on, and draws what its coil lets through: 3.9 A (600 units of 6.5 mA) at full duty, above the 3.25 A of
# a default Protection_Current. It has no weight to hold.
FREE_LOAD_PER_TICK_S, FREE_LOAD_SHARE, FREE_CURRENT_PER_LOAD = 250 / 1024, 0.5, 0.2
BLOCKED_LOAD_PER_TICK, BLOCKED_CURRENT_PER_LOAD = 10, 0.6


class VirtualServo:
    """A servo calibrated as `joint` says; it starts at `pose` (raw ticks) with torque off.

    error: its ERROR byte. stuck: blocked. max_step: how far a goal may lie from the one before while it is on,
    in ticks.
    """

    def __init__(self, servo_id: int, joint: JointCalibration, pose: int) -> None:
        self.id = servo_id
        self.max_step, self.stuck, self.error = math.inf, False, 0
        self._forced: dict[Register, bytes] = {}
        self._memory = bytearray(MEMORY_BYTES)
        values = VARIANT_VALUES | configuration(servo_id, VARIANT_VALUES) | joint.registers | {Register.ID: servo_id}
        for register in Register:
            self.set_register(register, values.get(register, register.default or 0))
        self._lasting = bytearray(self._memory)
        self._velocity = 0.0  # ticks/s
        self._angle = 0.0  # of the shaft, ticks; the encoder shows it modulo a turn
        self._last_goal = 0  # the one that was sent, even if it was lost
        self.set_register(Register.PRESENT_POSITION, pose)

    @property
    def position(self) -> float:
        """Exact position, raw ticks."""
        return (self._angle - self.peek(Register.HOMING_OFFSET)) % TICKS_PER_TURN

    def peek(self, register: Register) -> int:
        return decode(register, bytes(self._memory[register.address : register.end]))

    def set_register(self, register: Register, value: int) -> None:
        """Set any register from outside, as no bus can; Present_Position moves the servo there."""
        self._memory[register.address : register.end] = encode(register, value)
        if register is Register.PRESENT_POSITION:
            self._angle, self._velocity = float(value + self.peek(Register.HOMING_OFFSET)), 0.0
            self._show(0.0)
        if register is Register.GOAL_POSITION:
            self._last_goal = value

    def force(self, register: Register, value: int | None) -> None:
        """What the bus reads of a register from now on, whatever it holds; None for the truth again."""
        self._forced.pop(register, None)
        if value is not None:
            self._forced[register] = encode(register, value)

    def registers(self) -> dict[Register, int]:
        """Every register as it is: nothing forced."""
        return {register: self.peek(register) for register in Register}

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes from `address`; addresses that do not exist read 0."""
        shown = bytearray(self._memory)
        for register, data in self._forced.items():
            shown[register.address : register.end] = data
        return bytes(shown[address : address + size]).ljust(size, b"\0")

    def touched(self, address: int, data: bytes) -> dict[Register, int]:
        """Every register that a write reaches, with the value it would have then."""
        after = bytearray(self._memory)
        after[address : address + len(data)] = data
        return {
            r: decode(r, bytes(after[r.address : r.end]))
            for r in Register
            if address < r.end and r.address < address + len(data)
        }

    def objections(self, address: int, data: bytes) -> list[str]:
        """What a careful host would not have written to this servo now."""
        written = self.touched(address, data)
        found = [] if written else [f"write to no known register at {address}"]
        found += [f"write to {register}" for register in written if register in FORBIDDEN_WRITES]
        found += [f"write to read-only {register}" for register in written if not register.writable]
        energised = self.peek(Register.TORQUE_ENABLE) == 1
        if energised and any(register.area == "EPROM" for register in written):
            found.append(f"EPROM write at {address} while energised")
        torque = written.get(Register.TORQUE_ENABLE)
        if torque is not None and torque not in (0, 1):
            found.append(f"Torque_Enable set to {torque}")
        goal = written.get(Register.GOAL_POSITION, self.peek(Register.GOAL_POSITION))
        off_by = abs(goal - round(self.position))
        if torque == 1 and not energised and off_by > SAME_TICKS:
            found.append(f"torque on with goal {goal} at position {round(self.position)}")
        if Register.GOAL_POSITION in written:
            if self._outside(goal) > self._outside(self.position) + SAME_TICKS:
                found.append(f"goal {goal} beyond the limits")
            # A goal at the present position unloads a servo: no jump, however far the last goal was.
            if energised and abs(goal - self._last_goal) > self.max_step and off_by > SAME_TICKS:
                found.append(f"goal {goal} after {self._last_goal}: a step of more than {self.max_step:.0f}")
        return [f"servo {self.id}: {what}" for what in found]

    def write(self, address: int, data: bytes, lost: Collection[Register] = ()) -> None:
        """Take the bytes where registers are writable and not `lost`. EPROM bytes last only while Lock is 0."""
        unlocked = self.peek(Register.LOCK) == 0
        written = self.touched(address, data)
        self._last_goal = written.get(Register.GOAL_POSITION, self._last_goal)
        for register, value in written.items():
            if register.writable and register not in lost:
                place = slice(register.address, register.end)
                self._memory[place] = encode(register, value)
                if register.area == "EPROM" and unlocked:
                    self._lasting[place] = self._memory[place]

    def reboot(self) -> None:
        """Lose power and come back: torque off, volatile registers as at power-up, goal at the position."""
        self._memory[:] = self._lasting
        self._velocity = 0.0
        self._show(0.0)
        self.set_register(Register.GOAL_POSITION, self.peek(Register.PRESENT_POSITION))
        self.set_register(Register.TORQUE_LIMIT, self.peek(Register.MAX_TORQUE_LIMIT))

    def advance(self, dt_s: float) -> None:
        """Move on by `dt_s` and bring the Present registers up to date."""
        energised = self.peek(Register.TORQUE_ENABLE) == 1 and self.peek(Register.TORQUE_LIMIT) > 0
        goal = self.peek(Register.GOAL_POSITION)
        low, high = self.peek(Register.MIN_POSITION_LIMIT), self.peek(Register.MAX_POSITION_LIMIT)
        if low < high:
            goal = min(high, max(low, goal))
        distance = goal - self.position if energised else 0.0
        speed_limit = min(abs(self.peek(Register.GOAL_VELOCITY)), NO_LOAD_TICKS_PER_S)
        # 0 means no limit; 254 is as good as none.
        acceleration = (self.peek(Register.ACCELERATION) or 254) * ACCELERATION_UNIT
        wanted = math.copysign(min(speed_limit, math.sqrt(2 * acceleration * abs(distance))), distance)
        gain = acceleration * dt_s
        self._velocity += min(gain, max(-gain, wanted - self._velocity))
        step = self._velocity * dt_s
        if not energised or (step * distance >= 0 and abs(step) >= abs(distance)):
            step, self._velocity = distance, 0.0
        if self.stuck:
            step, self._velocity = 0.0, 0.0
        self._angle += step
        self._show(distance)

    def _show(self, distance: float) -> None:
        """Bring the Present registers up to date; `distance` ticks are left to the goal."""
        velocity = round(self._velocity)
        limit = min(1000, self.peek(Register.TORQUE_LIMIT)) * (1 if self.stuck else FREE_LOAD_SHARE)
        load = distance * BLOCKED_LOAD_PER_TICK if self.stuck else velocity * FREE_LOAD_PER_TICK_S
        load = round(min(limit, max(-limit, load)))
        current = abs(load) * (BLOCKED_CURRENT_PER_LOAD if self.stuck else FREE_CURRENT_PER_LOAD)
        for register, value in (
            (Register.PRESENT_POSITION, round(self.position) % TICKS_PER_TURN),
            (Register.PRESENT_VELOCITY, velocity),
            (Register.PRESENT_LOAD, load),
            (Register.PRESENT_CURRENT, round(current)),
            (Register.MOVING, int(velocity != 0)),
            (Register.STATUS, self.error),
        ):
            self._memory[register.address : register.end] = encode(register, value)

    def _outside(self, ticks: float) -> float:
        """How far a position lies outside the limits, in ticks."""
        low, high = self.peek(Register.MIN_POSITION_LIMIT), self.peek(Register.MAX_POSITION_LIMIT)
        return max(low - ticks, ticks - high, 0.0)
