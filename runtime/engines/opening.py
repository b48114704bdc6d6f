"""Load a bundle's graphs on the backend that `backend.choose_for` chose."""

from ..bundle.bundle import Bundle
from .backend import Backend
from .graphs import Graphs


def open_graphs(bundle: Bundle, backend: Backend, *, realtime: bool = False) -> Graphs:
    """Load the graphs of `bundle` on `backend`; realtime: leave a core to a control loop.

    Raises BackendError.
    """
    # Import the chosen engine only: on a CPU no TensorRT or CUDA code is loaded.
    if backend == "tensorrt":
        from .trt import TrtGraphs

        return TrtGraphs(bundle, realtime=realtime)
    from .ort import OrtGraphs

    return OrtGraphs(bundle, backend, realtime=realtime)
