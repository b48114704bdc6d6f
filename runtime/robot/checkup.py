"""The hardware checks of smolvla-doctor: machine, cameras, serial ports, servos. Only reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serial.tools import list_ports

from ...core.board import Board
from ...core.errors import CalibrationError, DeviceError
from ...devices.arm.calibration import (
    IDS,
    Calibration,
    joint_label,
    load_calibration,
    saved_calibrations,
)
from ...devices.arm.eeprom import differences
from ...devices.arm.inspection import inspect
from ...devices.bus.bus import FeetechBus
from ...devices.bus.port import ADAPTERS, lasting_path
from ...devices.bus.sts3215 import ENCODER_MAX, Register
from ...devices.cameras.camera import FPS, HEIGHT, WIDTH
from ...devices.cameras.camera_modes import Node

Status = Literal["ok", "warning", "stop", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One finding. do: what helps, or "".

    status: "stop" would stop or spoil a run, "unknown" could not be judged.
    """

    area: str
    status: Status
    text: str
    do: str = ""


def machine(board: Board) -> Iterator[Finding]:
    """Board, JetPack, power, clocks, heat and supply."""
    parts = [board.name, board.module, board.cpu, f"Linux {board.kernel}"]
    yield Finding("board", "ok", ", ".join(part for part in parts if part))
    if board.jetson:
        jetpack = board.packages.get("nvidia-jetpack")
        texts = [f"JetPack {jetpack}" if jetpack else "", f"L4T {board.l4t}" if board.l4t else ""]
        text = ", ".join(text for text in texts if text)
        yield Finding(
            "jetpack", "ok" if text else "unknown", text or "no /etc/nv_tegra_release: a container?"
        )
        yield _power(board)
    else:
        yield Finding(
            "jetpack", "ok", "no Jetson: JetPack, power modes and supply counters are Jetson only"
        )
    yield _clocks(board)
    yield _heat(board)
    if board.jetson:
        yield _supply(board)


def _power(board: Board) -> Finding:
    if board.power_mode is None:
        return Finding(
            "power", "unknown", "nvpmodel's files do not tell the power mode", "sudo nvpmodel -q"
        )
    modes = board.power_modes
    known = ", ".join(f"{i} {name}" for i, name in modes.items()) or "unknown ones"
    text = f"mode {board.power_mode} of {known}"
    # The numbers of the modes have no order.
    best = next((i for i, name in modes.items() if name.startswith("MAXN")), None)
    if best in (None, board.power_mode):
        return Finding("power", "ok", text)
    return Finding("power", "warning", f"{text}: not the fastest", f"sudo nvpmodel -m {best}")


def _clocks(board: Board) -> Finding:
    if not board.clocks:
        return Finding("clocks", "unknown", "this machine does not tell its clocks")
    text = ", ".join(
        f"{c.name} {c.now:.0f} MHz ({c.low:.0f} to {c.high:.0f})" for c in board.clocks
    )
    if all(c.low == c.high for c in board.clocks):
        return Finding("clocks", "ok", f"{text}, pinned")
    raises = (
        "sudo jetson_clocks"
        if board.jetson
        else "sudo cpupower frequency-set --governor performance"
    )
    return Finding(
        "clocks", "ok", f"{text}, following the load", f"{raises} (until the next start)"
    )


def _heat(board: Board) -> Finding:
    if board.throttled:
        text = f"throttled now: {'; '.join(board.throttled)}"
        return Finding(
            "heat", "stop" if board.jetson else "warning", text, "let it cool down, check its fan"
        )
    if not board.temperatures:
        return Finding("heat", "unknown", "this machine does not tell its temperatures")
    hottest = max(board.temperatures, key=lambda name: board.temperatures[name])
    celsius, count = board.temperatures[hottest], len(board.temperatures)
    text = f"{hottest} {celsius:.0f} °C is the hottest of {count}"
    return Finding("heat", "ok", f"{text}, nothing is throttled")


def _supply(board: Board) -> Finding:
    if board.events is None:
        return Finding(
            "supply", "unknown", "no soctherm_oc counters here: look for 'soctherm' in dmesg"
        )
    found = [f"{count} {what}" for what, count in board.events.items() if count]
    if not found:
        return Finding("supply", "ok", "no under-voltage or over-current since the start")
    text = f"since the start: {', '.join(found)} events, each of which throttled the board"
    if board.events["under-voltage"]:
        return Finding(
            "supply",
            "stop",
            text,
            "use the supply and cable made for this board, then start it again",
        )
    return Finding("supply", "warning", text, "a lower power mode, or a stronger supply")


def cameras(nodes: Sequence[Node], sources: Mapping[str, str]) -> Iterator[Finding]:
    """Every video node, and the devices among `sources`, {name: as open_camera takes it}."""
    for node in nodes:
        where = node.path if node.link == node.path else f"{node.path} ({node.link})"
        modes = f"{node.card or 'unnamed'}: {', '.join(map(str, node.modes)) or 'tells no modes'}"
        fits = any(
            (m.format, m.width, m.height) == ("MJPG", WIDTH, HEIGHT) and m.fps >= FPS
            for m in node.modes
        )
        if node.problem:
            yield Finding("cameras", "unknown", f"{where} {node.problem}")
        elif fits:
            yield Finding("cameras", "ok", f"{where} {modes}")
        else:
            wanted = f"MJPG {WIDTH}x{HEIGHT}@{FPS:g}, which is asked for, is not among them"
            yield Finding(
                "cameras",
                "warning",
                f"{where} {modes}. {wanted}",
                "expect another format, or a lower rate",
            )
    if not nodes:
        yield Finding("cameras", "unknown", "no /dev/video* here")
    usable = {Path(node.path).resolve() for node in nodes if not node.problem}
    for name, source in sources.items():
        path = Path(f"/dev/video{source}" if source.isdecimal() else source)
        if path.is_relative_to("/dev") and path.resolve() not in usable:
            yield Finding(
                "cameras", "stop", f"camera '{name}' is {source}, which is no usable camera node"
            )


def ports(board: Board) -> Iterator[Finding]:
    """Serial ports, who may open the servo adapters among them, and brltty."""
    found = list_ports.comports()
    adapters = [port for port in found if (port.vid, port.pid) in ADAPTERS]
    others = [lasting_path(port) for port in found if port not in adapters]
    for port in adapters:
        text = f"{lasting_path(port)}: {ADAPTERS[port.vid, port.pid]} {port.vid:04x}:{port.pid:04x}"
        if os.access(port.device, os.R_OK | os.W_OK):
            yield Finding("ports", "ok", text)
        else:
            yield Finding(
                "ports",
                "warning",
                f"{text}, not yours to open",
                _permit(port.device, port.vid, port.pid),
            )
    if not adapters:
        text = f"no servo adapter ({' or '.join(ADAPTERS.values())})"
        yield Finding(
            "ports", "unknown", f"{text}. Other serial ports: {', '.join(others) or 'none'}"
        )
    if "brltty" in board.packages or "brltty" in board.processes:
        state = "running" if "brltty" in board.processes else "installed"
        yield Finding(
            "ports",
            "warning",
            f"brltty is {state}: it takes CH340 adapters away",
            "sudo apt remove brltty",
        )


def _permit(device: str, vendor: int, product: int) -> str:
    group = "dialout"
    with suppress(KeyError):  # a group without a name
        group = Path(device).group()
    rule = (
        f'SUBSYSTEM=="tty", ATTRS{{idVendor}}=="{vendor:04x}", '
        f'ATTRS{{idProduct}}=="{product:04x}", '
        f'GROUP="dialout", MODE="0660", TAG+="uaccess", ENV{{ID_MM_DEVICE_IGNORE}}="1"'
    )
    return (
        f"sudo usermod -aG {group} $USER and log in again, or this line in "
        "/etc/udev/rules.d/70-so101.rules, then "
        f"sudo udevadm control --reload && sudo udevadm trigger:\n{rule}"
    )


def servos(port: str, calibration: Calibration | None) -> tuple[list[Finding], Calibration | None]:
    """Check all six servos. Returns findings and the calibration.

    calibration None: the saved calibration that the servos hold is returned, if there is one.
    """
    try:
        with FeetechBus(port) as bus:
            found = inspect(bus, calibration)
    except DeviceError as e:
        return [Finding("servos", "stop", str(e))], calibration
    findings = [Finding("servos", "ok", _servo(i, v)) for i, v in found.values.items()]
    findings += [Finding("servos", "stop", problem) for problem in found.problems]
    findings += [Finding("servos", "warning", warning) for warning in found.warnings]
    if calibration is None and found.values:
        calibration = _held(found.values)
        findings.append(_calibrated(port, found.values, calibration))
    elif calibration is not None:
        findings.append(
            Finding("servos", "ok", f"held against the calibration {calibration.source}")
        )
    return findings, calibration


def _servo(servo_id: int, values: Mapping[Register, int]) -> str:
    major, minor = Register.FIRMWARE_MAJOR_VERSION, Register.FIRMWARE_MINOR_VERSION
    return (
        f"{joint_label(servo_id)}: model {values[Register.MODEL_NUMBER]}, "
        f"firmware {values[major]}.{values[minor]}, {values[Register.PRESENT_VOLTAGE] / 10} V, "
        f"{values[Register.PRESENT_TEMPERATURE]} °C, at {values[Register.PRESENT_POSITION]}, "
        f"torque {'on' if values[Register.TORQUE_ENABLE] else 'off'}"
    )


def _held(values: Mapping[int, Mapping[Register, int]]) -> Calibration | None:
    for path in saved_calibrations():
        with suppress(CalibrationError):
            saved = load_calibration(path)
            if len(values) == len(IDS) and not differences(values, saved.registers):
                return saved
    return None


def _calibrated(
    port: str, values: Mapping[int, Mapping[Register, int]], held: Calibration | None
) -> Finding:
    if held is not None:
        return Finding("servos", "ok", f"calibrated: they hold {held.source}")
    factory = {
        Register.HOMING_OFFSET: 0,
        Register.MIN_POSITION_LIMIT: 0,
        Register.MAX_POSITION_LIMIT: ENCODER_MAX,
    }
    bare = [
        joint_label(i)
        for i, v in values.items()
        if all(v[r] == value for r, value in factory.items())
    ]
    do = f"smolvla-calibrate --port {port} --id my_arm"
    if bare:
        return Finding(
            "servos", "stop", f"not calibrated, as from the factory: {', '.join(bare)}", do
        )
    text = "calibrated, but no saved calibration is what they hold"
    return Finding("servos", "warning", text, f"name its file in robot.toml, or {do}")
