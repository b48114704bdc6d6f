"""A full-size checkpoint of the published architecture with random weights: it needs no network.

The weights are the same on every machine. A policy made of them makes random movements.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from ...core.errors import CheckpointError
from ...core.progress import SILENT, Progress
from ..views.expert import Expert
from ..views.layers import FP32
from ..views.prefix import Prefix
from ..views.weights import TIME_MLP_IN, source_key
from .architecture import DEFAULT_VLM_CONFIG, Architecture, read_vlm_config
from .checkpoint import TOKENIZER, WEIGHTS, hub_folder
from .policy_config import DEFAULT_VLM, PolicyConfig

# All of it but tokenizer, statistics and weights; its VLM is the published one.
_FOLDER = DEFAULT_VLM_CONFIG.parents[1]
# Five joints in degrees, the gripper in percent: a pose in front of the arm, and its spread.
_MEAN, _STD = [0.0, -40.0, 55.0, 60.0, 0.0, 20.0], [25.0, 20.0, 20.0, 15.0, 30.0, 12.0]
# Of random weights that are not scaled by their fan-in.
_SCALES = {"bias": 0.02, "embed_tokens": 0.03, "position_embedding": 0.2}
_TOKENIZER_FILES = [TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"]


def write_demo_checkpoint(folder: Path, progress: Progress = SILENT) -> None:
    """Write a LeRobot checkpoint folder: config, weights (bfloat16), processors, tokenizer."""
    shutil.copytree(_FOLDER, folder)
    _write_tokenizer(folder / "vlm", progress)
    statistics = {
        f"{key}.{name}": torch.tensor(values)
        for key in ("observation.state", "action")
        for name, values in (("mean", _MEAN), ("std", _STD))
    }
    for name in ("preprocessor_normalizer", "postprocessor_unnormalizer"):
        save_file(statistics, folder / f"policy_{name}_processor.safetensors")
    progress.stage("drawing 403 million random weights")
    config = PolicyConfig.from_json(json.loads((folder / "config.json").read_text()))
    vlm = read_vlm_config(DEFAULT_VLM_CONFIG)
    arch = Architecture(config, vlm, len(config.cameras), config.tokenizer_max_length)
    save_file(_random_weights(arch, progress), folder / WEIGHTS, metadata={"format": "pt"})


def _random_weights(arch: Architecture, progress: Progress) -> dict[str, Tensor]:
    """Every tensor the views read, drawn from a generator seeded by its own name."""
    with torch.device("meta"):
        views = Prefix(arch, FP32), Expert(arch, FP32)
    shapes = {
        source_key(view, name): tuple(parameter.shape)
        for view in views
        for name, parameter in view.named_parameters()
    }
    shapes[TIME_MLP_IN] = (arch.expert_width, 2 * arch.expert_width)
    weights = {}
    for key, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        x = rng.standard_normal(shape, dtype=np.float32)
        scale = next((scale for part, scale in _SCALES.items() if part in key), None)
        if "norm" in key:
            x *= 0.1
            if key.endswith("weight"):
                x += 1
        elif scale is not None:
            x *= scale
        else:
            halved = any(part in key for part in ("o_proj", "out_proj.", "down_proj", "fc2"))
            x *= (0.5 if halved else 1.0) * np.prod(shape[1:]) ** -0.5
        weights[key] = torch.from_numpy(x).bfloat16()
        progress.count(len(weights), len(shapes))
    return weights


def _write_tokenizer(folder: Path, progress: Progress) -> None:
    """SmolVLM2's own tokenizer where the Hub has it for us, else a small byte-level BPE."""
    progress.stage(f"reading the tokenizer of {DEFAULT_VLM}", own_bar=True)
    try:
        source = hub_folder(DEFAULT_VLM, _TOKENIZER_FILES)
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    except CheckpointError:
        progress.note(f"no tokenizer of {DEFAULT_VLM} here: the demo trains a small one")
    text = [
        "Pick up the red cube and place it on the plate.",
        "Push the button on the left side.",
        "Fold the towel.",
    ]
    special = ["<unk>", "<s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        text, vocab_size=400, min_frequency=1, show_progress=False, special_tokens=special
    )
    tokenizer.save(str(folder / TOKENIZER))
    # The class is for LeRobot, whose AutoTokenizer finds none by the VLM's config.
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
