"""The public API: what it answers, and what it refuses before anything runs."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from smolvla_edge.runtime import BackendError, InputError, Policy, RealTimeChunking
from smolvla_edge.runtime.engines.backend import Choice, choose
from support.goldens import Golden
from support.paths import DATA


@pytest.fixture(scope="module")
def golden():
    return Golden(DATA / "tiny")


@pytest.fixture(scope="module")
def policy(export_case):
    return Policy.load(export_case("tiny", "fp32"), device="cpu")


@pytest.fixture
def observation(golden):
    return {"images": dict(golden.images), "state": golden.state.copy(), "task": golden.task}


def test_a_chunk_holds_every_row_in_robot_units(policy, observation):
    chunk = policy.predict_chunk(**observation)
    assert chunk.shape == (50, 6)
    assert chunk.dtype == np.float32
    assert np.isfinite(chunk).all()
    assert policy.timing.prefix_ms > 0


def test_a_seed_makes_chunks_repeatable(export_case, observation):
    folder = export_case("tiny", "fp32")
    a, b, c = (
        Policy.load(folder, device="cpu", seed=s).predict_chunk(**observation) for s in (1, 1, 2)
    )
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_an_odd_number_of_steps_returns_the_last_buffer(policy, observation, golden):
    steps = [policy.predict_chunk(**observation, noise=golden.noise, steps=n) for n in (9, 10)]
    assert not np.array_equal(*steps)
    again = policy.predict_chunk(**observation, noise=golden.noise, steps=9)
    assert np.array_equal(steps[0], again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o["images"].pop("wrist"), "camera 'wrist' is missing"),
        (lambda o: o["images"].update(side=o["images"]["front"]), "camera 'side' is unknown"),
        (
            lambda o: o["images"].update(empty_camera_0=o["images"]["front"]),
            "'empty_camera_0' is unknown",
        ),
        (
            lambda o: o["images"].update(front=o["images"]["front"] / 255.0),
            "float64, expected uint8",
        ),
        (
            lambda o: o["images"].update(front=o["images"]["front"][..., 0]),
            "expected \\[height, width, 3\\]",
        ),
        (lambda o: o["images"].update(front=None), "NoneType, expected uint8"),
        (lambda o: o["images"].update(front=np.zeros((1, 5000, 3), np.uint8)), "too narrow"),
        (lambda o: o.update(state=o["state"][:5]), "state has shape \\(5,\\), expected \\(6,\\)"),
        (lambda o: o.update(state=o["state"].astype(int)), "state is int64, expected a float"),
        (lambda o: o["state"].__setitem__(2, np.nan), "state is not finite"),
        (lambda o: o.update(state=[1.0] * 6), "state is list"),
        (lambda o: o.update(state=np.full(6, 1e300)), "state is not finite"),
        (lambda o: o.update(task=""), "the task is ''"),
        (lambda o: o.update(task=None), "the task is None"),
        (lambda o: o.update(task="pick the cube " * 40), "tokens long, this bundle takes 48"),
        (lambda o: o.update(noise=np.zeros((1, 50, 6), np.float32)), "noise has shape"),
        (lambda o: o.update(noise=np.full((1, 50, 32), np.inf, np.float32)), "noise is not finite"),
        (lambda o: o.update(steps=0), "steps is 0"),
        (lambda o: o.update(steps=2.5), "steps is 2.5"),
        (lambda o: o.update(delay=-1), "delay is -1"),
        (lambda o: o.update(prev_chunk=np.zeros((60, 6), np.float32)), "prev_chunk has shape"),
        (lambda o: o.update(prev_chunk=np.zeros((0, 6), np.float32)), "prev_chunk has shape"),
        (lambda o: o.update(prev_chunk=np.zeros((10, 6))), "prev_chunk is float64"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused_before_anything_runs(
    policy, observation, change, message
):
    change(observation)
    ran = []
    prefill = policy.graphs.prefill
    policy.graphs.prefill = lambda feeds: ran.append(1) or prefill(feeds)
    try:
        with pytest.raises(InputError, match=message):
            policy.predict_chunk(**observation)
    finally:
        policy.graphs.prefill = prefill
    assert ran == []


def test_all_problems_of_an_observation_are_named_at_once(policy, observation):
    observation["images"].pop("front")
    observation["state"][0] = np.inf
    with pytest.raises(InputError, match=r"camera 'front' is missing; state is not finite"):
        policy.predict_chunk(**observation)


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def everything(_):
    return True


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with such providers of ONNX Runtime and such shared libraries."""

    def make(*providers, loads=everything):
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: list(providers))
        monkeypatch.setattr("smolvla_edge.runtime.engines.backend._loads", loads)

    return make


def test_jetson_without_tensorrt_says_what_each_backend_needs_and_what_to_use(machine):
    machine(CPU, loads=lambda _: False)
    needs = r"tensorrt needs .*module tensorrt .*; ort-cuda needs .*libcuda.*"
    with pytest.raises(BackendError, match=rf"device jetson is not available: {needs}--device cpu"):
        choose("jetson")
    machine(CUDA, CPU)
    with pytest.raises(BackendError, match=r"backend tensorrt is not available: .*--device cuda"):
        choose(backend="tensorrt")


def test_a_device_is_the_first_backend_that_can_run_and_says_why_the_others_cannot(machine):
    machine(CUDA, CPU)
    choice = choose("jetson")
    assert choice.backends == ("ort-cuda",)
    assert choice.reason.startswith(
        "device jetson: ort-cuda, because tensorrt needs the Python module tensorrt ("
    )
    assert choose("cuda") == Choice(("ort-cuda",), "device cuda: ort-cuda, as asked")
    assert choose("cuda", "ort-cpu").backends == ("ort-cpu",)


def test_cuda_without_a_driver_is_refused_before_anything_is_loaded(machine):
    machine(CUDA, CPU, loads=lambda _: False)
    with pytest.raises(BackendError, match=r"needs the NVIDIA driver .* use --device cpu"):
        choose("cuda")


def test_automatic_choices_give_their_reason(machine):
    machine(CPU)
    choice = choose()
    assert choice.backends == ("ort-cpu",)
    assert choice.reason.startswith(
        "device auto: ort-cpu, because ort-cuda needs ONNX Runtime's CUDAExecutionProvider"
    )
    machine(CUDA, CPU, loads=lambda _: False)
    assert "libcuda.so.1" in choose().reason
    machine(CUDA, CPU)
    assert choose().reason == "device auto: ort-cuda, it is available"


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        ("tpu", None, "unknown device 'tpu', expected auto, cpu, cuda, jetson"),
        ("auto", "onnx", "unknown backend 'onnx', expected tensorrt, ort-cuda, ort-cpu"),
        ("cpu", "ort-cuda", "backend ort-cuda does not run on the device cpu"),
    ],
)
def test_unknown_devices_and_backends_are_refused(device, backend, message):
    with pytest.raises(BackendError, match=message):
        choose(device, backend)


def test_a_bundle_for_the_cpu_stays_there_and_names_the_command_for_a_gpu(export_case, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr("smolvla_edge.runtime.engines.backend._loads", everything)
    folder = export_case("tiny", "fp32", "cpu")
    command = (
        f"smolvla-export {DATA}/tiny/checkpoint --precision fp32 --target portable "
        f"--output {folder} --force"
    )
    with pytest.raises(BackendError, match=f"target cpu.*ort-cuda does not have.*{command}"):
        Policy.load(folder, device="cuda")
    reason = Policy.load(folder).graphs.reason
    assert reason.startswith(
        f"device auto: ort-cpu, which is the bundle's target. For a GPU: {command}"
    )


def test_a_portable_bundle_on_a_cpu_hints_at_the_faster_target(policy, export_case):
    hint = ". On a CPU a bundle with --target cpu is faster"
    assert (
        policy.graphs.reason
        == f"device cpu: ort-cpu, as asked{hint} (ONNX Runtime {onnxruntime.__version__})"
    )
    same = Policy.load(export_case("tiny", "fp32", "cpu"), device="cpu")
    assert (
        same.graphs.reason
        == f"device cpu: ort-cpu, as asked (ONNX Runtime {onnxruntime.__version__})"
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("zeros", [1, 1, 0, 0, 0, 0]),
        ("ones", [1, 1, 1, 1, 1, 0]),
        ("linear", [1, 1, 0.75, 0.5, 0.25, 0]),
        ("exp", [1, 1, 0.75 * np.expm1(0.75) / (np.e - 1), 0.5 * np.expm1(0.5) / (np.e - 1),
                 0.25 * np.expm1(0.25) / (np.e - 1), 0]),
    ],
)  # fmt: skip
def test_real_time_chunking_weights_follow_the_schedule(schedule, expected):
    weights = RealTimeChunking(schedule, execution_horizon=5).prefix_weights(
        delay=2, tail=20, chunk=6
    )
    assert np.allclose(weights, expected)


def test_the_horizon_of_real_time_chunking_ends_with_the_tail():
    weights = RealTimeChunking("ones", execution_horizon=10).prefix_weights(
        delay=0, tail=3, chunk=6
    )
    assert weights.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "cubic"},
        {"execution_horizon": 0},
        {"max_guidance_weight": 0.0},
        {"max_guidance_weight": float("inf")},
        {"execution_horizon": 2.5},
    ],
)
def test_wrong_real_time_chunking_settings_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        RealTimeChunking(**wrong)


def test_predicting_loads_neither_torch_nor_transformers_nor_onnx(export_case):
    code = """
import sys, numpy as np
from smolvla_edge.runtime import Policy
policy = Policy.load(sys.argv[1], device="cpu")
images = {c.name: np.zeros((48, 64, 3), np.uint8) for c in policy.manifest.cameras}
policy.predict_chunk(images, np.zeros(6, np.float32), "Pick up the red cube.")
heavy = {"torch", "transformers", "onnx", "onnxscript", "safetensors"} & sys.modules.keys()
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code, str(export_case("tiny", "fp32"))], check=True)


def test_a_cpu_loads_no_code_for_tensorrt_or_cuda(export_case):
    code = """
import sys
from smolvla_edge.runtime import Policy
engines = "smolvla_edge.runtime.engines."
gpu = {engines + name for name in ("trt", "trt_engine", "trt_engine_cache", "cuda")} | {"tensorrt", "cuda"}
assert not gpu & sys.modules.keys(), "after the import"
Policy.load(sys.argv[1], device="cpu")
assert not gpu & sys.modules.keys(), "after the load"
"""
    subprocess.run([sys.executable, "-c", code, str(export_case("tiny", "fp32"))], check=True)
