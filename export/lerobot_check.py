"""The bundle against LeRobot itself, on a machine that has both (`--check-lerobot`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import Policy
from .checkpoint import Checkpoint
from .errors import ExportError
from .reference import Observation


def require_lerobot() -> None:
    """Raises ExportError where LeRobot cannot be imported."""
    if find_spec("lerobot") is None:
        raise ExportError("--check-lerobot needs lerobot beside this package: pip install 'lerobot[smolvla]'")


def measure(checkpoint: Checkpoint, policy: Policy, observations: Sequence[Observation]) -> float:
    """Max abs difference on normalised actions between the bundle and LeRobot in float32, over all observations."""
    import torch

    theirs, preprocess = _load(checkpoint)
    worst = 0.0
    for observation in observations:
        names = dict(zip(checkpoint.processors.camera_names, checkpoint.config.cameras, strict=True))
        batch: dict[str, Any] = {
            names[name]: torch.from_numpy(image).permute(2, 0, 1).float() / 255
            for name, image in observation.images.items()
        }
        batch |= {"observation.state": torch.from_numpy(observation.state), "task": observation.task}
        with _vision_positions():
            expected = theirs.predict_action_chunk(
                preprocess(batch), noise=torch.from_numpy(observation.noise)
            ).numpy()
        feeds = policy.preprocessor.feeds(observation.images, observation.state, observation.task)
        policy.graphs.prefill(feeds)
        nothing = np.zeros_like(observation.noise)
        got = policy.denoise(
            observation.noise, policy.manifest.sampling.num_steps, nothing, nothing[:, :, :1].copy()
        )
        difference = np.abs(got[:, :, : expected.shape[2]] - expected).max()
        worst = max(worst, float(difference) if np.isfinite(difference) else float("inf"))
    return worst


def _load(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """LeRobot's policy in float32 and its preprocessor."""
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

        config = PreTrainedConfig.from_pretrained(checkpoint.folder)
        config.device, config.load_vlm_weights = "cpu", False  # the checkpoint holds every weight
        overrides: dict[str, Any] = {
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {"rename_map": {}},
        }
        local = checkpoint.folder / config.vlm_model_name
        if local.is_dir():
            config.vlm_model_name = str(local)
            overrides["tokenizer_processor"] = {"tokenizer_name": str(local)}
        policy = SmolVLAPolicy.from_pretrained(checkpoint.folder, config=config).float().eval()
        has_files = Path(checkpoint.folder, "policy_preprocessor.json").is_file()
        preprocess, _ = make_pre_post_processors(
            config,
            pretrained_path=str(checkpoint.folder) if has_files else None,
            preprocessor_overrides=overrides if has_files else {},
        )
    except Exception as e:  # LeRobot, transformers and the Hub raise anything
        raise ExportError(f"LeRobot cannot load {checkpoint.folder}: {type(e).__name__}: {e}") from e
    return policy, preprocess


@contextmanager
def _vision_positions() -> Iterator[None]:
    """Position ids 0..N-1, as trained: transformers 4.55 to 4.57 shift them by one row and column in float32
    (huggingface/transformers#41190)."""
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    original = SmolVLMVisionEmbeddings.forward

    def forward(self: Any, pixel_values: Any, patch_attention_mask: Any = None) -> Any:
        return self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding.weight

    SmolVLMVisionEmbeddings.forward = forward
    try:
        yield
    finally:
        SmolVLMVisionEmbeddings.forward = original
