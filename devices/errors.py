"""Every error the devices package raises on purpose.

    DeviceError              anything below; a command line prints it and exits
    ├── BusError             the serial link: no answer in time, port cannot be opened, bus not open
    │   └── BusLost          the port itself is gone (unplugged, hung up, no longer accepts bytes)
    ├── GuardianLost         nobody watches over the host any more, or the guardian has taken the arm over
    ├── ArmError             the arm or a caller's request is refused: bring-up findings, registers, limits
    ├── CalibrationError     a calibration file is missing, ambiguous or not sane
    └── CameraError          a camera cannot be opened, or stopped delivering frames

`serial.SerialException`, `OSError` and `termios.error` never leave the package from an open port: the bus
turns them into `BusLost`. A message says what was found, what was expected and what to do.
"""

from collections.abc import Iterable


class DeviceError(Exception):
    """Base of the tree."""


class BusError(DeviceError):
    """The serial link failed; the port is still there."""


class BusLost(BusError):
    """The port is gone. Nothing more can be sent; the servos keep their last goal."""


class GuardianLost(DeviceError):
    """The arm runs without a guardian: stop it."""


class ArmError(DeviceError):
    """The arm, or what was asked of it, is refused."""


class CalibrationError(DeviceError):
    """A calibration cannot be used."""


class CameraError(DeviceError):
    """A camera cannot be used."""


def listed(head: str, problems: Iterable[object]) -> str:
    """A message with one problem a line."""
    return "\n  ".join((head, *map(str, problems)))
