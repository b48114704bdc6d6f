"""Every size of one SmolVLA, gathered from the policy's and the VLM's config. Nothing is assumed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .policy_config import PolicyConfig

# Sizes of the VLMs that SmolVLA checkpoints name (their config.json on the Hub), so that no network is needed.
KNOWN_VLMS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": {
        "scale_factor": 4,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "vocab_size": 49280,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
            "layer_norm_eps": 1e-6,
        },
    },
}


def read_vlm_config(source: Path | dict[str, Any]) -> Any:
    """A transformers SmolVLMConfig from a folder with config.json, or from a dict. Missing fields get
    transformers' own defaults: the published files leave some out."""
    from transformers import AutoConfig

    if isinstance(source, dict):
        return AutoConfig.for_model("smolvlm", **source)
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as e:  # transformers raises anything on a damaged file
        raise CheckpointError(f"{source} holds no readable VLM config.json: {e}") from e
    if config.model_type != "smolvlm":
        raise CheckpointError(f"{source}/config.json is of type {config.model_type!r}, expected 'smolvlm'")
    return config


@dataclass(frozen=True)
class Architecture:
    """Sizes of the two views. Widths in channels, counts in tokens or layers."""

    # vision
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_intermediate: int
    vision_eps: float
    pixel_shuffle: int
    # language
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    # expert
    expert_width: int
    expert_intermediate: int
    self_layers: frozenset[int]
    # sequence
    cameras: int
    empty_cameras: int
    image_special_tokens: tuple[int, ...]  # (fake, global, fake) ids around each image, or none
    token_length: int
    chunk_size: int
    max_state_dim: int
    max_action_dim: int

    def is_self(self, layer: int) -> bool:
        """Whether expert layer `layer` attends to its own actions too (else to the prefix only)."""
        return layer in self.self_layers

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        """Tokens of one image, without special tokens."""
        return self.patches // self.pixel_shuffle**2

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of a chunk inside the graphs."""
        return 1, self.chunk_size, self.max_action_dim

    @property
    def prefix_tokens(self) -> int:
        """Rows of the prefix: images, special tokens, language, state."""
        special = len(self.image_special_tokens) * (self.cameras + self.empty_cameras)
        return self.cameras * self.image_tokens + special + self.token_length + 1

    @classmethod
    def from_configs(
        cls, config: PolicyConfig, vlm: Any, *, token_length: int, image_special_tokens: tuple[int, ...]
    ) -> "Architecture":
        """Raises CheckpointError where the two configs do not fit each other."""
        text, vision = vlm.text_config, vlm.vision_config
        if config.image_size != vision.image_size:
            raise CheckpointError(
                f"images are resized to {config.image_size}, but the vision tower's positions are for "
                f"{vision.image_size}: set resize_imgs_with_padding to the VLM's image size"
            )
        layers = text.num_hidden_layers
        if config.num_vlm_layers > 0:
            layers = min(layers, config.num_vlm_layers)
        every = config.self_attn_every_n_layers
        cross = "cross" in config.attention_mode
        expert_width = int(text.hidden_size * config.expert_width_multiplier)
        if expert_width % 2:
            raise CheckpointError(f"the expert's width {expert_width} is odd, its time embedding needs pairs")
        return cls(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_width=vision.hidden_size,
            vision_layers=vision.num_hidden_layers,
            vision_heads=vision.num_attention_heads,
            vision_intermediate=vision.intermediate_size,
            vision_eps=vision.layer_norm_eps,
            pixel_shuffle=vlm.scale_factor,
            vocab=text.vocab_size,
            width=text.hidden_size,
            layers=layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            intermediate=text.intermediate_size,
            eps=text.rms_norm_eps,
            expert_width=expert_width,
            expert_intermediate=expert_intermediate(expert_width),
            self_layers=frozenset(i for i in range(layers) if not cross or (every > 0 and i % every == 0)),
            cameras=len(config.cameras),
            empty_cameras=config.empty_cameras,
            image_special_tokens=image_special_tokens,
            token_length=token_length,
            chunk_size=config.chunk_size,
            max_state_dim=config.max_state_dim,
            max_action_dim=config.max_action_dim,
        )


def expert_intermediate(width: int, multiple: int = 256) -> int:
    """Width of the expert's MLP: LeRobot's get_intermediate_size."""
    hidden = int(4 * int(2 * width / 3))
    return multiple * ((hidden + multiple - 1) // multiple)
