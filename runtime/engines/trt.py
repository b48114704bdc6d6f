"""The two graphs as TensorRT engines, joined by device buffers with fixed addresses.

Only frames, state, tokens and noise are uploaded, and only the actions are downloaded. A chunk
(frames to images, prefix, every denoise step) is captured as one CUDA graph when its number of
steps is first used. From then on one launch replays it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import BackendError
from ..bundle.bundle import Bundle
from ..bundle.manifest import CAMERA_GRAPH, Tensor
from .cuda import Stream
from .graphs import Feeds, Step
from .resizing import require_resized, resampling
from .trt_engine import Engine
from .trt_engine_cache import EngineCache

Array = NDArray[np.float32]


class TrtGraphs:
    """`prefill` once per observation, then `denoise` as often as needed against the same cache.

    `prefill` only uploads: the prefix runs with the next `denoise`, in the same CUDA graph.
    """

    provider = device = "tensorrt"

    def __init__(
        self, bundle: Bundle, *, realtime: bool = False, say: Callable[[str], None] = print
    ) -> None:
        """Load both engines, or build them first.

        realtime: do not spin while waiting for the GPU. say: receives the progress of builds.
        Raises BackendError where an engine cannot be built or loaded, or its layers contradict the
        bundle's label.
        """
        m = bundle.manifest
        self._manifest, self._size = m, m.image_size
        self.takes_frames = CAMERA_GRAPH in m.files
        self._stream = Stream(spin=not realtime)
        self.cache_of_engines = cache = EngineCache(bundle, self._stream, say)
        self._prefix = self._engine(m.prefix.file, (*m.prefix.inputs, *m.prefix.outputs))
        self._expert = self._engine(m.expert.file, (*m.expert.inputs, *m.expert.outputs))
        for file, record in cache.records.items():
            problem = mislabelled(m.precision, record.layers)
            if problem:
                raise BackendError(
                    f"the engine of {file} is not {m.precision}: {problem}. Try --backend ort-cuda"
                )
        self.reason = f"TensorRT {cache.tensorrt} on {cache.gpu}"
        self._tensors = m.tensors
        self._buffers = {name: self._stream.allocate(t.bytes) for name, t in self._tensors.items()}
        self._steps: list[dict[str, int]] = []  # buffers of the inputs of each denoise step
        self._resizers: dict[tuple[int, int], Engine] = {}  # by height and width
        # By camera and by height and width of its frame: the buffers of the resizing run.
        self._slots: dict[tuple[int, tuple[int, int]], dict[str, int]] = {}
        self._frames: list[tuple[Engine, dict[str, int]]] = []  # one resizing run for each camera
        self._shapes: list[tuple[int, int]] = []
        self._stale = False  # the cache is not yet that of the last prefill
        self._captured: dict[tuple[int, bool], Callable[[], None]] = {}

    def prefill(self, feeds: Feeds) -> None:
        """Upload the output of Preprocessor: `images`, or a raw frame for each camera."""
        frames = [
            feeds[f"frame.{c.name}"] for c in self._manifest.cameras if f"frame.{c.name}" in feeds
        ]
        self._use_frames([(f.shape[0], f.shape[1]) for f in frames])
        for (_, addresses), frame in zip(self._frames, frames, strict=True):
            self._stream.upload(addresses["frame"], np.ascontiguousarray(frame))
        for name, array in feeds.items():
            if name in self._buffers:
                self._upload(name, array)
        self._stale = True

    def finish_prefill(self) -> None:
        """Run the prefix now and wait for it, to time it alone or to read its outputs."""
        if self._stale:
            self._run_prefix()
            self._stale = False
        self._stream.wait()

    def denoise(
        self,
        noise: Array,
        steps: Sequence[Step],
        prev_chunk: Array,
        prev_weights: Array,
        velocities: list[Array] | None = None,
    ) -> Array:
        """Euler steps from `noise` to normalised actions: see `Graphs.denoise`.

        With `velocities` every step is a launch of its own.
        """
        for name, array in (
            ("noisy_actions", noise),
            ("prev_chunk", prev_chunk),
            ("prev_weights", prev_weights),
        ):
            self._upload(name, array)
        self._feed_steps(steps)
        if velocities is not None:
            self.finish_prefill()
            for i in range(len(steps)):
                self._step(i)
                velocities.append(np.array(self._download("velocity"), np.float32))
        else:
            self._chunk(len(steps), self._stale)
        self._stale = False
        return np.array(
            self._download("noisy_actions" if len(steps) % 2 == 0 else "next_actions"), np.float32
        )

    def cache(self) -> dict[str, NDArray[np.generic]]:
        """Copies of the prefix graph's outputs: prefix_mask and every key.i and value.i."""
        self.finish_prefill()
        return {t.name: self._download(t.name) for t in self._manifest.prefix.outputs}

    def proof(self) -> dict[str, float] | None:
        """The self-check that this bundle passed with these engines."""
        return self.cache_of_engines.proof()

    def keep_proof(self, errors: dict[str, float]) -> None:
        """Keep a self-check beside the engines."""
        self.cache_of_engines.prove(errors)

    def close(self) -> None:
        """Free the device's memory."""
        self._stream.close()

    def _engine(self, file: str, expected: tuple[Tensor, ...]) -> Engine:
        engine = self.cache_of_engines.engine(file)
        if {t.name: t for t in engine.tensors} != {t.name: t for t in expected}:
            raise BackendError(
                f"the engine of {file} has other inputs or outputs than the manifest: export again"
            )
        return engine

    def _use_frames(self, shapes: list[tuple[int, int]]) -> None:
        """Prepare for frames of these (height, width), or for ready images where there are none.

        A change makes the captured graphs invalid.
        """
        if shapes != self._shapes:
            self._frames = [self._resizing_run(i, shape) for i, shape in enumerate(shapes)]
            self._shapes, self._captured = shapes, {}

    def _resizing_run(self, index: int, size: tuple[int, int]) -> tuple[Engine, dict[str, int]]:
        """Engine and buffers that resize camera `index`'s frame into its slice of `images`."""
        if size not in self._resizers:
            self._resizers[size] = self.cache_of_engines.engine(CAMERA_GRAPH, {"frame": (*size, 3)})
        if (index, size) not in self._slots:
            slot = self._buffers["images"] + index * 3 * self._size**2 * 4  # float32
            addresses = {"frame": self._stream.allocate(size[0] * size[1] * 3), "image": slot}
            for name, array in resampling(*size, self._size).items():
                addresses[name] = self._stream.allocate(array.nbytes)
                self._stream.upload(addresses[name], array)
            self._require_host_pixels(self._resizers[size], addresses, size)
            self._slots[index, size] = addresses
        return self._resizers[size], self._slots[index, size]

    def _require_host_pixels(
        self, resizer: Engine, addresses: dict[str, int], size: tuple[int, int]
    ) -> None:
        """Raises BackendError where the device resizes a random frame otherwise than the host."""
        frame = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        self._stream.upload(addresses["frame"], frame)
        resizer.run(addresses)
        require_resized(
            self._stream.download(addresses["image"], (3, self._size, self._size), np.float32),
            frame,
        )

    def _feed_steps(self, steps: Sequence[Step]) -> None:
        for i, step in enumerate(steps):
            if i == len(self._steps):
                self._steps.append(
                    {name: self._stream.allocate(array.nbytes) for name, array in step.items()}
                )
            for name, array in step.items():
                self._stream.upload(self._steps[i][name], array)

    def _chunk(self, steps: int, with_prefix: bool) -> None:
        """Run a chunk. The first run of its kind is direct and is captured for the next ones."""
        kind = (steps, with_prefix)
        if kind in self._captured:
            self._captured[kind]()
            return
        work = partial(self._run_all, steps, with_prefix)
        work()  # a first run prepares the libraries, which cannot be captured
        try:
            self._captured[kind] = self._stream.capture(work)
        except BackendError as e:
            self._captured[kind] = work
            self.reason += f", without a CUDA graph ({e})"

    def _run_all(self, steps: int, with_prefix: bool) -> None:
        if with_prefix:
            self._run_prefix()
        for i in range(steps):
            self._step(i)

    def _run_prefix(self) -> None:
        for camera, addresses in self._frames:
            camera.run(addresses)
        self._prefix.run(self._buffers)

    def _step(self, i: int) -> None:
        """Denoise step i. Odd steps read what even steps wrote, and the reverse."""
        now, then = (
            ("noisy_actions", "next_actions") if i % 2 == 0 else ("next_actions", "noisy_actions")
        )
        swapped = {"noisy_actions": self._buffers[now], "next_actions": self._buffers[then]}
        self._expert.run(self._buffers | self._steps[i] | swapped)

    def _upload(self, name: str, array: NDArray[Any]) -> None:
        tensor = self._tensors[name]
        if array.shape != tensor.shape or array.dtype != tensor.dtype:
            raise BackendError(
                f"{name} is {array.dtype} {array.shape}, "
                f"the graph takes {tensor.dtype} {tensor.shape}"
            )
        self._stream.upload(self._buffers[name], np.ascontiguousarray(array))

    def _download(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        return self._stream.download(self._buffers[name], tensor.shape, np.dtype(tensor.dtype))


def engine_layers(bundle: Bundle, say: Callable[[str], None]) -> dict[str, dict[str, int]]:
    """Graph -> dtype -> number of layers, by TensorRT's inspector; engines are built where needed.

    Raises BackendError.
    """
    stream = Stream()
    try:
        cache = EngineCache(bundle, stream, say)
        for graph in (bundle.manifest.prefix, bundle.manifest.expert):
            cache.engine(graph.file)
        return {file: record.layers for file, record in cache.records.items()}
    finally:
        stream.close()


def mislabelled(precision: str, layers: dict[str, int]) -> str:
    """How the layers of an engine contradict the bundle's label; empty where they do not.

    layers: dtype -> number of layers; empty where TensorRT's inspector tells nothing.
    """
    wanted = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[precision]
    narrower = {"fp32": ("float16", "int8"), "fp16": ("int8",), "int8": ()}[precision]
    if not layers or (wanted in layers and not any(dtype in layers for dtype in narrower)):
        return ""
    return "it has " + ", ".join(f"{n} layers in {dtype}" for dtype, n in sorted(layers.items()))
