"""The CUDA path without a GPU: a stand-in for ONNX Runtime's CUDA provider.

It records the calls to ONNX Runtime and hands them to real sessions on the CPU.
"""

import gc
import threading
import weakref
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest

from smolvla_edge.core.errors import BackendError, CheckFailed
from smolvla_edge.runtime import Bundle, Policy
from smolvla_edge.runtime.engines.ort import OrtGraphs

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TASK = "Pick up the red cube."


class StandIn:
    """onnxruntime.InferenceSession as it would be with `providers`, computing on the CPU."""

    made: ClassVar[list["StandIn"]] = []
    refuse = ""  # "load" or "run": where CUDA graphs fail

    def __init__(self, path, options, providers, enable_fallback):
        self.providers, self.runs = providers, []  # a run: (graph id, binding, thread)
        self.made.append(self)
        assert enable_fallback == 0, (
            "ONNX Runtime must not choose other providers or options by itself"
        )
        self.captures = dict(providers).get(CUDA, {}).get("enable_cuda_graph") == "1"
        if self.captures and self.refuse == "load":
            raise RuntimeError("This session cannot use the CUDA Graph feature")
        self._real = RealSession(path, options, providers=[CPU])

    def __getattr__(self, name):
        return getattr(self._real, name)

    def get_providers(self):
        return [name for name, _ in self.providers]

    def run_with_iobinding(self, binding, options=None):
        if self.captures and self.refuse == "run":
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        graph_id = options.get_run_config_entry("gpu_graph_id") if options else ""
        self.runs.append((graph_id, id(binding), threading.current_thread().name))
        self._real.run_with_iobinding(binding)


RealSession = onnxruntime.InferenceSession


class Alive:
    """Sessions that something still references, and the largest number there ever was."""

    def __init__(self):
        self.sessions, self.most = weakref.WeakSet(), 0

    def append(self, session):
        self.sessions.add(session)
        self.most = max(self.most, len(self.sessions))


@pytest.fixture
def alive(cuda, monkeypatch):
    """Counts sessions; the collector of reference cycles is off: memory must not wait for it."""
    counted = Alive()
    monkeypatch.setattr(cuda, "made", counted)
    gc.disable()
    yield counted
    gc.enable()


@pytest.fixture
def cuda(export_case, monkeypatch):
    """ONNX Runtime as on a machine with an NVIDIA GPU; the tiny bundle is exported before."""
    export_case("tiny", "fp32")
    on_cpu = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(
        onnxruntime.OrtValue, "ortvalue_from_numpy", lambda array, device, index: on_cpu(array)
    )
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", StandIn)
    monkeypatch.setattr("smolvla_edge.runtime.engines.backend._loads", lambda _: True)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn


def chunk_of(policy, tasks=(TASK,)):
    images = {c.name: np.full((48, 64, 3), 99, np.uint8) for c in policy.manifest.cameras}
    noise = np.ones(
        (1, policy.manifest.sampling.chunk_size, policy.manifest.action.padded), np.float32
    )
    state = np.zeros(policy.manifest.state.dim, np.float32)
    return [policy.predict_chunk(images, state, task, noise, steps=3) for task in tasks]


def test_each_binding_is_a_cuda_graph_of_its_own_and_all_run_in_one_thread(cuda, export_case):
    policy = Policy.load(export_case("tiny", "fp32"), device="cuda")
    assert policy.graphs.reason.startswith("device cuda: ort-cuda, as asked (ONNX Runtime ")
    assert (
        ", replayed as CUDA graphs, self-check passed with actions within " in policy.graphs.reason
    )
    prefix, expert, camera = cuda.made
    for session, captured in ((prefix, "1"), (expert, "1"), (camera, "0")):
        assert session.providers == [
            (CUDA, {"use_tf32": "0", "enable_cuda_graph": captured}),
            (CPU, {}),
        ]
    for session in cuda.made:
        session.runs.clear()  # loading captures and proves
    chunks = []
    other = threading.Thread(target=lambda: chunks.extend(chunk_of(policy)))
    other.start()
    other.join()
    chunks += chunk_of(policy)
    assert [run[0] for run in prefix.runs] == ["1"] * 2
    assert [run[0] for run in expert.runs] == ["1", "2", "1"] * 2
    assert len(camera.runs) == 2 * len(policy.manifest.cameras)
    assert len({run[:2] for run in expert.runs}) == 2, (
        "a graph is only ever replayed with the binding it was captured on"
    )
    assert {run[2] for run in (*camera.runs, *prefix.runs, *expert.runs)} == {"cuda"}
    plain = chunk_of(Policy.load(export_case("tiny", "fp32"), device="cpu"))
    assert np.array_equal(chunks[0], chunks[1])
    assert np.abs(chunks[0] - plain[0]).max() < 1e-3  # frames are resized on the device


@pytest.mark.parametrize(
    ("where", "why"), [("load", "cannot use the CUDA Graph feature"), ("run", "CUDA failure 900")]
)
def test_where_capture_fails_it_runs_without_and_says_why(
    cuda, export_case, monkeypatch, where, why
):
    monkeypatch.setattr(cuda, "refuse", where)
    policy = Policy.load(export_case("tiny", "fp32"), device="cuda")
    assert ", without CUDA graphs (ONNX Runtime " in policy.graphs.reason
    assert why in policy.graphs.reason
    prefix, expert, _ = cuda.made[-3:]
    prefix.runs.clear()
    assert (
        prefix.providers
        == expert.providers
        == [(CUDA, {"use_tf32": "0", "enable_cuda_graph": "0"}), (CPU, {})]
    )
    chunk_of(policy)
    assert [run[2] for run in prefix.runs] == ["MainThread"]
    wait_for_no_cuda_thread()


@pytest.mark.parametrize("where", ["load", "run"])
def test_after_a_failed_capture_the_weights_are_never_in_memory_twice(
    cuda, alive, export_case, monkeypatch, where
):
    monkeypatch.setattr(cuda, "refuse", where)
    graphs = OrtGraphs(Bundle.open(export_case("tiny", "fp32")), "ort-cuda")
    assert "without CUDA graphs" in graphs.reason
    assert (len(alive.sessions), alive.most) == (3, 3)


def test_closing_frees_every_session_and_ends_the_thread(cuda, alive, export_case):
    policy = Policy.load(export_case("tiny", "fp32"), device="cuda")
    assert len(alive.sessions) == 3
    policy.graphs.close()
    assert len(alive.sessions) == 0
    assert "cuda" not in [t.name for t in threading.enumerate()]


def test_a_backend_that_fails_leaves_no_session_to_the_next(cuda, alive, export_case, monkeypatch):
    def fail(self, binding, options=None):
        if not self.captures and self.get_providers()[0] == CUDA:
            raise RuntimeError("CUDA failure 2: out of memory")
        run(self, binding, options)

    run = cuda.run_with_iobinding
    monkeypatch.setattr(cuda, "run_with_iobinding", fail)  # camera.onnx is not captured
    monkeypatch.setattr(cuda, "refuse", "run")
    policy = Policy.load(export_case("tiny", "fp32"), device="auto")
    assert policy.graphs.reason.startswith("ort-cpu, because ort-cuda: ONNX Runtime failed to run")
    assert (len(alive.sessions), alive.most) == (2, 3)


def test_a_profile_is_of_single_runs_without_cuda_graphs(cuda, export_case, tmp_path):
    graphs = OrtGraphs(Bundle.open(export_case("tiny", "fp32")), "ort-cuda", profile=tmp_path)
    assert "CUDA graphs" not in graphs.reason
    assert [s.providers[0][1]["enable_cuda_graph"] for s in cuda.made] == ["0", "0", "0"]


def test_a_backend_that_computes_something_else_is_refused(cuda, export_case, monkeypatch):
    def wrong(self, binding, options):
        self._real.run_with_iobinding(binding)
        if len(binding.get_outputs()) > 2:  # the prefix
            key = binding.get_outputs()[2].numpy()
            key += 1

    monkeypatch.setattr(cuda, "run_with_iobinding", wrong)
    with pytest.raises(
        CheckFailed, match=r"self-check failed: (key|value).\d is the first to differ"
    ):
        Policy.load(export_case("tiny", "fp32"), device="cuda")


def test_a_device_that_resizes_otherwise_than_the_host_is_refused(cuda, export_case, monkeypatch):
    policy = Policy.load(export_case("tiny", "fp32"), device="cuda")
    monkeypatch.setattr(
        "smolvla_edge.runtime.engines.resizing.resize_with_pad", lambda frame, size: np.zeros(1)
    )
    for _ in range(2):
        with pytest.raises(BackendError, match="resizes frames of 64 x 48 otherwise than the host"):
            chunk_of(policy)


def test_the_thread_ends_with_the_policy(cuda, export_case):
    policy = Policy.load(export_case("tiny", "fp32"), device="cuda")
    assert "cuda" in [t.name for t in threading.enumerate()]
    del policy
    gc.collect()
    wait_for_no_cuda_thread()


def wait_for_no_cuda_thread():
    for thread in threading.enumerate():
        if thread.name == "cuda":
            thread.join(5.0)
            assert not thread.is_alive()
