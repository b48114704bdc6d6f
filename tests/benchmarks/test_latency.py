"""smolvla-bench latency on tiny bundles; no time is ever tested."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smolvla_edge.benchmarks import machine
from smolvla_edge.benchmarks.latency import (
    RATIO_NOISE,
    Effort,
    in_turns,
    limits,
    noise,
    same_policy,
    verdict,
)
from smolvla_edge.benchmarks.result import Rates, read, spread
from smolvla_edge.benchmarks.start import cold_start
from smolvla_edge.core.errors import BenchError
from smolvla_edge.runtime import Bundle
from smolvla_edge.runtime.bundle.manifest import Work
from support.paths import DATA

CHECKPOINT = str(DATA / "tiny" / "checkpoint")
QUICK = ["--turns", "2", "--warmup", "1", "--seconds", "0"]


def test_latency_times_bundles_and_their_checkpoint_in_turns(export_case, bench, monkeypatch):
    # As without LeRobot
    monkeypatch.setattr("smolvla_edge.benchmarks.latency.find_spec", lambda _: None)
    bundles = [str(export_case("tiny", "fp32", target)) for target in ("portable", "cpu")]
    line = ["latency", "--bundle", bundles[0], "--bundle", bundles[1], "--reference", CHECKPOINT]
    said = bench(*line, *QUICK, "--board", "orin nano super")
    result = read(Path("latency.json"))
    assert [(r.name, r.kind) for r in result.runners] == [
        ("torch views float32", "views"), *((name, "bundle") for name in bundles)
    ]  # fmt: skip
    assert result.reference.startswith("this project's torch views")
    assert [(r.runner, r.against) for r in result.ratios] == [
        (bundles[0], "torch views float32"),
        (bundles[1], "torch views float32"),
        (bundles[1], bundles[0]),
    ]
    views, first, _ = (np.array(r.chunk_ms.values) for r in result.runners)
    assert len(views) == 2
    assert np.allclose(result.ratios[0].values, views / first, rtol=1e-3)
    assert all((r.noise is None) == (spread(r.values).spread <= RATIO_NOISE) for r in result.ratios)
    for r in result.runners[1:]:
        assert max(r.selfcheck.values()) < 1e-4
        assert list(r.stages_ms)[:4] == ["preprocess", "prefix", "denoise", "tokenize"]
        steps = [name for name in r.stages_ms if name.startswith("step")]
        assert steps == [f"step {i}" for i in range(1, 11)]
        assert [(v.kind, v.where) for v in r.verdicts[1:]] == [("projected", "Orin Nano 8GB Super")]
        assert r.verdicts[0].kind == "measured"
        assert r.start.load_s > 0
        assert r.start.peak_mb >= r.start.anonymous_mb
    assert result.machine.cores == result.machine.threads == len(os.sched_getaffinity(0))
    assert "## Latency: latency.json" in said and "torch views float32" in said
    assert "Machine and settings" not in said


def test_bundles_of_different_policies_are_not_compared(export_case):
    ours = Bundle.open(export_case("tiny", "fp32"))
    sampling = replace(ours.manifest.sampling, num_steps=4)
    other = Bundle(ours.folder, replace(ours.manifest, sampling=sampling), ours.digest)
    assert same_policy({"a": ours, "b": ours}) == ours.manifest
    with pytest.raises(BenchError, match="b and a are different policies"):
        same_policy({"a": ours, "b": other})


def test_a_reference_of_another_checkpoint_is_refused(export_case, bench):
    other = DATA / "tiny_outliers" / "checkpoint"
    expected = r"exported from another checkpoint .*: other weights. Name its own"
    with pytest.raises(BenchError, match=expected):
        bench("latency", "--bundle", export_case("tiny", "fp32"), "--reference", other, *QUICK)


def test_what_the_reference_cannot_read_is_one_error(export_case, bench):
    with pytest.raises(BenchError, match=r"^nosuch is neither a folder nor a Hub id"):
        bench("latency", "--bundle", export_case("tiny", "fp32"), "--reference", "nosuch", *QUICK)
    named = shutil.copytree(export_case("tiny", "fp32"), "torch views float32")
    expected = "a bundle has the name of the reference, 'torch views float32'"
    with pytest.raises(BenchError, match=expected):
        bench("latency", "--bundle", named, "--reference", CHECKPOINT, *QUICK)


def test_nothing_is_measured_where_the_result_cannot_be_written(export_case, bench):
    line = ["latency", "--bundle", export_case("tiny", "fp32")]
    Path("taken").mkdir()
    for output in ("taken", "/dev/null"):
        with pytest.raises(BenchError, match="is not a file"):
            bench(*line, "--output", output)
    with pytest.raises(BenchError, match="there is no folder"):
        bench(*line, "--output", "none/latency.json")
    with pytest.raises(BenchError, match="seconds is inf: expected a finite number"):
        bench(*line, "--seconds", "inf")


def test_runs_are_taken_in_turns_and_the_first_are_thrown_away():
    log, clock = [], iter(range(100))
    runs = {name: lambda name=name: log.append(name) or float(next(clock)) for name in "ab"}
    assert in_turns(runs, Effort(warmup=1, turns=2)) == {"a": [2.0, 4.0], "b": [3.0, 5.0]}
    assert log == ["a", "b"] * 3
    assert len(in_turns(runs, Effort(turns=30, seconds=0))["a"]) == 3  # slow: three at least


def test_a_noisy_machine_gets_a_sentence_and_a_verdict_only_where_every_run_agrees():
    here = machine.watched()()["machine"]
    steady, slow, wild, quick = (
        spread(v) for v in ([28, 29, 29], [50, 80, 90], [20, 29, 60], [5, 9, 20])
    )
    assert noise(steady) is None
    assert "too noisy to say" in noise(slow)
    assert [verdict(t, here).met for t in (steady, slow, wild, quick)] == [True, False, None, True]
    assert "too noisy" in verdict(wild, here).text
    assert "not met on this machine: not one run of 3" in verdict(slow, here).text


def test_the_limit_is_what_products_or_memory_alone_would_take(export_case):
    m = Bundle.open(export_case("tiny", "fp32")).manifest
    rates = Rates({"float32": (8.0, 10.0), "int8": (40.0, 30.0)}, (1.0, 2.0))
    prefix, denoise = limits(m, rates, {"prefix": spread([100.0]), "denoise": spread([100.0])})
    assert prefix.compute_ms == pytest.approx(m.prefix.flops / 10e6)
    weights = m.expert.stages["expert"].weight_bytes
    assert denoise.memory_ms == pytest.approx(10 * (weights + m.cache_bytes) / 2e6)
    assert prefix.share == pytest.approx(max(prefix.compute_ms, prefix.memory_ms) / 100)
    half = Work({"int8": 10_000_000, "float32": 8_000_000}, 2_000_000, {})
    mixed = replace(m, expert=replace(m.expert, stages={"expert": half}))
    taken = {"prefix": spread([1.0]), "denoise": spread([1.0])}
    denoise = limits(replace(mixed, target="cpu"), rates, taken)[1]
    assert (denoise.flops, denoise.int8_flops) == (200_000_000, 100_000_000)
    assert denoise.compute_ms == pytest.approx(10 * (1 + 0.25))
    portable = limits(mixed, rates, taken)[1]  # a CPU multiplies its products in float
    assert portable.compute_ms == pytest.approx(10 * (1 + 1))


def test_a_cold_start_that_fails_is_reported_with_its_words(export_case):
    with pytest.raises(BenchError, match="unknown device 'tpu'"):
        cold_start(Bundle.open(export_case("tiny", "fp32")), "tpu")


def test_timing_a_bundle_needs_no_torch(export_case):
    code = (
        "import sys; sys.argv[1:] = sys.argv[1:] + ['cpu', '0']\n"
        "import smolvla_edge.benchmarks.cli, smolvla_edge.benchmarks.latency\n"
        "from smolvla_edge.benchmarks.start import main; main()\n"
        "sys.exit(' '.join({'torch', 'onnx', 'transformers'} & sys.modules.keys()))"
    )
    line = [sys.executable, "-c", code, str(export_case("tiny", "fp32"))]
    assert subprocess.run(line, capture_output=True, text=True).stderr.strip() == ""
