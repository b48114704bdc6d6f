"""The two graphs in ONNX Runtime, joined by buffers with fixed addresses.

The prefix writes the KV cache where the expert reads it. Between denoise steps two action buffers
swap roles. A step allocates nothing and copies only a few scalars between host and device. On CUDA
each binding is captured once as a CUDA graph, which uses the same addresses at every replay.
"""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ...core.errors import BackendError
from ...core.worker import Worker
from ..bundle.bundle import Bundle
from ..bundle.manifest import CAMERA_GRAPH, Graph, Tensor
from .backend import PROVIDER, Backend
from .graphs import Feeds, Step
from .resizing import require_resized, resampling

_CPU, _CUDA = PROVIDER["ort-cpu"], PROVIDER["ort-cuda"]
# Q/DQ stay, and products between them are float. ONNX Runtime would fuse them to integer products,
# which overflow on an x86 CPU without VNNI. Set on every CPU, so that all give the same answer.
EXACT_INT8 = ("session.disable_quant_qdq", "1")
_STOP_LIMIT_S = 5.0
Call = Callable[[], None]


class OrtGraphs:
    """`prefill` once per observation, then `denoise` as often as needed against the same cache."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend = "ort-cpu",
        *,
        realtime: bool = False,
        profile: Path | None = None,
    ) -> None:
        """Load both graphs.

        Args:
            bundle: The graphs and their signature.
            backend: ort-cuda or ort-cpu.
            realtime: Leave a core to a control loop, and do not spin while waiting.
            profile: A folder where ONNX Runtime records each operator until `end_profiling`. It
                cannot record CUDA graphs, so none are used.

        Raises:
            BackendError: The backend does not start, or a graph does not load or run.
        """
        onnxruntime.disable_telemetry_events()
        self.provider = PROVIDER[backend]
        self.device = "cuda" if self.provider == _CUDA else "cpu"
        self.reason = f"ONNX Runtime {onnxruntime.__version__}"
        self.takes_frames = self.device == "cuda" and CAMERA_GRAPH in bundle.manifest.files
        self._sessions: dict[str, Any] = {}  # by file name
        self._worker: Worker | None = None
        self._realtime, self._profile = realtime, profile
        if self.device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
        if self.device == "cuda" and profile is None:
            # ONNX Runtime keeps captured CUDA graphs per thread, so one thread makes every call.
            self._worker = Worker("cuda", limit=1)
            weakref.finalize(self, self._worker.stop)
            try:
                self._load(bundle, capture=True)
            except BackendError as e:
                self.reason += f", without CUDA graphs ({e})"
            else:
                self.reason += ", replayed as CUDA graphs"
                return
            self.close()  # a small board cannot hold the weights twice
        self._load(bundle, capture=False)

    def _load(self, bundle: Bundle, capture: bool) -> None:
        m = bundle.manifest
        for graph in (m.prefix, m.expert):
            session = self._open(bundle, graph.file, capture, self._profile)
            self._sessions[graph.file] = session
            _require_signature(session, graph, bundle)
        if self.takes_frames:
            self._sessions[CAMERA_GRAPH] = self._open(bundle, CAMERA_GRAPH, False, None)
        self._checked_sizes: set[tuple[int, int]] = set()  # of frames, as the device resizes them
        self._graph_files = m.prefix.file, m.expert.file
        self._cameras = [c.name for c in m.cameras]
        self._buffers = {name: self._buffer(t) for name, t in m.tensors.items()}
        self._cache = [t.name for t in m.prefix.outputs]
        self._prefill = self._bound(m.prefix, {}, 1)
        swapped = {"noisy_actions": "next_actions", "next_actions": "noisy_actions"}
        self._steps = [self._bound(m.expert, {}, 1), self._bound(m.expert, swapped, 2)]
        if capture:
            for call in (self._prefill, *self._steps):  # the first run of each captures it
                self._run(call)

    def prefill(self, feeds: Feeds) -> None:
        """Run the prefix graph on the output of Preprocessor.feeds; fills the KV cache."""
        for i, name in enumerate(self._cameras):
            if f"frame.{name}" in feeds:
                self._run(partial(self._resize, i, feeds[f"frame.{name}"]))
        self._update({name: array for name, array in feeds.items() if name in self._buffers})
        self._run(self._prefill)

    def _update(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, array in arrays.items():
            self._buffers[name].update_inplace(np.ascontiguousarray(array))

    def finish_prefill(self) -> None:
        """Nothing: `prefill` has waited."""

    def _resize(self, index: int, frame: NDArray[np.generic]) -> None:
        """Resize the frame of camera `index` on the device into its slice of `images`.

        The first frame of each size is compared with the host's result.
        """
        session, images = self._sessions[CAMERA_GRAPH], self._buffers["images"]
        binding = session.io_binding()
        shape = (1, *images.shape()[1:])
        for name, array in {"frame": frame, **resampling(*frame.shape[:2], shape[-1])}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        address = images.data_ptr() + index * 4 * int(np.prod(shape))  # float32
        binding.bind_output("image", images.device_name(), 0, np.float32, shape, address)
        session.run_with_iobinding(binding)
        if frame.shape[:2] not in self._checked_sizes:
            require_resized(images.numpy()[index], frame)
            self._checked_sizes.add((frame.shape[0], frame.shape[1]))

    def denoise(
        self,
        noise: NDArray[np.float32],
        steps: Sequence[Step],
        prev_chunk: NDArray[np.float32],
        prev_weights: NDArray[np.float32],
        velocities: list[NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """Euler steps from `noise` to normalised actions: see `Graphs.denoise`."""
        self._update(
            {"noisy_actions": noise, "prev_chunk": prev_chunk, "prev_weights": prev_weights}
        )
        for i, step in enumerate(steps):
            self._update(step)
            self._run(self._steps[i % 2])
            if velocities is not None:
                velocities.append(self._buffers["velocity"].numpy().copy())
        out = self._buffers["noisy_actions" if len(steps) % 2 == 0 else "next_actions"].numpy()
        return np.array(out, np.float32)

    def cache(self) -> dict[str, NDArray[np.generic]]:
        """Copies of the prefix graph's outputs: prefix_mask and every key.i and value.i."""
        return {name: np.array(self._buffers[name].numpy()) for name in self._cache}

    def proof(self) -> None:
        """Nothing: every process makes new sessions."""

    def keep_proof(self, errors: dict[str, float]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Free the sessions and their memory, and end the CUDA thread."""
        self._prefill, self._steps, self._buffers = lambda: None, [], {}
        self._sessions.clear()
        if self._worker is not None:
            self._worker.stop(_STOP_LIMIT_S)
            self._worker = None

    def end_profiling(self) -> tuple[Path, Path]:
        """-> the JSON files of what the prefix and the expert ran."""
        prefix, expert = (Path(self._sessions[f].end_profiling()) for f in self._graph_files)
        return prefix, expert

    def _open(self, bundle: Bundle, file: str, capture: bool, profile: Path | None) -> Any:
        """A session. Raises BackendError where it, or its provider, does not start."""
        path = bundle.path(file)
        options = onnxruntime.SessionOptions()
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / file)
        options.log_severity_level = 3
        cores = len(os.sched_getaffinity(0))
        options.intra_op_num_threads = max(1, cores - 1) if self._realtime else cores
        if self._realtime:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        else:  # two sessions take turns: the idle one must not spin against the busy one
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.provider == _CPU and bundle.manifest.target == "portable":
            options.add_session_config_entry(*EXACT_INT8)
        providers: list[tuple[str, dict[str, str]]] = [(_CPU, {})]
        if self.provider == _CUDA:
            # Without TF32, which rounds the operands of float32 products to 10 bits.
            cuda = {"use_tf32": "0", "enable_cuda_graph": "1" if capture else "0"}
            providers.insert(0, (_CUDA, cuda))
        try:  # no fallback: it would leave out our options
            session = onnxruntime.InferenceSession(
                path, options, providers=providers, enable_fallback=0
            )
        except Exception as e:  # onnxruntime's own classes all derive from Exception only
            raise BackendError(f"ONNX Runtime cannot load {path} on {self.provider}: {e}") from e
        if session.get_providers()[0] != self.provider:
            raise BackendError(
                f"{self.provider} did not start (got {', '.join(session.get_providers())}): its "
                "CUDA or cuDNN libraries do not load, see above. Install them, or use --device cpu"
            )
        return session

    def _buffer(self, tensor: Tensor) -> Any:
        zeros: NDArray[Any] = np.zeros(tensor.shape, tensor.dtype)
        return onnxruntime.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)

    def _bound(self, graph: Graph, renamed: dict[str, str], graph_id: int) -> Call:
        """A run of a graph on our buffers; graph_id: of the CUDA graph, one for each binding."""
        session, options = self._sessions[graph.file], onnxruntime.RunOptions()
        binding = session.io_binding()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        for t in graph.inputs:
            binding.bind_ortvalue_input(t.name, self._buffers[renamed.get(t.name, t.name)])
        for t in graph.outputs:
            binding.bind_ortvalue_output(t.name, self._buffers[renamed.get(t.name, t.name)])
        return partial(session.run_with_iobinding, binding, options)

    def _run(self, call: Call) -> None:
        """Raises BackendError."""
        answer: Future[None] | None = None
        try:
            if self._worker is None:
                call()
                return
            answer = self._worker.submit(call)
            assert answer is not None, "one call at a time has room"
            answer.result()
        except Exception as e:
            raise BackendError(f"ONNX Runtime failed to run a graph: {e}") from e
        finally:
            del answer  # an error in it is a reference cycle, which keeps the session alive


def _require_signature(session: Any, graph: Graph, bundle: Bundle) -> None:
    for what, tensors, found in (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    ):
        expected = [
            (t.name, f"tensor({t.dtype.replace('float32', 'float')})", t.shape) for t in tensors
        ]
        if [(t.name, t.type, tuple(t.shape)) for t in found] != expected:
            raise BackendError(
                f"{graph.file} in {bundle.folder} has other {what} than the manifest says: "
                "export again"
            )
