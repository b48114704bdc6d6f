"""LeRobot's `config.json` of a SmolVLA policy, as far as inference needs it."""

from dataclasses import dataclass
from typing import Any

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
    normalization: tuple[tuple[str, str], ...] = ()  # feature type -> mode

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "PolicyConfig":
        """Raises CheckpointError with every reason why this config cannot be exported faithfully."""
        problems: list[str] = []
        if raw.get("type") != "smolvla":
            raise CheckpointError(
                f"config.json is of type {raw.get('type')!r}, expected 'smolvla': give a SmolVLA checkpoint"
            )
        inputs, outputs = raw.get("input_features") or {}, raw.get("output_features") or {}
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
        if size is None or len(size) != 2 or size[0] != size[1]:
            problems.append(f"resize_imgs_with_padding is {size}, only a square size is supported")
        for switch in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha"):
            if raw.get(switch):
                problems.append(f"{switch} is set: Aloha's joint conversion is not supported")
        if raw.get("n_obs_steps", 1) != 1:
            problems.append(f"n_obs_steps is {raw['n_obs_steps']}, only 1 is supported")
        layers, experts = raw.get("num_vlm_layers", 16), raw.get("num_expert_layers", -1)
        if experts > 0 and experts != layers:
            problems.append(
                f"num_expert_layers is {experts} beside {layers} VLM layers, only equal counts are supported"
            )
        if raw.get("use_peft"):
            problems.append("use_peft is set: merge the adapters into the weights first (peft: merge_and_unload)")
        if problems:
            raise CheckpointError("config.json cannot be exported: " + "; ".join(problems))

        same_name = {f for f in cls.__dataclass_fields__ if f in raw} - {"cameras", "empty_cameras"}
        try:
            config = cls(
                cameras=cameras,
                empty_cameras=int(raw.get("empty_cameras", 0)),
                state_dim=int(inputs["observation.state"]["shape"][0]),
                action_dim=int(outputs["action"]["shape"][0]),
                image_size=int(size[0]),
                vlm=raw.get("vlm_model_name", DEFAULT_VLM),
                normalization=tuple(sorted((raw.get("normalization_mapping") or {}).items())),
                **{name: raw[name] for name in same_name},
            )
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise CheckpointError(f"config.json is damaged: {e!r} in the feature shapes or sizes") from e
        config.check()
        return config

    def check(self) -> None:
        """Raises CheckpointError with every size that contradicts another."""
        problems = [
            f"{name} is {value!r}, expected at least 1"
            for name in ("chunk_size", "n_action_steps", "num_steps", "tokenizer_max_length", "image_size")
            if not isinstance(value := getattr(self, name), int) or value < 1
        ]
        if not problems and self.n_action_steps > self.chunk_size:
            problems.append(f"n_action_steps {self.n_action_steps} is over chunk_size {self.chunk_size}")
        for kind in ("state", "action"):
            dim, limit = getattr(self, f"{kind}_dim"), getattr(self, f"max_{kind}_dim")
            if not 1 <= dim <= limit:
                problems.append(f"the {kind} has {dim} dimensions, expected 1 to max_{kind}_dim {limit}")
        if problems:
            raise CheckpointError("config.json contradicts itself: " + "; ".join(problems))
