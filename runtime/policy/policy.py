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
from ..engines.backend import choose_for, open_graphs
from ..engines.graphs import Array, Feeds, Graphs, Step
from .preprocessing import Preprocessor
from .sampling import RealTimeChunking, schedule
from .selfcheck import require, run_selfcheck


@dataclass(frozen=True)
class Timing:
    """Wall time of the last chunk by stage, milliseconds. On TensorRT the prefix runs with the denoise steps, in one
    CUDA graph, and `prefix_ms` is the upload alone."""

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
        """Open and check a bundle (unless it is open already) and load its graphs.

        device: auto | cpu | cuda | jetson. backend: one alone (runtime/backend.py). realtime: leave a core to a
        control loop. rtc: settings of real-time chunking, used when `predict_chunk` is given a previous chunk. seed:
        of the noise, random when None.

        The first backend of the device that loads and computes the bundle's self-check is taken; `graphs.reason`
        says why, and what was wrong with those before it. An x86 CPU is not checked: exports are proved on one.
        Raises BundleError for the folder, BackendError for the device, CheckFailed when the last computes wrongly.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        choice = choose_for(opened, device, backend)
        skipped: list[str] = []
        for name in choice.backends:
            graphs: Graphs | None = None
            try:
                graphs = open_graphs(opened, name, realtime=realtime)
                policy = cls(opened, graphs, rtc or RealTimeChunking(), seed)
                if name != "ort-cpu" or platform.machine() != "x86_64":
                    policy._prove()
            except (BackendError, CheckFailed) as e:
                if graphs is not None:
                    graphs.close()  # the next one needs the memory
                if name == choice.backends[-1]:
                    raise type(e)(
                        "; ".join([*skipped, f"{name}: {e}" if skipped else str(e)])
                    ) from e
                skipped.append(f"{name}: {e}")
                continue
            why = choice.reason if not skipped else f"{name}, because {'; '.join(skipped)}"
            graphs.reason = f"{why} ({graphs.reason})"
            return policy
        raise AssertionError("a choice names at least one backend")

    def _prove(self) -> None:
        """Run the bundle's self-check, once for engines that stay. Raises CheckFailed."""
        proof = self.graphs.proof()
        if proof is not None:
            require(self.manifest.precision, proof)
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
        """-> float32 [chunk_size, dof] in robot units, every row of the chunk.

        images: camera name -> uint8 [H, W, 3] RGB, all cameras of the bundle. state: float [dof] in robot units.
        noise: float32 [1, chunk_size, max_action_dim], drawn when None. steps: denoise steps, the checkpoint's
        when None. prev_chunk: float32 [k, dof], the unexecuted tail of the last chunk as predicted, in robot units;
        delay: how many of its actions will have run before this chunk starts.

        Raises InputError before anything runs; BackendError when a graph fails.
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
        """Preprocess an observation and fill the KV cache from it; -> what the prefix graph was fed."""
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

        noise, prev and the result: [1, chunk_size, max_action_dim]; weights: [1, chunk_size, 1], zeros (no
        guidance) when None. `velocities`, where given, collects each step's velocity.
        """
        steps = self.manifest.sampling.num_steps if steps is None else steps
        prev = np.zeros_like(noise) if prev is None else prev
        weights = np.zeros((1, noise.shape[1], 1), np.float32) if weights is None else weights
        return self.graphs.denoise(
            noise, self.steps(steps, guided=bool(weights.any())), prev, weights, velocities
        )

    def robot_units(self, actions: Array) -> Array:
        """Normalised actions [1, chunk_size, max_action_dim] -> [chunk_size, dof] in robot units."""
        return self.manifest.action.normalization.unnormalize(
            actions[0, :, : self.manifest.action.dim]
        )

    def steps(self, count: int, *, guided: bool = False) -> list[Step]:
        """What the expert graph is given beside actions and cache, for each of `count` Euler steps."""
        width = self.manifest.tensors["time_embedding"].shape[1]
        return schedule(count, width, self.manifest.sampling, self.rtc if guided else None)

    def draw_noise(self) -> Array:
        """Standard normal [1, chunk_size, max_action_dim] from the policy's own generator."""
        return self._random.standard_normal(self._noise_shape, dtype=np.float32)

    @property
    def _noise_shape(self) -> tuple[int, int, int]:
        return (1, self.manifest.sampling.chunk_size, self.manifest.action.padded)

    def _sampling_inputs(
        self, noise: Array | None, steps: int, prev_chunk: Array | None, delay: int
    ) -> tuple[Array, Array, Array]:
        """Checked noise, padded normalised previous chunk and its weights. Raises InputError with all problems."""
        shape, problems = self._noise_shape, []
        chunk, dof = shape[1], self.manifest.action.dim
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= 1000:
            problems.append(f"steps is {steps!r}, expected 1 to 1000")
        if not isinstance(delay, int) or isinstance(delay, bool) or not 0 <= delay <= chunk:
            problems.append(f"delay is {delay!r}, expected 0 to {chunk} actions")
        if noise is not None:
            problems += _array_problems("noise", noise, shape)
        if prev_chunk is not None:
            tail = (
                prev_chunk.shape[0]
                if isinstance(prev_chunk, np.ndarray) and prev_chunk.ndim == 2
                else 0
            )
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
