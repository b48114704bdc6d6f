"""The runtime: runs a bundle without torch.

The public Python API:

    Policy            a bundle on a device: images, state and task in, a chunk of actions out
    Bundle            a bundle on disk, opened and checked
    RealTimeChunking  how strongly a new chunk follows the previous one

    SmolVLAError      the base of every error that this package raises on purpose
    BundleError       the bundle is missing, damaged or of another version
    InputError        an input does not fit; also a ValueError
    BackendError      the device or backend cannot run here, or a graph failed
    CheckFailed       a check of this machine or this bundle failed
    SettingsError     robot.toml or an option is wrong
    SafetyStop        the run ended because it was not safe to continue
"""

from ..core.errors import (
    BackendError,
    BundleError,
    CheckFailed,
    InputError,
    SafetyStop,
    SettingsError,
    SmolVLAError,
)
from .bundle.bundle import Bundle
from .policy.policy import Policy
from .policy.sampling import RealTimeChunking

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "CheckFailed",
    "InputError",
    "Policy",
    "RealTimeChunking",
    "SafetyStop",
    "SettingsError",
    "SmolVLAError",
]
