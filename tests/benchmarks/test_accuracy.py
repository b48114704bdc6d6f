"""smolvla-bench accuracy on tiny bundles."""

import json
import shutil
from pathlib import Path

import pytest

from smolvla_edge.benchmarks.result import read
from smolvla_edge.core.errors import BenchError, ObservationsError
from smolvla_edge.runtime import CheckFailed
from support.datasets import write_dataset
from support.paths import DATA

CHECKPOINT = str(DATA / "tiny" / "checkpoint")


def line(bundle, *more):
    return ["accuracy", "--bundle", bundle, "--reference", CHECKPOINT, *more]


def test_accuracy_passes_a_faithful_bundle_and_every_control_misses_the_gate(
    export_case, bench, few_seeds
):
    said = bench(*line(export_case("tiny", "fp16"), "--frames", "2", "--gate", few_seeds))
    result = read(Path("accuracy.json"))
    ours, stale, swapped, seed = result.comparisons
    assert result.passed
    assert [c.name for c in result.comparisons[1:]] == [
        "stale cache",
        "swapped cameras",
        "other seed",
    ]
    assert ours.missed == ()
    assert 0 < ours.worst < 0.1 < min(stale.worst, swapped.worst, seed.worst)
    assert all(c.missed for c in (stale, swapped, seed))
    assert ours.cache < 0.05 < min(stale.cache, swapped.cache)
    assert seed.cache == ours.cache  # a wrong noise does not show there
    assert len(ours.drift) == 50
    pan, gripper = ours.joints[0], ours.joints[5]
    assert pan.p50 < pan.p99 <= pan.max
    assert pan.ticks == pytest.approx(pan.p99 * 4096 / 360)
    assert gripper.ticks is None
    assert max(result.stages["images"], result.stages["state"]) < 1e-4 < result.stages["cache"]
    assert result.enters.startswith("the error starts at cache")
    assert "The bundle meets the gate. Every control" in said


def test_a_missed_gate_is_a_failed_check_with_its_result(export_case, bench):
    words = line(export_case("tiny", "fp32"), "--frames", "2", "--gate", "gate.toml")
    Path("gate.toml").write_text("seeds = 4\ncache = 0\n")
    with pytest.raises(CheckFailed, match=r"the gate is not met: (key|value)\.\d .* of the cache"):
        bench(*words)
    assert not read(Path("accuracy.json")).passed
    Path("gate.toml").write_text("seeds = 4\ncache = 9\naction_p99 = 99\ngripper_flips = 99999\n")
    with pytest.raises(CheckFailed, match="also met by stale cache, swapped cameras, other seed"):
        bench(*words)


def test_accuracy_is_judged_on_what_a_dataset_holds_back(export_case, bench, tmp_path, few_seeds):
    write_dataset(tmp_path / "mine", episodes=[(12, "Pick."), (12, "Place.")] * 5)
    more = ["--frames", "3", "--gate", few_seeds, "--observations", tmp_path / "mine"]
    bench(*line(export_case("tiny", "fp32"), *more))
    o = read(Path("accuracy.json")).observations
    assert (o.kind, o.source) == ("dataset", str(tmp_path / "mine"))
    assert (o.frames, o.episodes, o.tasks, o.seeds) == (3, 2, 2, 4)


def test_observations_of_no_use_are_named(export_case, bench, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ObservationsError, match="empty"):
        bench(*line(export_case("tiny", "fp32"), "--observations", tmp_path / "empty"))


def test_the_same_weights_with_another_config_are_another_policy(export_case, bench):
    config = Path(shutil.copytree(CHECKPOINT, "changed")) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_period": 8.0}))
    with pytest.raises(BenchError, match=r"other denoise steps. Name its own"):
        bench(*line(export_case("tiny", "fp32"), "--reference", "changed"))
