"""The runtime: a bundle, run without torch. `Policy` is the public API."""

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
