"""smolvla-bench runs on tiny bundles, and what it computes from its numbers is right; no time is ever tested."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from smolvla_edge.benchmarks import frontier, machine, reference_process
from smolvla_edge.benchmarks.cli import app
from smolvla_edge.benchmarks.frontier import pareto, recommend
from smolvla_edge.benchmarks.latency import (
    RATIO_NOISE,
    Effort,
    Reference,
    in_turns,
    limits,
    noise,
    verdict,
)
from smolvla_edge.benchmarks.reference_process import ReferenceProcess
from smolvla_edge.benchmarks.result import Cell, Rates, read, spread
from smolvla_edge.benchmarks.start import cold_start
from smolvla_edge.core.errors import BenchError, ObservationsError, ResultError
from smolvla_edge.export.checkpoint.checkpoint import load_checkpoint
from smolvla_edge.export.reference_process import ReferenceRequest, observation, serve_views
from smolvla_edge.quantize.int8.gate import Gate
from smolvla_edge.runtime import Bundle, CheckFailed, Policy
from smolvla_edge.runtime.bundle.manifest import Work
from smolvla_edge.runtime.policy.selfcheck import error
from support.datasets import write_dataset
from support.paths import DATA

CHECKPOINT = str(DATA / "tiny" / "checkpoint")
OTHER = str(DATA / "tiny_outliers" / "checkpoint")
QUICK = ["--turns", "2", "--warmup", "1", "--seconds", "0"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs a command line in an empty folder; -> its output, or raises what it raised."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        done = CliRunner().invoke(app, [str(w) for w in words])
        if done.exit_code:
            raise done.exception
        return done.output

    return run


def test_latency_times_bundles_and_their_checkpoint_in_turns(export_case, bench, monkeypatch):
    monkeypatch.setattr(
        "smolvla_edge.benchmarks.latency.find_spec", lambda _: None
    )  # as without LeRobot
    bundles = [str(export_case("tiny", "fp32", target)) for target in ("portable", "cpu")]
    board = ["--board", "orin nano super"]
    said = bench(
        "latency",
        "--bundle",
        bundles[0],
        "--bundle",
        bundles[1],
        "--reference",
        CHECKPOINT,
        *QUICK,
        *board,
    )
    result = read(Path("latency.json"))
    assert [(r.name, r.kind) for r in result.runners] == [
        ("torch views float32", "views"), *((name, "bundle") for name in bundles)
    ]  # fmt: skip
    assert result.reference.startswith("this project's torch views")
    assert [(r.runner, r.against) for r in result.ratios] == [
        (bundles[0], "torch views float32"), (bundles[1], "torch views float32"), (bundles[1], bundles[0])
    ]  # fmt: skip
    views, first, _ = (np.array(r.chunk_ms.values) for r in result.runners)
    assert len(views) == 2
    assert np.allclose(result.ratios[0].values, views / first, rtol=1e-3)
    assert all((r.noise is None) == (spread(r.values).spread <= RATIO_NOISE) for r in result.ratios)
    for r in result.runners[1:]:
        assert max(r.selfcheck.values()) < 1e-4
        assert list(r.stages_ms)[:4] == ["preprocess", "prefix", "denoise", "tokenize"]
        assert [name for name in r.stages_ms if name.startswith("step")] == [
            f"step {i}" for i in range(1, 11)
        ]
        assert [(v.kind, v.where) for v in r.verdicts[1:]] == [("projected", "Orin Nano 8GB Super")]
        assert r.verdicts[0].kind == "measured"
        assert r.start.load_s > 0
        assert r.start.peak_mb >= r.start.anonymous_mb
    assert result.machine.cores == len(os.sched_getaffinity(0))
    assert f"| {bundles[1]} / {bundles[0]} " in said


def test_the_torch_views_compute_what_the_bundle_does(export_case):
    bundle = Bundle.open(export_case("tiny", "fp32"))
    asked = ReferenceRequest("views", CHECKPOINT, None, str(bundle.folder), "float32", "cpu", False)
    chunk, tokens, _ = serve_views(asked, load_checkpoint(CHECKPOINT), bundle, ExitStack())
    assert tokens == bundle.manifest.tokens.length
    assert error(chunk(), Policy.load(bundle, "cpu").predict_chunk(*observation(bundle))) < 1e-5


def test_other_policies_are_not_compared(export_case, bench):
    ours = export_case("tiny", "fp32")
    with pytest.raises(BenchError, match="different policies"):
        bench("latency", "--bundle", ours, "--bundle", export_case("tiny_outliers", "fp32"), *QUICK)
    for line in (["latency", *QUICK], ["accuracy"]):
        with pytest.raises(
            BenchError, match=r"exported from another checkpoint .*: other weights. Name its own"
        ):
            bench(*line, "--bundle", ours, "--reference", OTHER)
    config = (
        Path(shutil.copytree(CHECKPOINT, "changed")) / "config.json"
    )  # the same weights, used otherwise
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_period": 8.0}))
    for line in (["latency", *QUICK], ["accuracy"]):
        with pytest.raises(BenchError, match=r"other denoise steps. Name its own"):
            bench(*line, "--bundle", ours, "--reference", "changed")


def test_lerobot_is_asked_for_dtype_device_and_compilation(export_case, tmp_path):
    bundle = Bundle.open(export_case("tiny", "fp32"))
    python, asked, said = Reference(
        CHECKPOINT, None, str(tmp_path / "python"), compiled=True
    ).processes(bundle, "cuda")
    assert [a.name for a in asked] == [
        "LeRobot float32", "LeRobot bfloat16", "LeRobot float32 compiled", "LeRobot bfloat16 compiled"
    ]  # fmt: skip
    assert said.startswith("LeRobot itself")
    Path(python).write_text(
        f'#!/bin/sh\necho "$3" > {tmp_path}/asked\necho loading\necho \'smolvla-bench [[], 48, "4.4"]\'\n'
        "read line; echo smolvla-bench 1.5\n"
    )
    Path(python).chmod(0o755)
    process = ReferenceProcess(python, asked[3])
    assert (process.differences, process.tokens, process.note, process.run()) == (
        [],
        48,
        "4.4",
        1.5,
    )
    process.close()
    Path(python).write_text(
        Path(python).read_text().replace("smolvla-bench 1.5", "smolvla-bench []")
    )
    with (
        ReferenceProcess(python, asked[3]) as process,
        pytest.raises(BenchError, match=r"answers a chunk with \[\]"),
    ):
        process.run()
    got = json.loads((tmp_path / "asked").read_text())
    assert (got["dtype"], got["device"], got["compiled"]) == ("bfloat16", "cuda", True)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "status 1.*make lerobot-env"),
        ("echo smolvla-bench rubbish", r"answers 'smolvla-bench rubbish"),
        ("echo 'smolvla-bench [1, 2]'", r"answers \[1, 2\]: it is no Python"),
        ("""echo 'smolvla-bench "no lerobot"'""", "^no lerobot$"),
        ("printf '\\377\\376\\n'", "status 0"),
        ("sleep 60", "was not ready after 0 s"),
    ],
)
def test_a_python_that_is_none_or_has_no_lerobot_is_reported(tmp_path, monkeypatch, script, said):
    monkeypatch.setattr(reference_process, "START_LIMIT_S", 0.3 if "sleep" in script else 60)
    python = tmp_path / "python"
    asked = ReferenceRequest("lerobot", CHECKPOINT, None, "", "float32", "cpu", False)
    with pytest.raises(BenchError, match="cannot be started"):
        ReferenceProcess(str(python), asked)
    python.write_text(
        f"#!/bin/sh\nexec {script}\n" if "sleep" in script else f"#!/bin/sh\n{script}\n"
    )
    python.chmod(0o755)
    with pytest.raises(BenchError, match=said):
        ReferenceProcess(str(python), asked)


def test_what_the_reference_cannot_read_is_one_error(export_case, bench):
    with pytest.raises(BenchError, match=r"^nosuch is neither a folder nor a Hub id"):
        bench("latency", "--bundle", export_case("tiny", "fp32"), "--reference", "nosuch", *QUICK)
    named = shutil.copytree(export_case("tiny", "fp32"), "torch views float32")
    with pytest.raises(
        BenchError, match="a bundle is named 'torch views float32', as the reference is"
    ):
        bench("latency", "--bundle", named, "--reference", CHECKPOINT, *QUICK)


def test_nothing_is_measured_for_an_output_that_is_something_else(export_case, bench, tmp_path):
    Path("taken").mkdir()
    Path("gate.toml").write_text("cache = 0\n")
    Path("link.json").symlink_to("elsewhere.json")
    bundle = export_case("tiny", "fp32")
    for output in ("taken", "gate.toml", "link.json", bundle / "manifest.json", "/dev/null"):
        with pytest.raises(BenchError, match="is there and was not written by this command"):
            bench("latency", "--bundle", bundle, *QUICK, "--output", output)
    with pytest.raises(BenchError, match="there is no folder"):
        bench("latency", "--bundle", bundle, *QUICK, "--output", "none/latency.json")
    with pytest.raises(BenchError, match="seconds is inf: expected a finite number"):
        bench("latency", "--bundle", bundle, "--seconds", "inf")
    Bundle.open(bundle)


def test_runs_are_taken_in_turns_and_the_first_are_thrown_away():
    log, clock = [], iter(range(100))
    runs = {name: lambda name=name: log.append(name) or float(next(clock)) for name in "ab"}
    assert in_turns(runs, Effort(warmup=1, turns=2)) == {"a": [2.0, 4.0], "b": [3.0, 5.0]}
    assert log == ["a", "b"] * 3
    assert len(in_turns(runs, Effort(turns=30, seconds=0))["a"]) == 3  # slow: three at least


def test_a_noisy_machine_gets_a_sentence_and_a_verdict_only_where_every_run_agrees(tmp_path):
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
    assert denoise.memory_ms == pytest.approx(
        10 * (m.expert.stages["expert"].weight_bytes + m.cache_bytes) / 2e6
    )
    assert prefix.share == pytest.approx(max(prefix.compute_ms, prefix.memory_ms) / 100)
    half = Work({"int8": 10_000_000, "float32": 8_000_000}, 2_000_000, {})
    expert = replace(m.expert, stages={"expert": half})
    taken = {"prefix": spread([1.0]), "denoise": spread([1.0])}
    denoise = limits(replace(m, expert=expert, target="cpu"), rates, taken)[1]
    assert (denoise.flops, denoise.int8_flops) == (200_000_000, 100_000_000)
    assert denoise.compute_ms == pytest.approx(10 * (1 + 0.25))
    portable = limits(replace(m, expert=expert), rates, taken)[1]  # its products are float here
    assert portable.compute_ms == pytest.approx(10 * (1 + 1))


def test_the_machine_card_names_vector_units_the_gpu_and_the_power_drawn(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\ncase $1 in *name*) echo NVIDIA H200, 580.1;; *) echo 1980;; esac\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    card = machine.watched()()["machine"]
    assert (card.gpu, card.before.gpu_mhz) == ("NVIDIA H200, 580.1", 1980.0)
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert {f for f in ("avx2", "avx512_vnni", "asimd") if f in card.cpu.split()} == flags & {
        "avx2", "avx512_vnni", "asimd"
    }  # fmt: skip
    assert machine.power_w(tmp_path) is None
    for name, text in (("in2_label", "VDD_IN"), ("in2_input", "19000"), ("curr2_input", "500")):
        (tmp_path / "hwmon3").mkdir(exist_ok=True)
        (tmp_path / "hwmon3" / name).write_text(text + "\n")
    assert machine.power_w(tmp_path) == pytest.approx(9.5)


def test_rates_are_measured_of_every_dtype_and_of_copying():
    found = machine.rates("cpu", seconds=0.01)
    assert set(found) == {"float32", "int8", "copy"}
    assert min(found.values()) > 0
    assert machine.both(found, found).copy_gbs == (round(found["copy"], 1),) * 2


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


def test_accuracy_passes_a_faithful_bundle_and_every_control_misses_the_gate(export_case, bench):
    said = bench(
        "accuracy",
        "--bundle",
        export_case("tiny", "fp16"),
        "--reference",
        CHECKPOINT,
        "--frames",
        "2",
    )
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
    assert result.enters.startswith("the error enters with the cache")
    assert "The gate is met, and missed by all that is wrong on purpose" in said


def test_a_missed_gate_is_a_failed_check_with_its_result(export_case, bench):
    Path("gate.toml").write_text("cache = 0\n")
    line = [
        "accuracy",
        "--bundle",
        export_case("tiny", "fp32"),
        "--reference",
        CHECKPOINT,
        "--frames",
        "2",
    ]
    with pytest.raises(CheckFailed, match=r"the gate is not met: (key|value)\.\d .* of the cache"):
        bench(*line, "--gate", "gate.toml")
    assert not read(Path("accuracy.json")).passed
    Path("gate.toml").write_text("cache = 9\naction_p99 = 99\ngripper_flips = 99999\n")
    with pytest.raises(CheckFailed, match="also met with stale cache, swapped cameras, other seed"):
        bench(*line, "--gate", "gate.toml")


def test_accuracy_is_judged_on_what_a_dataset_holds_back(export_case, bench, tmp_path):
    write_dataset(tmp_path / "mine", episodes=[(12, "Pick."), (12, "Place.")] * 5)
    line = [
        "accuracy",
        "--bundle",
        export_case("tiny", "fp32"),
        "--reference",
        CHECKPOINT,
        "--frames",
        "3",
    ]
    bench(*line, "--observations", tmp_path / "mine")
    o = read(Path("accuracy.json")).observations
    assert (o.kind, o.source, o.frames, o.episodes, o.tasks) == (
        "dataset",
        str(tmp_path / "mine"),
        3,
        2,
        2,
    )


def test_observations_of_no_use_are_named(export_case, bench, tmp_path):
    (tmp_path / "empty").mkdir()
    line = ["accuracy", "--bundle", export_case("tiny", "fp32"), "--reference", CHECKPOINT]
    with pytest.raises(ObservationsError, match="empty"):
        bench(*line, "--observations", tmp_path / "empty")


def test_a_frontier_that_was_interrupted_goes_on_where_it_was(bench, tmp_path, monkeypatch):
    line = [
        "frontier",
        "--reference",
        CHECKPOINT,
        "--precisions",
        "fp32",
        "--cameras",
        "2,1",
        "--steps",
        "2,10",
    ]
    line += ["--frames", "2", "--device", "cpu", *QUICK]
    said = bench(*line)
    result = read(Path("frontier.json"))
    assert [(c.cameras, c.steps) for c in result.cells] == [(2, 2), (2, 10), (1, 2), (1, 10)]
    ten = result.cells[1]
    assert ten.worst < 1e-4 < result.cells[0].worst
    assert [c.cache is None for c in result.cells] == [False, False, True, True]
    assert ten.pareto
    assert result.recommended == 1
    assert "the fastest within the gate" in said
    lost, kept = tmp_path / "frontier" / "fp32-1-2.json", tmp_path / "frontier" / "fp32-1-10.json"
    before = kept.stat().st_mtime_ns
    for text, problem in (("{", "cannot be read"), (kept.read_text(), "holds another cell")):
        lost.write_text(text)
        with pytest.raises(BenchError, match=rf"{problem}.*[Rr]emove"):
            bench(*line)
    other = os.open(tmp_path / "frontier", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    with pytest.raises(BenchError, match="another frontier is at work"):
        bench(*line)
    os.close(other)
    lost.unlink()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(frontier, "in_turns", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench(*line)
    judged = lost.with_suffix(".judged")
    judged.write_text(json.dumps(json.loads(judged.read_text()) | {"worst": 0.125}))
    said = bench(*line)
    assert read(Path("frontier.json")).cells[2].worst == 0.125  # it was not asked again
    assert "exporting" not in said and "judging" not in said
    assert said.count("timing") == 1 and not judged.exists()
    assert kept.stat().st_mtime_ns == before
    assert len(read(Path("frontier.json")).cells) == 4
    with pytest.raises(BenchError, match="measured with another observations"):
        bench(*line, "--frames", "3")
    with pytest.raises(BenchError, match="measured with another effort"):
        bench(*line, "--turns", "3")
    (tmp_path / "frontier" / "work.json").write_text(
        json.dumps(
            json.loads((tmp_path / "frontier" / "work.json").read_text()) | {"cpu": "another"}
        )
    )
    with pytest.raises(BenchError, match="measured with another cpu"):
        bench(*line)
    config = Path(shutil.copytree(CHECKPOINT, "changed")) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_period": 8.0}))
    with pytest.raises(BenchError, match="measured with another policy"):
        bench(*line, "--reference", "changed")
    with pytest.raises(BenchError, match="holds something else"):
        bench(*line, "--work", DATA)


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


def cell(ms, worst, steps=10):
    return Cell("fp32", 2, steps, "euler", spread([ms, ms]), None, worst, 0.0, 0, False)


def test_what_is_beaten_in_both_is_not_on_the_frontier():
    cells = pareto([cell(10, 0.5), cell(20, 0.1), cell(20, 0.2), cell(30, 0.1), cell(20, 0.1)])
    assert [c.pareto for c in cells] == [True, True, False, False, True]


def test_the_recommended_setting_is_the_closest_within_the_budget_and_says_so():
    cells = [cell(10, 0.5, 1), cell(20, 0.08, 4), cell(40, 0.01)]
    assert recommend(cells, 30, Gate()) == (
        1,
        "fp32, 2 cameras, 4 steps: the closest to the reference within 30 ms",
    )
    assert recommend(cells, None, Gate())[0] == 1
    best, reason = recommend(cells, 15, Gate())
    assert best == 0
    assert "over the gate" in reason
    assert recommend(cells, 5, Gate()) == (
        None, "nothing is within 5 ms: the fastest, fp32, 2 cameras, 1 steps, takes 10 ms (p95)"
    )  # fmt: skip
    assert recommend(cells[:1], None, Gate())[0] is None


def test_control_runs_the_loop_on_the_virtual_arm(export_case, bench):
    bench(
        "control",
        "--bundle",
        export_case("tiny", "fp32"),
        "--device",
        "cpu",
        "--seconds",
        "1",
        "--fps",
        "20",
    )
    (loop,) = read(Path("control.json")).loops
    assert loop.fps == 20
    assert loop.counts["ticks"] == len(loop.queued) == len(loop.late_ms.values)
    assert max(loop.queued) > 0
    assert loop.capture_ms.p50 > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r | {"version": 1}, r"is of version 1, expected 3: measure again"),
        (lambda r: r | {"format": "other"}, r"is no result of smolvla-bench"),
        (lambda r: [r], r"is no result of smolvla-bench"),
        (lambda r: r | {"kind": []}, r"is of kind \[\], expected"),
        (
            lambda r: r | {"kind": "speed"},
            r"is of kind 'speed', expected latency, accuracy, frontier, control",
        ),
        (lambda r: r | {"loops": 3, "more": 1}, r"not valid: unknown field more; loops is 3"),
    ],
)
def test_a_result_that_is_none_is_refused(tmp_path, change, said):
    head = machine.watched()()
    whole = {
        "format": "smolvla-edge-result",
        "version": 3,
        "kind": "control",
        **head,
        "bundle": "b",
        "loops": [],
    }
    whole |= {"machine": json.loads(json.dumps(head["machine"], default=vars)), "chunking": "sync"}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(whole))
    assert read(path).loops == ()
    path.write_text(json.dumps(change(whole)))
    with pytest.raises(ResultError, match=said):
        read(path)
    path.write_text("{")
    with pytest.raises(ResultError, match="cannot be read"):
        read(path)
