"""The checkpoint's own answer: preprocessing and the float32 views in torch, stage by stage.

It shares no code with the runtime except the names of statistics, so it shows a mistake there. It
does not show a mistake in the views themselves: the goldens and --check-lerobot do. Stages: images,
tokens, state, cache, velocity, actions, chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from ..quantize.observations.sample import Sample, draw_image, draw_state
from ..runtime.bundle.manifest import Target
from ..runtime.bundle.normalization import NEEDS, Normalization
from .checkpoint.architecture import Architecture
from .checkpoint.checkpoint import Checkpoint, architecture_of
from .checkpoint.tokens import instructions, read_tokenizer
from .graph import cache_names
from .views.expert import Expert
from .views.layers import FP32
from .views.prefix import Prefix
from .views.weights import build_views


@dataclass(frozen=True)
class ParityObservation(Sample):
    """One fixed input of the parity check."""

    noise: NDArray[np.float32]  # [1, chunk, max_action_dim]


@dataclass(frozen=True)
class Stages:
    """What the checkpoint computes from one observation; numpy, float32 where not said."""

    images: NDArray[np.float32]  # [cameras, 3, S, S]
    tokens: NDArray[np.int64]  # valid ones only
    state: NDArray[np.float32]  # [1, max_state_dim]
    cache: dict[str, NDArray[np.float32]]  # [1, KV heads, P, D]
    valid: NDArray[np.bool_]  # [P]: rows of the cache that are ever read
    velocity: NDArray[np.float32]  # [steps, 1, chunk, max_action_dim]
    actions: NDArray[np.float32]  # [1, chunk, max_action_dim], normalised
    chunk: NDArray[np.float32]  # [chunk, dof], robot units


def fixed_observations(
    checkpoint: Checkpoint, arch: Architecture, seed: int = 0
) -> list[ParityObservation]:
    """The same images, state and noise with a short, a padded and a full-length instruction."""
    rng = np.random.default_rng(seed)
    names = checkpoint.camera_names
    images = {name: draw_image(rng, 240 + 24 * i, 320) for i, name in enumerate(names)}
    state = draw_state(rng, checkpoint.config.state_dim, checkpoint.processors.state.statistics)
    noise = rng.standard_normal(arch.noise_shape, dtype=np.float32)
    tokenizer = read_tokenizer(checkpoint.tokenizer)
    return [
        ParityObservation(images, state, t, noise)
        for t in instructions(tokenizer, arch.token_length)
    ]


class TorchReference:
    """The float32 views and the checkpoint's processors, run in torch."""

    def __init__(self, checkpoint: Checkpoint, prefix: Prefix, expert: Expert) -> None:
        self.checkpoint, self.arch = checkpoint, prefix.arch
        self.prefix, self.expert = prefix, expert
        self._tokenizer = read_tokenizer(checkpoint.tokenizer)

    def run(self, observation: ParityObservation) -> Stages:
        images, state = self._images(observation.images), self._state(observation.state)
        ids, mask, cache = self.prefill(observation)
        velocity, x = self.denoise(observation.noise, mask, cache)
        return Stages(
            images=images.numpy(),
            tokens=np.asarray(ids),
            state=state.numpy(),
            cache={name: t.numpy() for name, t in cache.items()},
            valid=mask[0].numpy(),
            velocity=velocity,
            actions=x,
            chunk=self.robot_units(x),
        )

    @torch.no_grad()
    def prefill(self, observation: Sample) -> tuple[list[int], Tensor, dict[str, Tensor]]:
        """-> valid token ids, which of the cache's rows are ever read [1, P], the cache."""
        arch = self.arch
        ids = self._tokenizer.encode(observation.task.removesuffix("\n") + "\n").ids
        tokens = F.pad(torch.tensor([ids], dtype=torch.int32), (0, arch.token_length - len(ids)))
        token_mask = torch.arange(arch.token_length)[None] < len(ids)
        images, state = self._images(observation.images), self._state(observation.state)
        mask, *cache = self.prefix(images, tokens, token_mask, state)
        return ids, mask, dict(zip(cache_names(arch), cache, strict=True))

    @torch.no_grad()
    def denoise(
        self, noise: NDArray[np.float32], mask: Tensor, cache: Mapping[str, Tensor]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """-> each step's velocity [steps, 1, chunk, max_action_dim] and the normalised actions."""
        steps = self.checkpoint.config.num_steps
        x, velocities = torch.from_numpy(noise), []
        nothing = torch.zeros_like(x)
        for i in range(steps):
            time = torch.tensor([1.0 - i / steps])
            velocity, x = self.expert(
                x, self._time_embedding(time), time, torch.tensor([-1.0 / steps]), nothing,
                nothing[:, :, :1], torch.zeros(1), mask, *cache.values(),
            )  # fmt: skip
            velocities.append(velocity.numpy())
        return np.stack(velocities), x.numpy()

    def robot_units(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised actions [1, chunk, max_action_dim] -> [chunk, dof].

        As LeRobot's UnnormalizerProcessorStep.
        """
        n = self.checkpoint.processors.action
        x = torch.from_numpy(actions[0, :, : self.checkpoint.config.action_dim])
        if n.active and n.mode == "MEAN_STD":
            x = x * torch.tensor(n.statistics["std"]) + torch.tensor(n.statistics["mean"])
        elif n.active:
            low, span = _low_and_span(n)
            x = (x + 1) / 2 * span + low
        return x.numpy()

    def _images(self, images: Mapping[str, NDArray[np.uint8]]) -> Tensor:
        """LeRobot's prepare_images: bilinear, padded left and top with 0, then to [-1, 1]."""
        size, out = self.arch.vision.image_size, []
        for name in self.checkpoint.camera_names:
            pixels = torch.from_numpy(images[name]).permute(2, 0, 1)[None].float() / 255
            height, width = pixels.shape[2:]
            ratio = max(width / size, height / size)
            height, width = int(height / ratio), int(width / ratio)
            pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
            out.append(F.pad(pixels, (size - width, 0, size - height, 0)) * 2 - 1)
        return torch.cat(out)

    def _state(self, state: NDArray[np.float32]) -> Tensor:
        """LeRobot's NormalizerProcessorStep and prepare_state."""
        x, n = torch.from_numpy(state), self.checkpoint.processors.state
        if n.active and n.mode == "MEAN_STD":
            x = (x - torch.tensor(n.statistics["mean"])) / (
                torch.tensor(n.statistics["std"]) + n.eps
            )
        elif n.active:
            low, span = _low_and_span(n)
            x = 2 * (x - low) / span - 1
        return F.pad(x[None], (0, self.arch.config.max_state_dim - x.shape[0]))

    def _time_embedding(self, time: Tensor) -> Tensor:
        """LeRobot's create_sinusoidal_pos_embedding, in float64."""
        config, half = self.checkpoint.config, self.arch.expert_width // 2
        fraction = torch.linspace(0.0, 1.0, half, dtype=torch.float64)
        period = config.min_period * (config.max_period / config.min_period) ** fraction
        angle = 1.0 / period * 2 * torch.pi * time.double()[:, None]
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def reference_of(checkpoint: Checkpoint, target: Target) -> TorchReference:
    """The float32 views as they are exported for `target`. In torch all targets are equal."""
    recipe = replace(FP32, ort=target == "cpu")
    views = build_views(architecture_of(checkpoint), checkpoint.tensors, recipe)
    return TorchReference(checkpoint, *views)


def _low_and_span(n: Normalization) -> tuple[Tensor, Tensor]:
    low, high = (torch.tensor(n.statistics[name]) for name in NEEDS[n.mode])
    return low, torch.where(high == low, torch.tensor(n.eps), high - low)
