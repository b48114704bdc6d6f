"""Which backend runs a bundle on this machine, and why each of the others does not.

    tensorrt  TensorRT engines, built on this machine (trt.py)
    ort-cuda  ONNX Runtime's CUDA provider
    ort-cpu   ONNX Runtime's CPU provider

A device is a list of backends. `Policy.load` takes the first that loads and passes its self-check.
"""

import ctypes
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

import onnxruntime

from ...core.board import has_vnni
from ...core.errors import BackendError
from ..bundle.bundle import Bundle

Backend = Literal["tensorrt", "ort-cuda", "ort-cpu"]
KNOWN: tuple[Backend, ...] = get_args(Backend)
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "auto": ("ort-cuda", "ort-cpu"),
    "cpu": ("ort-cpu",),
    "cuda": ("ort-cuda",),
    "jetson": ("tensorrt", "ort-cuda"),
}
PROVIDER = {"ort-cuda": "CUDAExecutionProvider", "ort-cpu": "CPUExecutionProvider"}
_TENSORRT_MODULES = {
    "tensorrt": "from JetPack's apt: make the environment with --system-site-packages",
    "cuda.bindings": "pip install cuda-bindings, of this CUDA's major version",
}


@dataclass(frozen=True)
class Choice:
    """The backends to try, in order, at least one; the reason is for the first."""

    backends: tuple[Backend, ...]
    reason: str


def choose(device: str = "auto", backend: str | None = None) -> Choice:
    """The backends of `device` that this machine can run, or `backend` alone.

    Raises BackendError that says what each of them needs, where this machine can run none.
    """
    if device not in BACKENDS:
        raise BackendError(f"unknown device {device!r}, expected {', '.join(BACKENDS)}")
    if backend is not None and backend not in KNOWN:
        raise BackendError(f"unknown backend {backend!r}, expected {', '.join(KNOWN)}")
    if backend is not None and device == "cpu" and backend != "ort-cpu":
        raise BackendError(
            f"backend {backend} does not run on the device cpu: leave one of the two out"
        )
    wanted = BACKENDS[device] if backend is None else tuple(b for b in KNOWN if b == backend)
    missing = {b: missing_for(b) for b in wanted}
    able = tuple(b for b in wanted if not missing[b])
    left_out = "; ".join(f"{b} needs {what}" for b, what in missing.items() if what)
    asked = f"device {device}" if backend is None else f"backend {backend}"
    if not able:
        other = "cpu" if missing_for("ort-cuda") else "cuda"
        raise BackendError(
            f"{asked} is not available: {left_out}. On this machine use --device {other}"
        )
    if left_out:
        why = f"because {left_out}"
    elif device != "auto" or backend:
        why = "as asked"
    else:
        why = "it is available"
    return Choice(able, f"{asked}: {able[0]}, {why}")


def choose_for(bundle: Bundle, device: str = "auto", backend: str | None = None) -> Choice:
    """`choose` for a bundle. A bundle of the target cpu runs on ort-cpu only."""
    cpu_only = bundle.manifest.target == "cpu"
    if cpu_only and device == "auto" and backend is None:
        command = bundle.export_command("portable")
        reason = f"device auto: ort-cpu, which is the bundle's target. For a GPU: {command}"
        choice = Choice(("ort-cpu",), reason)
    else:
        choice = choose(device, backend)
    if choice.backends[0] != "ort-cpu":
        if not cpu_only:
            return choice
        raise BackendError(
            f"bundle {bundle.folder} has the target cpu, whose operators {choice.backends[0]} does "
            "not have: use --device cpu, or export it again with "
            f"{bundle.export_command('portable')}"
        )
    int8, hint = bundle.manifest.precision == "int8", ""
    if cpu_only and int8:
        require_vnni()
    elif int8:
        hint = ". On a CPU the INT8 of a portable bundle is exact, but not fast: products are float"
    elif not cpu_only:
        hint = ". On a CPU a bundle with --target cpu is faster"
    return Choice(choice.backends, choice.reason + hint)


def require_vnni() -> None:
    """Raises BackendError where INT8 for the target cpu would compute wrong products."""
    if not has_vnni():
        raise BackendError(
            "INT8 with the target cpu needs a CPU with VNNI. This CPU has no VNNI, so its 8-bit "
            "products overflow. For a GPU, export with --precision int8 --target portable. For "
            "this CPU, export with --precision fp32. Or export and run INT8 for the target cpu on "
            "a CPU with VNNI"
        )


def missing_for(backend: Backend) -> str:
    """What `backend` needs and this machine does not have; empty where it has all."""
    if backend == "ort-cpu":
        return ""
    missing = []
    if backend == "tensorrt":
        missing += [
            f"the Python module {name} ({where})"
            for name, where in _TENSORRT_MODULES.items()
            if not _importable(name)
        ]
    elif PROVIDER[backend] not in onnxruntime.get_available_providers():
        missing.append(
            f"ONNX Runtime's {PROVIDER[backend]} (onnxruntime-gpu in place of onnxruntime)"
        )
        names = (str(d.metadata["Name"]).lower() for d in importlib.metadata.distributions())
        if {"onnxruntime", "onnxruntime-gpu"} <= {name.replace("_", "-") for name in names}:
            missing.append(
                "only one of onnxruntime and onnxruntime-gpu "
                "(remove both, then install onnxruntime-gpu)"
            )
    if not _loads("libcuda.so.1"):
        missing.append("the NVIDIA driver (libcuda.so.1)")
    return ", ".join(missing)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
