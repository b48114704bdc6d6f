"""smolvla-run: a bundle drives an arm."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from ..devices.calibration import JOINT_NAMES, load_calibration
from ..devices.camera import Camera, open_camera
from ..devices.errors import DeviceError
from ..devices.motion import MotionLimits
from ..devices.so101 import SO101
from ..devices.units import Units
from ..devices.virtual_arm import VirtualArm
from . import command, settings
from .bundle import Bundle, Manifest
from .control import Arm, ControlLoop, Log, Tick
from .errors import BackendError, BundleError, SafetyStop, SettingsError, SmolVLAError
from .inference import InferenceThread
from .ort import choose_provider
from .policy import Policy
from .report import latency_table
from .selfcheck import TOLERANCE, run_selfcheck
from .settings import Settings

app = command.new_app()
_SIM_TASK = "Pick up the red cube and place it on the plate."


@app.command()
def run(
    bundle: str | None = typer.Option(None, help="Bundle folder.  [default: bundle]"),
    device: str | None = typer.Option(None, help="auto, cpu, cuda or jetson.  [default: auto]"),
    port: str | None = typer.Option(None, help="Serial port of the arm, or sim for the virtual arm."),
    units: str | None = typer.Option(None, help="degrees or range_m100_100, as the policy was trained."),
    calibration: str | None = typer.Option(None, help="LeRobot calibration file, or the id of one."),
    camera: list[str] | None = typer.Option(None, help="NAME=SOURCE, once for each camera of the bundle."),
    task: str | None = typer.Option(None, help="The instruction."),
    seconds: float | None = typer.Option(None, help="Stop so long after the first action.  [default: Ctrl-C]"),
    fps: float | None = typer.Option(None, help="Control rate.  [default: the training data's, else 30]"),
    steps: int | None = typer.Option(None, help="Denoise steps.  [default: the checkpoint's]"),
    seed: int | None = typer.Option(None, help="Seed of the noise.  [default: random]"),
    config: Path = typer.Option(Path("robot.toml"), help="Deployment settings; flags override them."),
    self_check: bool = typer.Option(False, "--self-check", help="Check the bundle on this device and leave."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Drive an SO-101 arm, or the virtual one, with an exported SmolVLA.

    Exit status: 0 done, 1 a check failed or a safety stop, 2 something in the input is wrong, 130 interrupted.
    The stop of a real arm is its power switch, not this program.
    """
    stored = settings.read_settings(config, required=config != Path("robot.toml"))
    chosen = settings.override(
        stored,
        bundle=bundle,
        device=device,
        port=port,
        units=units,
        calibration=calibration,
        task=task,
        seconds=seconds,
        fps=fps,
        steps=steps,
        seed=seed,
        cameras=stored.cameras | settings.parse_cameras(camera or []),
    )
    chosen.check_values()
    if self_check:
        _self_check(chosen)
    else:
        _run(chosen)


def _self_check(chosen: Settings) -> None:
    policy = Policy.load(chosen.bundle, chosen.device)
    limit = TOLERANCE[policy.manifest.precision]
    print(policy.graphs.reason)
    errors = run_selfcheck(policy)
    for stage, value in errors.items():
        print(f"{stage:<8} {value:.2e}  (at most {limit:.0e})")
    if over := [stage for stage, value in errors.items() if not value <= limit]:
        raise SafetyStop(f"the bundle does not compute here what its checkpoint computes: {', '.join(over)}")


@dataclass(frozen=True)
class _Plan:
    """Everything checked, nothing opened."""

    units: Units
    limits: MotionLimits
    task: str
    fps: float


def _run(chosen: Settings) -> None:
    """Check everything that can be checked, then open, then warm up, and only then energise."""
    plan, manifest = _check(chosen)
    command.terminate_like_interrupt()
    print(f"loading {chosen.bundle} ({manifest.precision})", flush=True)
    policy = Policy.load(chosen.bundle, chosen.device, realtime=True, seed=chosen.seed)
    print(policy.graphs.reason)
    policy.preprocessor.tokenizer.encode(plan.task)  # a task that does not fit is known before anything opens
    inference = InferenceThread(policy, plan.task, chosen.steps)
    with ExitStack() as stack:
        # Left in the reverse order: the arm is switched off first, the policy's thread is waited for last.
        inference.start()
        stack.callback(inference.stop)
        arm, cameras = stack.enter_context(_hardware(chosen, plan, manifest))
        _warm_up(policy, arm, cameras, plan, chosen)
        print("switching the motors on", flush=True)
        arm.enable()
        loop = ControlLoop(
            _fitted(arm, manifest),
            {c.name: c.latest for c in cameras},
            inference,
            fps=plan.fps,
            rows=manifest.sampling.n_action_steps,
            seconds=chosen.seconds,
            faults=(DeviceError,),
            watch=_Watcher(),
        )
        try:
            loop.run()
        finally:
            print("switching the motors off", flush=True)
            released = arm.release()
            _summary(loop.log, arm, plan)
        if released.unconfirmed:
            names = ", ".join(f"{name} ({why})" for name, why in released.unconfirmed.items())
            raise SafetyStop(f"these servos may still be energised, switch the power off: {names}")


def _check(chosen: Settings) -> tuple[_Plan, Manifest]:
    """Raises one SettingsError with everything that is missing or wrong."""
    problems, manifest = [], None
    try:
        choose_provider(chosen.device)
    except BackendError as e:
        problems.append(str(e))
    print(f"checking {chosen.bundle}", flush=True)  # the first time, every file is hashed
    try:
        manifest = Bundle.open(chosen.bundle).manifest
    except BundleError as e:
        problems.append(str(e))
    units, limits = Units.DEGREES, MotionLimits()
    try:
        units = Units(chosen.units or "degrees")
    except ValueError:
        problems.append(f"units is {chosen.units!r}, expected degrees or range_m100_100")
    known = set(MotionLimits.__dataclass_fields__)
    if unknown := set(chosen.limits) - known:
        problems.append(f"unknown limits {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))})")
    else:
        try:
            limits = MotionLimits(**_whole(chosen.limits))
        except DeviceError as e:
            problems.append(str(e))
    if chosen.simulated:
        if problems:
            raise SettingsError("; ".join(problems))
    else:
        settings.require_complete(chosen, manifest, problems)
    assert manifest is not None  # a bundle that does not open is a problem above
    if not chosen.simulated and (reasons := settings.refusals(manifest, JOINT_NAMES)):
        raise SettingsError(
            f"the bundle {chosen.bundle} must not move a real arm: {'; '.join(reasons)}. "
            "Run it on the virtual arm: --port sim"
        )
    fps, reason = settings.choose_fps(chosen, manifest)
    print(reason)
    return _Plan(units, limits, chosen.task or _SIM_TASK, fps), manifest


def _whole(limits: dict[str, float]) -> dict[str, Any]:
    """TOML reads every limit as a float; ticks are counted in whole ones."""
    return {k: int(v) if k.endswith("_ticks") and v == int(v) else v for k, v in limits.items()}


@contextmanager
def _hardware(chosen: Settings, plan: _Plan, manifest: Manifest) -> Iterator[tuple[SO101, list[Camera]]]:
    """The arm, connected and checked but not energised, and its cameras; all closed on the way out."""
    with ExitStack() as stack:
        names = [c.name for c in manifest.cameras]
        if chosen.simulated:
            print("starting the virtual arm")
            virtual = stack.enter_context(VirtualArm(cameras=names))
            port, calibration = virtual.port, virtual.calibration
            sources = dict(virtual.camera_sources) | chosen.cameras
        else:
            assert chosen.port is not None  # require_complete
            assert chosen.calibration is not None
            port, calibration = chosen.port, load_calibration(chosen.calibration)
            sources = chosen.cameras
        cameras = []
        for name in names:
            cameras.append(open_camera(name, sources[name]))
            stack.callback(cameras[-1].close)
        arm = SO101(port, calibration, plan.units, plan.limits, plan.fps)
        # connect() writes nothing; leaving the context switches every servo off.
        for warning in arm.connect():
            print(f"warning: {warning}")
        stack.push(arm)
        yield arm, cameras


def _warm_up(policy: Policy, arm: SO101, cameras: list[Camera], plan: _Plan, chosen: Settings) -> None:
    """The first inference is slow and may fail: it happens while the arm is still limp, and is thrown away."""
    print("warming up", flush=True)
    images = {c.name: c.latest().image for c in cameras}
    state = _fit(arm.read().position, policy.manifest.state.dim)
    start = time.monotonic()
    chunk = policy.predict_chunk(images, state, plan.task, steps=chosen.steps)
    took = time.monotonic() - start
    if not np.isfinite(chunk).all():
        raise SafetyStop("the policy's first chunk is not finite: check the bundle with --self-check")
    rows = policy.manifest.sampling.n_action_steps
    print(f"a chunk takes {took:.2f} s and lasts {rows / plan.fps:.2f} s; the arm holds while it waits for one")


@dataclass(frozen=True)
class _State:
    position: NDArray[np.float64]


class _PartialArm:
    """The virtual arm for a policy with other than six joints: it shows the first six, the rest stand still."""

    def __init__(self, arm: SO101, state_dim: int) -> None:
        self._arm, self._state_dim = arm, state_dim

    def read(self) -> _State:
        return _State(_fit(self._arm.read().position, self._state_dim))

    def send(self, target: NDArray[np.floating]) -> object:
        return self._arm.send(_fit(target, len(JOINT_NAMES)))

    def hold(self) -> object:
        return self._arm.hold()


def _fitted(arm: SO101, manifest: Manifest) -> Arm:
    if manifest.state.dim == manifest.action.dim == len(JOINT_NAMES):
        return arm
    print(f"note: the policy has {manifest.action.dim} joints, the virtual arm shows the first {len(JOINT_NAMES)}")
    return _PartialArm(arm, manifest.state.dim)


def _fit(vector: NDArray[Any], dim: int) -> NDArray[np.float64]:
    """`vector` cut or padded with zeros to `dim` values."""
    out = np.zeros(dim)
    out[: min(dim, len(vector))] = vector[:dim]
    return out


class _Watcher:
    """One line a second: where the arm is."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def __call__(self, tick: Tick) -> None:
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + 1.0
        joints = " ".join(f"{n}={v:7.1f}" for n, v in zip(JOINT_NAMES, tick.position, strict=False))
        doing = f"{tick.queued:3d} actions left" if tick.queued else "waiting for a chunk"
        print(f"{tick.elapsed_s:6.1f} s  {joints}  {doing}", flush=True)


def _summary(log: Log, arm: SO101, plan: _Plan) -> None:
    print(latency_table(log, 1 / plan.fps))
    c = arm.counts
    print(
        f"{c.accepted} goals sent: {c.clipped} clipped to the calibrated range, {c.slewed} slowed to the speed "
        f"limit, {c.rejected} rejected"
    )


def main() -> None:
    """Entry point of `smolvla-run`."""
    command.require_linux()
    command.run(app, mistakes=(SmolVLAError, DeviceError), failures=(SafetyStop,))
