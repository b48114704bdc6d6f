"""smolvla-audit: the table, and its exit status."""

import json

from typer.testing import CliRunner

from smolvla_edge.runtime import CheckFailed
from smolvla_edge.runtime.commands.audit import app
from smolvla_edge.runtime.policy.audit import CPU


def run(folder, device="cpu"):
    return CliRunner().invoke(app, ["--bundle", str(folder), "--device", device])


def test_the_command_prints_what_ran_the_slowest_first(export_case):
    done = run(export_case("tiny", "fp16", "cpu"))
    assert done.exit_code == 0, done.output
    assert "label     fp16" in done.output
    assert f"computed  {CPU}: float" in done.output
    assert "note" not in done.output
    lines = [line.split() for line in done.output.splitlines()]
    header = next(i for i, words in enumerate(lines) if words[:1] == ["graph"])
    assert {words[3] for words in lines[header + 1 :]} == {CPU}
    times = [float(words[-2]) for words in lines[header + 1 :]]
    assert times == sorted(times, reverse=True) and times[0] > 0


def test_the_command_refuses_a_bundle_that_does_other_work_than_its_manifest_says(tiny_bundle):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest["expert"]["stages"]["expert"]["gemm"]["float32"] *= 2
    (tiny_bundle / "manifest.json").write_text(json.dumps(manifest))
    done = run(tiny_bundle)
    assert isinstance(done.exception, CheckFailed)
    assert "is not what it says: by the manifest a chunk has 0." in str(done.exception)
    assert "counted   0.219223 G multiply-adds a chunk" in done.output


def test_a_board_with_tensorrt_shows_the_layers_of_its_engines(board, export_case):
    board()
    done = run(export_case("tiny", "fp32"), "jetson")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()]
    assert ["prefix.onnx", "float32", "3"] in rows
    assert ["expert.onnx", "float32", "3"] in rows


def test_an_engine_that_is_not_what_the_label_says_is_shown_and_refused(board, export_case):
    board(half="expert.onnx")
    done = run(export_case("tiny", "fp32"), "jetson")
    assert ["expert.onnx", "float16", "3"] in [line.split() for line in done.output.splitlines()]
    assert isinstance(done.exception, CheckFailed)
    assert "the engine of expert.onnx is not fp32: it has 3 layers" in str(done.exception)
