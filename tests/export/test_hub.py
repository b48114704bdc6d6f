"""lerobot/smolvla_base as the Hub's cache would hold it: the line every newcomer types first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.hub import COMMIT, fill_cache
from support.paths import DATA, SHARED


def save_mismatched_statistics(snapshot: Path) -> None:
    """smolvla_base's own: keyed by the pretraining sets, so that they match nothing."""
    for name in (
        "policy_preprocessor_step_5_normalizer_processor.safetensors",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    ):
        six = torch.ones(6)
        save_file(
            {"so100.buffer.action.mean": six, "so100.buffer.action.std": six.clone()},
            snapshot / name,
        )


def export_offline(home: Path, cwd: Path, *line: str):
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = Path(sys.executable).with_name("smolvla-export")
    return subprocess.run(
        [str(command), *line], capture_output=True, text=True, cwd=cwd, env=environment
    )


def refused_on_a_port(cwd: Path, *cameras: str) -> str:
    line = [
        str(Path(sys.executable).with_name("smolvla-run")),
        "--port",
        "/dev/ttyACM0",
        "--device",
        "cpu",
    ]
    line += ["--units", "degrees", "--calibration", "my_arm", "--task", "Go."]
    for camera in cameras:
        line += ["--camera", f"{camera}=/dev/video0"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 2
    return done.stderr


def test_a_cached_hub_checkpoint_is_exported_offline_at_its_commit(tmp_path):
    tiny = DATA / "tiny" / "checkpoint"
    files = {str(p.relative_to(tiny)): p for p in tiny.iterdir() if p.is_file()}
    files |= {"tokenizer/tokenizer.json": tiny / "vlm" / "tokenizer.json"}
    snapshot = fill_cache(tmp_path / "hf", "me/tiny", files)
    save_mismatched_statistics(snapshot)
    for name in ("config.json", "policy_preprocessor.json"):
        text = (snapshot / name).read_text()
        (snapshot / name).write_text(text.replace('"./vlm"', '"me/tiny-vlm"'))
    fill_cache(tmp_path / "hf", "me/tiny-vlm", {"config.json": tiny / "vlm" / "config.json"})

    done = export_offline(tmp_path / "hf", tmp_path, "me/tiny")
    assert done.returncode == 0, done.stderr
    assert "no statistics match" in done.stdout
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["source"]["revision"] == COMMIT
    assert "no statistics match" in refused_on_a_port(tmp_path, "front", "wrist")


def test_a_hub_checkpoint_that_is_not_cached_says_so_offline(tmp_path):
    done = export_offline(tmp_path / "hf", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: lerobot/smolvla_base cannot be had from the Hub")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.full
def test_smolvla_export_fp16_runs_as_typed_with_the_published_files(tmp_path):
    if not (SHARED / "smolvla_base").is_dir():
        pytest.skip("needs the published smolvla_base and SmolVLM2 files")
    base = {p.name: p for p in (SHARED / "smolvla_base").iterdir()}
    snapshot = fill_cache(tmp_path / "hf", "lerobot/smolvla_base", base)
    vlm = {p.name: p for p in (SHARED / "smolvlm2").iterdir()}
    fill_cache(tmp_path / "hf", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", vlm)
    reference = SHARED / "reference"
    weights = snapshot / "model.safetensors"
    subprocess.run(
        [sys.executable, reference / "weights.py", reference / "full/keys.json", weights],
        check=True,
    )
    assert len(load_file(weights)) == 500
    save_mismatched_statistics(snapshot)

    done = export_offline(tmp_path / "hf", tmp_path, "--precision", "fp16")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert [c["name"] for c in manifest["cameras"]] == ["camera1", "camera2", "camera3"]
    assert manifest["precision"] == "fp16"
    message = refused_on_a_port(tmp_path, "camera1", "camera2", "camera3")
    assert "no statistics match its state" in message
    assert "no statistics match its action" in message
