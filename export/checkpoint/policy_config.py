"""LeRobot's `config.json` of a SmolVLA policy, as far as inference needs it."""

from dataclasses import dataclass, field, fields
from typing import Any

from ...core.errors import CheckpointError
from ...core.strict import decode
from ...runtime.bundle.manifest import Sampling

IMAGES = "observation.images."
EMPTY = IMAGES + "empty_camera_"
DEFAULT_VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"


@dataclass(frozen=True)
class Feature:
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PolicyConfig:
    """What the checkpoint's config says, under LeRobot's names and with its SmolVLAConfig's
    defaults (0.4.4)."""

    input_features: dict[str, Feature]
    output_features: dict[str, Feature]
    # Feature type -> mode
    normalization_mapping: dict[str, str] | None = field(default_factory=dict)
    vlm_model_name: str = DEFAULT_VLM
    resize_imgs_with_padding: tuple[int, ...] = (512, 512)
    n_obs_steps: int = 1
    empty_cameras: int = 0
    chunk_size: int = 50
    n_action_steps: int = 50
    num_steps: int = 10
    max_state_dim: int = 32
    max_action_dim: int = 32
    tokenizer_max_length: int = 48
    attention_mode: str = "cross_attn"
    self_attn_every_n_layers: int = 2
    num_vlm_layers: int = 16
    num_expert_layers: int = -1
    expert_width_multiplier: float = 0.75
    add_image_special_tokens: bool = False
    min_period: float = 0.004
    max_period: float = 4.0
    adapt_to_pi_aloha: bool = False
    use_delta_joint_actions_aloha: bool = False
    use_peft: bool = False

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "PolicyConfig":
        """Raises CheckpointError with every reason why this config cannot be exported
        faithfully."""
        if raw.get("type") != "smolvla":
            raise CheckpointError(
                f"config.json is of type {raw.get('type')!r}, expected 'smolvla': "
                "give a SmolVLA checkpoint"
            )
        problems: list[str] = []
        config = decode(cls, {f.name: raw[f.name] for f in fields(cls) if f.name in raw}, problems)
        problems += config._problems() if config else []
        if config is None or problems:
            raise CheckpointError("config.json cannot be exported: " + "; ".join(problems))
        return config

    @property
    def cameras(self) -> tuple[str, ...]:
        """The policy's keys, in the order of input_features; empty slots have none."""
        visual = (name for name, feature in self.input_features.items() if feature.type == "VISUAL")
        return tuple(name for name in visual if not name.startswith(EMPTY))

    @property
    def state_dim(self) -> int:
        return self.input_features["observation.state"].shape[0]

    @property
    def action_dim(self) -> int:
        return self.output_features["action"].shape[0]

    @property
    def image_size(self) -> int:
        """Square, pixels."""
        return self.resize_imgs_with_padding[0]

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.chunk_size, self.n_action_steps, self.num_steps, self.min_period, self.max_period
        )

    def _problems(self) -> list[str]:
        """What is not supported, and what contradicts itself."""
        size, layers, experts = (
            self.resize_imgs_with_padding,
            self.num_vlm_layers,
            self.num_expert_layers,
        )
        found = self.sampling.problems()
        if not self.cameras:
            found.append(f"no camera among the input features {sorted(self.input_features)}")
        if len(size) != 2 or size[0] != size[1] or size[0] < 1:
            found.append(f"resize_imgs_with_padding is {size}, only a square size is supported")
        for switch in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha"):
            if getattr(self, switch):
                found.append(f"{switch} is set: Aloha's joint conversion is not supported")
        if self.use_peft:
            found.append(
                "use_peft is set: merge the adapters into the weights first "
                "(peft: merge_and_unload)"
            )
        if self.n_obs_steps != 1:
            found.append(f"n_obs_steps is {self.n_obs_steps}, only 1 is supported")
        if 0 < experts != layers:
            found.append(
                f"num_expert_layers is {experts} beside {layers} VLM layers, only equal "
                "counts are supported"
            )
        if self.tokenizer_max_length < 1:
            found.append(
                f"tokenizer_max_length is {self.tokenizer_max_length}, expected at least 1"
            )
        if self.empty_cameras < 0:
            found.append(f"empty_cameras is {self.empty_cameras}, expected 0 or more")
        if not 0 < self.expert_width_multiplier < 100:
            found.append(
                f"expert_width_multiplier is {self.expert_width_multiplier}, expected above 0"
            )
        for features, key, limit in (
            (self.input_features, "observation.state", self.max_state_dim),
            (self.output_features, "action", self.max_action_dim),
        ):
            shape = features[key].shape if key in features else None
            if shape is None or len(shape) != 1 or not 1 <= shape[0] <= limit:
                found.append(
                    f"the shape of {key} is {shape}, expected one dimension of 1 to {limit} values"
                )
        return found
