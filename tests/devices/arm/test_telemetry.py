"""What the servos report, read from the virtual arm: decoded, aged, and not believed when it cannot
be."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from smolvla_edge.core.errors import BusError
from smolvla_edge.devices.arm import telemetry as module
from smolvla_edge.devices.arm.telemetry import Telemetry
from smolvla_edge.devices.arm.units import Units, to_values
from smolvla_edge.devices.bus.bus import FeetechBus
from smolvla_edge.devices.bus.sts3215 import Register
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION

pytestmark = pytest.mark.arm

IDS = (1, 2, 3, 4, 5, 6)
MIDDLE = (2001, 2025, 2000, 2027, 2047, 2748)
PERIOD_S = 1 / 30


class Reader:
    """Telemetry that reads at exact times, however slow the machine."""

    def __init__(self, bus, units=Units.DEGREES):
        self.time_s = 100.0
        self.counters = bus.counters
        self.telemetry = Telemetry(bus, VIRTUAL_CALIBRATION, units)

    def read(self, after_s=PERIOD_S, budget_s=math.inf):
        self.time_s += after_s
        return self.telemetry.read(budget_s)


@pytest.fixture
def reader(virtual, monkeypatch):
    with FeetechBus(virtual.port) as bus:
        made = Reader(bus)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.time_s))
        yield made


def test_every_value_of_every_joint_comes_in_one_request(virtual, reader):
    virtual.force(3, Register.PRESENT_VELOCITY, -120)
    virtual.force(3, Register.PRESENT_LOAD, -255)
    virtual.force(3, Register.PRESENT_VOLTAGE, 71)
    virtual.force(3, Register.PRESENT_TEMPERATURE, 44)
    # The sign of a current is disputed, the amount is not
    virtual.force(3, Register.PRESENT_CURRENT, -30)
    virtual.force(3, Register.STATUS, 0x20)
    virtual.inject("error", 2, value=0x04)
    virtual.force(2, Register.STATUS, 0)
    seen = virtual.frames_seen()
    state = reader.read()
    assert virtual.frames_seen() == seen + 1
    assert state.time_s == reader.time_s
    assert np.array_equal(state.raw, MIDDLE)
    assert np.array_equal(state.position, to_values(state.raw, VIRTUAL_CALIBRATION, Units.DEGREES))
    assert state.velocity.tolist() == [0, 0, -120, 0, 0, 0]
    assert state.load.tolist() == [0, 0, -25.5, 0, 0, 0]
    assert state.voltage.tolist() == [7.4, 7.4, 7.1, 7.4, 7.4, 7.4]
    assert state.temperature.tolist() == [30, 30, 44, 30, 30, 30]
    assert state.current.tolist() == [0, 0, 195.0, 0, 0, 0]
    assert state.errors == (0, 0x04, 0x20, 0, 0, 0)  # in the reply's ERROR byte, or in register 65
    assert state.age_s.tolist() == [0.0] * 6 and state.missed == state.jumps == (0,) * 6


def test_positions_come_in_the_units_that_were_asked_for(virtual):
    with FeetechBus(virtual.port) as bus:
        state = Telemetry(bus, VIRTUAL_CALIBRATION, Units.RANGE_M100_100).read()
    assert np.array_equal(
        state.position, to_values(state.raw, VIRTUAL_CALIBRATION, Units.RANGE_M100_100)
    )


def test_joints_that_never_answered_are_an_error_until_all_have(virtual, reader):
    virtual.inject("mute", 2, count=-1)
    virtual.inject("mute", 5, count=-1)
    for _ in range(2):
        with pytest.raises(
            BusError, match=r"no answer from shoulder_lift \(2\), wrist_roll \(5\) on"
        ):
            reader.read()
    virtual.inject("mute", 2, count=0)
    virtual.inject("mute", 5, count=0)
    assert reader.read().missed == (0,) * 6
    assert reader.counters["unanswered_readings"] == 0


def test_a_joint_that_falls_silent_keeps_its_last_values_and_their_age_tells(virtual, reader):
    reader.read()
    virtual.inject("mute", 4, count=-1)
    virtual.set_register(4, Register.PRESENT_POSITION, MIDDLE[3] + 50)
    virtual.set_register(1, Register.PRESENT_POSITION, MIDDLE[0] + 50)
    for count in range(1, 4):
        state = reader.read()
        assert state.missed == (0, 0, 0, count, 0, 0) and state.jumps == (0,) * 6
        assert state.age_s.tolist() == pytest.approx([0, 0, 0, count * PERIOD_S, 0, 0])
        assert state.raw.tolist() == [MIDDLE[0] + 50, *MIDDLE[1:]]
    assert reader.counters["unanswered_readings"] == 3
    virtual.inject("mute", 4, count=0)
    state = reader.read()
    assert state.missed == (0,) * 6 and state.age_s[3] == 0 and state.raw[3] == MIDDLE[3] + 50
    assert reader.counters["unanswered_readings"] == 3


def test_a_joint_is_asked_again_only_within_the_budget(virtual, reader):
    reader.read()
    for budget_s, missed in ((math.inf, 0), (0.0, 1)):
        virtual.inject("mute", 3)
        assert reader.read(budget_s=budget_s).missed[2] == missed


@pytest.mark.parametrize("shown", [-100, 5000, MIDDLE[1] + 2000, 0])
def test_f17_a_position_that_cannot_be_reached_is_not_believed(virtual, reader, shown):
    reader.read()
    virtual.force(2, Register.PRESENT_POSITION, shown)
    virtual.force(2, Register.PRESENT_VOLTAGE, 50)
    for count in range(1, 4):
        state = reader.read()
        assert state.jumps == state.missed == (0, count, 0, 0, 0, 0)
        assert state.raw[1] == MIDDLE[1] and state.voltage[1] == 7.4
        assert state.age_s[1] == pytest.approx(count * PERIOD_S)
    assert (reader.counters["unbelieved_positions"], reader.counters["unanswered_readings"]) == (
        3,
        0,
    )
    # Waiting does not make it true, and a moment of truth does not either: somebody has to look.
    assert reader.read(after_s=5.0).raw[1] == MIDDLE[1]
    virtual.force(2, Register.PRESENT_POSITION, None)
    assert reader.read().jumps[1] == 5
    reader.telemetry.trust()
    assert reader.read().jumps == (0,) * 6


def test_f17_a_position_below_zero_is_decoded_as_one(virtual, reader):
    """0x8064 is -100, not 32868."""
    virtual.force(2, Register.PRESENT_POSITION, -100)
    assert reader.read().raw[1] == -100


@pytest.mark.parametrize(
    ("ticks", "believed"), [(199, True), (201, False)]
)  # 1.5 * (3400 / 30 + 20) = 200
@pytest.mark.parametrize("sign", [1, -1])
def test_a_joint_may_move_at_one_and_a_half_times_its_top_speed(
    virtual, reader, ticks, believed, sign
):
    reader.read()
    virtual.set_register(1, Register.PRESENT_POSITION, MIDDLE[0] + sign * ticks)
    assert (reader.read().jumps[0] == 0) == believed


def test_after_a_silence_a_joint_may_be_further_away(virtual, reader):
    reader.read()
    virtual.set_register(1, Register.PRESENT_POSITION, MIDDLE[0] + 1200)
    assert reader.read(after_s=0.21).jumps[0] == 1
    state = reader.read(after_s=0.05)  # 0.26 s since it was last believed
    assert state.jumps[0] == 0 and state.raw[0] == MIDDLE[0] + 1200


def test_f30_a_servo_that_restarted_is_found_powered_off(virtual, reader):
    for servo_id, raw in zip(IDS, MIDDLE, strict=True):
        virtual.set_register(servo_id, Register.GOAL_POSITION, raw)
        virtual.set_register(servo_id, Register.TORQUE_ENABLE, 1)
    assert reader.telemetry.powered_off() == ()
    virtual.reboot(5)
    virtual.inject("mute", 3, count=-1)  # says nothing: nothing is known of it
    assert reader.telemetry.powered_off() == (5,)
