"""EPROM: only what differs is written, it lasts, and everything that goes wrong is told."""

import pytest

from smolvla_edge.core.errors import ArmError
from smolvla_edge.devices.arm.calibration import IDS
from smolvla_edge.devices.arm.eeprom import configuration, write_differences
from smolvla_edge.devices.arm.inspection import inspect
from smolvla_edge.devices.bus.bus import FeetechBus
from smolvla_edge.devices.bus.sts3215 import Register
from smolvla_edge.devices.virtual.virtual_arm import VIRTUAL_CALIBRATION

pytestmark = pytest.mark.arm

EPROM = [register for register in Register if register.area == "EPROM"]


@pytest.fixture
def virtual(virtual):
    """Servos as they come from the factory, but calibrated, and locked."""
    for servo_id in IDS:
        for register in (*configuration(6, virtual.registers(servo_id)), Register.LOCK):
            factory = {Register.LOCK: 1, Register.PHASE: 12}.get(register, register.default)
            virtual.set_register(servo_id, register, factory)
    return virtual


@pytest.fixture
def bus(virtual):
    with FeetechBus(virtual.port) as opened:
        yield opened


def eprom(virtual):
    return {i: {r: virtual.registers(i)[r] for r in EPROM} for i in IDS}


def locks(virtual):
    return [virtual.registers(i)[Register.LOCK] for i in IDS]


def configured(virtual):
    return {i: configuration(i, virtual.registers(i)) for i in IDS}


def test_the_configuration_is_what_lerobot_writes(virtual):
    body = {7: 0, 33: 0, 21: 16, 22: 32, 23: 0, 18: 12}
    wanted = configured(virtual)
    for servo_id in IDS:
        gripper = {16: 500, 28: 250, 36: 25} if servo_id == 6 else {}
        assert {r.address: v for r, v in wanted[servo_id].items()} == body | gripper


def test_only_bit_4_of_phase_is_cleared():
    assert configuration(1, {Register.PHASE: 0xFF})[Register.PHASE] == 0xEF


def test_the_second_call_writes_nothing(virtual, bus):
    changes = write_differences(bus, configured(virtual))
    assert str(changes[0]) == "shoulder_pan (1): Return_Delay_Time (7) 250 -> 0"
    # Delay and P of all six, and three of the gripper.
    assert len(changes) == virtual.eprom_writes() == 6 * 2 + 3
    seen = len(virtual.writes())
    assert write_differences(bus, configured(virtual)) == []
    assert virtual.eprom_writes() == len(changes)
    assert len(virtual.writes()) == seen
    assert virtual.violations() == []


def test_only_the_register_that_differs_is_written(virtual, bus):
    write_differences(bus, configured(virtual))
    virtual.set_register(3, Register.I_COEFFICIENT, 7)
    before = eprom(virtual)
    seen = len(virtual.writes())
    assert [str(c) for c in write_differences(bus, configured(virtual))] == [
        "elbow_flex (3): I_Coefficient (23) 7 -> 0"
    ]
    written = [(w.id, w.register, w.value) for w in virtual.writes()[seen:]]
    assert written == [(3, Register.LOCK, 0), (3, Register.I_COEFFICIENT, 0), (3, Register.LOCK, 1)]
    before[3][Register.I_COEFFICIENT] = 0
    assert eprom(virtual) == before


def test_what_was_written_survives_the_power_switch(virtual, bus):
    write_differences(bus, {2: {Register.HOMING_OFFSET: -77}})
    virtual.reboot(2)
    assert virtual.registers(2)[Register.HOMING_OFFSET] == -77


@pytest.mark.parametrize("value", [2048, -2048])
def test_an_offset_that_does_not_fit_is_refused_before_any_write(virtual, bus, value):
    with pytest.raises(
        ArmError, match=rf"elbow_flex \(3\): Homing_Offset \(31\) cannot hold {value}"
    ):
        write_differences(bus, {1: {Register.HOMING_OFFSET: 5}, 3: {Register.HOMING_OFFSET: value}})
    assert virtual.writes() == []


def test_every_reason_not_to_write_is_told_at_once(virtual, bus):
    virtual.set_register(2, Register.TORQUE_ENABLE, 1)
    virtual.set_register(5, Register.TORQUE_ENABLE, 1)
    virtual.set_register(4, Register.MODEL_NUMBER, 2825)
    with pytest.raises(ArmError, match="was not written") as error:
        write_differences(bus, configured(virtual))
    for part in (
        "shoulder_lift (2) is energised",
        "wrist_roll (5) is energised",
        "wrist_flex (4): model 2825",
    ):
        assert part in str(error.value)
    assert virtual.writes() == []


def test_a_servo_that_stays_locked_is_not_written(virtual, bus):
    virtual.inject("lost_write", 3, count=-1, value=Register.LOCK.address)
    before = eprom(virtual)
    with pytest.raises(
        ArmError, match=r"elbow_flex \(3\) did not take Lock \(55\): 0 was written, it reads 1"
    ):
        write_differences(bus, {3: {Register.HOMING_OFFSET: 5}})
    assert eprom(virtual) == before
    assert virtual.eprom_writes() == 0
    assert locks(virtual) == [1] * 6


def test_a_servo_that_stays_unlocked_is_told(virtual, bus):
    virtual.set_register(3, Register.LOCK, 0)
    virtual.inject("lost_write", 3, count=-1, value=Register.LOCK.address)
    with pytest.raises(
        ArmError, match=r"elbow_flex \(3\) did not take Lock \(55\): 1 was written, it reads 0"
    ):
        write_differences(bus, {3: {Register.HOMING_OFFSET: 5}})


def test_a_write_that_does_not_take_is_told_and_the_servo_locked_again(virtual, bus):
    virtual.inject("lost_write", 3, count=-1, value=Register.HOMING_OFFSET.address)
    told = r"elbow_flex \(3\) did not take Homing_Offset \(31\): 5 was written, it reads -58"
    with pytest.raises(ArmError, match=told):
        write_differences(bus, {3: {Register.HOMING_OFFSET: 5}})
    assert locks(virtual) == [1] * 6


def test_servos_that_do_not_acknowledge_are_written_and_noted(virtual, bus):
    for servo_id in IDS:
        virtual.set_register(servo_id, Register.RESPONSE_STATUS_LEVEL, 0)
    write_differences(bus, configured(virtual))
    findings = inspect(bus, VIRTUAL_CALIBRATION)
    assert findings.problems == ()
    assert "not acknowledged by shoulder_pan (1)" in findings.warnings[0]
    assert eprom(virtual)[6][Register.OVERLOAD_TORQUE] == 25


def test_a_configured_arm_gives_no_warning_and_all_its_registers(virtual, bus):
    write_differences(bus, configured(virtual))
    findings = inspect(bus, VIRTUAL_CALIBRATION)
    assert findings.problems == findings.warnings == ()
    assert findings.values[6][Register.PROTECTION_CURRENT] == 250
    assert {0, 1, 3, 13, 19, 36, 40, 55, 56, 65, 69} <= {r.address for r in findings.values[1]}


def test_eprom_that_lerobot_would_write_is_one_short_warning(virtual, bus):
    virtual.set_register(4, Register.D_COEFFICIENT, 5)
    (warning,) = inspect(bus, VIRTUAL_CALIBRATION).warnings
    assert (
        "Return_Delay_Time (7), P_Coefficient (21)" in warning and "D_Coefficient (22)" in warning
    )
    assert "--write-eeprom" in warning


def test_protection_that_is_not_the_factory_s_is_a_warning(virtual, bus):
    write_differences(bus, configured(virtual))
    virtual.set_register(2, Register.UNLOADING_CONDITION, 0)
    virtual.set_register(3, Register.MAX_TEMPERATURE_LIMIT, 90)
    (warning,) = inspect(bus, VIRTUAL_CALIBRATION).warnings
    assert "shoulder_lift (2) Unloading_Condition (19) 0, not 44" in warning
    assert "elbow_flex (3) Max_Temperature_Limit (13) 90, not 70" in warning


def test_a_fault_that_only_the_status_register_shows_is_a_problem(virtual, bus):
    virtual.force(2, Register.STATUS, 0x04)
    assert "shoulder_lift (2): reports overheat" in inspect(bus, VIRTUAL_CALIBRATION).problems[0]


def test_an_arm_yet_to_be_written_must_be_limp_but_not_calibrated(virtual, bus):
    virtual.set_register(1, Register.HOMING_OFFSET, 0)
    virtual.set_register(2, Register.OPERATING_MODE, 1)
    virtual.set_register(3, Register.PHASE, 0x1C)
    assert inspect(bus, None).problems == ()
    assert len(inspect(bus, VIRTUAL_CALIBRATION).problems) == 3
    virtual.set_register(4, Register.TORQUE_ENABLE, 1)
    assert "wrist_flex (4) is energised" in inspect(bus, None).problems[0]
