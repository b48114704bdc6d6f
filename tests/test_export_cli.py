"""smolvla-export's own arguments, from the command line to the manifest."""

import pytest
from conftest import DATA
from typer.testing import CliRunner

from smolvla_edge.export.cli import app
from smolvla_edge.runtime import Bundle

CHECKPOINT = str(DATA / "tiny" / "checkpoint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "gpu"], "--target is 'gpu', expected portable or cpu"),
        (["--precision", "fp8"], "--precision is 'fp8', expected fp32 or fp16"),
        (["--demo"], "leave out"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(options, message, tmp_path):
    done = CliRunner().invoke(app, [CHECKPOINT, "--output", str(tmp_path / "bundle"), *options])
    assert message in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_target_and_the_precision_are_in_the_manifest_and_in_what_is_printed(tmp_path):
    options = ["--target", "cpu", "--precision", "fp16", "--output", str(tmp_path / "bundle")]
    done = CliRunner().invoke(app, [CHECKPOINT, *options])
    assert done.exit_code == 0, done.output
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.target, manifest.precision, manifest.pinned) == ("cpu", "fp16", ())
    assert "(fp16, target cpu, " in done.output


def test_a_torch_without_symbolic_operators_is_refused_for_the_cpu(tmp_path, monkeypatch):
    monkeypatch.delattr("torch.onnx.ops")
    done = CliRunner().invoke(app, [CHECKPOINT, "--target", "cpu", "--output", str(tmp_path / "bundle")])
    assert "--target cpu needs torch 2.8 or newer" in str(done.exception)
