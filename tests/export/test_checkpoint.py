"""Reading LeRobot checkpoints of every form, and refusing what cannot be exported faithfully."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smolvla_edge.core.errors import CheckpointError
from smolvla_edge.export.checkpoint.checkpoint import WEIGHTS, architecture_of, load_checkpoint
from smolvla_edge.export.checkpoint.tokens import read_tokenizer
from smolvla_edge.export.views.layers import FP16, FP32
from smolvla_edge.export.views.weights import build_views
from smolvla_edge.runtime.bundle.normalization import Normalization

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE_FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"
ACTION_FILE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_step(folder, side, index, **options):
    edit_json(
        folder / f"policy_{side}processor.json",
        lambda p: p["steps"][index]["config"].update(options),
    )


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


def same_weights(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors
    )


def views_of(checkpoint, dtypes=FP32):
    return build_views(architecture_of(checkpoint), checkpoint.tensors, dtypes)


def test_a_training_folder_is_read_through_pretrained_model(tiny_checkpoint):
    run = tiny_checkpoint.parent / "last"
    run.mkdir()
    tiny_checkpoint.rename(run / "pretrained_model")
    assert load_checkpoint(str(run)).camera_names == ("front", "wrist")


def test_a_whole_training_run_is_read_at_its_last_step(tiny_checkpoint):
    run = tiny_checkpoint.parent / "run"
    (run / "checkpoints" / "last").mkdir(parents=True)
    tiny_checkpoint.rename(run / "checkpoints" / "last" / "pretrained_model")
    assert load_checkpoint(str(run)).camera_names == ("front", "wrist")


def test_a_vlm_folder_that_is_gone_is_named_with_the_way_to_give_it(tiny_checkpoint, tmp_path):
    (tiny_checkpoint / "vlm").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"\./vlm is no Hub id: give --vlm FOLDER"):
        load_checkpoint(str(tiny_checkpoint))


def test_compiled_checkpoints_lose_their_prefix(tiny_checkpoint):
    before = load_checkpoint(str(tiny_checkpoint))
    edit_weights(
        tiny_checkpoint,
        lambda t: {k.replace("model.", "model._orig_mod.", 1): v for k, v in t.items()},
    )
    assert same_weights(load_checkpoint(str(tiny_checkpoint)), before)


def test_old_checkpoints_keep_their_statistics_in_the_weights(tiny_checkpoint):
    before = load_checkpoint(str(tiny_checkpoint)).processors
    for path in tiny_checkpoint.glob("policy_*"):
        path.unlink()

    def add(tensors):
        for prefix, n in (("normalize_inputs.buffer_observation_state.", before.state),
                          ("unnormalize_outputs.buffer_action.", before.action)):  # fmt: skip
            tensors |= {prefix + name: torch.tensor(v) for name, v in n.statistics.items()}
        return tensors

    edit_weights(tiny_checkpoint, add)
    after = load_checkpoint(str(tiny_checkpoint))
    assert (after.processors.state, after.processors.action) == (before.state, before.action)
    views_of(after)  # the buffers are no unknown weights


def test_old_checkpoints_that_were_never_trained_have_infinite_statistics_and_so_none(
    tiny_checkpoint,
):
    for path in tiny_checkpoint.glob("policy_*"):
        path.unlink()
    infinite = torch.full((6,), float("inf"))
    key = "normalize_inputs.buffer_observation_state."
    edit_weights(
        tiny_checkpoint, lambda t: t | {key + "mean": infinite, key + "std": infinite.clone()}
    )
    assert not load_checkpoint(str(tiny_checkpoint)).processors.state.active


def test_statistics_under_other_keys_match_nothing(tiny_checkpoint):
    for name in (STATE_FILE, ACTION_FILE):
        tensors = load_file(tiny_checkpoint / name)
        save_file({f"so100.buffer.{k}": v for k, v in tensors.items()}, tiny_checkpoint / name)
    processors = load_checkpoint(str(tiny_checkpoint)).processors
    assert not processors.state.active
    assert not processors.action.active


def test_cameras_get_the_names_the_robot_gives_them(tiny_checkpoint):
    rename_cameras(tiny_checkpoint, top="front")
    assert load_checkpoint(str(tiny_checkpoint)).camera_names == ("top", "wrist")


def test_old_image_keys_keep_what_follows_observation(tiny_checkpoint):
    def old(config):
        features = config["input_features"]
        features["observation.image2"] = features.pop("observation.images.front")

    edit_json(tiny_checkpoint / "config.json", old)
    assert load_checkpoint(str(tiny_checkpoint)).camera_names == ("wrist", "image2")


def test_frame_rate_and_joint_names_come_from_the_dataset(tiny_checkpoint, tmp_path):
    names = [f"{j}.pos" for j in ("a", "b", "c", "d", "e", "f")]
    (tmp_path / "set/meta").mkdir(parents=True)
    info = {"fps": 15, "features": {"action": {"names": names}}}
    (tmp_path / "set/meta/info.json").write_text(json.dumps(info))
    train = {"dataset": {"repo_id": "me/set", "root": str(tmp_path / "set")}}
    (tiny_checkpoint / "train_config.json").write_text(json.dumps(train))
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    assert (checkpoint.joints, checkpoint.fps) == (("a", "b", "c", "d", "e", "f"), 15.0)


def test_the_tokenizer_is_found_in_the_checkpoints_own_folder(tiny_checkpoint):
    (tiny_checkpoint / "vlm/tokenizer.json").rename(tiny_checkpoint / "tokenizer.json")
    assert load_checkpoint(str(tiny_checkpoint)).tokenizer == tiny_checkpoint / "tokenizer.json"


def test_a_vlm_folder_can_be_given(tiny_checkpoint, tmp_path):
    (tiny_checkpoint / "vlm").rename(tmp_path / "elsewhere")
    assert (
        load_checkpoint(
            str(tiny_checkpoint), vlm=tmp_path / "elsewhere"
        ).vlm.text_config.hidden_size
        == 96
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "pi0"}, "type 'pi0', expected 'smolvla'"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha"),
        ({"num_expert_layers": 2}, "num_expert_layers is 2"),
        ({"resize_imgs_with_padding": None}, "resize_imgs_with_padding is None"),
        ({"resize_imgs_with_padding": [256, 256]}, "vision tower's positions are for 128"),
        ({"n_obs_steps": 2}, "n_obs_steps is 2"),
        ({"use_peft": True}, "merge the adapters"),
        ({"chunk_size": 10}, "n_action_steps is 50, expected 1 to chunk_size 10"),
        ({"max_state_dim": 4}, r"observation.state is \(6,\), expected one dimension of 1 to 4"),
        ({"input_features": {}}, "no camera"),
        ({"input_features": [1]}, r"input_features is \[1\], expected a table"),
        ({"min_period": "x"}, "min_period is 'x', expected float"),
        ({"max_period": 0}, "expected 0 < min_period < max_period"),
        ({"empty_cameras": -1}, "empty_cameras is -1"),
        ({"num_vlm_layers": None}, "num_vlm_layers is None, expected int"),
        ({"add_image_special_tokens": "no"}, "add_image_special_tokens is 'no', expected bool"),
        ({"vlm_model_name": None}, "vlm_model_name is None"),
        (
            {"output_features": {"action": {"type": "ACTION", "shape": [6, 3]}}},
            r"action is \(6, 3\)",
        ),
    ],
)
def test_configs_that_cannot_be_exported_faithfully_are_refused(tiny_checkpoint, change, message):
    edit_json(tiny_checkpoint / "config.json", lambda c: c.update(change))
    with pytest.raises(CheckpointError, match=message):
        architecture_of(load_checkpoint(str(tiny_checkpoint)))


def test_the_processor_files_win_over_the_config(tiny_checkpoint):
    edit_json(
        tiny_checkpoint / "config.json",
        lambda c: c.update(normalization_mapping={"STATE": "MAGIC"}),
    )
    assert load_checkpoint(str(tiny_checkpoint)).processors.state.mode == "MEAN_STD"


def test_all_problems_of_a_config_are_named_at_once(tiny_checkpoint):
    edit_json(
        tiny_checkpoint / "config.json", lambda c: c.update(n_obs_steps=3, adapt_to_pi_aloha=True)
    )
    with pytest.raises(CheckpointError, match=r"adapt_to_pi_aloha.*n_obs_steps"):
        load_checkpoint(str(tiny_checkpoint))


def test_every_weight_that_does_not_fit_is_named_at_once(tiny_checkpoint):
    def damage(tensors):
        del tensors["model.state_proj.bias"]
        tensors["model.action_in_proj.weight"] = torch.zeros(3, 3)
        tensors["model.action_out_proj.bias"][0] = float("nan")
        tensors["model.surprise.weight"] = torch.zeros(1)

    edit_weights(tiny_checkpoint, damage)
    with pytest.raises(CheckpointError) as caught:
        views_of(load_checkpoint(str(tiny_checkpoint)))
    for part in ("missing model.state_proj.bias", r"model.action_in_proj.weight is (3, 3)",
                 "model.action_out_proj.bias holds NaN", "unknown weight model.surprise.weight"):  # fmt: skip
        assert part in str(caught.value)


def test_a_weight_beyond_float16_is_refused_in_float16_only(tiny_checkpoint):
    key = "model.vlm_with_expert.vlm.model.text_model.layers.0.mlp.up_proj.weight"

    def grow(tensors):
        tensors[key][0, 0] = 70000.0

    edit_weights(tiny_checkpoint, grow)
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    views_of(checkpoint, FP32)
    with pytest.raises(CheckpointError, match="beyond float16"):
        views_of(checkpoint, FP16)


def rename_cameras(folder, **to):
    renamed = {
        f"observation.images.{robot}": f"observation.images.{policy}"
        for robot, policy in to.items()
    }
    edit_step(folder, "pre", 0, rename_map=renamed)


RELATIVE = {"registry_name": "absolute_actions_processor", "config": {}}
MAGIC = {"STATE": "MAGIC"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: rename_cameras(f, wrist="front"), "two are equal"),
        (lambda f: rename_cameras(f, side="front", top="front"), "two sources"),
        (lambda f: rename_cameras(f, side="empty_camera_0"), "into the empty slot"),
        (
            lambda f: edit_step(f, "pre", 5, norm_map=MAGIC),
            "observation.state.mode is 'MAGIC', expected one of",
        ),
        (lambda f: edit_step(f, "pre", 5, normalize_observation_keys=[]), "leaves the state out"),
        (lambda f: edit_step(f, "pre", 5, features={}), "leaves the state out"),
        (lambda f: edit_step(f, "pre", 3, padding_side="left"), "pads on the left"),
        (
            lambda f: edit_step(f, "pre", 3, tokenizer_name="google/paligemma-3b"),
            "they must be one",
        ),
        (lambda f: edit_step(f, "pre", 3, max_length=2), "cut to 2 tokens"),
        (lambda f: edit_step(f, "pre", 3, max_length="many"), "is damaged"),
        (
            lambda f: edit_json(
                f / PRE, lambda p: p["steps"][5].update(state_file="../x.safetensors")
            ),
            "plain file name",
        ),
        (lambda f: edit_json(f / PRE, lambda p: p["steps"].pop(2)), "new_line.* is missing"),
        (lambda f: edit_json(f / PRE, lambda p: p["steps"].append(p["steps"][5])), "comes 2 times"),
        (
            lambda f: edit_json(f / POST, lambda p: p["steps"].append(RELATIVE)),
            "absolute_actions_processor",
        ),
        (lambda f: (f / PRE).write_text("{}"), "is damaged"),
        (lambda f: (f / STATE_FILE).write_bytes(b"{}"), "is damaged"),
        (
            lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
            r"pytorch_model\.bin.*only safetensors",
        ),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:1000]), "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), r"adapter_config\.json.*merge"),
        (lambda f: (f / "vlm/tokenizer.json").write_text("{}"), "is not a tokenizer"),
    ],
)
def test_checkpoints_that_are_damaged_or_do_something_else_are_refused(
    tiny_checkpoint, change, message
):
    change(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(load_checkpoint(str(tiny_checkpoint)).tokenizer)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "not-a-hub-id", "./nope/nope"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
        load_checkpoint(name)


def test_a_hub_checkpoint_that_cannot_be_had_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="cannot be had from the Hub"):
        load_checkpoint("nobody/no_such_policy")


def test_a_hub_error_without_a_text_is_named_too(monkeypatch):
    def slow(*_, **__):
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", slow)
    with pytest.raises(
        CheckpointError, match=r"cannot be had from the Hub \(TimeoutError: \)\. Check"
    ):
        load_checkpoint("nobody/no_such_policy")


def test_a_revision_of_a_folder_makes_no_sense(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="leave it out"):
        load_checkpoint(str(tiny_checkpoint), revision="main")


def test_an_export_that_is_terminated_leaves_nothing_behind(tiny_checkpoint, tmp_path):
    command = [
        str(Path(sys.executable).with_name("smolvla-export")),
        str(tiny_checkpoint),
        "--output",
        "out/bundle",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while "exporting expert" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"])
def test_every_normalisation_mode_inverts_itself(mode):
    names = ("mean", "std", "min", "max", "q01", "q99", "q10", "q90")
    rng = np.random.default_rng(0)
    statistics = {n: tuple(np.sort(rng.uniform(1, 9, 8))[[i] * 3] + i) for i, n in enumerate(names)}
    n = Normalization(mode, 1e-8, statistics)
    x = np.float32([1.5, -2.0, 30.0])
    assert np.allclose(n.unnormalize(n.normalize(x)), x, rtol=1e-5)
    assert np.allclose(n.normalize_inverse(n.unnormalize(x)), x, rtol=1e-5, atol=1e-5)
    assert not np.allclose(n.normalize(x), x)
