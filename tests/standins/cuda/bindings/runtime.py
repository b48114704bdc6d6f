"""A stand-in for `cuda.bindings.runtime`: device memory is host memory.

A stream is a list while it is captured.

`calls` holds the name of every call and, for copies, how many bytes went which way.
"""

import ctypes
import enum
import json
import os
from types import SimpleNamespace

calls: list[tuple] = []
_memory: dict[int, tuple[ctypes.Array, int]] = {}  # address -> its buffer and size
_capturing: list | None = None
cudaDeviceScheduleBlockingSync = 4


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess


def enqueue(work):
    """What TensorRT's stand-in puts on the stream."""
    if _capturing is not None:
        _capturing.append(work)
    else:
        work()


def view(address, size):
    """Device memory as a ctypes array; memory that was not allocated is the code's error."""
    for start, (_, length) in _memory.items():
        if start <= address and address + size <= start + length:
            return (ctypes.c_char * size).from_address(address)
    raise AssertionError(f"{size} bytes at {address} were never allocated")


def cudaMalloc(size):
    calls.append(("cudaMalloc", size))
    assert _capturing is None, "nothing may be allocated while a stream is captured"
    buffer = ctypes.create_string_buffer(size + 256)
    address = -(-ctypes.addressof(buffer) // 256) * 256
    _memory[address] = buffer, size
    return OK, address


def cudaFree(address):
    del _memory[address]
    return (OK,)


def cudaMemset(address, value, size):
    ctypes.memset(view(address, size), value, size)
    return (OK,)


def cudaMemcpyAsync(to, source, size, kind, stream):
    calls.append((kind.name, size))
    assert _capturing is None, "pageable memory cannot be copied while a stream is captured"
    view(to if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source, size)
    ctypes.memmove(to, source, size)
    return (OK,)


def cudaStreamBeginCapture(stream, mode):
    global _capturing
    calls.append(("cudaStreamBeginCapture",))
    _capturing = []
    return (OK,)


def cudaStreamEndCapture(stream):
    global _capturing
    graph, _capturing = _capturing, None
    return OK, graph


def cudaGraphInstantiate(graph, flags):
    return OK, graph


def cudaGraphLaunch(executable, stream):
    calls.append(("cudaGraphLaunch", len(executable)))
    for work in executable:
        work()
    return (OK,)


def cudaStreamCreate():
    return OK, 7


def cudaGetDeviceProperties(device):
    name = json.loads(os.environ.get("STANDIN", "{}")).get("gpu", "Stand-in")
    return OK, SimpleNamespace(name=name.encode(), major=8, minor=7, multiProcessorCount=8)


def cudaGetErrorString(error):
    return OK, b"out of memory"


def _nothing(*_):
    return (OK,)


cudaStreamSynchronize = cudaStreamDestroy = cudaGraphDestroy = cudaGraphExecDestroy = (
    cudaSetDeviceFlags
) = _nothing
