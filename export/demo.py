"""A full-size checkpoint of the published architecture with random weights, so that everything runs offline.

The weights are the same on every machine. A policy made of them moves the arm about, and knows nothing.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from .architecture import DEFAULT_VLM_CONFIG, Architecture, read_vlm_config
from .checkpoint import TOKENIZER, WEIGHTS, hub_folder
from .errors import CheckpointError
from .expert import Expert
from .layers import FP32
from .policy_config import DEFAULT_VLM, PolicyConfig
from .prefix import Prefix
from .weights import TIME_MLP_IN, source_key

# Six joints in degrees, gripper in percent: a pose in front of the arm and how far training data strays from it.
_STATISTICS = {
    "mean": [0.0, -40.0, 55.0, 60.0, 0.0, 20.0],
    "std": [25.0, 20.0, 20.0, 15.0, 30.0, 12.0],
}
# Of random weights that are not scaled by their fan-in.
_SCALES = {"bias": 0.02, "embed_tokens": 0.03, "position_embedding": 0.2}
_CAMERAS = ("front", "wrist")
_TOKENIZER_FILES = [TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"]


def write_demo_checkpoint(folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Write a LeRobot checkpoint folder: config, weights (bfloat16), processors, tokenizer."""
    features = {"observation.state": {"type": "STATE", "shape": [6]}}
    features |= {f"observation.images.{c}": {"type": "VISUAL", "shape": [3, 480, 640]} for c in _CAMERAS}
    action = {"action": {"type": "ACTION", "shape": [6]}}
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    config = {
        "type": "smolvla",
        "input_features": features,
        "output_features": action,
        "normalization_mapping": modes,
        "vlm_model_name": "./vlm",
    }
    vlm = folder / "vlm"
    vlm.mkdir(parents=True)
    shutil.copyfile(DEFAULT_VLM_CONFIG, vlm / "config.json")
    _write_json(folder / "config.json", config)
    _write_tokenizer(vlm, say)
    before = {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        "smolvla_new_line_processor": {},
        "tokenizer_processor": {"max_length": 48, "padding": "longest", "tokenizer_name": "./vlm"},
        "device_processor": {"device": "cpu"},
    }
    for kind, side, around in (("pre", "normalizer", before), ("post", "unnormalizer", {})):
        state = f"policy_{kind}processor_{side}_processor.safetensors"
        scaling = {
            "registry_name": f"{side}_processor",
            "config": {"features": features | action, "norm_map": modes},
            "state_file": state,
        }
        steps = [*({"registry_name": name, "config": options} for name, options in around.items()), scaling]
        _write_json(folder / f"policy_{kind}processor.json", {"name": f"policy_{kind}processor", "steps": steps})
        keys = ("observation.state", "action")
        save_file({f"{k}.{n}": torch.tensor(v) for k in keys for n, v in _STATISTICS.items()}, folder / state)
    say("drawing 403 million random weights")
    parsed = PolicyConfig.from_json(config)
    arch = Architecture(parsed, read_vlm_config(DEFAULT_VLM_CONFIG), parsed.tokenizer_max_length)
    save_file(_random_weights(arch), folder / WEIGHTS, metadata={"format": "pt"})


def _random_weights(arch: Architecture) -> dict[str, Tensor]:
    """Every tensor the views read, drawn from a generator seeded by its own name."""
    with torch.device("meta"):
        views = Prefix(arch, FP32), Expert(arch, FP32)
    weights = {}
    for view in views:
        for name, parameter in view.named_parameters():
            key, shape = source_key(view, name), tuple(parameter.shape)
            if key == TIME_MLP_IN:
                shape = (arch.expert_width, 2 * arch.expert_width)
            x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
            if "norm" in key:
                x = 0.1 * x + key.endswith("weight")
            elif named := [scale for part, scale in _SCALES.items() if part in key]:
                x *= named[0]
            else:
                halved = any(part in key for part in ("o_proj", "out_proj.", "down_proj", "fc2"))
                x *= (0.5 if halved else 1.0) * np.prod(shape[1:]) ** -0.5
            weights[key] = torch.from_numpy(x).bfloat16()
    return weights


def _write_tokenizer(folder: Path, say: Callable[[str], None]) -> None:
    """SmolVLM2's own tokenizer where it can be had, else a small byte-level BPE."""
    try:
        source = hub_folder(DEFAULT_VLM, _TOKENIZER_FILES)
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    except CheckpointError:
        say(f"the tokenizer of {DEFAULT_VLM} cannot be had here: using a small one trained on the spot")
    text = ["Pick up the red cube and place it on the plate.", "Push the button on the left side.", "Fold the towel."]
    special = ["<unk>", "<s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text, vocab_size=400, min_frequency=1, show_progress=False, special_tokens=special)
    tokenizer.save(str(folder / TOKENIZER))
    _write_json(folder / "special_tokens_map.json", {"pad_token": "<pad>"})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
