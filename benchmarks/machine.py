"""What a benchmark ran on, how fast that multiplies matrices on this day, and the JSON every result ends with."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

ROWS, INNER, COLUMNS = 1024, 768, 3072  # the largest product of the policy: vision's first MLP layer
_CARD = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
# Vector units that matrix products use, as Linux names them on x86 and on Arm.
_FLAGS = "avx2 fma avx_vnni avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16 asimd asimdhp asimddp i8mm bf16 sve"


def machine() -> str:
    """CPU model, cores this process may use, vector units, the kernel's release, and NVIDIA cards if there are."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    cpu = {key.strip(): value.strip() for key, value in reversed(lines)}
    numbers = [f"{key.split()[-1]} {cpu[key]}" for key in ("cpu family", "model", "stepping") if key in cpu]
    has = f"{cpu.get('flags', '')} {cpu.get('Features', '')}".split()
    parts = [cpu.get("model name", platform.machine()), *numbers, f"{len(os.sched_getaffinity(0))} cores"]
    parts += [" ".join(f for f in _FLAGS.split() if f in has), f"Linux {platform.release()}"]
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader"]
        parts += subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
    return ", ".join(part for part in parts if part)


def matmul_rates(seconds: float = 1.0) -> dict[str, float]:
    """Median GFLOP/s of one product through ONNX Runtime on all cores, weights in cache; `seconds` for each.

    float32: MatMul. int8: DynamicQuantizeMatMul with int8 weights, a scale per column; 1 multiply-add = 2 as well.
    """
    from onnx import NodeProto, TensorProto, helper, numpy_helper

    x = np.ones((ROWS, INNER), np.float32)
    weights = np.arange(INNER * COLUMNS, dtype=np.int64).reshape(INNER, COLUMNS).astype(np.int8)
    scales = np.ones(COLUMNS, np.float32)
    rates = {}
    products: list[tuple[str, NodeProto, dict[str, NDArray[Any]]]] = [
        ("float32", helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": weights.astype(np.float32)}),
        (
            "int8",
            helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft"),
            {"w": weights, "s": scales},
        ),
    ]
    for name, node, constants in products:
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (ROWS, COLUMNS))],
            [numpy_helper.from_array(value, key) for key, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": x})
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            session.run(None, {"x": x})
            taken.append(time.perf_counter() - start)
        rates[name] = 2e-9 * ROWS * INNER * COLUMNS / float(np.median(taken))
    return rates


def report(kind: str, output: str | None, **fields: object) -> None:
    """Print the result as one line of JSON, the last, and write it to the file `output` where one is named."""
    result = {"format": "smolvla-edge-result", "version": 1, "kind": kind}
    text = json.dumps(result | {"command": " ".join(sys.argv), "machine": machine()} | fields)
    print(text)
    if output:
        Path(output).write_text(text + "\n")
