"""What the runtime raises. Foreign exceptions are mapped to these at the border.

SmolVLAError         everything below; the command line prints it and exits 2
    BundleError      the bundle is missing, damaged, incomplete, changed, or of another version
    InputError       an observation, an instruction or an option does not fit the bundle (also a ValueError)
    BackendError     the device that was asked for cannot run here, or a graph failed to run
    SettingsError    robot.toml or the flags that override it are wrong or incomplete
    CheckFailed      the self-check: the bundle computes something else here; the command line exits 1
    SafetyStop       a run was ended because going on was not safe; the command line exits 1
"""


class SmolVLAError(Exception):
    """Base of everything that the runtime raises on purpose."""


class BundleError(SmolVLAError):
    """The bundle cannot be used as it is; the message says what to do."""


class InputError(SmolVLAError, ValueError):
    """Given input does not fit; nothing was run."""


class BackendError(SmolVLAError):
    """The execution provider is not there, or refused a graph."""


class SettingsError(SmolVLAError):
    """Deployment settings are wrong or incomplete; the message lists all of them."""


class SafetyStop(SmolVLAError):
    """A running arm was stopped; the message says why. at_once: the motors must go off without any ceremony."""

    def __init__(self, message: str, *, at_once: bool = False) -> None:
        super().__init__(message)
        self.at_once = at_once


class CheckFailed(SmolVLAError):
    """The bundle does not compute on this machine what its checkpoint computed."""
