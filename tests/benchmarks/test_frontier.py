"""smolvla-bench frontier on a tiny checkpoint."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from smolvla_edge.benchmarks import frontier
from smolvla_edge.benchmarks.frontier import pareto, recommend
from smolvla_edge.benchmarks.result import FrontierPoint, read, spread
from smolvla_edge.core.errors import BenchError
from smolvla_edge.quantize.int8.gate import Gate
from support.paths import DATA

CHECKPOINT = str(DATA / "tiny" / "checkpoint")


def test_a_frontier_that_was_interrupted_goes_on_where_it_was(bench, monkeypatch, few_seeds):
    line = ["frontier", "--reference", CHECKPOINT, "--precisions", "fp32", "--cameras", "2,1"]
    line += ["--steps", "2,10", "--frames", "2", "--gate", few_seeds, "--device", "cpu"]
    line += ["--turns", "2", "--warmup", "0", "--seconds", "0"]
    bench(*line)
    points = read(Path("frontier.json")).cells
    assert [(p.cameras, p.steps) for p in points] == [(2, 2), (2, 10), (1, 2), (1, 10)]
    assert points[1].worst < 1e-4 < points[0].worst
    assert [p.cache is None for p in points] == [False, False, True, True]
    lost, kept = Path("frontier/fp32-1-2.json"), Path("frontier/fp32-1-10.json")
    before = kept.stat().st_mtime_ns
    lost.write_text("{")
    with pytest.raises(BenchError, match=r"cannot read .*fp32-1-2.json.*Remove"):
        bench(*line)
    lost.unlink()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(frontier, "in_turns", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench(*line)
    said = bench(*line)
    assert "exporting" not in said
    assert said.count("judging") == said.count("timing") == 1
    assert kept.stat().st_mtime_ns == before
    assert len(read(Path("frontier.json")).cells) == 4


def test_a_work_folder_of_something_else_is_refused(bench):
    work = Path("frontier")
    work.mkdir()
    line = ["frontier", "--reference", CHECKPOINT, "--frames", "2"]
    other = os.open(work, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    with pytest.raises(BenchError, match="another frontier runs in"):
        bench(*line)
    os.close(other)
    (work / "work.json").write_text(json.dumps({"device": "auto"}))
    expected = "measured with another weights, policy, observations, gate, effort, cpu, cores"
    with pytest.raises(BenchError, match=expected):
        bench(*line)
    (work / "work.json").rename(work / "mine.txt")
    with pytest.raises(BenchError, match="is not empty"):
        bench(*line)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--precisions", "fp8"], "'fp8', expected fp32, fp16, int8"),
        (["--steps", "1,x"], "'1,x', expected whole numbers"),
        (["--steps", "0"], "--steps has 0, expected 1 to 1000"),
        (["--cameras", "3"], "--cameras has 3, expected 1 to 2"),
    ],
)
def test_a_setting_that_cannot_be_had_is_named(bench, option, said):
    with pytest.raises(BenchError, match=said):
        bench("frontier", "--reference", CHECKPOINT, *option)


def point(ms, worst, steps=10):
    return FrontierPoint("fp32", 2, steps, "euler", spread([ms, ms]), None, worst, 0.0, 0, False)


def test_what_is_beaten_in_both_is_not_on_the_frontier():
    points = [point(10, 0.5), point(20, 0.1), point(20, 0.2), point(30, 0.1), point(20, 0.1)]
    assert [p.pareto for p in pareto(points)] == [True, True, False, False, True]


def test_the_recommended_setting_is_the_closest_within_the_budget_and_says_so():
    points = [point(10, 0.5, 1), point(20, 0.08, 4), point(40, 0.01)]
    assert recommend(points, 30, Gate()) == (
        1, "fp32, 2 cameras, 4 steps: the least error within 30 ms"
    )  # fmt: skip
    best, reason = recommend(points, None, Gate())
    assert (best, "the fastest within the gate" in reason) == (1, True)
    best, reason = recommend(points, 15, Gate())
    assert (best, "is over the gate" in reason) == (0, True)
    assert recommend(points, 5, Gate()) == (
        None,
        "no setting is within 5 ms: the fastest, fp32, 2 cameras, 1 steps, takes 10 ms (p95)",
    )
    assert recommend(points[:1], None, Gate())[0] is None
