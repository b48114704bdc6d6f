"""A fine-tune whose config.json lists more cameras than training had."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smolvla_edge.benchmarks.accuracy import load, require_source
from smolvla_edge.benchmarks.latency import ReferenceOptions
from smolvla_edge.benchmarks.reference_process import ReferenceProcess
from smolvla_edge.core.errors import BenchError, CheckpointError
from smolvla_edge.core.progress import SILENT
from smolvla_edge.export.checkpoint.cameras import (
    Named,
    bundle_cameras,
    choose_cameras,
    dataset_cameras,
    named_cameras,
)
from smolvla_edge.export.checkpoint.checkpoint import load_checkpoint
from smolvla_edge.export.int8 import observations_for
from smolvla_edge.export.reference_process import ReferenceRequest
from smolvla_edge.export.writer import write_bundle
from smolvla_edge.runtime import Bundle, Policy
from support.goldens import Golden
from support.paths import DATA, SHARED

I = "observation.images."  # noqa: E741
BASE = (f"{I}camera1", f"{I}camera2", f"{I}camera3")
FRONT_WRIST = {f"{I}front": f"{I}camera1", f"{I}wrist": f"{I}camera2"}
STATE_FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"
FINETUNED = SHARED / "lerobot" / "finetuned_two_of_three"


def choose(keys=BASE, rename=FRONT_WRIST, statistics=(), dataset=(), asked=None):
    """-> what the robot calls the cameras of training, and the line on the others."""
    evidence = (
        Named("the statistics", tuple(I + name for name in statistics)),
        dataset_cameras({"features": {I + name: {"dtype": "video"} for name in dataset}}),
    )
    cameras, line = choose_cameras(keys, rename, evidence, named_cameras("--cameras", asked))
    return [camera.name for camera in cameras], line


@pytest.fixture
def three_cameras(tiny_checkpoint):
    """The tiny checkpoint as a fine-tune of a base with three cameras, without evidence."""
    path = tiny_checkpoint / "config.json"
    config = json.loads(path.read_text())
    image = {"type": "VISUAL", "shape": [3, 256, 256]}
    state = {"observation.state": config["input_features"]["observation.state"]}
    path.write_text(json.dumps(config | {"input_features": state | dict.fromkeys(BASE, image)}))
    path = tiny_checkpoint / "policy_preprocessor.json"
    steps = json.loads(path.read_text())
    steps["steps"][0]["config"]["rename_map"] = FRONT_WRIST
    path.write_text(json.dumps(steps))
    return tiny_checkpoint


def add_image_statistics(folder, *features):
    statistics = {f"{feature}.mean": torch.zeros(3, 1, 1) for feature in features}
    save_file(load_file(folder / STATE_FILE) | statistics, folder / STATE_FILE)


def add_dataset(folder, *cameras):
    """The training dataset beside the checkpoint, as LeRobot describes it."""
    (meta := folder.parent / "dataset/meta").mkdir(parents=True)
    features = {I + name: {"dtype": "video"} for name in cameras}
    features["observation.state"] = {"dtype": "float32"}
    (meta / "info.json").write_text(json.dumps({"fps": 30, "features": features}))
    train = {"dataset": {"repo_id": "me/set", "root": str(meta.parent)}}
    (folder / "train_config.json").write_text(json.dumps(train))


def require_golden(bundle, golden):
    """LeRobot's answer, normalised and in robot units."""
    policy = Policy.load(bundle, "cpu")
    policy.prefill(golden.images, golden.state, golden.task)
    normalized = policy.denoise(golden.noise)[:, :, : policy.manifest.action.dim]
    assert np.abs(normalized - golden["actions_normalized"]).max() < 1e-4
    chunk = policy.predict_chunk(golden.images, golden.state, golden.task, golden.noise)
    assert np.abs(chunk - golden["actions"]).max() < 1e-4 * np.abs(golden["actions"]).max()


def test_the_image_statistics_that_lerobot_writes_tell_the_cameras(tiny_checkpoint):
    shutil.copytree(DATA / "finetuned_two_of_three", tiny_checkpoint, dirs_exist_ok=True)
    checkpoint = load_checkpoint(str(tiny_checkpoint), vlm=tiny_checkpoint / "vlm")
    assert [(c.name, c.key) for c in checkpoint.cameras] == [("front", BASE[0]), ("wrist", BASE[1])]
    assert checkpoint.left_out == (
        "leaving out camera3: according to the normaliser's image statistics, training had only "
        "front, wrist"
    )


@pytest.mark.skipif(not FINETUNED.is_dir(), reason=f"{FINETUNED} is not here")
def test_a_finetune_of_lerobot_with_two_of_three_cameras_answers_as_lerobot(tmp_path):
    step = FINETUNED / "checkpoints/000002/pretrained_model"
    checkpoint = load_checkpoint(str(step), vlm=SHARED / "lerobot/vlm")
    write_bundle(checkpoint, tmp_path / "bundle", "fp32")
    require_golden(tmp_path / "bundle", Golden(FINETUNED))


def test_a_camera_that_is_left_out_changes_no_byte_of_the_graphs(
    three_cameras, export_case, tmp_path
):
    add_image_statistics(three_cameras, f"{I}front", f"{I}wrist")
    bundle = write_bundle(load_checkpoint(str(three_cameras)), tmp_path / "bundle", "fp32")
    assert [camera.key for camera in bundle.manifest.cameras] == list(BASE[:2])
    images = next(t for t in bundle.manifest.prefix.inputs if t.name == "images")
    assert images.shape[0] == 2
    tiny = Bundle.open(export_case("tiny", "fp32"))
    for name in tiny.manifest.files:
        if ".onnx" in name:
            assert bundle.manifest.files[name] == tiny.manifest.files[name], name
    require_golden(bundle, Golden(DATA / "tiny"))


def test_the_dataset_tells_the_cameras_where_the_normaliser_has_no_statistics(three_cameras):
    add_dataset(three_cameras, "front", "wrist")
    checkpoint = load_checkpoint(str(three_cameras))
    assert checkpoint.camera_names == ("front", "wrist")
    assert "according to the training dataset's meta/info.json" in checkpoint.left_out


def test_statistics_are_stronger_evidence_than_the_dataset():
    assert choose(statistics=["front"], dataset=["front", "wrist"])[0] == ["front"]


def test_cameras_keep_the_order_of_the_config():
    rename = {f"{I}wrist": BASE[0], f"{I}front": BASE[2]}
    names, line = choose(rename=rename, statistics=["front", "wrist"])
    assert names == ["wrist", "front"]
    assert line.startswith("leaving out camera2:")
    assert choose(asked="wrist, front")[0] == ["front", "wrist"]


@pytest.mark.parametrize("info", [{}, {"features": None}, {"features": {f"{I}front": None}}])
def test_a_damaged_dataset_tells_nothing(info):
    assert dataset_cameras(info).cameras == ()


@pytest.mark.parametrize(
    ("case", "names"),
    [
        # without evidence and a rename map, such as a base
        ({"rename": {}}, ["camera1", "camera2", "camera3"]),
        # a rename map that tells all cameras
        ({"rename": FRONT_WRIST | {f"{I}top": BASE[2]}}, ["front", "wrist", "top"]),
        # cameras with names of their own, of which one is renamed
        (
            {"keys": (f"{I}front", f"{I}wrist"), "rename": {f"{I}top": f"{I}front"}},
            ["top", "wrist"],
        ),
        # evidence for all, and a camera that the policy does not use
        (
            {"rename": {}, "statistics": ["camera1", "camera2", "camera3", "ceiling"]},
            ["camera1", "camera2", "camera3"],
        ),
        ({"rename": {}, "asked": "camera3,camera1,camera2"}, ["camera1", "camera2", "camera3"]),
    ],
)
def test_without_doubt_all_cameras_are_used(case, names):
    assert choose(**case) == (names, "")


@pytest.mark.parametrize(
    ("case", "doubt"),
    [
        ({}, "front, wrist, camera3; the rename_map leaves out camera3"),
        (
            {"rename": {}, "statistics": ["front", "wrist"]},
            "camera1, camera2, camera3; according to the statistics training had front, wrist",
        ),
        ({"statistics": ["front", "wrist", "top"]}, "according to the statistics .* had top,"),
        ({"rename": {}, "dataset": ["front"]}, r"the training dataset's meta/info.json .* front"),
        (
            {
                "keys": ("observation.image", "observation.image2"),
                "rename": {f"{I}top": "observation.image"},
            },
            "top, image2; the rename_map leaves out image2",
        ),
    ],
)
def test_a_doubt_is_asked(case, doubt):
    with pytest.raises(
        CheckpointError, match=f"not clear.*{doubt}.* smolvla-export --cameras NAME"
    ):
        choose(**case)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ({"asked": "front,wrist"}, ["front", "wrist"]),
        ({"asked": "camera3,front"}, ["front", "camera3"]),
        (
            {"rename": {}, "statistics": ["front", "wrist"], "asked": "camera1,camera2"},
            ["camera1", "camera2"],
        ),
        ({"statistics": ["front", "side"], "asked": "front,wrist"}, ["front", "wrist"]),
        ({"statistics": ["front", "wrist"], "asked": "front,wrist"}, ["front", "wrist"]),
    ],
)
def test_the_option_decides_what_the_evidence_leaves_open(case, names):
    assert choose(**case)[0] == names


@pytest.mark.parametrize(
    ("asked", "statistics", "training"),
    [
        ("front", ["front", "wrist"], "front, wrist"),
        ("front,wrist,camera3", ["front", "wrist"], "front, wrist"),
        ("wrist", ["front", "side"], "front"),
    ],
)
def test_the_option_does_not_overrule_evidence(asked, statistics, training):
    message = (
        f"--cameras names the cameras {asked.replace(',', ', ')}, but according to the "
        f"statistics training had {training}: use these"
    )
    with pytest.raises(CheckpointError, match=message):
        choose(asked=asked, statistics=statistics)


@pytest.mark.parametrize("asked", ["front,side", "front,front", "camera1", "", "front,"])
def test_the_option_names_cameras_of_the_policy_each_once(asked):
    with pytest.raises(CheckpointError, match=r"expected some .* \(front, wrist, camera3\), each"):
        choose(asked=asked)


def test_statistics_under_another_prefix_are_no_evidence(three_cameras):
    add_image_statistics(three_cameras, f"so100.buffer.{I}front")
    with pytest.raises(CheckpointError, match="not clear"):
        load_checkpoint(str(three_cameras))


def test_the_command_asks_with_status_2_and_takes_the_answer(three_cameras, tmp_path):
    command = [str(Path(sys.executable).with_name("smolvla-export")), str(three_cameras)]
    command += ["--output", str(tmp_path / "bundle")]
    asks = subprocess.run(command, capture_output=True, text=True)
    assert (asks.returncode, (tmp_path / "bundle").exists()) == (2, False)
    assert "config.json has front, wrist, camera3;" in asks.stderr
    answered = subprocess.run(
        [*command, "--cameras", "front,camera3"], capture_output=True, text=True
    )
    assert answered.returncode == 0, answered.stderr
    assert "leaving out wrist: according to --cameras" in answered.stdout

    # The measurements read the checkpoint as the bundle did.
    bundle = Bundle.open(tmp_path / "bundle")
    assert [camera.key for camera in bundle.manifest.cameras] == [BASE[0], BASE[2]]
    given = ReferenceOptions(str(three_cameras), cameras=bundle_cameras(bundle))
    checkpoint = load(given)
    require_source(bundle, checkpoint)
    data = observations_for(checkpoint, "synthetic", 2, SILENT)
    assert all(list(sample.images) == ["front", "camera3"] for sample in data.calibration)
    _, asked, _ = given.processes(bundle, "cpu")
    views = ReferenceRequest("views", *list(vars(asked[0]).values())[1:])
    with ReferenceProcess(sys.executable, views) as process:
        assert process.differences == []
        assert process.run() > 0


def test_a_bundle_of_other_cameras_is_another_policys(export_case):
    bundle = Bundle.open(export_case("tiny", "fp32"))
    checkpoint = load(
        ReferenceOptions(str(DATA / "tiny/checkpoint"), cameras=Named("x", ("wrist",)))
    )
    with pytest.raises(BenchError, match="other cameras"):
        require_source(bundle, checkpoint)
