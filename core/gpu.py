"""Facts that NVIDIA's libraries tell. They are loaded, but no context is made on the GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """Empty: there is no GPU, or the library does not load."""

    name: str  # of the first one
    cuda: str  # the newest that the driver runs, 12.6
    tensorrt: str  # 10.3.0


def read_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> Gpu:
    """Read the driver and TensorRT. Never raises.

    Sources of the numbers: cuda.h (1000 major + 10 minor), NvInferVersion.h of TensorRT 10 and
    later (10000 major + 100 minor + patch).
    """
    name = cuda = tensorrt = ""
    with suppress(OSError, AttributeError):
        driver, number, device = load("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(number)) == 0:
            cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
        text = ctypes.create_string_buffer(256)
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDeviceGetName(text, len(text), device)
            name = text.value.decode()
    for major in (11, 10):
        with suppress(OSError, AttributeError):
            version = load(f"libnvinfer.so.{major}").getInferLibVersion()
            tensorrt = tensorrt or f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    return Gpu(name, cuda, tensorrt)
