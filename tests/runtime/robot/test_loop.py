"""The control loop with an arm, cameras, keys and a policy that misbehave on purpose.

The clock is wound by hand, so that every tick of every test is the same on any machine; the policy
computes in its own thread as always, and is answered for at the tick that its latency says.
"""

import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from smolvla_edge.core.errors import BackendError, DeviceError, SafetyStop
from smolvla_edge.runtime.policy.policy import Timing
from smolvla_edge.runtime.robot import camera_monitor, inference
from smolvla_edge.runtime.robot import loop as control
from smolvla_edge.runtime.robot.chunks import CHUNKINGS, ChunkQueue, LatencyTracker
from smolvla_edge.runtime.robot.inference import InferenceThread
from smolvla_edge.runtime.robot.loop import ControlLoop, LoopParts
from smolvla_edge.runtime.robot.run_statistics import RunStatistics

FPS, ROWS = 20.0, 8
PERIOD_S = 1 / FPS
AGAIN_TICKS = int(control.AGAIN_S * FPS) + 2
MAX_AGE_S = 0.25
PARK_TICKS = 5
LIMIT_S = 30.0  # real time, for what must happen at all
BAD = np.full((ROWS, 2), np.nan, np.float32)


class ArmFailed(DeviceError):
    pass


class Clock:
    """Time for the loop. In the policy's thread it is when the policy is done."""

    def __init__(self):
        self.now = 1000.0
        self.finish = threading.local()

    def monotonic(self):
        return getattr(self.finish, "s", self.now)

    perf_counter = monotonic

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


class ScriptedPolicy:
    """The n-th answer is a chunk of n, n + 0.01, ...; `answers` replaces the first ones.
    latencies_s: of each."""

    timing = Timing(1.0, 2.0, 3.0)

    def __init__(self, clock, latencies_s, answers):
        self.clock, self.latencies_s, self.answers = (
            clock,
            itertools.chain(latencies_s, itertools.repeat(0.12)),
            answers,
        )
        self.asked = []
        self.ready_s = None
        self.answer_now = threading.Event()

    def draw_noise(self):
        return np.zeros((1, ROWS, 2), np.float32)

    def predict_chunk(self, images, state, task, *, noise, steps, prev_chunk, delay):
        self.asked.append(
            SimpleNamespace(
                images=images, prev_chunk=prev_chunk, delay=delay, time_s=self.clock.now
            )
        )
        number = len(self.asked)
        self.ready_s = self.clock.finish.s = self.clock.now + next(self.latencies_s)
        assert self.answer_now.wait(LIMIT_S)
        self.answer_now.clear()
        answer = self.answers[number - 1] if number <= len(self.answers) else None
        if isinstance(answer, BaseException):
            raise answer
        steps = np.float32(number + 0.01 * np.arange(ROWS))[:, None] * np.ones(2, np.float32)
        return steps if answer is None else answer


class RecordingArm:
    """Remembers what it was told and when; `at` does something at the start of a tick."""

    def __init__(self, clock, answer_policy):
        self.clock, self.answer_policy = clock, answer_policy
        self.told, self.starts_s, self.tick, self.script = [], [], -1, {}
        self.stopped, self.missed, self.dead_joint = "", (0, 0), False
        self.ramp_ticks, self.reject, self.parking, self.pause_s = 0, "", 0, 0.0
        self.warnings = []

    def at(self, tick, action):
        self.script.setdefault(tick, []).append(action)

    def read(self):
        self.tick += 1
        self.starts_s.append(self.clock.now)
        for action in self.script.pop(self.tick, []):
            action()
        self.answer_policy()
        return SimpleNamespace(position=np.zeros(2), missed=self.missed)

    def tell(self, kind, value=None, **emitted):
        self.told.append((kind, value, self.clock.now))
        self.clock.now, self.pause_s = self.clock.now + self.pause_s, 0.0
        plain = {"rejected": "", "stale": False, "ramping": False}
        return SimpleNamespace(**plain | emitted)

    def send(self, target, due_s):
        if self.clock.now - due_s > MAX_AGE_S:
            return self.tell("stale", float(target[0]), stale=True, rejected="too old")
        self.ramp_ticks -= self.ramp_ticks > 0
        kind = "reject" if self.reject else "ramp" if self.ramp_ticks else "send"
        return self.tell(
            kind, round(float(target[0]), 4), rejected=self.reject, ramping=self.ramp_ticks > 0
        )

    def hold(self):
        return self.tell("hold")

    def stop(self, reason):
        self.stopped = self.stopped or reason

    def resume(self):
        if self.dead_joint:
            raise ArmFailed("cannot resume: wrist_roll is off")
        self.told.append(("resume", None, self.clock.now))
        self.stopped = ""

    def begin_park(self):
        self.parking = PARK_TICKS
        return 0.25

    def park(self):
        self.parking -= 1
        return self.parking == 0, self.tell("park")

    def new_warnings(self):
        found, self.warnings = self.warnings, []
        return found

    def of(self, *kinds):
        return [value for kind, value, _ in self.told if kind in kinds]

    @property
    def kinds(self):
        return [kind for kind, _, _ in self.told]


class Bench:
    """A loop and everything around it. Times are in ticks: 0 is the first."""

    def __init__(
        self,
        monkeypatch,
        chunking="sync",
        latencies_s=(),
        answers=(),
        seconds=None,
        patience_s=60.0,
        usual_s=0.12,
    ):
        self.clock = Clock()
        for module in (control, camera_monitor, inference):
            monkeypatch.setattr(module, "time", self.clock)
        self.policy = ScriptedPolicy(self.clock, latencies_s, list(answers))
        self.arm = RecordingArm(self.clock, self.answer_policy)
        self.pressed, self.asked_to_end, self.problem = [], False, ""
        self.keys = SimpleNamespace(present=True, keys=self._keys)
        self.said, self.ticks, self.recorded = [], [], []
        self.queue = ChunkQueue(CHUNKINGS[chunking], ROWS, PERIOD_S, LatencyTracker())
        self.queue.latency.add(usual_s)
        self.thread = InferenceThread(self.policy, "task", None)
        image = np.zeros((2, 2, 3), np.uint8)
        parts = LoopParts(
            arm=self.arm,
            cameras=SimpleNamespace(
                look=lambda: {
                    "front": SimpleNamespace(
                        image=image, problem=self.problem, time_s=self.clock.now - 0.01
                    ),
                    "wrist": SimpleNamespace(image=image, problem="", time_s=self.clock.now - 0.04),
                },
                warnings=list,
            ),
            inference=self.thread,
            queue=self.queue,
            operator=self.keys,
            say=self.said.append,
            interrupted=lambda: self.asked_to_end,
            watch=self._watch,
            answered=self.recorded.append,
            patience_s=patience_s,
        )
        self.loop = ControlLoop(
            parts, fps=FPS, seconds=seconds, statistics=RunStatistics.keeping_values()
        )

    def _watch(self, tick):
        self.ticks.append(tick)
        # Time goes on only when the policy has begun.
        self._wait(
            lambda: not self.thread.busy or self.policy.ready_s is not None or self._answered
        )

    def answer_policy(self):
        """Let the policy answer when its time has come, and wait until it has."""
        if self.policy.ready_s is not None and self.policy.ready_s <= self.clock.now:
            self.policy.ready_s = None
            self.policy.answer_now.set()
            self._wait(lambda: self._answered)

    @property
    def _answered(self):
        return self.thread.busy and self.thread._answer.done()

    def _wait(self, condition):
        until = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < until
            time.sleep(0)

    def _keys(self):
        pressed, self.pressed = self.pressed, []
        return pressed

    def press(self, tick, *keys):
        self.arm.at(tick, lambda: self.pressed.extend(keys))

    def set(self, tick, **values):
        for name, value in values.items():
            target = next(x for x in (self, self.arm) if hasattr(x, name))
            self.arm.at(
                tick, lambda target=target, name=name, value=value: setattr(target, name, value)
            )

    def fail(self, method, tick):
        def broken(*args):
            raise ArmFailed("no answer")

        self.arm.at(tick, lambda: setattr(self.arm, method, broken))

    def doing(self, first, last=None):
        return {tick.doing for tick in self.ticks[first : last or first + 1]}

    def spoken(self, part):
        return sum(part in line for line in self.said)

    def close(self):
        self.policy.answer_now.set()
        self.thread.stop()


@pytest.fixture
def bench(monkeypatch):
    made = []

    def make(**options):
        made.append(Bench(monkeypatch, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def rows_of(*chunks, rows=ROWS):
    return [round(n + 0.01 * i, 4) for n in chunks for i in range(rows)]


# Running


def test_rows_of_a_chunk_are_sent_in_order_and_then_those_of_the_next(bench):
    b = bench(seconds=2.0)
    log = b.loop.run()
    assert b.arm.of("send")[:24] == rows_of(1, 2, 3)
    assert b.loop.parked
    assert log.counts.ticks == len(b.ticks) == len(b.arm.told)


def test_the_arm_holds_while_sync_computes_and_that_is_counted(bench):
    b = bench(seconds=2.0, latencies_s=[0.32] * 50)  # over six periods
    log = b.loop.run()
    assert b.arm.kinds[:7] == ["hold"] * 7
    assert b.arm.kinds[7:15] == ["send"] * 8
    assert b.arm.kinds[15:21] == ["hold"] * 6
    assert log.counts.held == b.arm.kinds.count("hold")
    assert log.counts.starved == log.counts.held - 7  # those before the first action are none


def test_control_does_not_wait_for_the_policy():
    """With the real clock: the policy answers only once the arm was told to hold ten times."""
    held = threading.Event()

    class Arm(RecordingArm):
        def hold(self):
            if self.kinds.count("hold") >= 10:
                held.set()
            return super().hold()

    class Policy(ScriptedPolicy):
        def predict_chunk(self, *args, **options):
            assert held.wait(LIMIT_S)
            return np.zeros((ROWS, 2), np.float32)

    assert real_run(Arm, Policy).acted > 0


def real_run(arm_class=RecordingArm, policy_class=ScriptedPolicy, fps=100.0, seconds=0.2):
    """A run with the machine's own clock; -> Counts."""
    until = time.monotonic() + LIMIT_S
    clock = SimpleNamespace(now=0.0, finish=SimpleNamespace())
    policy = policy_class(clock, [], [])
    policy.answer_now = SimpleNamespace(wait=lambda _: True, clear=lambda: None)
    thread = InferenceThread(policy, "task", None)
    view = SimpleNamespace(image=np.zeros((2, 2, 3), np.uint8), problem="", time_s=time.monotonic())
    arm = arm_class(clock, lambda: None)
    parts = LoopParts(
        arm=arm,
        cameras=SimpleNamespace(look=lambda: {"front": view}, warnings=list),
        inference=thread,
        queue=ChunkQueue(CHUNKINGS["sync"], ROWS, 1 / fps, LatencyTracker()),
        operator=SimpleNamespace(present=True, keys=lambda: ["quit"] * (time.monotonic() > until)),
        say=lambda _: None,
        interrupted=lambda: False,
        patience_s=LIMIT_S,
    )
    try:
        return ControlLoop(parts, fps=fps, seconds=seconds).run().counts
    finally:
        thread.stop()


def test_jumps_of_the_wall_clock_change_nothing(monkeypatch):
    """F35."""
    jumps = itertools.cycle([0.0, 5.0, -3.0])
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(jumps))
    start = time.monotonic()
    counts = real_run(seconds=0.5)
    assert 0.5 <= time.monotonic() - start < LIMIT_S
    assert counts.acted > 0


def test_seconds_count_from_the_first_action(bench):
    b = bench(latencies_s=[2.98], usual_s=3.0, seconds=0.98)
    b.loop.run()
    first = b.arm.kinds.index("send")
    assert first == 60
    assert b.arm.kinds.index("park") == first + 20
    assert b.ticks[first - 1].elapsed_s == 0
    assert b.ticks[first + 10].elapsed_s == pytest.approx(0.5)


def test_missed_ticks_are_never_made_up_for_in_a_burst(bench):
    b = bench(seconds=2.0)
    b.set(10, pause_s=10.5 * PERIOD_S)  # a bus that hangs
    log = b.loop.run()
    assert log.counts.missed == 9
    gaps = np.diff(b.arm.starts_s) / PERIOD_S
    assert gaps[10:13] == pytest.approx([10.5, 0.5, 1.0])  # back on the grid, at once and for good
    assert gaps[13:] == pytest.approx(1.0)
    assert log.counts.ticks + log.counts.missed == pytest.approx(
        (b.clock.now - 1000) / PERIOD_S, abs=2
    )


def test_periods_and_lateness_are_told_apart_from_starvation(bench):
    b = bench(seconds=1.0, latencies_s=[0.6] * 9)
    b.arm.at(5, lambda: setattr(b.clock, "now", b.clock.now + 0.02))
    log = b.loop.run()
    assert log.counts.starved > 0
    assert log.counts.missed == 0
    assert log.busy_ms.max == pytest.approx(20)
    assert log.late_ms.max == pytest.approx(0, abs=1e-6)  # 20 ms of 50: the next tick is in time
    assert log.period_error_ms.max == pytest.approx(0, abs=1e-6)


def test_the_recording_gets_the_pictures_of_each_chunk(bench):
    b = bench(seconds=1.0)
    b.loop.run()
    assert [set(chunk.request.images) for chunk in b.recorded[:2]] == [{"front", "wrist"}] * 2


def test_warnings_are_said_and_kept(bench):
    b = bench(seconds=0.5)
    b.set(3, warnings=["gripper: 56 C"])
    log = b.loop.run()
    assert log.warnings == ["gripper: 56 C"]
    assert b.spoken("gripper: 56 C") == 1
    assert any("gripper: 56 C" in event for event in b.ticks[3].events)


# Chunks


@pytest.mark.parametrize("chunking", ["async", "rtc"])
def test_where_chunks_come_early_enough_the_arm_never_holds_again(bench, chunking):
    b = bench(chunking=chunking, seconds=20.0, latencies_s=[0.12, 0.02, 0.18, 0.14] * 99)
    log = b.loop.run()
    assert log.counts.starved == 0
    assert len(log.chunk_ms) > 60
    assert len(log.seams_deg) == len(log.chunk_ms) - 1


def test_rtc_hands_the_policy_the_rest_of_the_last_chunk_and_how_much_of_it_will_run(bench):
    b = bench(chunking="rtc", seconds=1.0)
    b.loop.run()
    first, second = b.policy.asked[:2]
    assert (first.prev_chunk, first.delay) == (None, 0)
    assert second.delay == 3  # 0.12 s of 0.05 s each
    assert second.prev_chunk[:, 0] == pytest.approx(rows_of(1)[ROWS - len(second.prev_chunk) :])


@pytest.mark.parametrize("chunking", ["sync", "async", "rtc"])
def test_a_slow_first_chunk_starts_at_its_first_row(bench, chunking):
    """F23."""
    b = bench(chunking=chunking, latencies_s=[0.93], seconds=0.4)
    b.loop.run()
    assert b.arm.of("send")[0] == 1.0
    assert b.arm.kinds.index("send") == 19  # a chunk is 8 ticks


def test_after_starvation_the_chunk_goes_on_where_the_arm_stopped(bench):
    """Eight rows: asked for with six left, all of them executed, then half a second of nothing."""
    other = np.float32([[n, n] for n in range(ROWS)])
    b = bench(chunking="async", latencies_s=[0.12, 0.8], seconds=0.98, answers=[None, other])
    log = b.loop.run()
    sent = b.arm.of("send")
    assert sent[:8] == rows_of(1)
    assert log.counts.starved == 10
    assert sent[8] == pytest.approx(6 - 10 / 11 * (5 - 1.07), abs=1e-4)  # row 6, eased in
    assert log.gaps_deg.values[0] == pytest.approx(5 - 1.07)
    assert log.seams_deg.values[0] == pytest.approx(sent[8] - 1.07, abs=1e-4)


def test_a_chunk_that_took_far_too_long_is_thrown_away_and_remembered(bench):
    b = bench(latencies_s=[0.12, *[1.5] * 9], seconds=8.0)
    log = b.loop.run()
    assert log.counts.late_chunks == 2  # a third one is how it is now
    assert b.spoken("thrown away: it came after 1.5") == 2
    assert b.arm.of("send")[:24] == rows_of(1, 4, 5)
    assert len(log.chunk_ms) == len(b.recorded) == log.counts.late_chunks + len(log.seams_deg) + 1


def test_a_chunk_that_waited_for_a_loop_that_was_held_up_is_just_as_late(bench):
    b = bench(seconds=3.0)
    b.set(2, pause_s=2.0)
    log = b.loop.run()
    assert log.counts.late_chunks == 1
    assert b.arm.of("send")[0] == 2.0
    assert b.queue.latency.p95_s == pytest.approx(0.12)  # the policy was not slow


def test_while_the_arm_ramps_the_first_action_waits_and_none_grows_old(bench):
    b = bench(seconds=4.0)
    b.set(1, ramp_ticks=30)  # over a second, four times what an action may be late
    log = b.loop.run()
    assert b.arm.of("ramp") == [1.0] * 29
    assert b.arm.of("send")[:8] == rows_of(1)
    assert b.arm.of("stale") == []
    assert log.counts.starved > 0


def test_actions_that_grew_old_are_dropped_and_a_fresh_chunk_is_asked_for(bench):
    """F22: the loop itself stood still for half a second in the middle of a chunk."""
    b = bench(seconds=2.0)
    b.arm.at(6, lambda: setattr(b.clock, "now", b.clock.now + 0.5))
    b.loop.run()
    assert b.arm.kinds[6:7] == ["stale"]
    assert b.arm.of("send")[:4] == [1.0, 1.01, 1.02, 2.0]
    assert len(b.arm.of("stale")) == 1
    assert b.policy.asked[1].time_s == pytest.approx(1000 + 6 * PERIOD_S + 0.5)  # in the very tick


def test_a_chunk_asked_for_before_the_actions_grew_old_is_not_executed(bench):
    b = bench(chunking="async", latencies_s=[0.12, 0.9], seconds=2.0)
    b.arm.at(7, lambda: setattr(b.clock, "now", b.clock.now + 0.3))
    b.loop.run()
    assert len(b.arm.of("stale")) == 1
    after = b.arm.of("send")[b.arm.kinds.index("stale") - 3 :]
    assert after[0] == 3.0


def test_an_action_the_arm_rejects_is_passed_over_and_told_once(bench):
    b = bench(seconds=1.0)
    b.set(4, reject="target jumps")
    b.set(6, reject="")
    log = b.loop.run()
    assert b.arm.of("send")[:6] == [1.0, *rows_of(1)[3:]]
    assert log.counts.rejected == 2
    assert b.spoken("rejected: target jumps") == 1
    assert sum("rejected" in event for tick in b.ticks for event in tick.events) == 2


def test_a_chunk_that_is_not_finite_is_thrown_away_whole(bench):
    """F18."""
    spoilt = np.full((ROWS, 2), 9, np.float32)
    spoilt[-1, 1] = np.inf
    b = bench(seconds=1.0, answers=[spoilt])
    log = b.loop.run()
    assert log.counts.bad_chunks == 1
    assert b.arm.of("send")[0] == 2.0


def test_three_chunks_in_ten_seconds_that_are_not_finite_end_the_run(bench):
    b = bench(answers=[BAD, None, BAD, None, BAD], latencies_s=[0.12] * 5)
    with pytest.raises(SafetyStop, match="3 chunks that are not finite"):
        b.loop.run()
    assert b.loop.parked
    assert b.arm.of("send") == rows_of(2, 4)


def test_three_in_a_longer_time_do_not(bench):
    b = bench(answers=[BAD, BAD, *[None] * 24, BAD], latencies_s=[0.12] * 40, seconds=20.0)
    log = b.loop.run()
    assert log.counts.bad_chunks == 3


def test_a_joint_that_did_not_answer_is_not_shown_to_the_policy(bench):
    b = bench(seconds=0.5)
    b.set(0, missed=(0, 1))
    b.set(7, missed=(0, 0))
    log = b.loop.run()
    assert log.counts.unanswered == 7
    assert b.policy.asked[0].time_s == pytest.approx(1000 + 7 * PERIOD_S)


# Cameras


def test_a_picture_with_a_problem_is_never_shown_to_the_policy(bench):
    """F24."""
    b = bench(seconds=0.5)
    b.set(0, problem="frozen")
    b.set(20, problem="")
    log = b.loop.run()
    assert log.counts.blind == 20
    assert log.picture_age_ms.values == pytest.approx([40.0] * 14)  # until the arm is parked
    assert b.policy.asked[0].time_s == pytest.approx(1000 + 20 * PERIOD_S)


def test_a_camera_that_is_of_no_use_for_two_seconds_ends_the_run_even_with_actions_left(bench):
    b = bench()
    b.arm.at(5, lambda: setattr(b.arm, "ramp_ticks", 10**6))  # the chunk lasts for ever
    b.set(10, problem="stalled")
    with pytest.raises(
        SafetyStop, match=r"camera 'front' has had no usable picture for 2 s: stalled"
    ):
        b.loop.run()
    assert b.loop.parked
    assert b.arm.kinds.index("park") == 10 + 40  # the last good one was seen at tick 9
    assert b.spoken("no usable picture") == 1


def test_short_problems_of_a_camera_do_not_add_up(bench):
    b = bench(seconds=8.0)
    for tick in range(0, 160, 40):
        b.set(tick, problem="stalled")
        b.set(tick + 39, problem="")
    assert b.loop.run().counts.blind > 100


def test_a_camera_may_be_mended_during_a_stop(bench):
    b = bench(seconds=8.0)
    b.press(5, "stop")
    b.set(6, problem="failed")
    b.set(105, problem="")
    b.press(100, "resume")
    b.loop.run()
    assert b.doing(90) == {"stop"}
    assert b.doing(110, 130) >= {"run"}


# Stops


def test_a_stop_is_latched_until_the_operator_resumes(bench):
    b = bench(seconds=3.0)
    b.press(6, "stop")
    b.press(30, "resume")
    log = b.loop.run()
    assert b.doing(6, 30) == {"stop"}
    assert set(b.arm.kinds[6:30]) == {"hold"}
    assert b.arm.kinds[30] == "resume"
    assert log.counts.stops == 1
    assert b.spoken("STOPPED: the operator pressed stop") == 1


def test_what_was_left_of_the_chunk_is_forgotten(bench):
    b = bench(seconds=3.0)
    b.press(6, "stop")
    b.press(30, "resume")
    b.loop.run()
    assert b.arm.of("send")[:5] == [1.0, 1.01, 1.02, 2.0, 2.01]
    assert len(b.policy.asked) >= 2
    assert b.policy.asked[1].time_s == pytest.approx(1000 + 30 * PERIOD_S)


@pytest.mark.parametrize("answered_tick", [8, 14])
def test_a_chunk_asked_for_before_a_stop_is_not_executed_after_it(bench, answered_tick):
    """Answered during the stop, or after it: the world it saw is gone either way."""
    b = bench(seconds=3.0, latencies_s=[answered_tick * PERIOD_S])
    b.press(2, "stop")
    b.press(10, "resume")
    log = b.loop.run()
    assert b.arm.of("send")[0] == 2.0
    assert len(log.chunk_ms) == len(b.recorded) == len(b.policy.asked) - 1
    assert b.doing(10, 12) == {"hold"}


@pytest.mark.parametrize("state", ["run", "hold", "ramp", "park"])
def test_the_stop_key_latches_whatever_the_arm_does(bench, state):
    """F38."""
    b = bench(seconds=0.3 if state == "park" else 5.0, latencies_s=[3.0] if state == "hold" else [])
    if state == "ramp":
        b.set(1, ramp_ticks=1000)
    b.press(11, "stop")
    for tick in range(12, 100):  # a key held down is one press
        b.press(tick, "stop")
    b.press(100 + AGAIN_TICKS, "stop")
    with pytest.raises(SafetyStop, match="switched the motors off") as stopped:
        b.loop.run()
    assert stopped.value.at_once
    assert b.arm.kinds[10] == {"run": "send"}.get(state, state)
    assert set(b.arm.kinds[11:]) == {"hold"}
    assert b.doing(11, 100 + AGAIN_TICKS) == {"stop"}
    assert not b.loop.parked


def test_the_first_press_during_a_stop_of_the_arms_own_drops_nothing(bench):
    """F38: whoever reaches for the key may not have seen that the fault was there first."""
    b = bench()
    b.set(5, stopped="elbow_flex: blocked")
    b.press(9, "stop", "stop")
    b.press(9 + AGAIN_TICKS, "stop")
    with pytest.raises(SafetyStop) as stopped:
        b.loop.run()
    assert stopped.value.at_once
    assert len(b.arm.told) == 9 + AGAIN_TICKS


def test_without_an_operator_a_stop_ends_the_run(bench):
    b = bench()
    b.keys.present = False
    b.set(5, stopped="gripper: overheat")
    with pytest.raises(SafetyStop, match="gripper: overheat") as stopped:
        b.loop.run()
    assert not stopped.value.at_once
    assert not b.loop.parked
    assert b.loop.statistics.counts.stops == 1
    assert b.spoken("r goes on") == 0


def test_an_operator_who_goes_away_during_a_stop_ends_the_run(bench):
    """The terminal is gone: nobody could ever resume, and the motors would be on for ever."""
    b = bench()
    b.set(5, stopped="gripper: overheat")
    b.arm.at(20, lambda: setattr(b.keys, "present", False))
    with pytest.raises(SafetyStop, match="gripper: overheat"):
        b.loop.run()
    assert b.loop.statistics.counts.stops == 1


def test_resume_is_refused_where_a_servo_is_off(bench):
    b = bench()
    b.arm.dead_joint = True
    b.press(5, "stop")
    b.press(10, "resume")
    b.press(15, "quit")  # it cannot park either: the run ends, with the motors lowered
    with pytest.raises(SafetyStop, match="wrist_roll is off") as stopped:
        b.loop.run()
    assert b.spoken("wrist_roll is off") == 1
    assert b.doing(5, 15) == {"stop"} and not stopped.value.at_once


def test_resume_and_unknown_moments_for_keys_do_nothing(bench):
    b = bench(seconds=1.0)
    b.press(5, "resume")
    b.press(22, "quit", "resume", "quit")
    b.loop.run()
    assert "resume" not in b.arm.kinds
    assert b.arm.kinds[-PARK_TICKS:] == ["park"] * PARK_TICKS
    assert b.spoken("parking") == 1


def test_the_time_of_a_run_does_not_end_a_stop(bench):
    b = bench(seconds=1.0)
    b.press(10, "stop")
    b.press(60, "resume")
    b.loop.run()
    assert b.doing(10, 60) == {"stop"}
    assert b.spoken("parking") == 1
    assert b.arm.kinds[-PARK_TICKS:] == ["park"] * PARK_TICKS


# Ways out


def test_q_parks_and_ends_the_run(bench):
    b = bench()
    b.press(8, "quit")
    b.loop.run()
    assert b.loop.parked
    assert b.arm.kinds[8:] == ["park"] * PARK_TICKS
    assert b.spoken("parking the arm, 0.2 s") == 1
    assert len(b.policy.asked) == 1  # nothing is asked for any more


def test_q_during_a_stop_resumes_to_park(bench):
    b = bench()
    b.set(5, stopped="elbow_flex: blocked")
    b.press(9, "quit")
    b.loop.run()
    assert b.arm.kinds[9:] == ["resume", *["park"] * PARK_TICKS]
    assert b.loop.parked


def test_a_first_ctrl_c_parks_and_then_interrupts(bench):
    """F25."""
    b = bench()
    b.set(8, asked_to_end=True)
    with pytest.raises(KeyboardInterrupt):
        b.loop.run()
    assert b.loop.parked
    assert b.arm.kinds[9:] == ["park"] * PARK_TICKS


def test_ctrl_c_while_q_parks_does_not_start_over(bench):
    b = bench()
    b.press(8, "quit")
    b.set(10, asked_to_end=True)
    b.loop.run()
    assert b.arm.kinds[8:] == ["park"] * PARK_TICKS


def test_ctrl_c_during_a_stop_moves_nothing(bench):
    b = bench()
    b.press(5, "stop")
    b.set(9, asked_to_end=True)
    with pytest.raises(KeyboardInterrupt):
        b.loop.run()
    assert not b.loop.parked
    assert "park" not in b.arm.kinds
    assert len(b.arm.told) == 10


@pytest.mark.parametrize("key", ["resume", "quit"])
def test_a_stop_while_parking_holds_and_then_parks_on(bench, key):
    """F38, and the outcome of the run is not forgotten."""
    b = bench()
    b.set(8, asked_to_end=True)
    b.press(11, "stop")
    b.press(20, key)
    with pytest.raises(KeyboardInterrupt):
        b.loop.run()
    assert b.arm.kinds[9:] == ["park"] * 2 + ["hold"] * 9 + ["resume"] + ["park"] * PARK_TICKS
    assert b.loop.parked


def test_a_stop_while_parking_without_an_operator_ends_the_run_at_once(bench):
    b = bench()
    b.keys.present = False
    b.set(8, asked_to_end=True)
    b.set(11, stopped="shoulder_lift: blocked")
    with pytest.raises(SafetyStop, match="shoulder_lift: blocked"):
        b.loop.run()
    assert not b.loop.parked
    assert len(b.arm.told) == 11


@pytest.mark.parametrize("kind", [BackendError, ValueError, SystemExit])
def test_a_policy_that_fails_parks_the_arm_and_ends_the_run(bench, kind):
    """F25: even by sys.exit in its thread."""
    b = bench(answers=[None, kind("out of memory")])
    with pytest.raises(SafetyStop, match="the policy failed: out of memory"):
        b.loop.run()
    assert b.loop.parked
    assert b.arm.kinds[-PARK_TICKS:] == ["park"] * PARK_TICKS
    assert b.spoken("out of memory") == 1


def test_a_policy_that_fails_during_a_stop_does_so_when_the_arm_goes_on(bench):
    b = bench(latencies_s=[0.4], answers=[BackendError("out of memory")])
    b.press(5, "stop")
    b.press(20, "resume")
    with pytest.raises(SafetyStop, match="out of memory"):
        b.loop.run()
    assert not any("parking" in event for tick in b.ticks[:21] for event in tick.events)
    assert b.loop.parked


def test_a_policy_that_never_answers_parks_the_arm_and_ends_the_run(bench):
    b = bench(latencies_s=[0.12, 1e9], patience_s=5.0)
    with pytest.raises(SafetyStop, match="the policy has not answered for 5 s"):
        b.loop.run()
    assert b.loop.parked
    asked_tick = round((b.policy.asked[1].time_s - 1000) / PERIOD_S)
    assert b.arm.kinds.index("park") - asked_tick in (100, 101)
    assert b.spoken("has not answered") == 1  # and not once more in every tick of the way


@pytest.mark.parametrize(
    ("method", "message"),
    [("read", "cannot be read: no answer"), ("send", "cannot be commanded: no answer")],
)
def test_an_arm_that_fails_ends_the_run_at_once(bench, method, message):
    b = bench()
    b.fail(method, 6)
    with pytest.raises(SafetyStop, match=message):
        b.loop.run()
    assert not b.loop.parked
    assert "park" not in b.arm.kinds


@pytest.mark.parametrize("method", ["read", "hold", "park"])
def test_so_it_is_while_holding_stopped_or_parking(bench, method):
    b = bench(seconds=0.3)
    if method == "hold":
        b.press(6, "stop")
    b.fail(method, 11)
    with pytest.raises(SafetyStop, match="no answer"):
        b.loop.run()
    assert not b.loop.parked
