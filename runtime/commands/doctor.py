"""smolvla-doctor: what a run would find on this machine, and what would stop it. It looks and changes nothing.

Beside `--write-config`, which writes a new file, only the bundle's own cache of checked hashes is ever written.
"""

import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime
import typer

from ...core import command
from ...core.board import Board, read_board
from ...core.errors import BackendError, BundleError, CheckFailed, DeviceError, SettingsError
from ...core.files import write_whole
from ...core.gpu import Gpu, read_gpu
from ...devices.arm.calibration import JOINT_NAMES, Calibration, load_calibration
from ...devices.bus.port import find_port
from ...devices.cameras.camera_modes import Node, read_nodes
from ...devices.checkup import Finding, Status, cameras, machine, ports, servos
from ...devices.virtual.virtual_arm import VirtualArm
from ..budget.budget import measure, report
from ..budget.roofline import find_board
from ..bundle.bundle import Bundle
from ..bundle.manifest import Manifest
from ..engines.backend import BACKENDS, choose, choose_for, missing_for
from ..engines.engine_cache import engine_records
from ..policy.policy import Policy
from ..robot import settings
from ..robot.preflight import units_evidence
from ..robot.settings import Settings
from ..robot.settings_text import as_toml

ROBOT_TOML = Path("robot.toml")
OVERHEAD_BYTES = 700e6  # of a run beside weights and cache, measured on a CPU
BUILD_FACTOR = 2.5  # memory of a TensorRT build over the larger graph's weights: an estimate
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-python", "cuda-bindings")

app = command.new_app()


@app.command()
def doctor(
    bundle: str | None = typer.Option(None, help="Bundle folder.  [default: bundle]"),
    device: str | None = typer.Option(None, help="cpu, cuda, jetson or auto.  [default: auto]"),
    port: str | None = typer.Option(
        None, help="Serial port of the arm, auto, or sim: the virtual arm."
    ),
    budget: bool = typer.Option(
        False, "--budget", help="Can this bundle's chunk take 30 ms on this board?"
    ),
    board_name: str | None = typer.Option(
        None,
        "--board",
        metavar="NAME",
        help="The same of a named one, such as 'orin nano super', or all.",
    ),
    write_config: Path | None = typer.Option(
        None,
        metavar="PATH",
        help="Draft a robot.toml from what was found; never over a file that is there.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Look at the machine, the bundle, the cameras and the arm as a run would. Settings come from ./robot.toml where
    it is there; nothing is changed, and no servo is written to.

    Exit status: 0 nothing found that stops a run, 1 something would stop it, 2 something in the input is wrong.
    """
    if write_config is not None and write_config.exists():
        raise SettingsError(f"{write_config} is there already: give another name")
    findings = []
    stored = Settings()
    try:
        stored = settings.read_settings(ROBOT_TOML, required=False)
    except SettingsError as e:
        findings.append(Finding("settings", "stop", str(e)))
    chosen = settings.override(stored, bundle=bundle, device=device, port=port)
    if budget or board_name is not None:
        text, data = _budget(chosen, board_name)
        print(json.dumps(data, indent=1) if as_json else text)
        return
    board, gpu, nodes = read_board(), read_gpu(), read_nodes()
    more, drafted = examine(chosen, board, gpu, nodes)
    findings += more
    if as_json:
        print(json.dumps(_json(findings, board, gpu, nodes), indent=1))
    else:
        print("\n".join(map(_lines, findings)))
    if write_config is not None:
        if write_config.exists():  # by now
            raise SettingsError(f"{write_config} is there already: give another name")
        write_whole(write_config, drafted.encode())
        print(f"wrote {write_config}", file=sys.stderr)
    if stops := [f.area for f in findings if f.status == "stop"]:
        raise CheckFailed(
            f"{len(stops)} of these would stop a run: {', '.join(dict.fromkeys(stops))}"
        )


def _budget(chosen: Settings, board_name: str | None) -> tuple[str, dict[str, Any]]:
    """On a named board, on all, or on this one: then with a chunk measured, if its device can be had here."""
    bundle = Bundle.open(chosen.bundle)
    if board_name is not None:
        return report(bundle.manifest, None if board_name == "all" else board_name)
    board = read_board()
    if not board.jetson:
        raise SettingsError(
            "this is no Jetson: name one with --board, such as 'orin nano super', or all"
        )
    if chosen.device == "cpu" or chosen.backend == "ort-cpu":
        raise SettingsError(
            "the budget is of the board's GPU: leave out --device cpu and --backend ort-cpu"
        )
    fast = "super" in f"{board.name} {board.power_modes.get(board.power_mode or 0, '')}".lower()
    # Before a chunk is measured.
    name = find_board(board.module.split(" (")[0] + " Super" * fast, board.name).name
    policy = Policy.load(
        bundle, "jetson" if chosen.device == "auto" else chosen.device, backend=chosen.backend
    )
    print(policy.graphs.reason, file=sys.stderr)
    return report(bundle.manifest, name, measure(policy))


def examine(
    chosen: Settings, board: Board, gpu: Gpu, nodes: Sequence[Node]
) -> tuple[list[Finding], str]:
    """Everything but the settings' file; -> findings, and a robot.toml drafted from what was found."""
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
    text = f"{chosen.bundle}: {m.precision} for {m.target}, cameras {', '.join(c.name for c in m.cameras)}"
    found = [Finding("bundle", "ok", text)]
    if not chosen.simulated:
        status: Status = "stop" if chosen.port else "warning"
        reasons = settings.refusals(m, JOINT_NAMES)
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
        f"{_gb(board.available_bytes)} of {_gb(board.memory_bytes)} are available, {_gb(board.swap_bytes)} of swap "
        f"on disk{zram}"
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
        swap = "sudo fallocate -l 8G /swap && sudo chmod 600 /swap && sudo mkswap /swap && sudo swapon /swap"
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
    """Every TensorRT engine that this user keeps, and whether it fits this machine and was proved for `bundle`."""
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
    """-> findings, the port, and the calibration that is named or, without one, the saved one they hold."""
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
    """The text of a robot.toml; what was neither given nor found is a comment that says what is wanted."""
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
    # Which of two cameras is which, a machine cannot know.
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
    hints["fps"] = (settings.DEFAULT_FPS, "the rate of the training data")
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


def _lines(finding: Finding) -> str:
    text = finding.text + (f"\ndo: {finding.do}" if finding.do else "")
    return f"{finding.area:<10}{finding.status:<9}" + text.replace("\n", "\n" + " " * 19)


def _json(
    findings: Sequence[Finding], board: Board, gpu: Gpu, nodes: Sequence[Node]
) -> dict[str, Any]:
    facts = {"board": {**asdict(board), "processes": sorted(board.processes)}, "gpu": asdict(gpu)}
    lists = {
        "cameras": [asdict(node) for node in nodes],
        "findings": [asdict(finding) for finding in findings],
    }
    return {"format": "smolvla-edge-doctor", "version": 1, **facts, **lists}


def main() -> None:
    """Entry point of `smolvla-doctor`."""
    command.require_linux()
    command.run(app)
