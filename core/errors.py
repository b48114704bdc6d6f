"""Every error that smolvla-edge raises on purpose. The class holds the exit status of a command.

SmolVLAError                 anything below; a command prints `error: ...` and exits
    BundleError              the bundle is missing, damaged, changed, or of another version
    InputError               an input does not fit; also a ValueError
    BackendError             the device or backend cannot run here, or a graph failed
    SettingsError            robot.toml or an option is wrong or incomplete
    CheckFailed          1   a check of this machine or this bundle failed
    SafetyStop           1   the run ended because it was not safe to continue
    ExportError              the export cannot start or continue
        CheckpointError      the checkpoint is missing, damaged, or asks for what is not supported
        GraphError           an exported graph breaks the contract (operators, dtypes, shapes)
        ParityError      1   the graphs do not compute what the checkpoint computes
        AuditError       1   the graphs do not run in the precision of their label
    QuantizeError            a precision recipe cannot be applied
        RangeError           a float16 tensor comes too close to the largest float16
        ObservationsError    observations to calibrate with are missing, damaged or do not fit
        GateError        1   a policy of lower precision is too far from float32
    DeviceError              the arm, the bus or a camera
        BusError             the serial link: no answer in time, or the port cannot be opened
            BusLost          the port is gone: unplugged, hung up, or it accepts no more bytes
        GuardianLost         the guardian process ended or has taken the arm over
        ArmError             the arm, or a request to it, is refused
        CalibrationError     a calibration file is missing, ambiguous or not plausible
        CameraError          a camera cannot be opened, or delivers no more frames
    BenchError               what was given cannot be compared
        ResultError          a result file cannot be read, or is of another version

The exit status is 2 where the table shows none. Foreign exceptions become these at the border.
"""

from collections.abc import Iterable
from typing import ClassVar


class SmolVLAError(Exception):
    """Base of everything that smolvla-edge raises on purpose."""

    exit_status: ClassVar[int] = 2


class BundleError(SmolVLAError):
    """The bundle cannot be used as it is; the message says what to do."""


class InputError(SmolVLAError, ValueError):
    """Given input does not fit; nothing was run."""


class BackendError(SmolVLAError):
    """The backend is not there, or it refused a graph."""


class SettingsError(SmolVLAError):
    """Deployment settings are wrong or incomplete; the message lists all of them."""


class CheckFailed(SmolVLAError):
    """A check failed, such as the self-check of a bundle on this machine."""

    exit_status = 1


class SafetyStop(SmolVLAError):
    """A running arm was stopped; the message says why.

    at_once: switch the motors off immediately, without lowering the torque first.
    """

    exit_status = 1

    def __init__(self, message: str, *, at_once: bool = False) -> None:
        super().__init__(message)
        self.at_once = at_once


class ExportError(SmolVLAError):
    """The export cannot start or continue."""


class CheckpointError(ExportError):
    """The checkpoint is missing, damaged, of another kind, or asks for what is not supported."""


class GraphError(ExportError):
    """An exported graph holds operators, dtypes or shapes that the bundle's contract forbids."""


class ParityError(ExportError):
    """A stage of the exported graphs is over its tolerance."""

    exit_status = 1


class AuditError(ExportError):
    """What ran contradicts the precision that the bundle would claim."""

    exit_status = 1


class QuantizeError(SmolVLAError):
    """A precision recipe cannot be applied."""


class RangeError(QuantizeError):
    """The graph would overflow in float16 on the observations it was given."""


class ObservationsError(QuantizeError):
    """No observations can be read from what was given."""


class GateError(QuantizeError):
    """The gate cannot be met."""

    exit_status = 1


class DeviceError(SmolVLAError):
    """The arm, the bus or a camera failed or is refused."""


class BusError(DeviceError):
    """The serial link failed; the port is still there."""


class BusLost(BusError):
    """The port is gone. Nothing more can be sent; the servos keep their last goal."""


class GuardianLost(DeviceError):
    """The arm runs without a guardian: stop it."""


class ArmError(DeviceError):
    """The arm, or what was asked of it, is refused."""


class CalibrationError(DeviceError):
    """A calibration file cannot be used."""


class CameraError(DeviceError):
    """A camera cannot be used."""


class BenchError(SmolVLAError):
    """What was given cannot be compared."""


class ResultError(BenchError):
    """The file is no result of this version."""


def listed(head: str, problems: Iterable[object]) -> str:
    """A message with one problem a line."""
    return "\n  ".join((head, *map(str, problems)))
