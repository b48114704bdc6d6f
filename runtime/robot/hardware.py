"""The arm and the cameras of a run, opened and checked, not energised."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ...core.errors import DeviceError
from ...devices.arm import eeprom
from ...devices.arm.calibration import JOINT_NAMES, Calibration
from ...devices.arm.inspection import inspect
from ...devices.arm.so101 import SO101
from ...devices.arm.units import to_raw
from ...devices.bus.bus import FeetechBus
from ...devices.bus.sts3215 import MODEL_NUMBER, Register
from ...devices.cameras.camera import Camera
from ...devices.cameras.sources import open_camera
from ...devices.virtual.virtual_arm import VIRTUAL_CALIBRATION, VirtualArm
from .checked_run import CheckedRun


@contextmanager
def open_hardware(
    run: CheckedRun, *, motors_off: bool, write_eeprom: bool
) -> Iterator[tuple[SO101, list[Camera]]]:
    """Everything is closed on the way out, after the arm is switched off.

    Raises one DeviceError with everything that is wrong with arm and cameras.
    """
    names = [c.name for c in run.bundle.manifest.cameras]
    with ExitStack() as stack:
        if run.calibration is None:
            print("starting the virtual arm")
            virtual = stack.enter_context(VirtualArm(cameras=names, pose=_mean_pose(run)))
            port, calibration, sources = virtual.port, virtual.calibration, virtual.camera_sources
        else:
            port, calibration, sources = run.port, run.calibration, run.settings.cameras
        if write_eeprom:
            with FeetechBus(port) as bus:
                _write_configuration(bus, calibration)
        # The arm first: that motors are still on after a crash is the most important finding.
        arm = SO101(port, calibration, run.units, run.limits, run.fps, motors_off=motors_off)
        problems: list[str] = []
        try:
            for warning in arm.connect():  # writes nothing
                print(f"warning: {warning}")
            stack.push(arm)  # leaving the context switches every servo off
        except DeviceError as e:
            problems.append(str(e))
        cameras = []
        for name in names:
            if Path(sources[name]).is_file() and not run.settings.simulated:
                print(f"warning: camera '{name}' is a file ({sources[name]})")
            try:
                cameras.append(open_camera(name, sources[name]))
                stack.callback(cameras[-1].close)
            except DeviceError as e:
                problems.append(str(e))
        if problems:
            raise DeviceError("\n".join(problems))
        yield arm, cameras


def _write_configuration(bus: FeetechBus, calibration: Calibration) -> None:
    """Give six known servos LeRobot's configuration. connect() refuses any other arm."""
    values = inspect(bus, calibration).values
    if any(v[Register.MODEL_NUMBER] != MODEL_NUMBER for v in values.values()) or len(values) != len(
        JOINT_NAMES
    ):
        return
    changes = eeprom.write_differences(
        bus, {i: eeprom.configuration(i, v) for i, v in values.items()}
    )
    for change in changes:
        print(f"EPROM: {change}")
    print(f"EPROM: {len(changes)} registers written")


def _mean_pose(run: CheckedRun) -> list[int] | None:
    """The mean position of the training data, in raw ticks: where the virtual arm starts."""
    mean = run.bundle.manifest.state.normalization.statistics.get("mean")
    if mean is None:
        return None
    raw = to_raw(np.array(mean), VIRTUAL_CALIBRATION, run.units)
    return [
        int(np.clip(r, j.range_min, j.range_max))
        for r, j in zip(raw, VIRTUAL_CALIBRATION.joints, strict=True)
    ]
