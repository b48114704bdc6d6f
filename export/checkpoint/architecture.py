"""Every size of one SmolVLA, from the policy's config and the VLM's config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import CheckpointError
from .policy_config import PolicyConfig

# The config.json of the VLM that SmolVLA checkpoints name, so that no network is needed.
DEFAULT_VLM_CONFIG = Path(__file__).with_name("demo_checkpoint") / "vlm/config.json"


def read_vlm_config(path: Path) -> Any:
    """A transformers SmolVLMConfig from its JSON file.

    Missing fields get transformers' own defaults: the published files leave some out.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as e:  # transformers raises anything on a damaged file
        raise CheckpointError(f"{path} is no readable VLM config: {e}") from e
    if config.model_type != "smolvlm":
        raise CheckpointError(f"{path} is of type {config.model_type!r}, expected 'smolvlm'")
    return config


@dataclass(frozen=True)
class Architecture:
    """Sizes of the two views. Widths in channels, counts in tokens or layers.

    Raises CheckpointError where the two configs do not fit each other.
    """

    config: PolicyConfig
    vlm: Any  # transformers' SmolVLMConfig
    cameras: int
    token_length: int
    image_special_tokens: tuple[
        int, ...
    ] = ()  # (fake, global, fake) ids around each image, or none

    def __post_init__(self) -> None:
        if self.config.image_size != self.vision.image_size:
            raise CheckpointError(
                f"images are resized to {self.config.image_size}, but the vision tower's positions "
                f"are for {self.vision.image_size}: set resize_imgs_with_padding to the VLM's "
                "image size"
            )
        if self.expert_width % 2:
            raise CheckpointError(
                f"the expert's width {self.expert_width} is odd, its time embedding needs pairs"
            )

    @property
    def vision(self) -> Any:
        return self.vlm.vision_config

    @property
    def text(self) -> Any:
        return self.vlm.text_config

    @property
    def layers(self) -> int:
        """Of the language model that are used, and of the expert."""
        wanted, there = self.config.num_vlm_layers, self.text.num_hidden_layers
        return min(wanted, there) if wanted > 0 else there

    @property
    def head_dim(self) -> int:
        return (
            getattr(self.text, "head_dim", None)
            or self.text.hidden_size // self.text.num_attention_heads
        )

    @property
    def q_width(self) -> int:
        return self.text.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.text.num_key_value_heads * self.head_dim

    @property
    def expert_width(self) -> int:
        return int(self.text.hidden_size * self.config.expert_width_multiplier)

    @property
    def expert_intermediate(self) -> int:
        """Width of the expert's MLP: LeRobot's get_intermediate_size, a multiple of 256."""
        return -(int(4 * int(2 * self.expert_width / 3)) // -256) * 256

    def is_self(self, layer: int) -> bool:
        """Whether expert layer `layer` attends to its own actions too (else to the prefix only)."""
        every = self.config.self_attn_every_n_layers
        return "cross" not in self.config.attention_mode or (every > 0 and layer % every == 0)

    @property
    def patches(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        """Tokens of one image, without special tokens."""
        return self.patches // self.vlm.scale_factor**2

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of a chunk inside the graphs."""
        return 1, self.config.chunk_size, self.config.max_action_dim

    @property
    def prefix_tokens(self) -> int:
        """Rows of the prefix: images, special tokens, language, state."""
        special = len(self.image_special_tokens) * (self.cameras + self.config.empty_cameras)
        return self.cameras * self.image_tokens + special + self.token_length + 1
