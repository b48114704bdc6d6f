"""Shared fixtures: the golden cases, exported once per test run."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.faulty_arm import FaultyArm
from support.paths import DATA
from support.running import POSE, WILD

# Tests run beside each other: a second thread of torch would only wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
TORCH = find_spec("torch") is not None
# Without torch (make test-fast), the rooms that import it are left out.
NEED_TORCH = [
    "benchmarks",
    "docs",
    "export",
    "quantize",
    "runtime/engines/test_tensorrt_graph.py",
    "runtime/policy/test_audit.py",
    "runtime/policy/test_full.py",
    "runtime/policy/test_goldens.py",
    "test_install.py",
]
collect_ignore = [] if TORCH else NEED_TORCH


def pytest_report_header():
    if not TORCH:
        return "torch is not installed: tests of export, quantize and benchmarks are left out"
    return None


def pytest_collection_modifyitems(items):
    from smolvla_edge.core.board import has_vnni

    if not has_vnni():
        for item in items:
            if item.get_closest_marker("needs_vnni"):
                item.add_marker(pytest.mark.skip(reason="needs a CPU with VNNI"))


def export_tiny(checkpoint: Path, output: Path, precision: str, target: str) -> None:
    from smolvla_edge.core.progress import SILENT
    from smolvla_edge.export.checkpoint.checkpoint import load_checkpoint
    from smolvla_edge.export.int8 import observations_for
    from smolvla_edge.export.writer import write_bundle

    loaded = load_checkpoint(str(checkpoint))
    data = observations_for(loaded, "synthetic", 8, SILENT) if precision == "int8" else None
    write_bundle(loaded, output, precision, target=target, calibration=data)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A run in the background of a shell inherits an ignored SIGINT, and so would every process it
    starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory):
    """Nothing a test derives from a bundle or logs lands in the user's folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def export_case(tmp_path_factory, worker_id):
    """(case, precision, target) -> the folder of its bundle, exported on first use by any
    worker."""
    if not TORCH:
        pytest.skip("an export needs torch")
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent  # of all workers of this run
    shared = shared / "exported"
    shared.mkdir(exist_ok=True)

    def export(name: str, precision: str, target: str = "portable") -> Path:
        output = shared / "-".join((name, precision, target))
        with (shared / f"{output.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not output.exists():
                export_tiny(DATA / name / "checkpoint", output, precision, target)
        return output

    return export


@pytest.fixture
def tiny_bundle(export_case, tmp_path):
    """A private copy of the tiny fp32 bundle, to be damaged at will."""
    copy = tmp_path / "bundle"
    shutil.copytree(export_case("tiny", "fp32"), copy)
    for path in (copy, *copy.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """A private copy of the tiny checkpoint, to be damaged at will."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(DATA / "tiny" / "checkpoint", copy)
    return copy


@pytest.fixture(scope="session")
def oldest_python():
    """A Python 3.10 interpreter: what the lean runtime must run on."""
    candidates = ["python3.10"]
    # Version managers keep interpreters side by side: look beside the one that runs the tests.
    candidates += [
        str(p) for p in sorted(Path(sys.base_prefix).parent.glob("*3.10*/bin/python3.10"))
    ]
    for candidate in candidates:
        try:
            subprocess.run([candidate, "-c", ""], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    message = "needs a python3.10 on the PATH or beside the Python that runs the tests"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def bare_arm():
    """A virtual arm without cameras, for `virtual`."""
    with FaultyArm(cameras=()) as arm:
        yield arm


@pytest.fixture
def virtual(bare_arm):
    """A virtual arm without cameras, as new, in mid-range."""
    bare_arm.reset()
    return bare_arm


@pytest.fixture(scope="module")
def arm():
    """A virtual arm with two cameras, where the tiny policy expects it."""
    with FaultyArm(cameras=("front", "wrist"), width=160, height=120, pose=POSE) as virtual:
        yield virtual


@pytest.fixture
def fresh(arm, tmp_path):
    """The arm as new, its calibration as a file, and settings that let the random policy have its
    way."""
    arm.reset()
    arm.calibration.save(tmp_path / "my_arm.json")
    (tmp_path / "robot.toml").write_text(WILD)
    return arm


@pytest.fixture
def start(tmp_path):
    """Starts a line without waiting for it; whatever is still running at the end of the test is
    killed."""
    started = []

    def popen(line, **options):
        started.append(
            subprocess.Popen(
                line,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                **options,
            )
        )
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()
