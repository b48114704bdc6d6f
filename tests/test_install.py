"""The built wheel in a clean Python 3.10: what a board gets."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of a clean copy of the tracked tree: nothing of this checkout but what git would
    give."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    made = {"bench", "bundle", "bundle-demo", "build", "dist", "frontier", "tests"}

    def ignore(folder: str, names: list[str]) -> set[str]:
        found = {n for n in names if n.endswith((".egg-info", "__pycache__"))}
        if Path(folder) == ROOT:  # the packages have folders of the same names
            found |= made & set(names)
            found |= {n for n in names if n == ".git" or n.startswith(".venv") or "cache" in n}
        return found

    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def lean(wheel, oldest_python, tmp_path_factory):
    """A clean Python 3.10 environment with the wheel and its dependencies; -> its bin folder."""
    folder = tmp_path_factory.mktemp("lean") / "venv"
    subprocess.run([oldest_python, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder / "bin"


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_the_wheel_holds_every_package_and_no_test(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {str(Path(n).parent) for n in names if n.endswith("/__init__.py")}
    folders = ("benchmarks", "core", "devices", "export", "quantize", "runtime")
    inits = [p for folder in folders for p in (ROOT / folder).rglob("__init__.py")]
    assert packages == {f"smolvla_edge/{p.parent.relative_to(ROOT)}" for p in inits}
    assert not any("test" in n for n in names)
    demo = [
        n.removeprefix("smolvla_edge/export/checkpoint/demo_checkpoint/")
        for n in names
        if "/demo_checkpoint/" in n
    ]
    assert set(demo) == {
        "config.json",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
        "vlm/config.json",
    }
    assert "smolvla_edge/benchmarks/page.html" in names


def test_the_lean_runtime_brings_no_torch_transformers_or_onnx(lean, tmp_path):
    listed = run(lean / "pip", "list", "--format", "freeze", cwd=tmp_path).stdout.lower()
    names = {line.split("==")[0].replace("_", "-") for line in listed.splitlines()}
    assert not names & {
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "safetensors",
        "onnxruntime-gpu",
    }
    assert {"onnxruntime", "tokenizers", "opencv-python-headless", "pyserial", "typer"} <= names


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_lean_runtime_predicts_and_passes_the_self_check(
    lean, export_case, tmp_path, precision
):
    code = """
import sys, numpy as np
from smolvla_edge.runtime import Policy
from smolvla_edge.runtime.policy.selfcheck import TOLERANCE, run_selfcheck
policy = Policy.load(sys.argv[1], device="cpu")
errors = run_selfcheck(policy)
assert all(e < TOLERANCE[policy.manifest.precision] for e in errors.values()), errors
images = {c.name: np.zeros((48, 64, 3), np.uint8) for c in policy.manifest.cameras}
print(policy.predict_chunk(images, np.zeros(6, np.float32), "Pick up the red cube.").shape)
"""
    done = run(lean / "python", "-c", code, export_case("tiny", precision), cwd=tmp_path)
    assert done.stdout.strip() == "(50, 6)", done.stderr


def test_exporting_from_the_lean_runtime_says_what_to_install(lean, tmp_path):
    done = run(lean / "smolvla-export", cwd=tmp_path)
    assert done.returncode == 2
    assert "with its [export] extra" in done.stderr


@pytest.mark.parametrize(
    "line",
    ["smolvla-audit", "smolvla-bench latency", "smolvla-doctor", "smolvla-export", "smolvla-run"],
)
def test_every_command_has_a_version_and_a_help_with_defaults(lean, tmp_path, line):
    command, *more = line.split()
    assert run(lean / command, "--version", cwd=tmp_path).stdout.startswith("smolvla-edge 0.")
    shown = run(lean / command, *more, "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "default:" in shown.stdout
