"""One run of an arm: check everything, open, warm up while it is limp, and only then energise and loop.

This is where the runtime meets the devices; nothing else of the runtime knows them.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..devices.calibration import JOINT_NAMES, Calibration, load_calibration
from ..devices.camera import Camera, open_camera
from ..devices.errors import DeviceError
from ..devices.motion import MotionLimits
from ..devices.so101 import SO101
from ..devices.units import Units
from ..devices.virtual_arm import VirtualArm
from . import settings
from .bundle import Bundle, Manifest
from .control import STALE_FRAME_S, Arm, ControlLoop, Log, Tick
from .errors import BackendError, BundleError, SafetyStop, SettingsError
from .inference import InferenceThread
from .ort import choose_provider
from .policy import Policy
from .report import latency_table
from .settings import Settings

SLOWEST_ARM_FPS = 5.0  # below, a real arm would stand still most of the time and creep in between


@dataclass(frozen=True)
class Plan:
    """A run of which everything that can be checked was checked, and nothing opened but the bundle's manifest."""

    settings: Settings
    bundle: Bundle
    units: Units
    limits: MotionLimits
    calibration: Calibration | None  # None: the virtual arm brings its own
    task: str
    fps: float


def drive(chosen: Settings) -> None:
    """Run until `seconds` are over, interrupted, or stopped; every motor is off afterwards.

    Raises SettingsError before anything is opened, DeviceError while the arm is brought up, SafetyStop later.
    """
    plan = check(chosen)
    manifest = plan.bundle.manifest
    print(f"loading {chosen.bundle} ({manifest.precision})", flush=True)
    policy = Policy.load(plan.bundle, chosen.device, realtime=True, seed=chosen.seed)
    print(policy.graphs.reason)
    policy.preprocessor.tokenizer.encode(plan.task)  # a task that does not fit is known before anything opens
    inference = InferenceThread(policy, plan.task, chosen.steps)
    with ExitStack() as stack:
        # Left in the reverse order: the arm is switched off first, the policy's thread is waited for last.
        inference.start()
        stack.callback(inference.stop)
        arm, cameras = stack.enter_context(_hardware(plan))
        chunk_s = _warm_up(policy, arm, cameras, plan)
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
            patience_s=max(30.0, 10 * chunk_s),
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


def check(chosen: Settings) -> Plan:
    """Raises one SettingsError with everything that is missing or wrong."""
    problems: list[str] = []
    bundle = units = limits = calibration = None
    try:
        choose_provider(chosen.device)
    except BackendError as e:
        problems.append(str(e))
    print(f"checking {chosen.bundle}", flush=True)  # the first time, every file is hashed
    try:
        bundle = Bundle.open(chosen.bundle)
    except BundleError as e:
        problems.append(str(e))
    try:
        units = Units(chosen.units) if chosen.units else None
    except ValueError:
        problems.append(f"units is {chosen.units!r}, expected degrees or range_m100_100")
    try:
        limits = _limits(chosen.limits)
    except (DeviceError, SettingsError) as e:
        problems.append(str(e))
    if chosen.simulated:
        units = units or Units.DEGREES
        ignored = [n for n in ("calibration", "cameras") if getattr(chosen, n)]
        if ignored:
            print(f"note: the virtual arm brings its own {' and '.join(ignored)}, yours are not used")
        if problems:
            raise SettingsError("; ".join(problems))
    else:
        if bundle is not None and (reasons := settings.refusals(bundle.manifest, JOINT_NAMES)):
            raise SettingsError(
                f"the bundle {chosen.bundle} must not move a real arm: {'; '.join(reasons)}. "
                "Run it on the virtual arm: --port sim"
            )
        if bundle is not None and units is not None and bundle.manifest.units not in (None, units.value):
            problems.append(f"units is {units.value}, but the bundle was trained in {bundle.manifest.units}")
        if chosen.calibration:
            try:
                calibration = load_calibration(chosen.calibration)
            except DeviceError as e:
                problems.append(str(e))
        settings.require_complete(chosen, bundle.manifest if bundle else None, problems)
    assert bundle is not None  # one that does not open is a problem above, and so are the next two
    assert units is not None
    assert limits is not None
    fps, reason = settings.choose_fps(chosen, bundle.manifest)
    if not chosen.simulated and fps < SLOWEST_ARM_FPS:
        raise SettingsError(f"{fps:g} fps is too slow for a real arm, expected at least {SLOWEST_ARM_FPS:g}")
    task = chosen.task or settings.EXAMPLE_TASK
    print(f"task: {task!r}, in {units.value}\n{reason}")
    return Plan(chosen, bundle, units, limits, calibration, task, fps)


def _limits(given: dict[str, float]) -> MotionLimits:
    """Limits of robot.toml. TOML gives every number as a float; ticks are counted in whole ones."""
    known = set(MotionLimits.__dataclass_fields__)
    if unknown := set(given) - known:
        raise SettingsError(f"unknown limits {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))})")
    whole: dict[str, Any] = {
        k: int(v) if k.endswith("_ticks") and float(v).is_integer() else v for k, v in given.items()
    }
    return MotionLimits(**whole)


@contextmanager
def _hardware(plan: Plan) -> Iterator[tuple[SO101, list[Camera]]]:
    """The arm, connected and checked but not energised, and its cameras; all closed on the way out."""
    names = [c.name for c in plan.bundle.manifest.cameras]
    with ExitStack() as stack:
        if plan.calibration is None:
            print("starting the virtual arm")
            virtual = stack.enter_context(VirtualArm(cameras=names))
            port, calibration, sources = virtual.port, virtual.calibration, virtual.camera_sources
        else:
            assert plan.settings.port is not None  # require_complete
            port, calibration, sources = plan.settings.port, plan.calibration, plan.settings.cameras
        # The arm first: if its motors are still on from a run that died, that is the thing to say.
        arm = SO101(port, calibration, plan.units, plan.limits, plan.fps)
        for warning in arm.connect():  # writes nothing
            print(f"warning: {warning}")
        stack.push(arm)  # leaving the context switches every servo off
        cameras = []
        for name in names:
            if Path(sources[name]).is_file() and not plan.settings.simulated:
                print(f"warning: camera '{name}' is a still picture ({sources[name]})")
            cameras.append(open_camera(name, sources[name]))
            stack.callback(cameras[-1].close)
        yield arm, cameras


def _warm_up(policy: Policy, arm: SO101, cameras: list[Camera], plan: Plan) -> float:
    """The first inference is slow and may fail: it happens while the arm is still limp, and is thrown away.

    -> seconds that a chunk takes, the first one left out.
    """
    print("warming up", flush=True)
    manifest = policy.manifest
    frames = {c.name: c.latest() for c in cameras}
    stale = [name for name, f in frames.items() if time.monotonic() - f.time_s > STALE_FRAME_S]
    if stale:
        raise SafetyStop(f"no new frame from camera {', '.join(stale)} for {STALE_FRAME_S:g} s: check the cable")
    images = {name: f.image for name, f in frames.items()}
    state = _fit(arm.read().position, manifest.state.dim)
    took = 0.0
    for _ in range(2):
        start = time.monotonic()
        chunk = policy.predict_chunk(images, state, plan.task, steps=plan.settings.steps)
        took = time.monotonic() - start
        if not np.isfinite(chunk).all():
            raise SafetyStop("the policy's first chunk is not finite: check the bundle with --self-check")
    lasts = manifest.sampling.n_action_steps / plan.fps
    print(f"a chunk takes {took:.2f} s and lasts {lasts:.2f} s; the arm holds while it waits for one")
    return took


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


def _summary(log: Log, arm: SO101, plan: Plan) -> None:
    print(latency_table(log, 1 / plan.fps))
    c = arm.counts
    print(
        f"{c.accepted} goals sent: {c.clipped} clipped to the calibrated range, {c.slewed} slowed to the speed "
        f"limit, {c.rejected} rejected"
    )
