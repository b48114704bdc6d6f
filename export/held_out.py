"""What INT8 is judged by: observations that calibration has not seen, and float32's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.progress import SILENT, Progress
from ..quantize.int8 import gate as gates
from ..quantize.int8.gate import Array, Errors, Outputs, Prefilled
from ..quantize.observations.sample import Sample
from ..runtime import Policy
from .checkpoint.checkpoint import Checkpoint
from .reference import TorchReference


@dataclass(frozen=True)
class HeldOut:
    """Observations, their noises, and the outputs of float32."""

    samples: tuple[Sample, ...]
    noises: list[list[Array]]  # for each sample, one for each seed
    expected: Outputs
    grippers: list[int]  # indices in the action
    middle: Array  # of each joint, robot units [dof]

    def compare(self, got: Outputs) -> Errors:
        return gates.compare(self.expected, got, self.grippers, self.middle)

    def judge(self, policy: Policy, progress: Progress = SILENT) -> Errors:
        """How far a bundle's own graphs are from float32."""
        prefilled = (prefill_policy(policy, sample) for sample in self.samples)
        return self.compare(gates.outputs_of(prefilled, self.noises, progress))


def hold_out(
    reference: TorchReference,
    samples: tuple[Sample, ...],
    seeds: int,
    progress: Progress = SILENT,
) -> HeldOut:
    """Run float32 on `samples`, each with `seeds` noises."""
    rng, shape = np.random.default_rng(2), reference.arch.noise_shape
    noises = [[rng.standard_normal(shape, dtype=np.float32) for _ in range(seeds)] for _ in samples]
    expected = reference_outputs(reference, samples, noises, progress)
    middle = reference.robot_units(np.zeros(shape, np.float32))[0]
    return HeldOut(samples, noises, expected, grippers_of(reference.checkpoint), middle)


def prefill_policy(policy: Policy, sample: Sample) -> Prefilled:
    """A bundle's cache of an observation, and its denoising."""
    policy.prefill(sample.images, sample.state, sample.task)
    cache = policy.graphs.cache()
    valid = cache.pop("prefix_mask")[0]
    kept = {name: t[:, :, valid] for name, t in cache.items()}
    return kept, lambda noise: policy.robot_units(policy.denoise(noise))


def reference_outputs(
    reference: TorchReference,
    samples: Sequence[Sample],
    noises: Sequence[Sequence[Array]],
    progress: Progress = SILENT,
) -> Outputs:
    """What the torch views answer: noises for each sample, as in `HeldOut`."""

    def prefill(sample: Sample) -> Prefilled:
        _, mask, cache = reference.prefill(sample)
        valid = {name: t[:, :, mask[0]].numpy() for name, t in cache.items()}
        return valid, lambda noise: reference.robot_units(reference.denoise(noise, mask, cache)[1])

    return gates.outputs_of(map(prefill, samples), noises, progress)


def grippers_of(checkpoint: Checkpoint) -> list[int]:
    """Indices of the grippers in the action: by name, else the last of an SO-101's six joints."""
    dim = checkpoint.config.action_dim
    if checkpoint.joints:
        return [i for i, name in enumerate(checkpoint.joints) if "gripper" in name]
    return [dim - 1] if dim == 6 else []
