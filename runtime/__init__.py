"""The runtime: a bundle, run without torch. `Policy` is the public API."""

from .bundle import Bundle
from .errors import BackendError, BundleError, InputError, SettingsError, SmolVLAError
from .policy import Policy
from .sampling import RealTimeChunking

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "InputError",
    "Policy",
    "RealTimeChunking",
    "SettingsError",
    "SmolVLAError",
]
