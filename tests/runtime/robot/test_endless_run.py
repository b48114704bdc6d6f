"""An endless run in seconds: memory and logs stay bounded.

The clock is wound by hand; loop, statistics, log and their threads are the real ones.
"""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from smolvla_edge.devices.arm.motion import Emitted
from smolvla_edge.devices.arm.telemetry import JointState
from smolvla_edge.runtime.policy.policy import Timing
from smolvla_edge.runtime.robot import camera_monitor, inference
from smolvla_edge.runtime.robot import loop as control
from smolvla_edge.runtime.robot.chunks import CHUNKINGS, ChunkQueue, LatencyTracker
from smolvla_edge.runtime.robot.inference import InferenceThread
from smolvla_edge.runtime.robot.loop import ControlLoop, LoopParts
from smolvla_edge.runtime.robot.run_log import QUEUE_LIMIT, RunLog

FPS, TICKS, WARM_TICKS = 30.0, 30_000, 10_000
LIMIT_BYTES = 3_000_000


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds):
        self.now += seconds


class Policy:
    timing = Timing(1.0, 2.0, 3.0)

    def __init__(self):
        self.answered = threading.Event()

    def draw_noise(self):
        return np.zeros((1, 50, 32), np.float32)

    def predict_chunk(self, *args, **options):
        self.answered.set()
        return np.zeros((50, 6), np.float32)


class Arm:
    """Reads as the real one, with other values in each tick."""

    stopped = ""

    def __init__(self, clock):
        self.clock, self.random = clock, np.random.default_rng(1)

    def read(self):
        self.clock.now += self.random.uniform(0.001, 0.004)
        values = self.random.normal(size=6)
        ticks, zeros = np.arange(6), (0,) * 6
        return JointState(
            self.clock.now,
            *(values, ticks, ticks, values, values, ticks, values),
            *(zeros, values, zeros, zeros),
        )

    def send(self, target, due_s):
        return Emitted((1, 2, 3, 4, 5, 6), np.asarray(target, np.float64))

    def hold(self):
        return self.send(np.zeros(6), None)

    def new_warnings(self):
        return ["gripper: 56 C"] if self.random.uniform() < 0.1 else []

    def begin_park(self):
        return 0.0

    def park(self):
        return True, self.hold()


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_memory_is_flat_and_logs_are_bounded_over_30_000_ticks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    clock, resident, done = Clock(), {}, 0
    for module in (control, camera_monitor, inference):
        monkeypatch.setattr(module, "time", clock)
    log = RunLog.in_folder(LIMIT_BYTES)
    largest = 0

    def watch(tick):
        nonlocal done, largest
        done += 1
        log.tick(tick)
        while log.worker.waiting > QUEUE_LIMIT // 2:
            time.sleep(0.0005)
        if thread.busy:  # its thread is not accelerated: without this wait every chunk is late
            policy.answered.wait(0.01)
            policy.answered.clear()
        if done % 5_000 == 0:
            resident[done] = resident_bytes()
            files = (tmp_path / "smolvla-edge" / "runs").iterdir()
            largest = max(largest, sum(file.stat().st_size for file in files))

    view = SimpleNamespace(image=np.zeros((48, 64, 3), np.uint8), problem="", time_s=clock.now)
    policy = Policy()
    thread = InferenceThread(policy, "task", 10)
    parts = LoopParts(
        arm=Arm(clock),
        cameras=SimpleNamespace(look=lambda: {"front": view}, warnings=list),
        inference=thread,
        queue=ChunkQueue(CHUNKINGS["async"], 50, 1 / FPS, LatencyTracker()),
        operator=SimpleNamespace(present=True, keys=lambda: ["quit"] if done == TICKS else []),
        say=lambda _: None,
        interrupted=lambda: False,
        watch=watch,
        answered=log.answered,
    )
    statistics = ControlLoop(parts, fps=FPS, seconds=None).run()
    thread.stop()
    log.close()
    files = sorted((tmp_path / "smolvla-edge" / "runs").iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"resident: { ({n: f'{b / 1e6:.1f} MB' for n, b in resident.items()}) }")
    print(f"log: {size / 1e6:.2f} MB in {len(files)} files, at most {largest / 1e6:.2f} MB")
    assert statistics.counts.ticks == TICKS + 1
    assert statistics.counts.acted > 0.9 * TICKS
    assert len(statistics.read_ms) == TICKS + 1
    assert len(statistics.warnings) == 50 < statistics.counts.warnings
    assert (log.problem, log.dropped) == ("", 0)
    assert max(largest, size) <= LIMIT_BYTES
    assert resident[TICKS] - resident[WARM_TICKS] < 1_000_000
    assert capsys.readouterr().err.count("the log of this run reached 3 MB") == 1
