"""The registers of the Feetech STS3215 servo.

Source: vendor sheet "Magnetic Encoded SMS & STS memory table 220328". Address and size agree with
the tables of LeRobot and rustypot, except at 24/25, which the vendor lists as two registers (never
written here).
"""

from __future__ import annotations

from enum import Enum

from ...core.errors import ArmError

MODEL_NUMBER = 777
TICKS_PER_TURN = 4096
ENCODER_MAX = TICKS_PER_TURN - 1
# About 50 rpm without load at 7.4 V.
NO_LOAD_TICKS_PER_S = 3400
PHASE_MULTI_TURN = 0x10


class Register(Enum):
    """The registers that are used here: (address, bytes, access, factory default, sign bit).

    EPROM is below address 40. A signed register is sign-magnitude, never two's complement: the sign
    bit, then the magnitude below it.
    """

    FIRMWARE_MAJOR_VERSION = (0, 1, "R", None, None)
    FIRMWARE_MINOR_VERSION = (1, 1, "R", None, None)
    MODEL_NUMBER = (3, 2, "R", 777, None)
    ID = (5, 1, "RW", 1, None)
    BAUD_RATE = (6, 1, "RW", 0, None)
    RETURN_DELAY_TIME = (7, 1, "RW", 250, None)
    RESPONSE_STATUS_LEVEL = (8, 1, "RW", 1, None)
    MIN_POSITION_LIMIT = (9, 2, "RW", 0, None)
    MAX_POSITION_LIMIT = (11, 2, "RW", 4095, None)
    MAX_TEMPERATURE_LIMIT = (13, 1, "RW", 70, None)
    MAX_VOLTAGE_LIMIT = (14, 1, "RW", None, None)
    MIN_VOLTAGE_LIMIT = (15, 1, "RW", None, None)
    MAX_TORQUE_LIMIT = (16, 2, "RW", 1000, None)
    PHASE = (18, 1, "RW", None, None)
    UNLOADING_CONDITION = (19, 1, "RW", 44, None)
    P_COEFFICIENT = (21, 1, "RW", 32, None)
    D_COEFFICIENT = (22, 1, "RW", 32, None)
    I_COEFFICIENT = (23, 1, "RW", 0, None)
    MINIMUM_STARTUP_FORCE = (24, 1, "RW", None, None)
    INTEGRAL_LIMIT = (25, 1, "RW", None, None)
    PROTECTION_CURRENT = (28, 2, "RW", 500, None)
    HOMING_OFFSET = (31, 2, "RW", 0, 11)
    OPERATING_MODE = (33, 1, "RW", 0, None)
    PROTECTIVE_TORQUE = (34, 1, "RW", 20, None)
    PROTECTION_TIME = (35, 1, "RW", 200, None)
    OVERLOAD_TORQUE = (36, 1, "RW", 80, None)
    VELOCITY_I = (39, 1, "RW", None, None)
    TORQUE_ENABLE = (40, 1, "RW", 0, None)
    ACCELERATION = (41, 1, "RW", 0, None)
    GOAL_POSITION = (42, 2, "RW", 0, 15)
    GOAL_TIME = (44, 2, "RW", 0, None)
    GOAL_VELOCITY = (46, 2, "RW", 0, 15)
    TORQUE_LIMIT = (48, 2, "RW", 1000, None)
    LOCK = (55, 1, "RW", 0, None)
    PRESENT_POSITION = (56, 2, "R", None, 15)
    PRESENT_VELOCITY = (58, 2, "R", None, 15)
    PRESENT_LOAD = (60, 2, "R", None, 10)
    PRESENT_VOLTAGE = (62, 1, "R", None, None)
    PRESENT_TEMPERATURE = (63, 1, "R", None, None)
    STATUS = (65, 1, "R", None, None)
    MOVING = (66, 1, "R", None, None)
    PRESENT_CURRENT = (69, 2, "R", None, 15)

    def __init__(
        self, address: int, size: int, access: str, default: int | None, sign_bit: int | None
    ) -> None:
        self.address, self.size, self.default, self.sign_bit = address, size, default, sign_bit
        self.end = address + size  # first address after this register
        self.area = "EPROM" if address < 40 else "SRAM"
        self.writable = access == "RW"

    def __str__(self) -> str:
        return f"{self.name.title()} ({self.address})"


FORBIDDEN_WRITES = frozenset(
    {Register.ID, Register.BAUD_RATE, Register.MINIMUM_STARTUP_FORCE, Register.INTEGRAL_LIMIT}
)

# What a goal is sent with, every control tick.
STREAMED = (
    Register.ACCELERATION,
    Register.GOAL_POSITION,
    Register.GOAL_TIME,
    Register.GOAL_VELOCITY,
)
# The ERROR byte of a status frame, and registers 65 and 19, use the same bits.
ERROR_BITS = {
    0x01: "voltage",
    0x02: "encoder",
    0x04: "overheat",
    0x08: "overcurrent",
    0x20: "overload",
}


def encode(register: Register, value: int) -> bytes:
    """Little-endian bytes of `value`; ArmError when it does not fit the register."""
    bits = 8 * register.size if register.sign_bit is None else register.sign_bit
    low = 0 if register.sign_bit is None else -((1 << bits) - 1)
    high = (1 << bits) - 1
    if not low <= value <= high:
        raise ArmError(f"{register} cannot hold {value}: it takes {low} to {high}.")
    raw = abs(value) | (1 << bits if value < 0 else 0)
    return raw.to_bytes(register.size, "little")


def decode(register: Register, data: bytes) -> int:
    """Value of `register` from its bytes, sign applied. Bits above the sign bit are ignored."""
    assert len(data) == register.size, f"{register} has {register.size} bytes, not {len(data)}"
    raw = int.from_bytes(data, "little")
    if register.sign_bit is None:
        return raw
    magnitude = raw & ((1 << register.sign_bit) - 1)
    return -magnitude if raw >> register.sign_bit & 1 else magnitude


def registers_between(first: Register, last: Register) -> tuple[Register, ...]:
    """Every register that lies wholly in the block from `first` to `last`, in address order."""
    return tuple(r for r in Register if first.address <= r.address and r.end <= last.end)


def write_problem(register: Register, value: int) -> str | None:
    """Why this package never performs the write, or None."""
    if not register.writable:
        return f"{register} is read-only"
    if register in FORBIDDEN_WRITES:
        return (
            f"{register} is never written: it changes how the servo is addressed, or it is "
            "not documented"
        )
    if register is Register.TORQUE_ENABLE and value not in (0, 1):
        return (
            f"{register} takes 0 or 1, not {value} (128 moves the centre of the servo and makes "
            "its calibration invalid)"
        )
    return None


def error_names(error: int) -> tuple[str, ...]:
    """Names of the bits set in an ERROR byte, lowest first; unnamed bits as 'bit 4'."""
    return tuple(ERROR_BITS.get(1 << bit, f"bit {bit}") for bit in range(8) if error >> bit & 1)
