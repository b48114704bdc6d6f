"""The gate: what it reads, what it measures, what it refuses."""

import numpy as np
import pytest

from smolvla_edge.core.errors import GateError, QuantizeError
from smolvla_edge.quantize.int8.gate import (
    Errors,
    Gate,
    Outputs,
    compare,
    outputs_of,
    read_gate,
    relative_l2,
    require,
)


def some(seed=0, observations=3, seeds=8, chunk=10, dof=2):
    rng = np.random.default_rng(seed)
    caches = [
        {"key.0": rng.standard_normal((1, 2, 5, 4)).astype(np.float32)} for _ in range(observations)
    ]
    return Outputs(
        caches, rng.standard_normal((observations, seeds, chunk, dof)).astype(np.float32)
    )


def test_a_file_may_name_what_it_changes(tmp_path):
    (tmp_path / "gate.toml").write_text("action_p99 = 0.2\nseeds = 4\n")
    assert read_gate(tmp_path / "gate.toml") == Gate(action_p99=0.2, seeds=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("action = 1", "unknown field action"),
        ("seeds = 1", r"gate\.toml is not valid: seeds is 1, expected 2 to 1000"),
        ("seeds = 99999999999", "seeds is 99999999999, expected 2 to 1000"),
        ("cache = -0.1", "cache is -0.1, expected a number from 0 on"),
        ("cache = nan", "cache is nan, expected a number from 0 on"),
        ("action_p99 = inf", "action_p99 is inf, expected a number from 0 on"),
        ("cache = 'much'", "cache is 'much', expected float"),
        ("cache =", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, text, said):
    (tmp_path / "gate.toml").write_text(text)
    with pytest.raises(QuantizeError, match=said):
        read_gate(tmp_path / "gate.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(QuantizeError, match=r"none\.toml cannot be read"):
        read_gate(tmp_path / "none.toml")


def test_errors_are_told_against_the_spread_of_the_reference_alone():
    reference = some(seeds=4000, observations=1)
    got = Outputs(reference.caches, reference.chunks + np.float32([0.05, -0.2]))
    found = compare(reference, got, [], np.zeros(2))
    assert np.allclose(found.p99, [0.05, 0.2], atol=1e-4)
    assert np.allclose(found.spread, 1.0, atol=0.03)
    assert found.action == pytest.approx(0.2, abs=0.01)
    assert found.flips is None
    assert found.cache == {"key.0": 0.0}


def test_fewer_seeds_are_judged_by_the_spread_of_all():
    reference = some(seeds=400)
    few = Outputs(reference.caches[:1], reference.chunks[:1, :1] + np.float32(0.1))
    found = compare(reference, few, [], np.zeros(2))
    assert np.allclose(found.p99, 0.1, atol=1e-4)
    assert np.allclose(found.spread, 1.0, atol=0.1)


def test_the_worst_observation_speaks_for_a_cache_tensor():
    reference = some()
    caches = [dict(c) for c in reference.caches]
    caches[1]["key.0"] = caches[1]["key.0"] * 1.25
    assert compare(reference, Outputs(caches, reference.chunks), [], np.zeros(2)).cache == {
        "key.0": pytest.approx(0.25, rel=1e-5)
    }


def test_a_gripper_on_the_other_side_is_a_flip_unless_it_was_on_the_edge():
    reference = some(dof=3)
    # Open or closed, by seed
    reference.chunks[:] = np.where(np.arange(8)[None, :, None, None] % 2, 10.0, 0.0)
    middle = np.full(3, 5.0, np.float32)
    got = reference.chunks.copy()
    got[0, 0, 0] = 9.0  # all three: closed -> open
    assert compare(reference, Outputs(reference.caches, got), [2], middle).flips == 1
    assert compare(reference, Outputs(reference.caches, got), [0, 2], middle).flips == 2
    edge = reference.chunks.copy()
    edge[0, 0, 0] = 4.99
    near = edge.copy()
    near[0, 0, 0] = 5.01
    assert (
        compare(Outputs(reference.caches, edge), Outputs(reference.caches, near), [2], middle).flips
        == 0
    )


def test_what_is_not_finite_is_infinitely_wrong():
    reference = some()
    broken = reference.chunks.copy()
    broken[0, 0, 0, 0] = np.nan
    found = compare(reference, Outputs(reference.caches, broken), [], np.zeros(2))
    assert found.p99[0] == np.inf
    assert relative_l2(np.ones(3), np.array([1, np.inf, 1])) == np.inf
    assert relative_l2(np.array([1, np.nan, 1]), np.ones(3)) == np.inf
    with pytest.raises(GateError, match="joint a inf"):
        require(found, Gate(), ["joint a", "joint b"])


def test_everything_over_the_gate_is_named_and_nothing_else():
    found = Errors((0.05, 0.3), (1.0, 2.0), 2, {"key.0": 0.01, "value.3": 0.06})
    with pytest.raises(GateError) as caught:
        require(found, Gate(), ["pan", "gripper"])
    text = str(caught.value)
    assert "gripper 0.300 (at most 0.200)" in text
    assert "value.3 0.060 (at most 0.05)" in text
    assert "2 gripper flips (at most 0)" in text
    assert "pan" not in text
    assert "key.0" not in text
    require(Errors((0.05,), (1.0,), None, {"key.0": 0.01}), Gate(), ["pan"])


def test_the_share_of_the_gate_is_that_of_its_tightest_part():
    assert Errors((0.05,), (1.0,), 0, {"k": 0.04}).share(Gate()) == pytest.approx(0.8)
    assert Errors((0.05,), (1.0,), 1, {"k": 0.01}).share(Gate()) == np.inf


def test_each_observation_is_asked_with_its_own_noises():
    def ask(i):
        return {"key.0": np.full(2, i)}, lambda noise: np.full((1, 1), 10 * i + noise)

    found = outputs_of(map(ask, range(2)), [[1, 2], [3, 4]])
    assert [cache["key.0"][0] for cache in found.caches] == [0, 1]
    assert found.chunks[..., 0, 0].tolist() == [[1, 2], [13, 14]]


def test_the_table_shows_ticks_beside_the_spread():
    text = Errors((0.1758,), (2.0,), 0, {"key.0": 0.01}).table(["pan"])
    assert "0.1758     2.0     2.000   0.088" in text
