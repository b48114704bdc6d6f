"""The bundle against LeRobot itself, on a machine that has both (`--check-lerobot`)."""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import ExportError
from ..quantize.observations.sample import Sample
from ..runtime import Policy
from .checkpoint.checkpoint import TOKENIZER, Checkpoint
from .checkpoint.tokens import image_special_tokens, read_tokenizer
from .reference import ParityObservation


def lerobot_actions(
    checkpoint: Checkpoint, observations: Sequence[ParityObservation]
) -> list[NDArray[np.float32]]:
    """LeRobot's own answer in float32: normalised actions [1, chunk, dof] for each observation.

    Raises ExportError where LeRobot cannot load the checkpoint.
    """
    answers = []
    with tempfile.TemporaryDirectory() as scratch, vision_positions():
        policy, preprocess = load_policy(checkpoint, Path(scratch) / "vlm")
        for observation in observations:
            batch = lerobot_batch(checkpoint, observation)
            noise = torch.from_numpy(observation.noise)
            answers.append(policy.predict_action_chunk(preprocess(batch), noise=noise).numpy())
    return answers


def lerobot_batch(checkpoint: Checkpoint, sample: Sample) -> dict[str, Any]:
    """One observation under LeRobot's keys.

    LeRobot leaves cameras that are not in it out of the prefix.
    """
    images = {
        camera.key: torch.from_numpy(sample.images[camera.name]).permute(2, 0, 1).float() / 255
        for camera in checkpoint.cameras
    }
    return {**images, "observation.state": torch.from_numpy(sample.state), "task": sample.task}


def measure(
    checkpoint: Checkpoint, policy: Policy, observations: Sequence[ParityObservation]
) -> float:
    """Max abs difference on normalised actions between the bundle and LeRobot."""
    worst = 0.0
    for observation, expected in zip(
        observations, lerobot_actions(checkpoint, observations), strict=True
    ):
        policy.prefill(observation.images, observation.state, observation.task)
        got = policy.denoise(observation.noise)
        # np.maximum keeps a NaN.
        worst = np.maximum(worst, np.abs(got[:, :, : expected.shape[2]] - expected).max())
    return float(worst)


def load_policy(checkpoint: Checkpoint, vlm: Path) -> tuple[Any, Any]:
    """LeRobot's policy in float32 and its preprocessor.

    vlm: a scratch folder, for the files that LeRobot loads by name.
    """
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

        # The config that this exporter found: LeRobot then needs no network.
        checkpoint.vlm.save_pretrained(vlm)
        for name in (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"):
            source = checkpoint.tokenizer.with_name(name)
            if source.is_file():
                shutil.copyfile(source, vlm / name)
        config = PreTrainedConfig.from_pretrained(checkpoint.folder)
        config.device, config.load_vlm_weights = "cpu", False  # the checkpoint holds every weight
        config.vlm_model_name = str(vlm)
        with _processor_stub(checkpoint):
            policy = SmolVLAPolicy.from_pretrained(checkpoint.folder, config=config).float().eval()
        given: dict[str, Any] = {}
        if (checkpoint.folder / "policy_preprocessor.json").is_file():
            given["pretrained_path"] = str(checkpoint.folder)
            given["preprocessor_overrides"] = {
                "device_processor": {"device": "cpu"},
                "rename_observations_processor": {"rename_map": {}},
                "tokenizer_processor": {"tokenizer_name": str(vlm)},
            }
        preprocess, _ = make_pre_post_processors(config, **given)
    except Exception as e:  # LeRobot, transformers and the Hub raise anything
        raise ExportError(
            f"LeRobot cannot load {checkpoint.folder}: {type(e).__name__}: {e}"
        ) from e
    return policy, preprocess


def _processor_stub(checkpoint: Checkpoint) -> AbstractContextManager[object]:
    """LeRobot uses two token ids of the VLM's processor. The whole one needs torchvision."""
    from transformers import AutoProcessor

    fake, whole = 0, 0  # LeRobot makes tensors of them all the same
    if checkpoint.config.add_image_special_tokens:
        fake, whole, _ = image_special_tokens(read_tokenizer(checkpoint.tokenizer))
    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(fake_image_token_id=fake, global_image_token_id=whole)
    )
    return patch.object(AutoProcessor, "from_pretrained", lambda *_, **__: processor)


def vision_positions() -> AbstractContextManager[object]:
    """Position ids 0..N-1, as in training.

    transformers 4.55 to 4.57 shift them by one row and column in float32
    (huggingface/transformers#41190).
    """
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    def forward(self: Any, pixel_values: Any, patch_attention_mask: Any = None) -> Any:
        return (
            self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
            + self.position_embedding.weight
        )

    return patch.object(SmolVLMVisionEmbeddings, "forward", forward)
