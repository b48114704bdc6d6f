"""smolvla-export's own arguments, from the command line to the manifest."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from smolvla_edge.core import extras
from smolvla_edge.export.cli import app
from smolvla_edge.runtime import BackendError, Bundle
from support.paths import DATA

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
from smolvla_edge.export.cli import main
main()
"""
CHECKPOINT = str(DATA / "tiny" / "checkpoint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "gpu"], "--target is 'gpu', expected portable or cpu"),
        (["--precision", "fp8"], "--precision is 'fp8', expected fp32, fp16 or int8"),
        (["--demo"], "leave out"),
        (["--precision", "int8"], "--precision int8 needs --calibration"),
        (
            ["--precision", "fp16", "--calibration", "synthetic"],
            "belong to int8, --precision is fp16",
        ),
        (
            [
                "--precision",
                "int8",
                "--calibration",
                "synthetic",
                "--frames",
                "2",
                "--check-lerobot",
            ],
            "for fp32 and fp16",
        ),
        (["--sensitivity"], "belong to int8, --precision is fp32"),
        (["--precision", "int8", "--calibration", "no/such data"], "no/such data"),
        (
            ["--precision", "int8", "--calibration", "synthetic", "--gate", "none.toml"],
            "none.toml cannot be read",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(options, message, tmp_path):
    done = CliRunner().invoke(app, [CHECKPOINT, "--output", str(tmp_path / "bundle"), *options])
    assert message in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_an_export_asks_only_for_the_modules_that_it_uses(tmp_path, monkeypatch):
    found = extras.find_spec
    monkeypatch.setattr(
        extras, "find_spec", lambda name: None if name in ("av", "pyarrow") else found(name)
    )
    (tmp_path / "bundle").mkdir()
    for options, message in (
        (["--precision", "fp16"], "bundle exists"),
        (["--precision", "int8", "--calibration", "synthetic"], "bundle exists"),
        (["--precision", "int8", "--calibration", "me/set"], "this needs av, pyarrow: install"),
    ):
        line = [CHECKPOINT, "--output", str(tmp_path / "bundle"), *options]
        assert message in str(CliRunner().invoke(app, line).exception)
    code = (
        "import sys, smolvla_edge.export.writer\n"
        "sys.exit(' '.join({'av', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.stderr.strip() == b""


def test_the_target_and_the_precision_are_in_the_manifest_and_in_what_is_printed(tmp_path):
    options = ["--target", "cpu", "--precision", "fp16", "--output", str(tmp_path / "bundle")]
    done = CliRunner().invoke(app, [CHECKPOINT, *options])
    assert done.exit_code == 0, done.output
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.target, manifest.precision, manifest.pinned) == ("cpu", "fp16", ())
    assert "(fp16, target cpu, " in done.output


def test_a_torch_without_symbolic_operators_is_refused_for_the_cpu(tmp_path, monkeypatch):
    monkeypatch.delattr("torch.onnx.ops")
    done = CliRunner().invoke(
        app, [CHECKPOINT, "--target", "cpu", "--output", str(tmp_path / "bundle")]
    )
    assert "--target cpu needs torch 2.8 or newer" in str(done.exception)


@pytest.mark.parametrize("more", [[], ["--sensitivity"]])
def test_int8_for_a_cpu_without_vnni_is_refused_before_torch_is_loaded(tmp_path, monkeypatch, more):
    monkeypatch.setattr("smolvla_edge.runtime.engines.backend.has_vnni", lambda: False)
    options = ["--precision", "int8", "--target", "cpu", "--calibration", "synthetic", *more]
    done = CliRunner().invoke(app, [CHECKPOINT, *options, "--output", str(tmp_path / "bundle")])
    assert isinstance(done.exception, BackendError)
    assert done.exception.exit_status == 2
    assert "For this CPU, export with --precision fp32" in str(done.exception)
    assert "loading torch" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_sensitivity_measures_every_group_whatever_the_gate_says_and_writes_nothing(tmp_path):
    gate = tmp_path / "gate.toml"
    gate.write_text("action_p99 = 1e-4\nseeds = 2\n")
    options = ["--precision", "int8", "--calibration", "synthetic", "--frames", "2"]
    options += ["--gate", str(gate)]
    done = CliRunner().invoke(
        app, [CHECKPOINT, *options, "--sensitivity", "--output", str(tmp_path / "bundle")]
    )
    assert done.exit_code == 0, done.output
    table = done.output[done.output.index("group alone in int8") :]
    for group in (
        "vision early",
        "vision late",
        "language early",
        "language late",
        "expert attention",
        "expert MLP",
    ):
        assert group in table
    assert table.count("stays float") == 8
    assert list(tmp_path.iterdir()) == [gate]


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(tmp_path):
    output = tmp_path / "bundle"
    line = [sys.executable, "-c", LIMITED, CHECKPOINT, "--output", str(output)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Is the disk full?" in done.stderr
    assert list(tmp_path.iterdir()) == []
