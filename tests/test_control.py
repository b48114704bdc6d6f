"""The control loop against an arm and a policy that misbehave on purpose."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from smolvla_edge.runtime import control
from smolvla_edge.runtime.control import ControlLoop
from smolvla_edge.runtime.errors import BackendError, SafetyStop
from smolvla_edge.runtime.inference import InferenceThread
from smolvla_edge.runtime.policy import Timing


class ArmFailed(Exception):
    pass


class RecordingArm:
    """Remembers what it was told and when."""

    def __init__(self):
        self.sent, self.times, self.holds = [], [], 0
        self.fail_reads = iter(())

    def read(self):
        if next(self.fail_reads, False):
            raise ArmFailed("no answer")
        return SimpleNamespace(position=np.zeros(2))

    def send(self, target):
        self.sent.append(np.array(target))
        self.times.append(time.monotonic())

    def hold(self):
        self.holds += 1


class ScriptedPolicy:
    """Answers chunks of 4 rows, after `delay_s`; `answers` replaces the first ones."""

    timing = Timing(0, 0, 0)

    def __init__(self, delay_s=0.0, answers=()):
        self.delay_s, self.answers, self.calls = delay_s, list(answers), 0

    def predict_chunk(self, images, state, task, steps):
        time.sleep(self.delay_s)
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else np.full((4, 2), self.calls, np.float32)
        if isinstance(answer, Exception):
            raise answer
        return answer


def loop_of(arm, policy, *, frames=None, seconds=0.5, rows=4, fps=100.0):
    inference = InferenceThread(policy, "task", None)
    inference.start()
    fresh = {"front": lambda: SimpleNamespace(image=np.zeros((2, 2, 3), np.uint8), time_s=time.monotonic())}
    loop = ControlLoop(
        arm,
        fresh if frames is None else frames,
        inference,
        fps=fps,
        rows=rows,
        seconds=seconds,
        faults=(ArmFailed,),
    )
    return loop, inference


def run(arm, policy, **options):
    loop, inference = loop_of(arm, policy, **options)
    try:
        return loop.run()
    finally:
        inference.stop()


def test_rows_of_a_chunk_are_sent_in_order_and_then_the_next_chunk():
    arm = RecordingArm()
    chunks = [np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(8, 16, dtype=np.float32).reshape(4, 2)]
    run(arm, ScriptedPolicy(answers=chunks), seconds=0.2)
    assert np.array_equal(arm.sent[:8], np.concatenate(chunks))


def test_only_the_rows_to_execute_are_sent():
    arm = RecordingArm()
    run(arm, ScriptedPolicy(), rows=2, seconds=0.2)
    assert [int(t[0]) for t in arm.sent[:6]] == [1, 1, 2, 2, 3, 3]


def test_control_goes_on_while_the_policy_thinks_and_the_arm_holds():
    arm = RecordingArm()
    log = run(arm, ScriptedPolicy(delay_s=0.3), seconds=0.4)
    assert log.counts.held >= 20  # 0.3 s at 100 Hz, twice
    assert log.counts.missed == 0
    assert arm.holds == log.counts.held


def test_seconds_count_from_the_first_action():
    arm = RecordingArm()
    start = time.monotonic()
    run(arm, ScriptedPolicy(delay_s=0.5), seconds=0.3)
    assert time.monotonic() - start >= 0.8
    assert arm.sent


def test_a_chunk_that_is_not_finite_is_thrown_away_whole():
    arm = RecordingArm()
    bad = np.float32([[1, 2], [np.nan, 2], [1, 2], [1, 2]])
    log = run(arm, ScriptedPolicy(answers=[bad]), seconds=0.2)
    assert log.counts.bad_chunks == 1
    assert all(np.isfinite(t).all() for t in arm.sent)
    assert arm.sent[0][0] == 2  # the second answer


def test_three_such_chunks_in_a_row_end_the_run():
    bad = np.full((4, 2), np.inf, np.float32)
    with pytest.raises(SafetyStop, match="not finite"):
        run(RecordingArm(), ScriptedPolicy(answers=[bad] * 3))


def test_what_the_policy_raises_ends_the_run_in_the_control_thread():
    with pytest.raises(ValueError, match="boom"):
        run(RecordingArm(), ScriptedPolicy(answers=[ValueError("boom")]))


def test_lost_reads_are_bridged_until_there_are_too_many():
    arm = RecordingArm()
    arm.fail_reads = iter([False] * 5 + [True] * (control.LOST_READS - 1) + [False] * 3)
    assert run(arm, ScriptedPolicy(), seconds=0.3).counts.failed_reads == control.LOST_READS - 1
    arm.fail_reads = iter([False] * 5 + [True] * control.LOST_READS)
    with pytest.raises(SafetyStop, match="cannot be read"):
        run(arm, ScriptedPolicy(), seconds=0.3)


def camera(age_s):
    """A camera whose newest frame is `age_s()` old."""
    return {"front": lambda: SimpleNamespace(image=np.zeros((2, 2, 3), np.uint8), time_s=time.monotonic() - age_s())}


def test_a_stale_frame_is_never_shown_to_the_policy():
    policy, start = ScriptedPolicy(), time.monotonic()
    late = camera(lambda: 1.0 if time.monotonic() - start < 0.3 else 0.0)
    log = run(RecordingArm(), policy, frames=late, seconds=0.1)
    assert log.counts.stale_frames >= 20
    assert log.counts.acted > 0  # once the frames were fresh again


def test_a_camera_that_dies_ends_the_run_while_a_chunk_is_still_executed():
    arm, start = RecordingArm(), time.monotonic()
    policy = ScriptedPolicy(answers=[np.zeros((1000, 2), np.float32)])
    dying = camera(lambda: 0.0 if time.monotonic() - start < 0.2 else control.CAMERA_FAULT_S + 1)
    with pytest.raises(SafetyStop, match="camera 'front' gave no new frame"):
        run(arm, policy, frames=dying, rows=1000, seconds=5)
    assert 5 < len(arm.sent) < 60


def test_a_long_chunk_is_no_camera_fault(monkeypatch):
    monkeypatch.setattr(control, "CAMERA_FAULT_S", 0.2)
    chunk = np.zeros((40, 2), np.float32)
    log = run(RecordingArm(), ScriptedPolicy(answers=[chunk, chunk]), rows=40, seconds=0.6)
    assert log.counts.stale_frames == 0


def test_a_policy_that_never_answers_ends_the_run():
    loop, inference = loop_of(RecordingArm(), ScriptedPolicy(delay_s=0.6))
    loop.patience_s = 0.2
    try:
        with pytest.raises(SafetyStop, match="has not answered for"):
            loop.run()
    finally:
        inference.stop()


def test_a_policy_that_fails_is_a_safety_stop():
    with pytest.raises(SafetyStop, match="the policy failed: out of memory"):
        run(RecordingArm(), ScriptedPolicy(answers=[BackendError("out of memory")]))


def test_a_slow_tick_is_not_made_up_for_in_a_burst():
    class SlowOnce(RecordingArm):
        def send(self, target):
            super().send(target)
            if len(self.sent) == 3:
                time.sleep(0.2)

    arm = SlowOnce()
    log = run(arm, ScriptedPolicy(answers=[np.zeros((40, 2), np.float32)]), rows=40, seconds=0.5, fps=50.0)
    assert log.counts.missed >= 8
    gaps = np.diff(arm.times)[3:]
    assert gaps.min() > 0.005  # a period is 20 ms
