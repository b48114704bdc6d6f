"""The exported tiny cases against what the real LeRobot computed (tests/data, see goldens.py)."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smolvla_edge.export.checkpoint.checkpoint import load_checkpoint
from smolvla_edge.export.reference import reference_of
from smolvla_edge.runtime import Policy
from smolvla_edge.runtime.policy.selfcheck import TOLERANCE, error, run_selfcheck
from support.goldens import Golden, stage_errors
from support.paths import DATA

CASES = ("tiny", "tiny_outliers", "tiny_variant")


@pytest.mark.parametrize("case", CASES)
def test_the_torch_view_gives_lerobots_vision_embeddings(case):
    prefix = reference_of(load_checkpoint(str(DATA / case / "checkpoint")), "portable").prefix
    golden = Golden(DATA / case)
    embeds = prefix.embed_images(torch.from_numpy(golden["images_preprocessed"])).numpy()
    assert error(embeds, golden["vision_embeds"]) < 1e-4


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_every_stage_of_the_exported_graphs_equals_lerobot(case, precision, target, export_case):
    policy = Policy.load(export_case(case, precision, target), device="cpu")
    tensors = load_file(DATA / case / "checkpoint" / "model.safetensors")
    errors = stage_errors(policy, Golden(DATA / case), tensors)
    assert errors.pop("images") < 1e-5
    assert errors.pop("state") < 1e-6
    assert {k: v for k, v in errors.items() if v > TOLERANCE[precision]} == {}


@pytest.mark.parametrize("case", CASES)
def test_the_self_check_in_the_bundle_passes_where_it_was_exported(case, export_case):
    policy = Policy.load(export_case(case, "fp32"), device="cpu")
    assert all(value < TOLERANCE["fp32"] for value in run_selfcheck(policy).values())


def test_the_number_of_steps_is_a_run_time_choice(export_case):
    policy, golden = Policy.load(export_case("tiny", "fp32"), device="cpu"), Golden(DATA / "tiny")
    given = (golden.images, golden.state, golden.task, golden.noise)
    one, ten = policy.predict_chunk(*given, steps=1), policy.predict_chunk(*given, steps=10)
    # One Euler step from t = 1 is noise - velocity, and the goldens hold the velocity.
    scale = policy.manifest.action.normalization
    expected = scale.unnormalize((golden.noise - golden["velocity"][0])[0, :, :6])
    assert error(one, expected) < 1e-4
    assert np.abs(one - ten).max() > 0.1
