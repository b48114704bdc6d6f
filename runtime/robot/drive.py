"""One run of an arm: open and check, warm up while it is limp, show where it would go, and only then energise.

This is where the runtime meets the devices; nothing else that runs knows both.
"""

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...core import command
from ...core.errors import DeviceError, SafetyStop, SettingsError
from ...devices.arm import eeprom
from ...devices.arm.calibration import JOINT_NAMES, Calibration
from ...devices.arm.guardian import Guardian, GuardianAction
from ...devices.arm.inspection import inspect
from ...devices.arm.motion import Emitted
from ...devices.arm.so101 import SO101
from ...devices.arm.telemetry import JointState
from ...devices.arm.units import degrees_per_unit, to_raw
from ...devices.bus.bus import FeetechBus
from ...devices.bus.sts3215 import MODEL_NUMBER, Register
from ...devices.cameras.camera import Camera
from ...devices.cameras.camera_watch import CameraWatch
from ...devices.cameras.sources import open_camera
from ...devices.virtual.virtual_arm import VIRTUAL_CALIBRATION, VirtualArm
from ..bundle.manifest import Manifest
from ..policy.policy import Policy
from . import recording
from . import summary as report
from .chunks import ChunkQueue, LatencyTracker
from .inference import InferenceThread
from .keys import HELP, Operator
from .loop import ControlLoop, Log, Rig
from .plan import Plan, check
from .preflight import preflight
from .settings import Settings

Mode = Literal["drive", "dry-run", "rehearse"]
REHEARSAL_S = 10.0
FIRST_PICTURES_S = 2.0
CONTROL_PRIORITY, POLICY_NICE = 10, 10


def drive(
    chosen: Settings, mode: Mode = "drive", *, far: bool = False, write_eeprom: bool = False
) -> Log:
    """Run until `seconds` are over, interrupted, or stopped; every motor is off afterwards.

    dry-run: leave after the preflight. rehearse: the whole loop with the motors off, and a report. Neither writes a
    goal. far: start although the preflight objects. write_eeprom: give the servos LeRobot's configuration first.
    -> what happened. Raises SettingsError before anything is opened, DeviceError while the arm is brought up,
    SafetyStop later.
    """
    plan = check(chosen)
    manifest = plan.bundle.manifest
    print(f"loading {chosen.bundle} ({manifest.precision})", flush=True)
    policy = Policy.load(
        plan.bundle, chosen.device, backend=chosen.backend, realtime=True, seed=chosen.seed
    )
    print(policy.graphs.reason)
    policy.preprocessor.tokenizer.encode(
        plan.task
    )  # a task that does not fit is known before anything opens
    inference = InferenceThread(policy, plan.task, chosen.steps or manifest.sampling.num_steps)
    with ExitStack() as stack:
        # Left in the reverse order: the arm is switched off first, the policy's thread is waited for last.
        inference.start()
        stack.callback(inference.stop)
        arm, cameras = stack.enter_context(_hardware(plan, mode, write_eeprom))
        watch = CameraWatch(cameras)
        latency = LatencyTracker()
        queue = ChunkQueue(chosen.chunking, manifest.sampling.n_action_steps, 1 / plan.fps, latency)
        _preflight(policy, arm, watch, plan, queue, far=far or mode == "rehearse")
        if mode == "dry-run":
            print("dry run: nothing was energised, no goal was written")
            return Log()
        log = stack.enter_context(recording.opened(plan, policy))
        arm.bus.on_write = log.wrote
        operator = stack.enter_context(Operator())
        if mode == "drive":
            stack.enter_context(_guarded(arm, GuardianAction(chosen.guardian)))
            print(
                "switching the motors on" + (f" ({HELP})" if operator.present else ""), flush=True
            )
        arm.enable(far=far)
        asked = stack.enter_context(command.first_signal_asks(command.say))
        rig = Rig(
            arm=arm,
            cameras=watch,
            inference=inference,
            queue=queue,
            faults=(DeviceError,),
            keys=operator,
            say=command.say,
            asked_to_end=asked,
            watch=report.Watcher(log.tick, JOINT_NAMES),
            answered=log.answered,
            patience_s=max(30.0, 10 * latency.p95_s),
            # For seams in degrees; the gripper has none.
            degrees_per_unit=_fit(
                degrees_per_unit(arm.calibration, arm.units)[:-1], manifest.action.dim
            ),
        )
        seconds = REHEARSAL_S if mode == "rehearse" and chosen.seconds is None else chosen.seconds
        loop = ControlLoop(rig, fps=plan.fps, seconds=seconds)
        failure = ""
        try:
            print(f"the control thread runs at {_raise_priority()}", flush=True)
            _run(loop, arm)
        except SafetyStop as e:
            failure = str(e)
            if mode != "rehearse":
                raise
        finally:
            command.say(report.summary(loop.log, 1 / plan.fps, arm.counts, arm.anomalies))
            command.said()
        if mode == "rehearse":
            report.judge(loop.log, arm.counts, arm.anomalies, plan, failure)
        return loop.log


def _run(loop: ControlLoop, arm: SO101) -> None:
    """Every way out switches the motors off: gently, unless somebody insists."""
    gently = True
    try:
        loop.run()
    except KeyboardInterrupt:
        gently = loop.parked or bool(arm.stopped)  # else it is the second one
        raise
    except SafetyStop as e:
        gently = not e.at_once
        raise
    finally:
        arm.beat = lambda: None  # from here on the guardian may only help
        if not arm.motors_off:
            command.say("switching the motors off")
        why = sys.exc_info()[1]
        released = arm.release(soft=gently)
        if released.unconfirmed:
            raise SafetyStop(
                f"{why}; {released.message}" if isinstance(why, SafetyStop) else released.message
            )


@contextmanager
def _guarded(arm: SO101, action: GuardianAction) -> Iterator[None]:
    """Within, a second process switches the arm off should this one die or freeze. It is dismissed only once every
    motor is known to be off."""
    guardian = Guardian(arm.bus.fileno(), arm.bus.path, action, arm.torque_limits)
    arm.beat = guardian.beat
    try:
        yield
    finally:
        arm.beat = lambda: None
        if not arm.release().unconfirmed:
            guardian.dismiss()


@contextmanager
def _hardware(plan: Plan, mode: Mode, write_eeprom: bool) -> Iterator[tuple[SO101, list[Camera]]]:
    """The arm, connected and checked but not energised, and its cameras; all closed on the way out. One error tells
    everything that is wrong with them."""
    manifest = plan.bundle.manifest
    names = [c.name for c in manifest.cameras]
    with ExitStack() as stack:
        if plan.calibration is None:
            print("starting the virtual arm")
            virtual = stack.enter_context(VirtualArm(cameras=names, pose=_usual_pose(plan)))
            port, calibration, sources = virtual.port, virtual.calibration, virtual.camera_sources
        else:
            port, calibration, sources = plan.port, plan.calibration, plan.settings.cameras
        if write_eeprom:
            with FeetechBus(port) as bus:
                _write_configuration(bus, calibration)
        # The arm first: if its motors are still on from a run that died, that is the thing to say.
        arm = _arm_class(manifest)(
            port, calibration, plan.units, plan.limits, plan.fps, motors_off=mode != "drive"
        )
        problems: list[str] = []
        try:
            for warning in arm.connect():  # writes nothing
                print(f"warning: {warning}")
            stack.push(arm)  # leaving the context switches every servo off
        except DeviceError as e:
            problems.append(str(e))
        cameras = []
        for name in names:
            if Path(sources[name]).is_file() and not plan.settings.simulated:
                print(f"warning: camera '{name}' is a file ({sources[name]})")
            try:
                cameras.append(open_camera(name, sources[name]))
                stack.callback(cameras[-1].close)
            except DeviceError as e:
                problems.append(str(e))
        if problems:
            raise DeviceError("\n".join(problems))
        yield arm, cameras


def _write_configuration(bus: FeetechBus, calibration: Calibration) -> None:
    """Give six known servos LeRobot's configuration. Any other arm is left alone: connect() will say why."""
    values = inspect(bus, calibration).values
    if any(v[Register.MODEL_NUMBER] != MODEL_NUMBER for v in values.values()) or len(values) != len(
        JOINT_NAMES
    ):
        return
    changes = eeprom.write_differences(
        bus, {i: eeprom.configuration(i, v) for i, v in values.items()}
    )
    for change in changes:
        print(f"EPROM: {change}")
    print(f"EPROM: {len(changes)} registers written")


def _preflight(
    policy: Policy, arm: SO101, watch: CameraWatch, plan: Plan, queue: ChunkQueue, *, far: bool
) -> None:
    """Compute chunks while the arm is limp, and show where it would go from here. The first inference of a process is
    slow: it does not count."""
    print("warming up", flush=True)
    manifest, n = policy.manifest, len(JOINT_NAMES)
    images = _pictures(watch)
    _compare_cameras(watch, plan)
    state = arm.read().position
    chunk = np.zeros((0, 0), np.float32)
    for attempt in range(2):
        start = time.monotonic()
        chunk = policy.predict_chunk(images, state, plan.task, steps=plan.settings.steps)
        if attempt:
            queue.latency.add(time.monotonic() - start)
        if not np.isfinite(chunk).all():
            raise SafetyStop(
                "the policy's first chunk is not finite: check the bundle with --self-check"
            )
    print(_pace(queue))
    if queue.chunking == "rtc" and queue.keeps_up:
        horizon = queue.delay + policy.rtc.execution_horizon
        policy.rtc = dataclasses.replace(policy.rtc, execution_horizon=horizon)
        print(f"real-time chunking: the first {queue.delay} actions are fixed, {horizon} guided")
    per_unit = degrees_per_unit(arm.calibration, arm.units)
    jump = np.append(plan.limits.jump_deg / per_unit[:-1], np.inf)
    if not len(state) == n == chunk.shape[1]:
        print(f"note: the policy has {chunk.shape[1]} joints, the virtual arm shows the first {n}")
        return
    table, problems = preflight(JOINT_NAMES, state, manifest.state.normalization, chunk, jump)
    print(table)
    if not problems:
        return
    listed = "\n  ".join(problems)
    if far or plan.settings.simulated:
        print(f"note: {listed}")
        return
    raise SettingsError(
        f"the arm stands where the policy does not know it:\n  {listed}\n"
        "Move it by hand to where your episodes begin, or look for wrong units or a wrong calibration. "
        "To start from here all the same: --allow-far-start"
    )


def _pace(queue: ChunkQueue) -> str:
    took, lasts = queue.latency.p95_s, queue.rows * queue.period_s
    line = f"a chunk takes {took:.2f} s and lasts {lasts:.2f} s"
    if queue.chunking == "sync":
        return f"{line}; the arm holds while it waits for one"
    if queue.keeps_up:
        return f"{line}; the next one is asked for when half of it is left, or sooner"
    return f"{line}: too slow to join chunks (half of it would do), so the arm holds between them"


def _pictures(watch: CameraWatch) -> Mapping[str, NDArray[np.uint8]]:
    """A usable picture of every camera, waited for a moment."""
    until = time.monotonic() + FIRST_PICTURES_S
    while True:
        views = watch.look()
        problems = [
            f"camera '{name}': {view.problem}" for name, view in views.items() if view.problem
        ]
        if not problems:
            return {name: view.image for name, view in views.items()}
        if time.monotonic() > until:
            raise SafetyStop(f"no usable pictures: {'; '.join(problems)}. Check the cables")
        time.sleep(0.05)


def _compare_cameras(watch: CameraWatch, plan: Plan) -> None:
    """Two cameras that changed places since the last run are refused: /dev/video numbers do change."""
    if plan.settings.simulated:
        return
    path = plan.bundle.cache_folder / "cameras.npz"
    if swapped := watch.compare_with(path):
        raise SettingsError(
            f"{'; '.join(swapped)}. Give the cameras the right way round. If they were moved on purpose: "
            f"delete {path}"
        )
    try:
        watch.remember(path)
    except (OSError, DeviceError) as e:
        print(f"note: pictures for the next run's comparison are not kept: {e}")


def _usual_pose(plan: Plan) -> list[int] | None:
    """Where the policy's training has the arm on average, for the virtual one to start from."""
    mean = plan.bundle.manifest.state.normalization.statistics.get("mean")
    if mean is None or len(mean) != len(JOINT_NAMES):
        return None
    raw = to_raw(np.array(mean), VIRTUAL_CALIBRATION, plan.units)
    return [
        int(np.clip(r, j.range_min, j.range_max))
        for r, j in zip(raw, VIRTUAL_CALIBRATION.joints, strict=True)
    ]


def _arm_class(manifest: Manifest) -> Callable[..., SO101]:
    dims = manifest.state.dim, manifest.action.dim
    if dims == (len(JOINT_NAMES),) * 2:
        return SO101

    class FirstSix(SO101):
        """The virtual arm for a policy with other than six joints: it shows the first six, the rest stand still."""

        def read(self) -> JointState:
            state = super().read()
            return dataclasses.replace(state, position=_fit(state.position, dims[0]))

        def send(self, target: Any, due_s: float | None = None) -> Emitted:
            return super().send(_fit(np.asarray(target), len(JOINT_NAMES)), due_s)

    return FirstSix


def _fit(vector: NDArray[Any], dim: int) -> NDArray[np.float64]:
    """`vector` cut or padded with zeros to `dim` values."""
    out = np.zeros(dim)
    out[: min(dim, len(vector))] = vector[:dim]
    return out


def _raise_priority() -> str:
    """A chunk being computed must not delay a tick. Threads started later keep the normal priority."""
    with suppress(OSError):
        os.sched_setscheduler(
            0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(CONTROL_PRIORITY)
        )
        return "real-time priority"
    # Nobody may raise a thread without a permission, but anybody may lower the others.
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            with suppress(OSError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, int(task.name), POLICY_NICE)
    return "normal priority, the policy below it (real-time priority needs root or an rtprio limit)"
