"""The two graphs in ONNX Runtime, joined by buffers with fixed addresses.

The prefix writes the KV cache where the expert reads it; between denoise steps two action buffers swap roles. No
step allocates, and nothing but a few scalars crosses between host and device. On CUDA each binding is captured once
as a CUDA graph, which reads and writes those same addresses whenever it is replayed.
"""

import os
import queue
import threading
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
from ...core.files import cache_home, private_folder
from ..bundle.bundle import Bundle
from ..bundle.manifest import CAMERA_GRAPH, Graph, Tensor
from .backend import PROVIDER, Backend
from .graphs import Feeds, Step
from .resizing import require_resized, resampling

_CPU, _CUDA, _TENSORRT = (PROVIDER[name] for name in ("ort-cpu", "ort-cuda", "ort-tensorrt"))
# Q/DQ stay as they are, and products between them are float. ONNX Runtime would fuse them to integer products, which
# overflow on an x86 CPU without VNNI. Set on every CPU, so that all give the same answer.
EXACT_INT8 = ("session.disable_quant_qdq", "1")
_Calls = queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None]


def _serve(calls: _Calls) -> None:
    """Make the calls one by one until None, in one thread: ONNX Runtime keeps captured CUDA graphs per thread."""
    while (item := calls.get()) is not None:
        call, answer = item
        try:
            answer.set_result(call())
        except Exception as e:  # raised again in the thread that waits
            answer.set_exception(e)
        del item, call, answer  # a traceback among them would keep everything alive


def _tensorrt_options(bundle: Bundle) -> dict[str, str]:
    """ONNX Runtime's TensorRT provider builds weakly typed networks of older versions: it must be told of the types
    that are there. Its engines are kept apart from ours."""
    folder = str(private_folder(cache_home() / "engines-ort"))
    narrow = bundle.manifest.precision
    return {
        "trt_fp16_enable": str(int(narrow != "fp32")),
        "trt_int8_enable": str(int(narrow == "int8")),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }


class OrtGraphs:
    """`prefill` once per observation, then `denoise` as often as wanted against the same cache."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend = "ort-cpu",
        *,
        realtime: bool = False,
        profile: Path | None = None,
    ) -> None:
        """realtime: leave a core to a control loop and do not spin while waiting. profile: a folder in which ONNX
        Runtime keeps what it ran, until `end_profiling`; without CUDA graphs then, of which it sees nothing.

        Raises BackendError when the backend or a graph cannot be used.
        """
        onnxruntime.disable_telemetry_events()
        self.provider = provider = PROVIDER[backend]
        self.reason = f"ONNX Runtime {onnxruntime.__version__}"
        if provider != _CPU and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
        self.device = "cpu" if provider == _CPU else "cuda"
        self.takes_frames = self.device == "cuda" and CAMERA_GRAPH in bundle.manifest.files
        self._calls: _Calls | None = None
        if profile is None and provider == _CUDA:
            self._calls = calls = _Calls()
            # A daemon: a device that hangs must not keep the process alive.
            threading.Thread(target=_serve, args=(calls,), name="cuda", daemon=True).start()
            weakref.finalize(self, calls.put, None)
            try:
                self._load(bundle, realtime, None)
                for call in (self._prefill, *self._steps):  # the first run of each captures it
                    self._run(call)
                self.reason += ", replayed as CUDA graphs"
                return
            except BackendError as e:
                self.reason += f", without CUDA graphs ({e})"
                calls.put(None)  # the thread ends and lets go of the session
                self._calls = None
        self._load(bundle, realtime, profile)

    def _load(self, bundle: Bundle, realtime: bool, profile: Path | None) -> None:
        manifest = bundle.manifest
        captured = self._calls is not None
        self._prefix, self._expert = (
            self._session(bundle, g.file, realtime, profile, captured)
            for g in (manifest.prefix, manifest.expert)
        )
        if self.takes_frames:
            self._camera = self._session(bundle, CAMERA_GRAPH, realtime, None, False)
            self._checked: set[tuple[int, int]] = (
                set()
            )  # frame sizes that the device resizes as the host does
        self._cameras = [c.name for c in manifest.cameras]
        self._check_signature(self._prefix, manifest.prefix, bundle)
        self._check_signature(self._expert, manifest.expert, bundle)
        self._buffers = {name: self._buffer(t) for name, t in manifest.tensors.items()}
        self._cache = [t.name for t in manifest.prefix.outputs]
        self._prefill = self._call(self._prefix, manifest.prefix, {}, 1)
        there = {"noisy_actions": "noisy_actions", "next_actions": "next_actions"}
        back = {"noisy_actions": "next_actions", "next_actions": "noisy_actions"}
        swaps = enumerate((there, back), 1)
        self._steps = [self._call(self._expert, manifest.expert, swap, i) for i, swap in swaps]

    def prefill(self, feeds: Feeds) -> None:
        """Run the prefix graph on what Preprocessor.feeds made, `images` or raw frames; fills the KV cache."""
        for i, name in enumerate(self._cameras):
            if (frame := feeds.get(f"frame.{name}")) is not None:
                self._run(partial(self._place, i, frame))
        self._update({name: array for name, array in feeds.items() if name in self._buffers})
        self._run(self._prefill)

    def _update(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, array in arrays.items():
            self._buffers[name].update_inplace(np.ascontiguousarray(array))

    def finish_prefill(self) -> None:
        """Nothing: `prefill` has waited."""

    def _place(self, index: int, frame: NDArray[np.generic]) -> None:
        """The frame of camera `index`, resized on the device into its slice of `images`. The first of each size must
        be what the host makes of it."""
        images, binding = self._buffers["images"], self._camera.io_binding()
        shape = (1, *images.shape()[1:])
        for name, array in {"frame": frame, **resampling(*frame.shape[:2], shape[-1])}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        slot = images.data_ptr() + index * 4 * int(np.prod(shape))
        binding.bind_output("image", images.device_name(), 0, np.float32, shape, slot)
        self._camera.run_with_iobinding(binding)
        if frame.shape[:2] not in self._checked:
            require_resized(images.numpy()[index], frame)
            self._checked.add((frame.shape[0], frame.shape[1]))

    def denoise(
        self,
        noise: NDArray[np.float32],
        steps: Sequence[Step],
        prev_chunk: NDArray[np.float32],
        prev_weights: NDArray[np.float32],
        velocities: list[NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """Euler steps from `noise` to normalised actions, both float32 [1, chunk, max_action_dim].

        prev_chunk is normalised and padded like noise, prev_weights [1, chunk, 1]; zeros switch guidance off.
        `velocities`, where given, collects each step's velocity.
        """
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
        """Copies of what the prefix wrote: prefix_mask and every key.i and value.i."""
        return {name: np.array(self._buffers[name].numpy()) for name in self._cache}

    def proof(self) -> None:
        """Nothing: sessions are made anew in every process."""

    def keep_proof(self, errors: dict[str, float]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Let go of the sessions and their memory."""
        self._prefill, self._steps, self._buffers = lambda: None, [], {}
        del self._prefix, self._expert

    def end_profiling(self) -> tuple[Path, Path]:
        """-> the profiles of prefix and expert, JSON."""
        return Path(self._prefix.end_profiling()), Path(self._expert.end_profiling())

    def _session(
        self, bundle: Bundle, file: str, realtime: bool, profile: Path | None, captured: bool
    ) -> Any:
        provider = self.provider
        options = onnxruntime.SessionOptions()
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile / file)
        options.log_severity_level = 3
        cores = len(os.sched_getaffinity(0))
        options.intra_op_num_threads = max(1, cores - 1) if realtime else cores
        if realtime:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        else:  # two sessions take turns: the idle one must not spin against the busy one
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if provider == _CPU and bundle.manifest.target == "portable":
            options.add_session_config_entry(*EXACT_INT8)
        # Without TF32, which rounds the operands of float32 products to 10 bits.
        own = {_CUDA: {"use_tf32": "0", "enable_cuda_graph": "1" if captured else "0"}}
        if provider == _TENSORRT:
            own[_TENSORRT] = _tensorrt_options(bundle)
        order = [_TENSORRT, _CUDA, _CPU] if file != CAMERA_GRAPH else [_CUDA, _CPU]  # all float32
        provider = provider if provider in order else order[0]
        providers = [(p, own.get(p, {})) for p in order[order.index(provider) :]]
        path = bundle.path(file)
        try:  # no fallback: it would leave out our options
            session = onnxruntime.InferenceSession(
                path, options, providers=providers, enable_fallback=0
            )
        except Exception as e:  # onnxruntime's own classes all derive from Exception only
            raise BackendError(f"ONNX Runtime cannot load {path} on {provider}: {e}") from e
        if session.get_providers()[0] != provider:
            raise BackendError(
                f"{provider} did not start (got {', '.join(session.get_providers())}): its CUDA, cuDNN or TensorRT "
                "libraries do not load, see above. Install them, or use --device cpu"
            )
        return session

    @staticmethod
    def _check_signature(session: Any, graph: Graph, bundle: Bundle) -> None:
        for what, tensors, found in (
            ("inputs", graph.inputs, session.get_inputs()),
            ("outputs", graph.outputs, session.get_outputs()),
        ):
            has = [(t.name, t.type, tuple(t.shape)) for t in found]
            if has != [
                (t.name, f"tensor({t.dtype.replace('float32', 'float')})", t.shape) for t in tensors
            ]:
                raise BackendError(
                    f"{graph.file} in {bundle.folder} has other {what} than the manifest says: export again"
                )

    def _buffer(self, tensor: Tensor) -> Any:
        zeros: NDArray[Any] = np.zeros(tensor.shape, tensor.dtype)
        return onnxruntime.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)

    def _call(
        self, session: Any, graph: Graph, renamed: dict[str, str], graph_id: int
    ) -> Callable[[], None]:
        """A run of `session` on our buffers. graph_id: of its CUDA graph, another for each binding of a session."""
        binding, options = session.io_binding(), onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        for t in graph.inputs:
            binding.bind_ortvalue_input(t.name, self._buffers[renamed.get(t.name, t.name)])
        for t in graph.outputs:
            binding.bind_ortvalue_output(t.name, self._buffers[renamed.get(t.name, t.name)])
        return partial(session.run_with_iobinding, binding, options)

    def _run(self, call: Callable[[], None]) -> None:
        try:
            if self._calls is not None:
                answer: Future[None] = Future()
                self._calls.put((call, answer))
                answer.result()
            else:
                call()
        except Exception as e:
            raise BackendError(f"ONNX Runtime failed to run a graph: {e}") from e
