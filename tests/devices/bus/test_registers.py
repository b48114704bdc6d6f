"""The register table against the reference table, and the sign-magnitude encoding."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvla_edge.core.errors import ArmError
from smolvla_edge.devices.bus.sts3215 import (
    MODEL_NUMBER,
    TICKS_PER_TURN,
    Register,
    decode,
    encode,
    error_names,
    registers_between,
    write_problem,
)
from support.paths import DATA

REFERENCE = json.loads((DATA / "sts3215_registers.json").read_text())


def test_the_table_agrees_with_the_reference_table():
    ours = [
        (r.name, r.address, r.size, r.area, r.writable, r.default, r.sign_bit) for r in Register
    ]
    theirs = [
        (
            row["name"].upper(),
            row["address"],
            row["size"],
            row["area"],
            row["access"] == "RW",
            row["default"],
            row["sign_bit"],
        )
        for row in REFERENCE["registers"]
    ]
    assert [row for row in theirs if row in ours] == ours
    assert REFERENCE["model_number"] == MODEL_NUMBER
    assert REFERENCE["resolution"] == TICKS_PER_TURN


def test_registers_do_not_overlap():
    in_order = sorted(Register, key=lambda r: r.address)
    assert all(a.end <= b.address for a, b in pairwise(in_order))


@given(st.sampled_from(list(Register)), st.data())
def test_every_value_that_fits_survives_encoding(register, data):
    bits = 8 * register.size if register.sign_bit is None else register.sign_bit
    low = 0 if register.sign_bit is None else 1 - (1 << bits)
    value = data.draw(st.integers(low, (1 << bits) - 1))
    encoded = encode(register, value)
    assert len(encoded) == register.size
    assert decode(register, encoded) == value


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (Register.HOMING_OFFSET, 2048),
        (Register.HOMING_OFFSET, -2048),
        (Register.GOAL_POSITION, 32768),
        (Register.GOAL_POSITION, -32768),
        (Register.TORQUE_LIMIT, -1),
        (Register.TORQUE_LIMIT, 65536),
        (Register.ACCELERATION, 256),
    ],
)
def test_a_value_that_does_not_fit_is_refused(register, value):
    with pytest.raises(ArmError, match=f"cannot hold {value}"):
        encode(register, value)


@pytest.mark.parametrize(
    ("register", "raw", "value"),
    [
        (Register.HOMING_OFFSET, 0x0AC5, -709),
        (Register.PRESENT_POSITION, 0x8064, -100),
        (Register.PRESENT_LOAD, 0x04FA, -250),
        (Register.PRESENT_CURRENT, 0x8001, -1),
        (Register.MODEL_NUMBER, 0x0309, 777),
    ],
)
def test_signs_are_a_bit_and_not_two_s_complement(register, raw, value):
    assert decode(register, raw.to_bytes(2, "little")) == value


def test_a_block_holds_the_registers_that_lie_in_it():
    block = registers_between(Register.PRESENT_POSITION, Register.PRESENT_CURRENT)
    assert [r.address for r in block] == [56, 58, 60, 62, 63, 65, 66, 69]


def test_registers_that_would_change_the_servo_for_good_are_never_written():
    for register in (
        Register.ID,
        Register.BAUD_RATE,
        Register.MINIMUM_STARTUP_FORCE,
        Register.INTEGRAL_LIMIT,
    ):
        assert write_problem(register, 1)
    assert write_problem(Register.TORQUE_ENABLE, 128)
    assert write_problem(Register.PRESENT_POSITION, 0)
    assert write_problem(Register.TORQUE_ENABLE, 1) is None


def test_error_bits_have_names():
    assert error_names(0) == ()
    assert error_names(0x2F) == ("voltage", "encoder", "overheat", "overcurrent", "overload")
    assert error_names(0x10) == ("bit 4",)
