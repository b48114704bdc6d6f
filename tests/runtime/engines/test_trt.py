"""The TensorRT path without a GPU: stand-ins at the outermost border (tests/standins/README.md).

Tested are the calls, their order and memory, what is kept and built again, and failures. Nothing
here is a result of TensorRT.
"""

import json
import os
import stat
import sys
from dataclasses import replace

import numpy as np
import pytest

from smolvla_edge.core.errors import BackendError, CheckFailed
from smolvla_edge.core.files import cache_home
from smolvla_edge.runtime import Policy
from smolvla_edge.runtime.bundle.bundle import Bundle
from smolvla_edge.runtime.engines import trt, trt_engine_cache
from smolvla_edge.runtime.engines.trt_engine import count_precisions
from smolvla_edge.runtime.robot import drive
from smolvla_edge.runtime.robot.settings import Settings

TASK = "Pick up the red cube."


@pytest.fixture(scope="session")
def bundle(export_case):
    return Bundle.open(export_case("tiny", "fp32"))


def load(bundle, **options):
    return Policy.load(bundle, "jetson", backend="tensorrt", seed=1, **options)


def calls():
    return sys.modules["cuda.bindings.runtime"].calls


def observe(policy, size=(48, 64), value=99):
    rng = np.random.default_rng(value)
    images = {c.name: rng.integers(0, 256, (*size, 3), np.uint8) for c in policy.manifest.cameras}
    return images, rng.standard_normal(policy.manifest.state.dim).astype(np.float32), TASK


def chunks(policy, steps=(3, 3, 4, 3)):
    """Of different observations and numbers of steps, with and without guidance."""
    noise = np.random.default_rng(5).standard_normal(policy._noise_shape).astype(np.float32)
    tail = np.zeros((4, policy.manifest.action.dim), np.float32)
    found = []
    for i, n in enumerate(steps):
        more = {"prev_chunk": tail, "delay": 1} if i % 2 else {}
        found.append(policy.predict_chunk(*observe(policy, value=i), noise, steps=n, **more))
    return found


def test_chunks_on_the_engines_are_those_of_the_cpu(board, bundle):
    policy = load(bundle)
    assert policy.graphs.takes_frames
    assert (
        "backend tensorrt: tensorrt, as asked (TensorRT 10.3.0 on Stand-in, compute 8.7, 8 SM"
        in policy.graphs.reason
    )
    for got, expected in zip(chunks(policy), chunks(Policy.load(bundle, "cpu")), strict=True):
        assert np.abs(got - expected).max() < 1e-3


def test_a_chunk_is_one_launch_and_only_actions_come_down(board, bundle):
    policy = load(bundle)
    chunks(policy)
    before = len(calls())
    chunks(policy, steps=(3, 3))
    made = calls()[before:]
    cameras = len(policy.manifest.cameras)
    assert [c for c in made if c[0] == "cudaGraphLaunch"] == [
        ("cudaGraphLaunch", cameras + 1 + 3)
    ] * 2
    assert {c[0] for c in made} == {
        "cudaGraphLaunch",
        "cudaMemcpyHostToDevice",
        "cudaMemcpyDeviceToHost",
    }
    size = 4 * int(np.prod(policy._noise_shape))
    assert [c[1] for c in made if c[0] == "cudaMemcpyDeviceToHost"] == [size, size]
    frames = [c[1] for c in made if c[0] == "cudaMemcpyHostToDevice" and c[1] == 48 * 64 * 3]
    assert len(frames) == 2 * cameras, "frames go up as bytes"


def test_the_cache_is_that_of_the_last_prefill_whoever_asks_first(board, bundle):
    policy, plain = load(bundle), Policy.load(bundle, "cpu")
    noise = np.ones(policy._noise_shape, np.float32)
    velocities = {}
    for name, p in (("engines", policy), ("cpu", plain)):
        velocities[name] = []
        p.prefill(*observe(p))
        p.denoise(noise, 3, velocities=velocities[name])
        p.prefill(*observe(p, value=7))
    assert np.allclose(velocities["engines"], velocities["cpu"], atol=1e-4)
    for name, expected in plain.graphs.cache().items():
        assert np.allclose(policy.graphs.cache()[name], expected, atol=1e-4), name
    assert np.allclose(policy.denoise(noise, 3), plain.denoise(noise, 3), atol=1e-4)


def test_frames_of_another_size_get_an_engine_of_their_own(board, bundle):
    policy, plain = load(bundle), Policy.load(bundle, "cpu")
    noise = np.ones(policy._noise_shape, np.float32)
    for size in ((48, 64), (30, 90), (48, 64)):
        got, expected = (
            p.predict_chunk(*observe(p, size), noise, steps=2) for p in (policy, plain)
        )
        assert np.abs(got - expected).max() < 1e-3, size


def test_a_camera_engine_that_resizes_otherwise_than_the_host_is_refused(board, bundle):
    board(wrong=("image", 0.001))
    policy = load(bundle)
    with pytest.raises(
        BackendError, match=r"resizes frames of 64 x 48 otherwise than the host, by 1.0e-03"
    ):
        policy.predict_chunk(*observe(policy))
    with pytest.raises(BackendError, match="resizes frames"):  # asking again does not help
        policy.predict_chunk(*observe(policy))


def test_engines_are_built_once_and_again_for_another_tensorrt_or_gpu(board, bundle, capsys):
    def built():
        load(bundle)
        return capsys.readouterr().out.count("building the TensorRT engine")

    assert [built(), built()] == [2, 0]
    board(version="10.16.1")
    assert [built(), built()] == [2, 0]
    board(gpu="Another")
    assert [built(), built()] == [2, 0]
    board()
    assert built() == 0
    records = [record for _, record in trt_engine_cache.engine_records()]
    assert len(records) == 6
    assert {r.key.gpu.split(",")[0] for r in records} == {"Stand-in", "Another"}
    assert stat.S_IMODE((cache_home() / "engines").stat().st_mode) == 0o700
    assert len(list((cache_home() / "engines").glob("timing-*.cache"))) == 3


@pytest.mark.parametrize("file", ["engine.plan", "engine.json"])
def test_a_damaged_engine_is_built_again(board, bundle, capsys, file):
    load(bundle)
    capsys.readouterr()
    for path in (cache_home() / "engines").glob(f"*/{file}"):
        path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    assert sum("damaged" in str(r) for _, r in trt_engine_cache.engine_records()) == 2
    load(bundle)
    assert capsys.readouterr().out.count("is damaged: building it again") == 2
    load(bundle)
    assert "building" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "parse",
            r"could not build prefix.onnx: its parser refuses the graph: "
            r"In node 3: UNSUPPORTED_NODE",
        ),
        ("build", r"could not build prefix.onnx: no implementation for node MatMul_7"),
        (
            "killed",
            r"the build of prefix.onnx was ended by SIGKILL; SIGKILL means that memory ran out: "
            r"stop other",
        ),
    ],
)
def test_a_build_that_fails_says_why_and_leaves_nothing(board, bundle, how, message):
    board(fail=how)
    with pytest.raises(BackendError, match=message):
        load(bundle)
    assert list((cache_home() / "engines").iterdir()) == []
    board()
    load(bundle)


def test_an_interrupted_build_leaves_nothing_and_no_process(board, bundle, monkeypatch):
    board(fail="wait")
    heard = []

    def interrupt(line):
        heard.append(line)
        if line == "Building engine":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trt.TrtGraphs(bundle, say=interrupt)
    assert heard[-1] == "Building engine"
    assert list((cache_home() / "engines").iterdir()) == []


def test_what_a_killed_program_left_half_built_goes_with_the_next_build(board, bundle):
    left = [cache_home() / "engines" / name for name in (".building-old", ".building-now")]
    for folder in left:
        folder.mkdir(parents=True, mode=0o700)
    left[0].parent.chmod(0o700)
    os.utime(left[0], (0, 0))
    load(bundle)
    assert [folder.exists() for folder in left] == [False, True]


def test_a_full_disk_is_an_error_that_names_the_folder(board, bundle, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trt_engine_cache, "_write", full)
    with pytest.raises(
        BackendError, match=r"prefix.onnx cannot be kept in .*engines: .*No space left"
    ):
        load(bundle)
    assert [p for p in (cache_home() / "engines").iterdir() if p.is_dir()] == []


def test_an_engine_cache_that_others_may_write_to_is_refused(board, bundle):
    load(bundle)
    (cache_home() / "engines").chmod(0o777)
    with pytest.raises(BackendError, match="not a folder of this user alone"):
        load(bundle)


def test_an_engine_that_computes_something_else_is_refused_before_the_arm_is_touched(
    board, bundle, monkeypatch
):
    touched = []
    monkeypatch.setattr(drive, "open_hardware", lambda *_: touched.append(1))
    for wrong, stage in (
        (("key.1", 0.5), "key.1"),
        (("velocity", 0.5), None),
        (("next_actions", 0.5), "actions"),
    ):
        board(wrong=wrong)
        if stage is None:  # nothing but a benchmark reads it
            load(bundle)
            (cache_home() / "engines").rename(cache_home() / "proved")
            continue
        with pytest.raises(
            CheckFailed,
            match=rf"self-check failed: {stage} is the first to differ .*another --backend",
        ):
            drive.drive(
                Settings(bundle=str(bundle.folder), device="jetson", backend="tensorrt", port="sim")
            )
    assert touched == []


def test_a_proof_is_kept_with_the_engines_and_asked_for_once(board, bundle):
    assert "self-check passed with actions within" in load(bundle).graphs.reason
    assert "self-check" not in load(bundle).graphs.reason
    proofs = [record.proved[bundle.digest] for _, record in trt_engine_cache.engine_records()]
    assert len(proofs) == 2
    assert {"key.0", "actions", "chunk"} < set(proofs[0])
    for path in (cache_home() / "engines").glob("*/engine.json"):
        path.write_text(path.read_text().replace(bundle.digest, "0" * 64))
    assert "self-check passed" in load(bundle).graphs.reason


def test_an_engine_whose_layers_are_not_what_the_label_says_is_refused(board, bundle):
    board(half="expert.onnx")
    with pytest.raises(
        BackendError, match=r"engine of expert.onnx is not fp32: it has 3 layers in float16"
    ):
        load(bundle)


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0", "12.0.0"])
def test_another_tensorrt_than_ours_is_refused(board, bundle, version):
    board(version=version)
    with pytest.raises(BackendError, match=rf"TensorRT {version} found, expected 10.3 to 11"):
        load(bundle)


def test_the_next_backend_is_taken_with_the_reason_for_each_one_before(board, bundle, monkeypatch):
    """ONNX Runtime's CUDA stands in as the CPU."""
    board(wrong=("key.0", 1.0))
    from smolvla_edge.runtime.engines import backend
    from smolvla_edge.runtime.policy import policy

    choice = backend.Choice(("tensorrt", "ort-cpu"), "device jetson: tensorrt, as asked")
    monkeypatch.setattr(policy, "choose_for", lambda *_: choice)
    reason = Policy.load(bundle, "jetson").graphs.reason
    assert reason.startswith(
        "ort-cpu, because tensorrt: self-check failed: key.0 is the first to differ"
    )


def test_the_memory_of_the_device_is_given_back(board, bundle):
    policy = load(bundle)
    chunks(policy)
    policy.graphs.close()
    assert sys.modules["cuda.bindings.runtime"]._memory == {}


def test_the_inspector_is_read_in_the_words_of_old_and_new_versions():
    layers = [
        {
            "Name": "a",
            "Inputs": [{"Format/Datatype": "Half"}],
            "Outputs": [{"Format/Datatype": "Float"}],
        },
        {
            "Inputs": [
                {"Format/Datatype": "Row major linear FP16 format"},
                {"Format/Datatype": "Float"},
            ]
        },
        {
            "Inputs": [
                {"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}
            ]
        },
        {"Inputs": [{"Format/Datatype": "Float"}]},
        {"Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]},
        "a layer of which only the name is told",
    ]
    assert count_precisions(json.dumps({"Layers": layers})) == {
        "float16": 2,
        "int8": 1,
        "float32": 1,
    }


@pytest.mark.parametrize(
    ("precision", "layers", "wrong"),
    [
        ("fp32", {"float32": 9}, ""),
        ("fp32", {"float32": 9, "float16": 1}, "it has 1 layers in float16, 9 layers in float32"),
        ("fp16", {"float32": 4, "float16": 5}, ""),
        ("fp16", {"float32": 9}, "it has 9 layers in float32"),
        ("int8", {"float32": 4, "float16": 5, "int8": 1}, ""),
        ("int8", {"float16": 5}, "it has 5 layers in float16"),
        ("int8", {}, ""),
    ],
)
def test_a_label_is_held_against_the_layers(precision, layers, wrong):
    assert trt.mislabelled(precision, layers) == wrong


def test_a_bundle_in_the_engines_record_is_for_people_only(board, bundle):
    """Engines belong to graphs: a copy of the bundle elsewhere uses them."""
    load(bundle)
    record = trt_engine_cache.engine_records()[0][1]
    assert record.bundle == str(bundle.folder)
    assert replace(record.key, graph_sha256="0").digest != record.key.digest


def test_a_build_imports_nothing_from_the_current_folder(board, bundle, monkeypatch, tmp_path):
    """A folder with a robot.toml can come from anywhere; the build process must not run it."""
    for name in ("serial", "json", "numpy", "tensorrt"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the local {name}.py ran')")
    monkeypatch.chdir(tmp_path)
    trt.TrtGraphs(bundle)
    assert len(trt_engine_cache.engine_records()) == 2
