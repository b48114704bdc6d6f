"""LeRobot's `config.json` of a SmolVLA policy, as far as inference needs it."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..runtime.strict import decode
from .errors import CheckpointError

IMAGES = "observation.images."
EMPTY = IMAGES + "empty_camera_"
DEFAULT_VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"


@dataclass(frozen=True)
class PolicyConfig:
    """What the checkpoint's config says. Defaults are LeRobot's SmolVLAConfig (0.4.4)."""

    cameras: tuple[str, ...]  # policy keys, in the order of input_features
    empty_cameras: int
    state_dim: int
    action_dim: int
    image_size: int  # square, pixels
    vlm: str
    chunk_size: int = 50
    n_action_steps: int = 50
    num_steps: int = 10
    max_state_dim: int = 32
    max_action_dim: int = 32
    tokenizer_max_length: int = 48
    attention_mode: str = "cross_attn"
    self_attn_every_n_layers: int = 2
    num_vlm_layers: int = 16
    expert_width_multiplier: float = 0.75
    add_image_special_tokens: bool = False
    min_period: float = 0.004
    max_period: float = 4.0
    normalization: dict[str, str] = field(default_factory=dict)  # feature type -> mode

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "PolicyConfig":
        """Raises CheckpointError with every reason why this config cannot be exported faithfully."""
        problems: list[str] = []
        if raw.get("type") != "smolvla":
            raise CheckpointError(
                f"config.json is of type {raw.get('type')!r}, expected 'smolvla': give a SmolVLA checkpoint"
            )
        inputs, outputs = _features(raw, "input_features"), _features(raw, "output_features")
        visual = [k for k, f in inputs.items() if f.get("type") == "VISUAL"]
        cameras = tuple(k for k in visual if not k.startswith(EMPTY))
        if not cameras:
            problems.append(f"no camera among the input features {sorted(inputs)}")
        problems += [
            f"{where} has no '{key}'"
            for where, features, key in (
                ("input_features", inputs, "observation.state"),
                ("output_features", outputs, "action"),
            )
            if key not in features
        ]
        size = raw.get("resize_imgs_with_padding", [512, 512])
        if not isinstance(size, list) or len(size) != 2 or size[0] != size[1]:
            problems.append(f"resize_imgs_with_padding is {size}, only a square size is supported")
        for switch in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha"):
            if raw.get(switch):
                problems.append(f"{switch} is set: Aloha's joint conversion is not supported")
        if raw.get("n_obs_steps", 1) != 1:
            problems.append(f"n_obs_steps is {raw['n_obs_steps']}, only 1 is supported")
        layers, experts = raw.get("num_vlm_layers", 16), raw.get("num_expert_layers", -1)
        if not isinstance(experts, int) or not isinstance(layers, int):
            problems.append(f"num_vlm_layers is {layers!r} and num_expert_layers {experts!r}, expected whole numbers")
        elif experts > 0 and experts != layers:
            problems.append(
                f"num_expert_layers is {experts} beside {layers} VLM layers, only equal counts are supported"
            )
        if raw.get("use_peft"):
            problems.append("use_peft is set: merge the adapters into the weights first (peft: merge_and_unload)")
        if problems:
            raise CheckpointError("config.json cannot be exported: " + "; ".join(problems))
        state, action = inputs["observation.state"].get("shape"), outputs["action"].get("shape")
        values = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw} | {
            "cameras": cameras,
            "empty_cameras": raw.get("empty_cameras", 0),
            "state_dim": state[0] if isinstance(state, list) and len(state) == 1 else state,
            "action_dim": action[0] if isinstance(action, list) and len(action) == 1 else action,
            "image_size": size[0],
            "vlm": raw.get("vlm_model_name", DEFAULT_VLM),
            "normalization": raw.get("normalization_mapping") or {},
        }
        config = decode(cls, values, problems)
        if config is None:
            raise CheckpointError("config.json cannot be exported: " + "; ".join(problems))
        config.check()
        return config

    def check(self) -> None:
        """Raises CheckpointError with every size that contradicts another."""
        problems = [
            f"{name} is {value!r}, expected at least 1"
            for name in ("chunk_size", "n_action_steps", "num_steps", "tokenizer_max_length", "image_size")
            if (value := getattr(self, name)) < 1
        ]
        if self.num_steps > 1000:
            problems.append(f"num_steps is {self.num_steps}, expected at most 1000")
        if self.empty_cameras < 0:
            problems.append(f"empty_cameras is {self.empty_cameras}, expected 0 or more")
        if not 0 < self.min_period < self.max_period < math.inf:
            problems.append(f"periods are {self.min_period} to {self.max_period}, expected 0 < min < max")
        if not 0 < self.expert_width_multiplier < 100:
            problems.append(f"expert_width_multiplier is {self.expert_width_multiplier}, expected above 0")
        if not problems and self.n_action_steps > self.chunk_size:
            problems.append(f"n_action_steps {self.n_action_steps} is over chunk_size {self.chunk_size}")
        for kind in ("state", "action"):
            dim, limit = getattr(self, f"{kind}_dim"), getattr(self, f"max_{kind}_dim")
            if not 1 <= dim <= limit:
                problems.append(f"the {kind} has {dim} dimensions, expected 1 to max_{kind}_dim {limit}")
        if problems:
            raise CheckpointError("config.json contradicts itself: " + "; ".join(problems))


def _features(raw: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Input or output features; CheckpointError unless they are a table of tables."""
    features = raw.get(name) or {}
    if not isinstance(features, dict) or not all(isinstance(f, dict) for f in features.values()):
        raise CheckpointError(f"config.json: {name} is {features!r}, expected a table of features")
    return features
