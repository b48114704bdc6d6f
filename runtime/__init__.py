"""The runtime: a bundle, run without torch. `Policy` is the public API."""

from .bundle import Bundle
from .errors import BackendError, BundleError, CheckFailed, InputError, SafetyStop, SettingsError, SmolVLAError
from .policy import Policy
from .sampling import RealTimeChunking

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
