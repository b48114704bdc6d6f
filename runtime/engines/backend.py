"""Which backend runs a bundle on this machine, and the reason for each that does not.

    tensorrt      engines of our own, built on this machine (runtime/trt.py)
    ort-tensorrt  ONNX Runtime's TensorRT provider
    ort-cuda      ONNX Runtime's CUDA provider
    ort-cpu       ONNX Runtime's CPU provider

A device is a list of backends; the first that loads and passes its self-check is taken (`Policy.load`).
"""

import ctypes
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal

import onnxruntime

from ...core.board import has_vnni
from ...core.errors import BackendError
from ..bundle.bundle import Bundle
from .graphs import Graphs

Device = Literal["auto", "cpu", "cuda", "jetson"]
Backend = Literal["tensorrt", "ort-tensorrt", "ort-cuda", "ort-cpu"]
PROVIDER = {
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-cpu": "CPUExecutionProvider",
}
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "auto": ("ort-cuda", "ort-cpu"),
    "cpu": ("ort-cpu",),
    "cuda": ("ort-cuda",),
    "jetson": ("tensorrt", "ort-tensorrt", "ort-cuda"),
}


@dataclass(frozen=True)
class Choice:
    """backends: to be tried in this order, at least one. reason: why the first of them, in words."""

    backends: tuple[Backend, ...]
    reason: str


def choose(device: str = "auto", backend: str | None = None) -> Choice:
    """What can run on this machine of what `device` stands for, or `backend` alone where it is named.

    Raises BackendError when nothing can, with what each one needs.
    """
    if device not in BACKENDS:
        raise BackendError(f"unknown device {device!r}, expected {', '.join(BACKENDS)}")
    known = BACKENDS["jetson"] + BACKENDS["cpu"]
    if backend is not None and backend not in known:
        raise BackendError(f"unknown backend {backend!r}, expected {', '.join(known)}")
    if backend is not None and device == "cpu" and backend != "ort-cpu":
        raise BackendError(
            f"backend {backend} does not run on the device cpu: leave one of the two out"
        )
    wanted = BACKENDS[device] if backend is None else tuple(b for b in known if b == backend)
    missing = {b: lacks(b) for b in wanted}
    able = tuple(b for b in wanted if not missing[b])
    left_out = [f"{b} needs {what}" for b, what in missing.items() if what]
    asked = f"device {device}" if backend is None else f"backend {backend}"
    if not able:
        other = "cpu" if lacks("ort-cuda") else "cuda"
        raise BackendError(
            f"{asked} cannot be had: {'; '.join(left_out)}. On this machine use --device {other}"
        )
    why = (
        f"because {'; '.join(left_out)}"
        if left_out
        else "as asked"
        if device != "auto" or backend
        else "it is there"
    )
    return Choice(able, f"{asked}: {able[0]}, {why}")


def choose_for(bundle: Bundle, device: str = "auto", backend: str | None = None) -> Choice:
    """`choose` for a bundle: one of the target cpu runs nowhere else, a portable one anywhere."""
    cpu_only = bundle.manifest.target == "cpu"
    if cpu_only and device == "auto" and backend is None:
        command = bundle.export_command("portable")
        choice = Choice(
            ("ort-cpu",),
            f"device auto: ort-cpu, which is the bundle's target. For a GPU: {command}",
        )
    else:
        choice = choose(device, backend)
    if cpu_only and choice.backends[0] != "ort-cpu":
        raise BackendError(
            f"bundle {bundle.folder} has the target cpu, whose operators {choice.backends[0]} does not have: use "
            f"--device cpu, or export it again with {bundle.export_command('portable')}"
        )
    if choice.backends[0] != "ort-cpu":
        return choice
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
            "INT8 with the target cpu needs a CPU with VNNI. This CPU has no VNNI, so its 8-bit products overflow. "
            "For a GPU, export with --precision int8 --target portable. For this CPU, export with --precision fp32. "
            "Or export and run INT8 for the target cpu on a CPU with VNNI"
        )


def open_graphs(bundle: Bundle, backend: Backend, *, realtime: bool = False) -> Graphs:
    """Load the graphs of `bundle` on `backend`. realtime: leave a core to a control loop. Raises BackendError."""
    # Only the chosen engine is imported: a CPU loads no TensorRT or CUDA code.
    if backend == "tensorrt":
        from .trt import TrtGraphs

        return TrtGraphs(bundle, realtime=realtime)
    from .ort import OrtGraphs

    return OrtGraphs(bundle, backend, realtime=realtime)


def lacks(backend: Backend) -> str:
    """What this machine is missing for `backend`, in words; empty when nothing is."""
    if backend == "ort-cpu":
        return ""
    missing = []
    if backend == "tensorrt":
        missing += [
            f"the Python module {name} ({where})"
            for name, where in (
                (
                    "tensorrt",
                    "from JetPack's apt: make the environment with --system-site-packages",
                ),
                ("cuda.bindings", "pip install cuda-bindings, of this CUDA's major version"),
            )
            if not _importable(name)
        ]
    elif PROVIDER[backend] not in onnxruntime.get_available_providers():
        package = (
            "an onnxruntime-gpu built with TensorRT, as for JetPack"
            if backend == "ort-tensorrt"
            else "onnxruntime-gpu in place of onnxruntime"
        )
        missing.append(f"ONNX Runtime's {PROVIDER[backend]} ({package})")
        installed = {
            str(d.metadata["Name"]).lower().replace("_", "-")
            for d in importlib.metadata.distributions()
        }
        if {"onnxruntime", "onnxruntime-gpu"} <= installed:
            missing.append(
                "only one of onnxruntime and onnxruntime-gpu (remove both, then install onnxruntime-gpu)"
            )
    if not _loads("libcuda.so.1"):
        missing.append("the NVIDIA driver (libcuda.so.1)")
    if backend == "ort-tensorrt" and not any(
        _loads(f"libnvinfer.so.{version}") for version in (10, 11)
    ):
        missing.append("TensorRT 10.3 to 11 (libnvinfer.so.10 or .11)")
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
