"""What smolvla-doctor finds: bundle, memory, software, engines and arm, and a draft of robot.toml.

The checks of the hardware alone are in checkup.py.
"""

import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from ...core.board import Board, read_board
from ...core.errors import BackendError, BundleError, DeviceError, SettingsError
from ...core.gpu import Gpu, read_gpu
from ...devices.arm.calibration import JOINT_NAMES, Calibration, load_calibration
from ...devices.bus.port import find_port
from ...devices.cameras.camera_modes import Node, read_nodes
from ...devices.virtual.virtual_arm import VirtualArm
from ..budget.budget import measure, report
from ..budget.roofline import find_board
from ..bundle.bundle import Bundle
from ..bundle.manifest import Manifest
from ..engines.backend import BACKENDS, choose, choose_for, missing_for
from ..engines.trt_engine_cache import engine_records
from ..policy.policy import Policy
from . import settings
from .checked_run import DEFAULT_FPS
from .checkup import Finding, Status, cameras, machine, ports, servos
from .preflight import refusals, units_evidence
from .settings import Settings
from .settings_text import as_toml

OVERHEAD_BYTES = 700e6  # of a run beside weights and cache, measured on a CPU
BUILD_FACTOR = 2.5  # memory of a TensorRT build over the larger graph's weights: an estimate
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-python", "cuda-bindings")


@dataclass(frozen=True)
class MachineFacts:
    """What the machine tells before anything is opened."""

    board: Board
    gpu: Gpu
    video_nodes: Sequence[Node]


def read_machine() -> MachineFacts:
    """Read board, GPU and video nodes. Never raises."""
    return MachineFacts(read_board(), read_gpu(), read_nodes())


def budget(chosen: Settings, board_name: str | None) -> tuple[str, dict[str, Any]]:
    """The budget of a named board, of "all" boards, or of this one (None), as text and as data.

    On this board, a chunk is measured. Raises SettingsError if it is no Jetson.
    """
    bundle = Bundle.open(chosen.bundle)
    if board_name is not None:
        return report(bundle.manifest, None if board_name == "all" else board_name)
    board = read_board()
    if not board.jetson:
        raise SettingsError(
            "this is no Jetson: name a board with --board, such as 'orin nano super', or all"
        )
    if chosen.device == "cpu" or chosen.backend == "ort-cpu":
        raise SettingsError(
            "the budget is of the board's GPU: do not give --device cpu or --backend ort-cpu"
        )
    mode = board.power_modes.get(board.power_mode or 0, "")
    module = board.module.split(" (")[0]
    if "super" in f"{board.name} {mode}".lower():
        module += " Super"
    name = find_board(module, board.name).name  # raises before a chunk is measured
    policy = Policy.load(
        bundle, "jetson" if chosen.device == "auto" else chosen.device, backend=chosen.backend
    )
    print(policy.graphs.reason, file=sys.stderr)
    return report(bundle.manifest, name, measure(policy))


def examine(chosen: Settings, facts: MachineFacts) -> tuple[list[Finding], str]:
    """Check everything except robot.toml itself. Returns the findings and a draft of robot.toml."""
    board, gpu, nodes = facts.board, facts.gpu, facts.video_nodes
    findings = list(machine(board))
    opened, about = _bundle(chosen)
    findings += about
    manifest = opened.manifest if opened else None
    engines = list(_engines(opened, gpu)) if opened else []
    findings += _memory(
        board,
        manifest,
        chosen.device == "jetson" or board.jetson,
        any(e.status == "ok" for e in engines),
    )
    findings += _software(opened, chosen, board, gpu)
    findings += engines
    findings += cameras(nodes, {} if chosen.simulated else chosen.cameras)
    findings += ports(board)
    about, port, calibration = _arm(chosen)
    findings += about
    return findings, draft(chosen, manifest, port, calibration, nodes)


def _bundle(chosen: Settings) -> tuple[Bundle | None, list[Finding]]:
    if chosen.bundle == Settings.bundle and not Path(chosen.bundle).exists():
        return None, [
            Finding(
                "bundle",
                "unknown",
                "none was named, and there is none in ./bundle",
                "--bundle FOLDER",
            )
        ]
    try:
        bundle = Bundle.open(chosen.bundle)
    except BundleError as e:
        return None, [Finding("bundle", "stop", str(e))]
    m = bundle.manifest
    names = ", ".join(c.name for c in m.cameras)
    text = f"{chosen.bundle}: {m.precision} for {m.target}, cameras {names}"
    found = [Finding("bundle", "ok", text)]
    if not chosen.simulated:
        status: Status = "stop" if chosen.port else "warning"
        reasons = refusals(m, JOINT_NAMES)
        found += [
            Finding("bundle", status, f"must not move a real arm: {r}", "--port sim")
            for r in reasons
        ]
    return bundle, found


def _memory(
    board: Board, manifest: Manifest | None, builds: bool, built: bool
) -> Iterator[Finding]:
    zram = f", {_gb(board.zram_bytes)} of zram, which is memory itself" if board.zram_bytes else ""
    has = (
        f"{_gb(board.available_bytes)} of {_gb(board.memory_bytes)} are available, "
        f"{_gb(board.swap_bytes)} of swap on disk{zram}"
    )
    if manifest is None:
        yield Finding("memory", "unknown", has)
        return
    graphs = [f.bytes for name, f in manifest.files.items() if name.endswith(".onnx.data")]
    needed = sum(graphs) + manifest.cache_bytes + OVERHEAD_BYTES
    text = f"{has}; a run needs about {_gb(needed)}: weights, cache and {_gb(OVERHEAD_BYTES)}"
    frees = "end other programs; a desktop ends with: sudo systemctl isolate multi-user.target"
    low = board.available_bytes < needed
    yield Finding("memory", "stop" if low else "ok", text, frees if low else "")
    if builds and manifest.target == "portable":
        needed = BUILD_FACTOR * max(graphs)
        low = board.available_bytes + board.swap_bytes < needed
        text = f"building TensorRT engines needs about {_gb(needed)}, swap counted: an estimate"
        swap = (
            "sudo fallocate -l 8G /swap && sudo chmod 600 /swap && sudo mkswap /swap && "
            "sudo swapon /swap"
        )
        status: Status = "ok" if not low else "warning" if built else "stop"
        yield Finding("memory", status, text, f"{frees}; or add swap: {swap}" if low else "")


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _software(bundle: Bundle | None, chosen: Settings, board: Board, gpu: Gpu) -> Iterator[Finding]:
    """GPU, CUDA, TensorRT, ONNX Runtime, and what each device lacks."""
    names = {
        "driver": board.driver,
        "its CUDA": gpu.cuda,
        "CUDA toolkit": board.cuda,
        "TensorRT": gpu.tensorrt,
    }
    versions = ", ".join(f"{name} {value or 'none'}" for name, value in names.items())
    yield Finding(
        "gpu",
        "ok" if gpu.name or not board.jetson else "warning",
        f"{gpu.name or 'no NVIDIA GPU'}, {versions}",
    )
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    packages = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    yield Finding(
        "python", "ok", f"{packages}; providers {', '.join(onnxruntime.get_available_providers())}"
    )
    for backend in BACKENDS["jetson"]:
        missing = missing_for(backend)
        text = f"{backend} needs {missing}" if missing else f"{backend} would be tried"
        yield Finding("backend", "warning" if missing and gpu.name else "ok", text)
    asked = chosen.device, chosen.backend
    try:
        yield Finding(
            "device", "ok", (choose_for(bundle, *asked) if bundle else choose(*asked)).reason
        )
    except BackendError as e:
        yield Finding("device", "stop", str(e))


def _engines(bundle: Bundle, gpu: Gpu) -> Iterator[Finding]:
    """Every cached TensorRT engine: does it fit this machine, has it passed for `bundle`?"""
    for folder, record in engine_records():
        if isinstance(record, str):
            made, problem = "an engine that", record
        else:
            key, proof = record.key, record.proved.get(bundle.digest)
            made = f"{key.graph} in {key.precision} for {key.gpu} with TensorRT {key.tensorrt}"
            problem = ""
            if gpu.name and not key.gpu.startswith(gpu.name):
                problem = f"was built on another machine, this GPU is {gpu.name}"
            elif gpu.tensorrt and not key.tensorrt.startswith(gpu.tensorrt):
                problem = f"was built with another TensorRT, here is {gpu.tensorrt}"
            else:
                layers = (
                    ", ".join(f"{n} {dtype}" for dtype, n in sorted(record.layers.items()))
                    or "not told"
                )
                passed = (
                    f"passed, actions within {proof['actions']:.1e}"
                    if proof
                    else "not done for this bundle yet"
                )
                yield Finding(
                    "engines", "ok", f"{folder}: {made}; layers: {layers}; self-check: {passed}"
                )
        if problem:
            do = f"rm -r {folder}: an engine is built again when it is needed"
            yield Finding("engines", "warning", f"{folder}: {made} {problem}", do)


def _arm(chosen: Settings) -> tuple[list[Finding], str | None, Calibration | None]:
    """Returns findings, the port, and the calibration.

    The calibration is the named one, else the saved one that the servos hold.
    """
    if chosen.simulated:
        with VirtualArm(cameras=()) as virtual:
            return servos(virtual.port, virtual.calibration)[0], settings.SIM, None
    calibration, port, found = None, chosen.port, []
    if chosen.calibration:
        try:
            calibration = load_calibration(chosen.calibration)
        except DeviceError as e:
            found.append(Finding("servos", "stop", str(e)))
    if port is None or port == settings.AUTO:
        try:
            port, _ = find_port()
        except DeviceError as e:
            return (
                [*found, Finding("servos", "stop" if port else "unknown", str(e))],
                None,
                calibration,
            )
    more, held = servos(port, calibration)
    return found + more, port, held


def draft(
    chosen: Settings,
    manifest: Manifest | None,
    port: str | None,
    calibration: Calibration | None,
    nodes: Sequence[Node],
) -> str:
    """The text of a robot.toml. A value that was neither given nor found is a comment."""
    units = chosen.units or (manifest and manifest.units)
    if manifest and not units:
        seen, _ = units_evidence(
            (manifest.state.normalization, manifest.action.normalization), JOINT_NAMES
        )
        units = seen if seen in ("degrees", "range_m100_100") else None
    held = None if calibration is None else str(Path(calibration.source).absolute())
    free = [
        node.link for node in nodes if not node.problem and node.link not in chosen.cameras.values()
    ]
    names = [c.name for c in manifest.cameras] if manifest else list(chosen.cameras) or ["front"]
    missing = [name for name in names if name not in chosen.cameras]
    # With two cameras and two sources, only a person knows which is which.
    found = {missing[0]: free[0]} if len(missing) == len(free) == 1 else {}
    values = {
        "port": port,
        "units": units,
        "calibration": chosen.calibration or held,
        "task": chosen.task,
        "fps": chosen.fps or (manifest.fps if manifest else None),
    }
    hints: dict[str, tuple[Any, str]] = {
        name: (description.example, description.needed)
        for name, description in settings.descriptions().items()
    }
    hints["bundle"] = ("bundle", "none was found")
    hints["fps"] = (DEFAULT_FPS, "the rate of the training data")
    unknown = [name for name, value in values.items() if value is None]
    if manifest is None:
        unknown.append("bundle")
    source = f"found: {', '.join(free) or 'none'}"
    return as_toml(
        settings.override(chosen, **values, cameras=found),
        {
            "": {name: hints[name] for name in unknown},
            "cameras": {n: ("/dev/video0", source) for n in missing if n not in found},
        },
    )
