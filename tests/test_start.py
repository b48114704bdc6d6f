"""The start benchmark runs; its numbers are never tested."""

import json
import sys

from typer.testing import CliRunner

from smolvla_edge.benchmarks import start
from smolvla_edge.runtime import BackendError


def test_every_bundle_starts_in_processes_of_its_own_and_the_last_line_is_json(export_case, tmp_path, monkeypatch):
    bundles = [str(export_case("tiny", "fp32", target)) for target in ("portable", "cpu")]
    options = [word for bundle in bundles for word in ("--bundle", bundle)]
    began, run = [], start.subprocess.run
    monkeypatch.setattr(start.subprocess, "run", lambda line, **k: began.append(line) or run(line, **k))
    result = tmp_path / "result.json"
    done = CliRunner().invoke(start.app, [*options, "--repeats", "2", "--output", str(result)])
    assert done.exit_code == 0, done.output
    assert [word for line in began for word in line if word in bundles] == bundles * 2
    answer = json.loads(done.output.splitlines()[-1])
    assert json.loads(result.read_text()) == answer
    assert [answer[key] for key in ("format", "version", "kind")] == ["smolvla-edge-result", 1, "start"]
    assert list(answer["runs"]) == bundles
    for values in answer["runs"].values():
        assert len(values) == 2
        for value in values:
            assert list(value) == [*start.SECONDS, *start.MEMORY]
            assert min(value.values()) > 0
            assert value["peak_mb"] >= value["anonymous_mb"]


def test_a_start_needs_neither_torch_nor_onnx(export_case):
    code = f"""
import sys
from smolvla_edge.benchmarks.start import _once
_once({str(export_case("tiny", "fp32"))!r}, "cpu", 0.0)
sys.exit(" ".join({{"torch", "onnx", "transformers"}} & sys.modules.keys()))
"""
    done = start.subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_a_process_that_fails_is_reported_with_its_words(export_case):
    bundle = str(export_case("tiny", "fp32"))
    done = CliRunner().invoke(start.app, ["--bundle", bundle, "--device", "tpu"])
    assert isinstance(done.exception, BackendError)
    assert "ended with status 2: error: unknown device 'tpu'" in str(done.exception)
