"""What happens before the motors are switched on: warm up, compare the cameras, show the start."""

import dataclasses
import time

import numpy as np
from numpy.typing import NDArray

from ...core.errors import DeviceError, SafetyStop, SettingsError, listed
from ...devices.arm.calibration import JOINT_NAMES
from ...devices.arm.so101 import SO101
from ...devices.arm.units import degrees_per_unit
from ...devices.cameras.camera_watch import CameraWatch
from ..policy.policy import Policy
from .camera_monitor import Images
from .checked_run import CheckedRun
from .chunks import ChunkQueue
from .preflight import preflight

FIRST_PICTURES_S = 2.0


def first_images(watch: CameraWatch) -> Images:
    """A usable picture of every camera. Raises SafetyStop after FIRST_PICTURES_S without."""
    until = time.monotonic() + FIRST_PICTURES_S
    while True:
        views = watch.look()
        problems = [f"camera '{n}': {view.problem}" for n, view in views.items() if view.problem]
        if not problems:
            return {name: view.image for name, view in views.items()}
        if time.monotonic() > until:
            raise SafetyStop(f"no usable pictures: {'; '.join(problems)}. Check the cables")
        time.sleep(0.05)


def compare_cameras(watch: CameraWatch, run: CheckedRun) -> None:
    """Raises SettingsError where two cameras changed places since the last run: numbers of
    /dev/video do change."""
    if run.settings.simulated:
        return
    path = run.bundle.cache_folder / "cameras.npz"
    if swapped := watch.compare_with(path):
        raise SettingsError(
            f"{'; '.join(swapped)}. Exchange the sources of the cameras. "
            f"If they were moved on purpose: delete {path}"
        )
    try:
        watch.remember(path)
    except (OSError, DeviceError) as e:
        print(f"note: pictures for the next run's comparison are not kept: {e}")


def warm_up(
    policy: Policy, images: Images, state: NDArray[np.float64], run: CheckedRun, queue: ChunkQueue
) -> NDArray[np.float32]:
    """-> a first chunk, [rows, dof]; its latency is in the queue's tracker. Of two: the first
    inference of a process is slower than all others. Raises SafetyStop for one that is not
    finite."""
    chunk = np.zeros((0, 0), np.float32)
    for attempt in range(2):
        start = time.monotonic()
        chunk = policy.predict_chunk(images, state, run.task, steps=run.settings.steps)
        if attempt:
            queue.latency.add(time.monotonic() - start)
        if not np.isfinite(chunk).all():
            raise SafetyStop(
                "the policy's first chunk is not finite: check the bundle with --self-check"
            )
    return chunk


def set_pace(policy: Policy, run: CheckedRun, queue: ChunkQueue) -> None:
    """Print how chunks and the control rate fit, and tell the policy how much it continues."""
    took, lasts = queue.latency.p95_s, queue.rows * queue.period_s
    line = f"a chunk takes {took:.2f} s and lasts {lasts:.2f} s"
    if run.settings.chunking == "sync":
        print(f"{line}; the arm holds while it waits for one")
    elif queue.keeps_up:
        print(f"{line}; the next one is requested when half of it is left, or sooner")
    else:
        print(f"{line}: more than half, so chunks cannot be joined and the arm holds between them")
    if run.settings.chunking == "rtc" and queue.keeps_up:
        horizon = queue.delay + policy.rtc.execution_horizon
        policy.rtc = dataclasses.replace(policy.rtc, execution_horizon=horizon)
        print(f"real-time chunking: the first {queue.delay} actions are fixed, {horizon} guided")


def show_start(
    arm: SO101,
    state: NDArray[np.float64],
    chunk: NDArray[np.float32],
    run: CheckedRun,
    *,
    far: bool,
) -> None:
    """Print where the arm is, what training has seen, and where the chunk goes.

    Raises SettingsError where the arm is too far away, unless `far` or on the virtual arm.
    """
    per_unit = degrees_per_unit(arm.calibration, arm.units)
    jump = np.append(run.limits.jump_deg / per_unit[:-1], np.inf)
    normalization = run.bundle.manifest.state.normalization
    table, problems = preflight(JOINT_NAMES, state, normalization, chunk, jump)
    print(table)
    if not problems:
        return
    if far or run.settings.simulated:
        print(listed("note: the arm is not where the policy expects it:", problems))
        return
    raise SettingsError(
        listed("the arm is not where the policy expects it:", problems)
        + "\nMove it by hand to where your episodes begin, or look for wrong units or a wrong "
        "calibration. To start from here: --allow-far-start"
    )
