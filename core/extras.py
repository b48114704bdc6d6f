"""Optional dependencies: which modules a command needs, and the extra that installs them."""

from collections.abc import Iterable
from importlib.util import find_spec

from .errors import SmolVLAError

EXPORT = ("torch", "onnx", "onnxscript", "safetensors", "transformers", "huggingface_hub")
DATASET = ("av", "pyarrow", "huggingface_hub")


def require_modules(names: Iterable[str], extra: str) -> None:
    """Raises SmolVLAError that names every module which is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise SmolVLAError(
            f"this needs {', '.join(missing)}: "
            f"install the package with its [{extra}] extra (README)"
        )
