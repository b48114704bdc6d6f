"""The port: which one is taken, who else may have it, and what becomes of one that is gone."""

import errno
import fcntl
import os
import struct
import time
import tty
from pathlib import Path

import pytest
import serial
from serial.tools import list_ports
from serial.tools.list_ports_common import ListPortInfo

from smolvla_edge.core.errors import BusError, BusLost
from smolvla_edge.devices.bus import port as port_module
from smolvla_edge.devices.bus.bus import FeetechBus
from smolvla_edge.devices.bus.port import find_port
from smolvla_edge.devices.bus.sts3215 import Register
from support.faulty_arm import FaultyArm

pytestmark = pytest.mark.arm

IDS = (1, 2, 3, 4, 5, 6)
TIOCGEXCL = 0x80045440
POSITION = Register.PRESENT_POSITION


@pytest.fixture
def arm(virtual):
    return virtual


@pytest.fixture
def bus(arm):
    with FeetechBus(arm.port) as bus:
        yield bus


@pytest.fixture
def plugged(monkeypatch, tmp_path):
    """Pretend that these are the serial ports of the machine: (device, USB id or None, has a link
    by id)."""

    def plug(*devices):
        ports = []
        for name, usb_id, linked in devices:
            device = tmp_path / name
            device.touch()
            port = ListPortInfo(str(device))
            port.description = f"the description of {name}"
            if usb_id is not None:
                port.vid, port.pid = usb_id
            if linked:
                (tmp_path / "by-id").mkdir(exist_ok=True)
                (tmp_path / "by-id" / f"usb-{name}").symlink_to(device)
            ports.append(port)
        monkeypatch.setattr(list_ports, "comports", lambda: ports)
        monkeypatch.setattr(port_module, "BY_ID", tmp_path / "by-id")
        return tmp_path

    return plug


@pytest.mark.parametrize(
    ("usb_id", "chip"), [((0x1A86, 0x55D3), "CH343"), ((0x1A86, 0x7523), "CH340")]
)
def test_the_one_servo_adapter_is_found_by_its_lasting_name(plugged, usb_id, chip):
    folder = plugged(
        ("ttyS0", None, False), ("ttyACM1", (0x2341, 0x0043), True), ("ttyACM3", usb_id, True)
    )
    path, reason = find_port()
    assert path == str(folder / "by-id" / "usb-ttyACM3")
    assert Path(path).resolve() == folder / "ttyACM3"
    assert reason == f"port {path}: the only servo adapter here, a {chip}."


def test_an_adapter_without_a_link_is_taken_by_its_device(plugged):
    folder = plugged(("ttyACM0", (0x1A86, 0x55D3), False))
    assert find_port()[0] == str(folder / "ttyACM0")


def test_two_servo_adapters_are_not_guessed_between(plugged):
    plugged(
        ("ttyACM0", (0x1A86, 0x55D3), True),
        ("ttyUSB0", (0x1A86, 0x7523), False),
        ("ttyS0", None, False),
    )
    with pytest.raises(
        BusError, match=r"found 2\..*by-id/usb-ttyACM0.*ttyS0.*ttyUSB0.*Give one with --port"
    ) as error:
        find_port()
    assert "brltty" not in str(error.value)


@pytest.mark.parametrize(
    "others", [(), (("ttyACM0", (0x2341, 0x0043), False),)], ids=["nothing", "another board"]
)
def test_no_servo_adapter_is_told_with_what_there_is(plugged, others):
    plugged(*others)
    listed = r".*ttyACM0 \(the description of ttyACM0\)" if others else " none"
    with pytest.raises(
        BusError, match=rf"found none\. Serial ports here:{listed}\. Give one with --port\..*brltty"
    ):
        find_port()


def test_a_missing_port_is_told_with_the_ports_there_are():
    with pytest.raises(BusError, match=r"no port /dev/ttyNOWHERE\. Serial ports here: "):
        FeetechBus("/dev/ttyNOWHERE").open()


def test_a_port_in_use_is_told_with_its_holder(arm, bus):
    with pytest.raises(BusError, match=rf"in use.*\(process {os.getpid()}\)"):
        FeetechBus(arm.port).open()


def test_a_port_without_permission_is_told_with_the_remedy(monkeypatch):
    def refuse(*arguments, **options):
        raise serial.SerialException(errno.EACCES, "could not open port: Permission denied")

    monkeypatch.setattr(serial, "Serial", refuse)
    with pytest.raises(BusError, match=r"dialout.*udev"):
        FeetechBus("/dev/ttyACM0").open()


def test_a_file_is_no_port(tmp_path):
    path = tmp_path / "port"
    path.write_text("")
    with pytest.raises(BusError, match="cannot open"):
        FeetechBus(str(path)).open()


def test_plain_opens_by_others_are_locked_out_while_the_bus_is_open_and_not_after(arm):
    def exclusive():
        fd = os.open(arm.port, os.O_RDWR | os.O_NOCTTY)
        try:
            return struct.unpack("i", fcntl.ioctl(fd, TIOCGEXCL, b"\0" * 4))[0]
        finally:
            os.close(fd)

    with FeetechBus(arm.port):
        if os.geteuid() == 0:
            assert exclusive() == 1
        else:
            with pytest.raises(OSError, match="busy"):
                exclusive()
    assert exclusive() == 0


def test_a_port_that_goes_away_is_one_kind_of_error():
    with FaultyArm(cameras=()) as arm:
        bus = FeetechBus(arm.port)
        bus.open()
        assert bus.ping(1)
        arm.close()
        for action in (
            lambda: bus.read(1, POSITION),
            lambda: bus.ping(1),
            lambda: bus.sync_read(IDS, POSITION),
            lambda: bus.sync_write(Register.GOAL_POSITION, {1: 2000}),
            bus.broadcast_torque_off,
        ):
            with pytest.raises(BusLost, match="USB cable"):
                action()
        bus.close()
        bus.close()


def test_a_line_nobody_reads_is_lost_and_does_not_hang():
    master, slave = os.openpty()
    tty.setraw(master)
    tty.setraw(slave)
    values = dict.fromkeys(range(80), 0)
    try:
        with FeetechBus(os.ttyname(slave)) as bus, pytest.raises(BusLost):
            for _ in range(1000):
                bus.sync_write(Register.GOAL_POSITION, values)
    finally:
        os.close(slave)
        os.close(master)


def test_an_unplugged_adapter_is_one_kind_of_error():
    with FaultyArm(cameras=()) as arm, FeetechBus(arm.port) as bus:
        assert bus.ping(1)
        arm.hang_up()
        for action in (
            lambda: bus.read(1, POSITION),
            lambda: bus.write(1, Register.ACCELERATION, 50),
            lambda: bus.sync_read(IDS, POSITION),
            bus.broadcast_torque_off,
        ):
            with pytest.raises(BusLost, match="USB cable"):
                action()


def test_a_device_that_stops_listening_is_lost_and_does_not_hang():
    with FaultyArm(cameras=()) as arm, FeetechBus(arm.port) as bus:
        arm.deaf(True)
        before = time.monotonic()
        with pytest.raises(BusLost):
            for _ in range(10_000):
                bus.sync_write(Register.GOAL_POSITION, dict.fromkeys(IDS, 2000))
        assert time.monotonic() - before < 20
