"""The calls of the CUDA runtime that TensorRT's buffers and graphs need, through `cuda.bindings`.

The module is imported when a `Stream` is made. A call that fails raises BackendError with CUDA's
message.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import BackendError


def load_cuda() -> Any:
    """The module `cuda.bindings.runtime`. Raises BackendError where it is missing."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError as e:
        raise BackendError(
            f"{e}: pip install cuda-bindings, of the major version of this machine's CUDA"
        ) from e
    return cudart


class Stream:
    """One CUDA stream with its memory and its captured graphs, which are freed together."""

    def __init__(self, *, spin: bool = True) -> None:
        """spin: wait in a busy loop, which is faster by microseconds and uses a core."""
        self._cudart = load_cuda()
        if not spin:
            with suppress(BackendError):  # refused after CUDA's start: waiting then uses a core
                self._call("cudaSetDeviceFlags", self._cudart.cudaDeviceScheduleBlockingSync)
        self.handle = self._call("cudaStreamCreate")
        self._memory: list[Any] = []
        self._held: list[Any] = []  # arrays that copies may still read
        self._graphs: list[Any] = []

    def gpu(self) -> str:
        """Name, compute capability and multiprocessors: an engine fits no other GPU."""
        p = self._call("cudaGetDeviceProperties", 0)
        name = p.name.decode() if isinstance(p.name, bytes) else str(p.name)
        return f"{name.rstrip(chr(0))}, compute {p.major}.{p.minor}, {p.multiProcessorCount} SM"

    def allocate(self, size: int) -> int:
        """-> address of `size` zeroed bytes on the device, aligned to 256."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        self._memory.append(address)
        self._call("cudaMemset", address, 0, max(size, 1))
        return address

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device. Do not change it before the next `wait`."""
        self._held.append(array)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.handle)

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Wait for all work, then copy device memory to a new array."""
        out: NDArray[Any] = np.empty(shape, dtype)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", out.ctypes.data, address, out.nbytes, kind, self.handle)
        self.wait()
        return out

    def wait(self) -> None:
        """Wait until all work on the stream is done."""
        self._call("cudaStreamSynchronize", self.handle)
        self._held.clear()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what `work` puts on the stream, without running it; -> its launch.

        Run `work` once before: a library's first run prepares it, and that cannot be captured.
        """
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", self.handle)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        return lambda: self._call("cudaGraphLaunch", executable, self.handle)

    def close(self) -> None:
        """Free everything. The allocated addresses are not valid afterwards."""
        self.wait()
        for executable in self._graphs:
            self._call("cudaGraphExecDestroy", executable)
        for address in self._memory:
            self._call("cudaFree", address)
        self._call("cudaStreamDestroy", self.handle)
        self._graphs, self._memory = [], []

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            error, *values = getattr(self._cudart, name)(*arguments)
        except RuntimeError as e:  # some versions raise it where there is no driver
            raise BackendError(f"{name} failed: {e}") from e
        if error != self._cudart.cudaError_t.cudaSuccess:
            _, text = self._cudart.cudaGetErrorString(error)
            raise BackendError(
                f"{name} failed: {text.decode() if isinstance(text, bytes) else text}"
            )
        return values[0] if values else None
