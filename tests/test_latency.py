"""The latency benchmark runs; its numbers are never tested."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from typer.testing import CliRunner

from smolvla_edge.benchmarks.latency import _policies, _run_views, app, interleaved
from smolvla_edge.benchmarks.lerobot_process import LeRobotProcess
from smolvla_edge.benchmarks.machine import machine
from smolvla_edge.export.checkpoint import load_checkpoint
from smolvla_edge.export.errors import ExportError
from smolvla_edge.export.layers import FP32
from smolvla_edge.export.reference import fixed_observations
from smolvla_edge.export.weights import build_views
from smolvla_edge.export.writer import architecture_of
from smolvla_edge.runtime import Bundle, Policy
from smolvla_edge.runtime.ort import OrtGraphs
from smolvla_edge.runtime.selfcheck import error

CHECKPOINT = str(DATA / "tiny" / "checkpoint")


def test_every_bundle_is_compared_with_the_checkpoint_and_the_last_line_is_json(export_case, tmp_path):
    bundles = [str(export_case("tiny", "fp32", target)) for target in ("portable", "cpu")]
    options, output = [word for bundle in bundles for word in ("--bundle", bundle)], tmp_path / "result.json"
    done = CliRunner().invoke(app, [CHECKPOINT, *options, "--repeats", "2", "--warmup", "1", "--output", str(output)])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    assert json.loads(output.read_text()) == result
    assert [result[key] for key in ("format", "version", "kind")] == ["smolvla-edge-result", 1, "latency"]
    assert {kind: len(rates) for kind, rates in result["gflops"].items()} == {"float32": 2, "int8": 2}
    seconds = result["seconds"]
    assert list(seconds) == ["torch views float32", *bundles]
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    assert f"{bundles[1]} is faster than torch views float32 by" in done.output
    for name, bundle in result["bundles"].items():
        assert max(bundle["selfcheck"].values()) < 1e-4
        m = Bundle.open(name).manifest
        flops = m.prefix.flops + 10 * m.expert.flops
        floor = 1e-9 * flops / max(result["gflops"]["float32"]) / np.median(seconds[name])
        assert bundle["floor"] == pytest.approx(floor)


def test_the_torch_views_compute_what_the_bundle_does(export_case):
    source = load_checkpoint(CHECKPOINT)
    arch = architecture_of(source)
    observation = fixed_observations(source, arch)[1]
    policy = Policy.load(export_case("tiny", "fp32"), "cpu")
    got = _run_views(*build_views(arch, source.tensors, FP32), policy, observation)
    chunk = policy.predict_chunk(observation.images, observation.state, observation.task, observation.noise)
    assert error(got, chunk) < 1e-5


def test_the_torch_views_are_compiled_where_asked(export_case, monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.compile", lambda view: compiled.append(type(view).__name__) or view)
    bundle = str(export_case("tiny", "fp32"))
    done = CliRunner().invoke(app, [CHECKPOINT, "--bundle", bundle, "--repeats", "1", "--warmup", "0", "--compile"])
    assert done.exit_code == 0, done.output
    seconds = json.loads(done.output.splitlines()[-1])["seconds"]
    assert list(seconds) == ["torch views float32", "torch views float32 compiled", bundle]
    assert compiled == ["Prefix", "Expert"]


def test_on_cuda_each_bundle_runs_with_cuda_graphs_and_without(export_case, monkeypatch):
    """A stand-in for ONNX Runtime on a GPU: graphs on the CPU that say they are not."""

    def load(self, bundle, backend, *, realtime=False, cuda_graphs=True):
        given.append((backend, cuda_graphs))
        self.device, self.reason = "cuda", ""

    given = []
    folder = str(export_case("tiny", "fp32"))
    monkeypatch.setattr(OrtGraphs, "__init__", load)
    monkeypatch.setattr(Policy, "_prove", lambda self: None)
    monkeypatch.setattr("smolvla_edge.runtime.backend.lacks", lambda *_: "")
    policies = _policies(load_checkpoint(CHECKPOINT), [folder], "cuda")
    assert list(policies) == [folder, f"{folder} without CUDA graphs"]
    assert given == [("ort-cuda", True), ("ort-cuda", False)]


def test_the_machine_line_names_vector_units_and_the_card(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho NVIDIA H200, 580.1, 143771 MiB\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    line = machine()
    assert line.endswith(", NVIDIA H200, 580.1, 143771 MiB")
    assert f", {len(os.sched_getaffinity(0))} cores, " in line
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert [f for f in ("avx2", "avx512_vnni", "asimd") if f in line.split()] == [
        f for f in ("avx2", "avx512_vnni", "asimd") if f in flags
    ]


def test_runs_are_taken_in_turns_and_the_first_are_thrown_away():
    log, clock = [], iter(range(100))

    def run(name):
        return lambda: log.append(name) or float(next(clock))

    assert interleaved([run("a"), run("b")], repeats=2, warmup=1).tolist() == [[2.0, 4.0], [3.0, 5.0]]
    assert log == ["a", "b"] * 3


def test_a_bundle_of_other_weights_is_not_compared(export_case):
    other = str(DATA / "tiny_outliers" / "checkpoint")
    done = CliRunner().invoke(app, [other, "--bundle", str(export_case("tiny", "fp32"))])
    assert "exported from other weights" in str(done.exception)


def test_lerobot_is_asked_for_dtype_device_and_compilation(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/asked\necho seconds 0\nread line; echo seconds 1.5\n')
    python.chmod(0o755)
    process = LeRobotProcess(str(python), CHECKPOINT, "bfloat16", "cuda", compiled=True)
    assert process.run() == 1.5
    process.close()
    assert (tmp_path / "asked").read_text().split()[-3:] == ["bfloat16", "cuda", "compile"]


def test_a_python_without_lerobot_is_reported():
    with pytest.raises(ExportError, match=r"ended with status 1.*needs lerobot"):
        LeRobotProcess("/bin/false", CHECKPOINT, "float32")
