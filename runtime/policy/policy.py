"""The policy: observation and instruction in, action chunk out. The public Python API."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.errors import BackendError, CheckFailed, InputError
from ..bundle.bundle import Bundle
from ..bundle.manifest import Manifest
from ..engines.backend import Backend, choose_for
from ..engines.graphs import Array, Feeds, Graphs, Step
from ..engines.opening import open_graphs
from .preprocessing import Preprocessor
from .sampling import RealTimeChunking, schedule
from .selfcheck import require, run_selfcheck


@dataclass(frozen=True)
class Timing:
    """Wall time of the last chunk by stage, in milliseconds.

    On TensorRT the prefix runs with the denoise steps in one CUDA graph: `prefix_ms` is the upload.
    """

    preprocess_ms: float
    prefix_ms: float
    denoise_ms: float


class Policy:
    """A bundle, loaded on one device. Not thread-safe: one thread predicts at a time."""

    def __init__(
        self, bundle: Bundle, graphs: Graphs, rtc: RealTimeChunking, seed: int | None
    ) -> None:
        self.bundle, self.graphs, self.rtc = bundle, graphs, rtc
        self.preprocessor = Preprocessor(bundle)
        self.timing = Timing(0.0, 0.0, 0.0)
        self._random = np.random.default_rng(seed)

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        device: str = "auto",
        *,
        backend: str | None = None,
        realtime: bool = False,
        rtc: RealTimeChunking | None = None,
        seed: int | None = None,
    ) -> "Policy":
        """Open and check a bundle, and load its graphs.

        The first backend of the device that loads and passes the bundle's self-check is taken.
        `graphs.reason` says why, and what was wrong with the backends before it. On an x86 CPU the
        self-check is left out: the export has run it on one.

        Args:
            bundle: A folder, or an open bundle.
            device: auto, cpu, cuda or jetson.
            backend: Use this one only: tensorrt, ort-cuda or ort-cpu.
            realtime: Leave a core to a control loop.
            rtc: Settings of real-time chunking, for `predict_chunk` with a previous chunk.
            seed: Of the noise; random when None.

        Raises:
            BundleError: The folder is no undamaged bundle of this version.
            BackendError: No backend of the device runs.
            CheckFailed: The last backend fails the self-check.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        choice = choose_for(opened, device, backend)
        rtc = rtc or RealTimeChunking()
        failures: list[str] = []
        for name in choice.backends:
            try:
                policy = cls._load_on(opened, name, realtime, rtc, seed)
            except (BackendError, CheckFailed) as e:
                failures.append(f"{name}: {e}")
                if name == choice.backends[-1]:
                    raise type(e)("; ".join(failures)) from e
                continue
            why = f"{name}, because {'; '.join(failures)}" if failures else choice.reason
            policy.graphs.reason = f"{why} ({policy.graphs.reason})"
            return policy
        raise AssertionError("a choice names at least one backend")

    @classmethod
    def _load_on(
        cls,
        bundle: Bundle,
        backend: Backend,
        realtime: bool,
        rtc: RealTimeChunking,
        seed: int | None,
    ) -> "Policy":
        """Load and check one backend. On an error its memory is free again, for the next one."""
        graphs = open_graphs(bundle, backend, realtime=realtime)
        try:
            policy = cls(bundle, graphs, rtc, seed)
            if backend != "ort-cpu" or platform.machine() != "x86_64":
                policy._prove()
        except (BackendError, CheckFailed):
            graphs.close()
            raise
        return policy

    def _prove(self) -> None:
        """Run the self-check, unless these engines passed it before. Raises CheckFailed."""
        known = self.graphs.proof()
        if known is not None:
            require(self.manifest.precision, known)
            return
        errors = run_selfcheck(self)
        require(self.manifest.precision, errors)
        self.graphs.keep_proof(errors)
        self.graphs.reason += f", self-check passed with actions within {errors['actions']:.1e}"

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def predict_chunk(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[np.floating],
        task: str,
        noise: Array | None = None,
        steps: int | None = None,
        prev_chunk: Array | None = None,
        delay: int = 0,
    ) -> Array:
        """Predict the next actions.

        Args:
            images: Camera name -> uint8 [H, W, 3] RGB, for every camera of the bundle.
            state: float [dof], in robot units.
            task: The instruction.
            noise: float32 [1, chunk_size, max_action_dim]; drawn when None.
            steps: Denoise steps; as in the checkpoint when None.
            prev_chunk: float32 [k, dof] in robot units: the actions of the last chunk that have not
                run. The new chunk follows them by real-time chunking.
            delay: How many actions of `prev_chunk` run before the new chunk starts.

        Returns:
            float32 [chunk_size, dof] in robot units.

        Raises:
            InputError: An input does not fit; nothing has run.
            BackendError: A graph failed.
        """
        start = time.perf_counter()
        steps = self.manifest.sampling.num_steps if steps is None else steps
        noise, prev, weights = self._sampling_inputs(noise, steps, prev_chunk, delay)
        feeds = self.preprocessor.feeds(images, state, task, raw=self.graphs.takes_frames)
        ready = time.perf_counter()
        self.graphs.prefill(feeds)
        filled = time.perf_counter()
        actions = self.denoise(noise, steps, prev, weights)
        chunk = self.robot_units(actions)
        end = time.perf_counter()
        self.timing = Timing(*(1e3 * s for s in (ready - start, filled - ready, end - filled)))
        return chunk

    def prefill(
        self, images: Mapping[str, NDArray[np.uint8]], state: NDArray[np.floating], task: str
    ) -> Feeds:
        """Preprocess an observation and fill the KV cache; -> the prefix graph's inputs."""
        feeds = self.preprocessor.feeds(images, state, task)
        self.graphs.prefill(feeds)
        return feeds

    def denoise(
        self,
        noise: Array,
        steps: int | None = None,
        prev: Array | None = None,
        weights: Array | None = None,
        velocities: list[Array] | None = None,
    ) -> Array:
        """Solve from `noise` against the current cache; -> normalised actions.

        noise, prev and the result: [1, chunk_size, max_action_dim]. weights: [1, chunk_size, 1],
        zeros (no guidance) when None. `velocities`, where given, collects each step's velocity.
        """
        steps = self.manifest.sampling.num_steps if steps is None else steps
        prev = np.zeros_like(noise) if prev is None else prev
        weights = np.zeros((1, noise.shape[1], 1), np.float32) if weights is None else weights
        return self.graphs.denoise(
            noise, self.steps(steps, guided=bool(weights.any())), prev, weights, velocities
        )

    def robot_units(self, actions: Array) -> Array:
        """Normalised actions [1, chunk_size, max_action_dim] -> [chunk_size, dof] in robot
        units."""
        return self.manifest.action.normalization.unnormalize(
            actions[0, :, : self.manifest.action.dim]
        )

    def steps(self, count: int, *, guided: bool = False) -> list[Step]:
        """The expert graph's inputs beside actions and cache, for each of `count` Euler steps."""
        width = self.manifest.tensors["time_embedding"].shape[1]
        return schedule(count, width, self.manifest.sampling, self.rtc if guided else None)

    def draw_noise(self) -> Array:
        """Standard normal [1, chunk_size, max_action_dim] from the policy's generator."""
        return self._random.standard_normal(self._noise_shape, dtype=np.float32)

    @property
    def _noise_shape(self) -> tuple[int, int, int]:
        return (1, self.manifest.sampling.chunk_size, self.manifest.action.padded)

    def _sampling_inputs(
        self, noise: Array | None, steps: int, prev_chunk: Array | None, delay: int
    ) -> tuple[Array, Array, Array]:
        """-> noise, the previous chunk normalised and padded, its weights.

        Raises InputError that lists every problem.
        """
        shape, problems = self._noise_shape, []
        chunk, dof = shape[1], self.manifest.action.dim
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= 1000:
            problems.append(f"steps is {steps!r}, expected 1 to 1000")
        if not isinstance(delay, int) or isinstance(delay, bool) or not 0 <= delay <= chunk:
            problems.append(f"delay is {delay!r}, expected 0 to {chunk} actions")
        if noise is not None:
            problems += _array_problems("noise", noise, shape)
        if prev_chunk is not None:
            tail = len(prev_chunk) if np.ndim(prev_chunk) == 2 else 0
            problems += _array_problems("prev_chunk", prev_chunk, (min(max(tail, 1), chunk), dof))
        if problems:
            raise InputError("the chunk cannot be predicted: " + "; ".join(problems))
        prev, weights = np.zeros(shape, np.float32), np.zeros((1, chunk, 1), np.float32)
        if prev_chunk is not None:
            prev[0, :tail, :dof] = self.manifest.action.normalization.normalize_inverse(prev_chunk)
            weights[0, :, 0] = self.rtc.prefix_weights(delay, tail, chunk)
        return self.draw_noise() if noise is None else noise, prev, weights


def _array_problems(name: str, array: object, shape: tuple[int, ...]) -> list[str]:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        return [f"{name} is {getattr(array, 'dtype', type(array).__name__)}, expected float32"]
    if array.shape != shape:
        return [f"{name} has shape {array.shape}, expected {shape}"]
    return [] if np.isfinite(array).all() else [f"{name} is not finite"]
