"""The parity check must notice what final actions alone hide."""

from dataclasses import replace

import numpy as np
import pytest

from smolvla_edge.core.errors import ParityError
from smolvla_edge.export import parity
from smolvla_edge.export.checkpoint.checkpoint import load_checkpoint
from smolvla_edge.export.reference import fixed_observations, reference_of
from smolvla_edge.runtime import Policy
from smolvla_edge.runtime.policy.selfcheck import TOLERANCE, error, run_selfcheck, summary
from support.paths import DATA


@pytest.fixture(scope="module")
def reference():
    return reference_of(load_checkpoint(str(DATA / "tiny" / "checkpoint")), "portable")


@pytest.fixture(scope="module")
def references(reference):
    observations = fixed_observations(reference.checkpoint, reference.arch)
    return observations, [reference.run(o) for o in observations]


@pytest.fixture
def policy(export_case):
    return Policy.load(export_case("tiny", "fp32"), device="cpu")


def failing_stages(policy, references) -> set[str]:
    measured, _ = parity.measure(policy, *references)
    with pytest.raises(ParityError):
        parity.require(measured, "fp32")
    return {stage for stage, value in measured.items() if not value <= TOLERANCE["fp32"]}


def test_an_intact_bundle_passes(policy, references):
    parity.require(parity.measure(policy, *references)[0], "fp32")


def test_the_instructions_are_short_padded_and_of_full_length(policy, references):
    lengths = [len(stages.tokens) for stages in references[1]]
    assert lengths[0] < lengths[1] < lengths[2] == policy.manifest.tokens.length


@pytest.mark.parametrize("task", ["Go.", "Go.\n", "Go.\n\n"])
def test_the_reference_ends_an_instruction_as_the_runtime_does(policy, reference, references, task):
    observation = replace(references[0][0], task=task)
    feeds = policy.prefill(observation.images, observation.state, task)
    assert reference.prefill(observation)[0] == feeds["tokens"][feeds["token_mask"]].tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_equal(value):
    assert error(np.array([0.0, value]), np.zeros(2)) == float("inf")
    with pytest.raises(ParityError, match="cache inf"):
        parity.require({"cache": error(np.array([value]), np.zeros(1))}, "fp16")


def test_a_stale_cache_fails_the_check(policy, references):
    prefill, calls = policy.graphs.prefill, []
    policy.graphs.prefill = lambda feeds: calls or (calls.append(1), prefill(feeds))
    assert "cache" in failing_stages(policy, references)
    assert not summary(run_selfcheck(policy))["cache"] <= TOLERANCE["fp32"]


def test_swapped_cameras_fail_the_check(policy, references):
    m = policy.manifest
    policy.preprocessor.manifest = replace(m, cameras=m.cameras[::-1])
    assert {"images", "cache", "actions"} <= failing_stages(policy, references)
    assert not summary(run_selfcheck(policy))["cache"] <= TOLERANCE["fp32"]


def test_an_unnormalised_state_fails_the_check(policy, references):
    m = policy.manifest
    identity = replace(m.state.normalization, mode="IDENTITY")
    policy.preprocessor.manifest = replace(m, state=replace(m.state, normalization=identity))
    assert {"state", "cache", "actions"} <= failing_stages(policy, references)
    assert not summary(run_selfcheck(policy))["cache"] <= TOLERANCE["fp32"]


def test_actions_scaled_back_wrongly_fail_the_check(policy, references):
    """Nothing before the last stage knows the action's statistics."""
    m = policy.manifest
    identity = replace(m.action.normalization, mode="IDENTITY")
    policy.bundle.manifest = replace(m, action=replace(m.action, normalization=identity))
    assert failing_stages(policy, references) == {"chunk"}
    assert not run_selfcheck(policy)["chunk"] <= TOLERANCE["fp32"]


def test_a_truncated_instruction_fails_the_check(policy, references):
    encode = policy.preprocessor.tokenizer.encode

    def cut(task):
        tokens, mask = encode(task)
        mask[:, 16:] = False
        return tokens, mask

    policy.preprocessor.tokenizer.encode = cut
    assert "tokens" in failing_stages(policy, references)
