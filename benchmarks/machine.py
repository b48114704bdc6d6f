"""The machine card, before and after a run, and this machine's rates of products and copies."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..core.board import cpu_flags, cpu_info, read_board
from .result import Machine, Rates, Readings

# The largest product of the policy, the first MLP layer of the vision tower: [ROWS, INNER,
# COLUMNS].
ROWS, INNER, COLUMNS = 1024, 768, 3072
COPIED = 64 << 20  # float32 numbers: larger than every cache
# CPU flags of matrix products, as Linux names them on x86 and Arm.
_FLAGS = (
    "avx2 fma avx_vnni avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16 "
    "asimd asimdhp asimddp i8mm bf16 sve"
)
_PACKAGES = ("smolvla-edge", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy", "torch")


def watched(realtime: bool = False) -> Callable[[], dict[str, Any]]:
    """Read load, clocks and temperature now.

    Returns a function that reads them again and gives the fields of `Result`.
    realtime: the policy keeps a core for the control loop, as `Policy.load(realtime=True)` does.
    """
    load, before = os.getloadavg()[0], readings()

    def head() -> dict[str, Any]:
        board = read_board()
        cores = len(os.sched_getaffinity(0))
        machine = Machine(
            cpu=cpu_name(),
            cores=cores,
            threads=max(1, cores - 1) if realtime else cores,  # as runtime/engines/ort.py
            memory_mb=round(1e-6 * board.memory_bytes),
            gpu=_nvidia("name,driver_version,memory.total,clocks.max.sm,power.limit"),
            board=board.module or board.name if board.jetson else None,
            power_mode=None
            if board.power_mode is None
            else board.power_modes.get(board.power_mode),
            system=f"Linux {board.kernel}",
            versions={"python": platform.python_version(), **_versions()},
            load=round(load, 2),
            before=before,
            after=readings(),
        )
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        made = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
        return {"command": command, "made": made, "machine": machine}

    return head


def cpu_name() -> str:
    """Model and matrix instructions. The family tells CPUs apart whose name a hypervisor hides."""
    info, flags = cpu_info(), cpu_flags()
    fields = ("cpu family", "model", "stepping")
    numbers = [f"{key.split()[-1]} {info[key]}" for key in fields if key in info]
    known = " ".join(flag for flag in _FLAGS.split() if flag in flags)
    return ", ".join([read_board().cpu, *numbers, known])


def readings() -> Readings:
    """Clocks and temperature at this moment."""
    board = read_board()
    clocks = {clock.name: clock.now for clock in board.clocks}
    cpu, gpu = clocks.pop("CPU", None), next(iter(clocks.values()), None)
    if cpu is None and "cpu MHz" in cpu_info():  # a virtual machine has no cpufreq
        cpu = float(cpu_info()["cpu MHz"])
    card = _nvidia("clocks.sm", "nounits")
    return Readings(
        cpu_mhz=cpu,
        gpu_mhz=float(card) if card and card.isdigit() else gpu,
        temperature_c=max(board.temperatures.values(), default=None),
    )


def power_w(root: Path = Path("/sys/class/hwmon")) -> float | None:
    """Power of the whole board, by the INA3221 of a Jetson. None without one."""
    for label in root.glob("hwmon*/in*_label"):
        if _text(label) in ("VDD_IN", "POM_5V_IN"):
            channel = label.name.removeprefix("in").removesuffix("_label")
            millivolts, milliamperes = (
                _text(label.with_name(f"{n}{channel}_input")) for n in ("in", "curr")
            )
            if millivolts and milliamperes:
                return 1e-6 * int(millivolts) * int(milliamperes)
    return None


def rates(device: str, seconds: float = 1.0) -> dict[str, float] | None:
    """Medians through ONNX Runtime with buffers on `device` (cpu | cuda).

    GFLOP/s of one product by dtype, 1 multiply-add = 2. "copy": GB/s read and written by y = -x.
    int8: DynamicQuantizeMatMul with int8 weights and a scale per column. None without the onnx
    package, which makes the graphs, or without the provider.
    """
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if find_spec("onnx") is None or provider not in onnxruntime.get_available_providers():
        return None
    from onnx import helper

    weights = np.arange(INNER * COLUMNS, dtype=np.int64).reshape(INNER, COLUMNS).astype(np.int8)
    x, scales = np.ones((ROWS, INNER), np.float32), np.ones(COLUMNS, np.float32)
    product, flops = helper.make_node("MatMul", ["x", "w"], ["y"]), 2e-9 * ROWS * INNER * COLUMNS
    found = {
        "float32": flops / _seconds(product, x, {"w": weights.astype(np.float32)}, device, seconds)
    }
    if device == "cpu":
        product = helper.make_node(
            "DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft"
        )
        found["int8"] = flops / _seconds(product, x, {"w": weights, "s": scales}, device, seconds)
    else:
        x16, w16 = x.astype(np.float16), weights.astype(np.float16)
        found["float16"] = flops / _seconds(product, x16, {"w": w16}, device, seconds)
    large = np.ones((COPIED // COLUMNS, COLUMNS), np.float32)
    copy = _seconds(helper.make_node("Neg", ["x"], ["y"]), large, {}, device, seconds)
    return found | {"copy": 2e-9 * large.nbytes / copy}


def before_and_after(
    before: dict[str, float] | None, after: dict[str, float] | None
) -> Rates | None:
    """Pairs of what `rates` gave."""
    if before is None or after is None:
        return None
    pairs: dict[str, tuple[float, ...]] = {
        n: (round(before[n], 1), round(after[n], 1)) for n in before
    }
    return Rates(copy_gbs=pairs.pop("copy"), gflops=pairs)


def _seconds(
    node: Any, x: NDArray[Any], constants: dict[str, NDArray[Any]], device: str, seconds: float
) -> float:
    """Median time of one operator, on all cores or on the GPU."""
    from onnx import helper, numpy_helper

    shape = (x.shape[0], COLUMNS)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    own = {"use_tf32": "0"} if device == "cuda" else {}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=[(provider, own)]
    )
    binding = session.io_binding()
    y = np.empty(shape, x.dtype)
    for bind, name, value in (
        (binding.bind_ortvalue_input, "x", x),
        (binding.bind_ortvalue_output, "y", y),
    ):
        bind(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
    session.run_with_iobinding(binding)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def _versions() -> dict[str, str]:
    names = {str(d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions()}
    return {name: names[name] for name in _PACKAGES if name in names}


def _nvidia(query: str, form: str = "") -> str | None:
    """nvidia-smi's answer for the first card."""
    if shutil.which("nvidia-smi") is None:
        return None
    line = [
        "nvidia-smi",
        f"--query-gpu={query}",
        f"--format=csv,noheader{',' if form else ''}{form}",
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    return None if done.returncode else done.stdout.partition("\n")[0] or None


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip(" \n\0") or None
    except OSError:  # missing, not permitted, or the sensor is off
        return None
