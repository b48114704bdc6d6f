"""One run of an arm, in order: check, open, warm up, show the start, switch on, run, switch off."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

from ...core import command
from ...core.errors import SafetyStop
from ...devices.arm.calibration import JOINT_NAMES
from ...devices.arm.guardian import Guardian, GuardianAction
from ...devices.arm.so101 import SO101
from ...devices.arm.units import degrees_per_unit
from ...devices.cameras.camera_watch import CameraWatch
from ..policy.policy import Policy
from . import start
from .checked_run import CheckedRun, check
from .chunks import CHUNKINGS, ChunkQueue, LatencyTracker
from .hardware import open_hardware
from .inference import InferenceThread
from .keys import HELP, Operator
from .loop import ControlLoop, LoopParts
from .priority import raise_priority
from .recording import open_log
from .rehearsal import judge
from .run_statistics import RunStatistics
from .settings import Settings
from .summary import StatusLine, summary

Mode = Literal["drive", "dry-run", "rehearse"]
REHEARSAL_S = 10.0


def drive(
    chosen: Settings,
    mode: Mode = "drive",
    *,
    far: bool = False,
    write_eeprom: bool = False,
    words: Sequence[str] = (),
    statistics: RunStatistics | None = None,
) -> RunStatistics:
    """Run until `seconds` are over, interrupted, or stopped; every motor is off afterwards.

    mode: dry-run leaves before the motors would be switched on; rehearse runs the loop with the
    motors off and judges it. Neither writes a goal. far: start although the arm is outside the
    range seen in training. write_eeprom: give the servos LeRobot's configuration first. words:
    options for the complete command in an error. statistics: what to fill, for a benchmark.

    -> what happened. Raises SettingsError before anything is opened, DeviceError for the hardware,
    SafetyStop later, CheckFailed for a rehearsal.
    """
    run = check(chosen, words)
    policy = _load(run)
    statistics = statistics or RunStatistics()
    with ExitStack() as stack:
        # Left in the reverse order: the arm is switched off before the policy's thread ends.
        steps = chosen.steps or run.bundle.manifest.sampling.num_steps
        inference = InferenceThread(policy, run.task, steps)
        stack.callback(inference.stop)
        arm, cameras = stack.enter_context(
            open_hardware(run, motors_off=mode != "drive", write_eeprom=write_eeprom)
        )
        watch = CameraWatch(cameras)
        rows = run.bundle.manifest.sampling.n_action_steps
        queue = ChunkQueue(CHUNKINGS[chosen.chunking], rows, 1 / run.fps, LatencyTracker())

        print("warming up", flush=True)
        images = start.first_images(watch)
        start.compare_cameras(watch, run)
        state = arm.read().position
        chunk = start.warm_up(policy, images, state, run, queue)
        start.set_pace(policy, run, queue)
        start.show_start(arm, state, chunk, run, far=far or mode == "rehearse")
        if mode == "dry-run":
            print("dry run: nothing was energised, no goal was written")
            return statistics

        log = stack.enter_context(open_log(run, policy))
        arm.bus.on_write = log.wrote
        operator = stack.enter_context(Operator())
        if mode == "drive":
            stack.enter_context(_guarded(arm, GuardianAction(chosen.guardian)))
            help_ = f" ({HELP})" if operator.present else ""
            print(f"switching the motors on{help_}", flush=True)
        arm.enable(far=far)
        per_unit = degrees_per_unit(arm.calibration, arm.units)
        per_unit[-1] = 0.0  # the gripper has no degrees
        parts = LoopParts(
            arm=arm,
            cameras=watch,
            inference=inference,
            queue=queue,
            operator=operator,
            say=command.say,
            interrupted=stack.enter_context(command.first_signal_asks(command.say)),
            watch=StatusLine(log.tick, JOINT_NAMES),
            answered=log.answered,
            patience_s=max(30.0, 10 * queue.latency.p95_s),
            degrees_per_unit=per_unit,
        )
        seconds = REHEARSAL_S if mode == "rehearse" and chosen.seconds is None else chosen.seconds
        loop = ControlLoop(parts, fps=run.fps, seconds=seconds, statistics=statistics)
        failure = ""
        try:
            print(f"the control thread runs at {raise_priority()}", flush=True)
            _run(loop, arm)
        except SafetyStop as e:
            failure = str(e)
            if mode != "rehearse":
                raise
        finally:
            command.say(summary(statistics, 1 / run.fps, arm.counts, arm.anomalies))
            command.said()
        if mode == "rehearse":
            judge(statistics, arm.counts, arm.anomalies, run, failure)
        return statistics


def _load(run: CheckedRun) -> Policy:
    """The policy, on its device. A task that is too long is an error before hardware is opened."""
    chosen = run.settings
    print(f"loading {chosen.bundle} ({run.bundle.manifest.precision})", flush=True)
    policy = Policy.load(
        run.bundle, chosen.device, backend=chosen.backend, realtime=True, seed=chosen.seed
    )
    print(policy.graphs.reason)
    policy.preprocessor.tokenizer.encode(run.task)
    return policy


def _run(loop: ControlLoop, arm: SO101) -> None:
    """Every way out switches the motors off: slowly, except after a second Ctrl-C or stop key."""
    soft = True
    try:
        loop.run()
    except KeyboardInterrupt:
        soft = loop.parked or bool(arm.stopped)  # else it is the second one
        raise
    except SafetyStop as e:
        soft = not e.at_once
        raise
    finally:
        arm.beat = lambda: None  # a guardian that is gone must not prevent what follows
        if not arm.motors_off:
            command.say("switching the motors off")
        why = sys.exc_info()[1]
        released = arm.release(soft=soft)
        if released.unconfirmed:
            raise SafetyStop(
                f"{why}; {released.message}" if isinstance(why, SafetyStop) else released.message
            )


@contextmanager
def _guarded(arm: SO101, action: GuardianAction) -> Iterator[None]:
    """Within, a second process switches the arm off if this one crashes or hangs. It ends only
    after every motor is known to be off."""
    guardian = Guardian(arm.bus.fileno(), arm.bus.path, action, arm.torque_limits)
    arm.beat = guardian.beat
    try:
        yield
    finally:
        arm.beat = lambda: None
        if not arm.release().unconfirmed:
            guardian.dismiss()
