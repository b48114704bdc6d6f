"""The torch views against LeRobot itself, on architectures that no published checkpoint has."""

import json
import shutil

import numpy as np
import pytest
import torch

from smolvla_edge.core.errors import CheckpointError
from smolvla_edge.export.checkpoint import demo
from smolvla_edge.export.checkpoint.architecture import DEFAULT_VLM_CONFIG
from smolvla_edge.export.checkpoint.checkpoint import load_checkpoint
from smolvla_edge.export.checkpoint.tokens import pad_id, read_tokenizer
from smolvla_edge.export.reference import fixed_observations, reference_of
from support.paths import DATA

pytest.importorskip("lerobot", reason="LeRobot is not installed beside this package")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

CASES = {
    "three cameras, every third layer self": (3, {"self_attn_every_n_layers": 3, "num_vlm_layers": 5}),
    "every layer self by count": (1, {"self_attn_every_n_layers": 1}),
    "every layer self by mode": (2, {"attention_mode": "self_attn"}),
    "every layer cross": (2, {"self_attn_every_n_layers": -1}),
    "all VLM layers, wide expert": (1, {"num_vlm_layers": 0, "expert_width_multiplier": 1.5}),
    "narrow expert, short chunk": (2, {"expert_width_multiplier": 0.25, "chunk_size": 7, "n_action_steps": 5}),
    "other max dims and periods": (
        1,
        {"max_state_dim": 12, "max_action_dim": 9, "min_period": 0.01, "max_period": 2.0, "num_steps": 3},
    ),
    "padding to a length, special tokens, empty cameras": (
        2,
        {"pad_language_to": "max_length", "tokenizer_max_length": 24, "prefix_length": 200,
         "add_image_special_tokens": True, "empty_cameras": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_views_equal_lerobot_for(case, tmp_path):
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    from smolvla_edge.export.lerobot_check import _processor_stub, lerobot_actions

    cameras, overrides = CASES[case]
    tiny = DATA / "tiny" / "checkpoint"
    raw = json.loads((tiny / "config.json").read_text()) | overrides
    raw["vlm_model_name"] = str(tiny / "vlm")
    sizes = [(48, 64), (64, 48), (128, 128)][:cameras]
    images = {
        f"observation.images.c{i}": {"type": "VISUAL", "shape": [3, *s]}
        for i, s in enumerate(sizes)
    }
    raw["input_features"] = {"observation.state": {"type": "STATE", "shape": [6]}} | images
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = PreTrainedConfig.from_pretrained(tmp_path)
    config.validate_features()
    config.save_pretrained(tmp_path)
    with _processor_stub(load_checkpoint(str(tiny))):
        policy = SmolVLAPolicy(config)
    torch.manual_seed(0)
    for name, p in policy.named_parameters():
        with torch.no_grad():
            scale = np.prod(p.shape[1:]) ** -0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn_like(p) * scale + ("norm" in name and name.endswith("weight")))
    policy.save_pretrained(tmp_path)
    statistics = {
        key: {"mean": torch.randn(6), "std": torch.rand(6) + 0.5}
        for key in ("observation.state", "action")
    }
    for side, name in zip(
        make_smolvla_pre_post_processors(config, statistics),
        ("preprocessor", "postprocessor"),
        strict=True,
    ):
        side.save_pretrained(tmp_path, config_filename=f"policy_{name}.json")

    checkpoint = load_checkpoint(str(tmp_path))
    reference = reference_of(checkpoint, "portable")
    observations = fixed_observations(checkpoint, reference.arch)
    expected = lerobot_actions(checkpoint, observations)
    for observation, theirs in zip(observations, expected, strict=True):
        ours = reference.run(observation).actions[:, :, :6]
        assert np.abs(theirs).max() > 0.1
        assert np.abs(ours - theirs).max() < 1e-4


def test_lerobot_reads_the_tokenizer_that_the_demo_makes_without_the_hub(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    def unreachable(*_):
        raise CheckpointError("no network")

    monkeypatch.setattr(demo, "hub_folder", unreachable)
    shutil.copy(DEFAULT_VLM_CONFIG, tmp_path)
    demo._write_tokenizer(tmp_path, lambda _: None)
    theirs, ours = (
        AutoTokenizer.from_pretrained(tmp_path),
        read_tokenizer(tmp_path / "tokenizer.json"),
    )
    assert theirs("Pick up the red cube.\n").input_ids == ours.encode("Pick up the red cube.\n").ids
    assert (
        theirs.pad_token_id
        == pad_id(tmp_path / "tokenizer.json", ours, None)
        == ours.token_to_id("<pad>")
    )
