"""Chunks joined to one another, with a hand-cranked clock and no policy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvla_edge.runtime.robot import chunks
from smolvla_edge.runtime.robot.chunks import BLEND_ROWS, CHUNKINGS, ChunkQueue, LatencyTracker

FPS = 30.0
PERIOD_S = 1 / FPS


def tracker(*seconds):
    latency = LatencyTracker()
    for s in seconds:
        latency.add(s)
    return latency


def queue_of(chunking, rows=50, latency_s=0.2):
    return ChunkQueue(CHUNKINGS[chunking], rows, PERIOD_S, tracker(latency_s))


def line(first, rows=50, step=1.0):
    """A chunk of two joints: first, first + step, ..."""
    return np.float32(first + step * np.arange(rows))[:, None] * np.ones(2, np.float32)


def execute(queue, count):
    """-> the values of the next `count` actions, [count, dof]."""
    done = []
    for _ in range(count):
        done.append(queue.next.values)
        queue.done()
    return np.array(done)


def halfway(chunking, meanwhile=6, first=None):
    """A queue that has executed half of line(0), asked, and then executed `meanwhile` more; -> (it,
    the ask, the last action)."""
    queue = queue_of(chunking)
    queue.join(line(0) if first is None else first, queue.continuation(), 0.0)
    execute(queue, 25)
    ask = queue.continuation()
    done = execute(queue, meanwhile)
    return queue, ask, done[-1] if meanwhile else line(0)[24]


def test_sync_executes_every_row_and_asks_when_none_is_left():
    queue = queue_of("sync", rows=3)
    assert queue.wants_chunk
    queue.join(line(0), queue.continuation(), 5.0)
    assert [a.due_s for a in queue._actions] == pytest.approx(
        [5.0, 5.0 + PERIOD_S, 5.0 + 2 * PERIOD_S]
    )
    assert execute(queue, 2)[:, 0].tolist() == [0, 1]
    assert not queue.wants_chunk
    assert execute(queue, 1)[:, 0].tolist() == [2]
    assert queue.wants_chunk
    assert queue.continuation().prev_chunk is None


@pytest.mark.parametrize("chunking", ["sync", "async", "rtc"])
@pytest.mark.parametrize("periods", [1, 40, 1000])
def test_from_standstill_a_chunk_starts_at_its_first_row_however_late_it_is(chunking, periods):
    """F23: LeRobot has taken a slow first inference for executed steps and skipped 21 of 30
    actions."""
    queue = queue_of(chunking)
    queue.join(line(7), queue.continuation(), periods * PERIOD_S)
    assert len(queue) == 50
    assert execute(queue, 50)[:, 0].tolist() == line(7)[:, 0].tolist()


@pytest.mark.parametrize("chunking", ["async", "rtc"])
def test_after_starvation_the_next_chunk_goes_on_where_the_arm_stopped(chunking):
    # All of it, and then nothing for as long as you like
    queue, ask, last = halfway(chunking, meanwhile=25)
    assert queue.next is None
    assert last[0] == 49
    queue.join(line(25), ask, 1000.0)
    assert len(queue) == 25
    assert queue.next.values[0] == 50


@pytest.mark.parametrize("chunking", ["async", "rtc"])
@pytest.mark.parametrize("meanwhile", [1, 6, 24])
def test_rows_are_counted_in_executed_actions(chunking, meanwhile):
    queue, ask, _ = halfway(chunking, meanwhile)
    queue.join(line(25), ask, 99.0)
    assert len(queue) == 50 - meanwhile
    assert execute(queue, 5)[:, 0] == pytest.approx(25 + meanwhile + np.arange(5))


def test_a_chunk_that_comes_after_all_of_its_rows_leaves_nothing_to_do():
    queue = ChunkQueue(CHUNKINGS["async"], 10, PERIOD_S, tracker(0.1))
    queue.join(line(0), queue.continuation(), 0.0)
    ask = queue.continuation()
    execute(queue, 10)
    assert queue.join(line(0), ask, 0.0) is None
    assert queue.wants_chunk


def test_async_eases_in_from_the_last_executed_action():
    queue, ask, last = halfway("async")
    other = line(25 + 22)  # 22 away from what is executed now
    seam = queue.join(other, ask, 0.0)
    plain = other[6] - last
    assert plain.tolist() == [23, 23]  # what a plain replacement would do in one tick
    assert seam.gap.tolist() == [-22, -22]
    # As it will be executed
    assert seam.step.tolist() == pytest.approx([1 + 22 / (BLEND_ROWS + 1)] * 2)
    done = execute(queue, BLEND_ROWS + 5)
    steps = np.abs(np.diff(np.vstack([last, done]), axis=0))
    assert steps.max() == pytest.approx(1 + 22 / (BLEND_ROWS + 1), abs=1e-4)
    # And then it is the new chunk, exactly
    assert np.array_equal(done[BLEND_ROWS:], other[6 + BLEND_ROWS :][:5])


@pytest.mark.parametrize("chunking", ["async", "rtc"])
@pytest.mark.parametrize("meanwhile", [0, 1, 6])
def test_a_chunk_that_agrees_with_the_last_one_changes_nothing(chunking, meanwhile):
    curve = np.float32(40 * np.sin(np.arange(100) / 9))[:, None] * np.ones(2, np.float32)
    queue, ask, _ = halfway(chunking, meanwhile, first=curve[:50])
    queue.join(curve[25:75], ask, 0.0)
    assert np.array_equal(execute(queue, 40), curve[25 + meanwhile :][:40])


def test_a_chunk_so_fast_that_nothing_was_executed_meanwhile_is_eased_in_too():
    queue, ask, last = halfway("async", meanwhile=0)
    queue.join(line(25 + 22), ask, 0.0)
    steps = np.abs(np.diff(np.vstack([last, execute(queue, 20)]), axis=0))
    assert steps.max() <= 1 + 22 / (BLEND_ROWS + 1) + 1e-4


@given(
    old=st.lists(st.floats(-100, 100, width=32), min_size=50, max_size=50),
    new=st.lists(st.floats(-100, 100, width=32), min_size=50, max_size=50),
    meanwhile=st.integers(1, 24),
)
def test_an_async_seam_is_bounded_by_the_chunks_own_step_and_a_share_of_the_gap(
    old, new, meanwhile
):
    first, second = (np.float32(x)[:, None] for x in (old, new))
    queue, ask, last = halfway("async", meanwhile, first=first)
    queue.join(second, ask, 0.0)
    own = abs(second[meanwhile] - second[meanwhile - 1])
    gap = abs(last - second[meanwhile - 1])
    assert abs(queue.next.values - last) <= own + gap / (BLEND_ROWS + 1) + 1e-3


def test_sync_never_eases():
    queue, ask, _ = halfway("sync")
    queue.join(line(200), ask, 0.0)
    assert queue.next.values[0] == 206


def test_rtc_hands_over_the_unexecuted_tail_as_predicted_and_the_p95_delay():
    queue = ChunkQueue(CHUNKINGS["rtc"], 20, PERIOD_S, tracker(0.11))  # executes 20 of 50 rows
    assert queue.continuation().prev_chunk is None
    queue.join(line(0), queue.continuation(), 0.0)
    execute(queue, 12)
    ask = queue.continuation()
    assert ask.prev_chunk.dtype == np.float32
    assert np.array_equal(ask.prev_chunk, line(0)[12:])  # also what is predicted and never executed
    assert ask.delay == math.ceil(0.11 * FPS) == 4


def test_the_tail_is_not_what_easing_made_of_it():
    queue, ask, _ = halfway("rtc", meanwhile=12)  # 6 were expected
    other = line(60)
    queue.join(other, ask, 0.0)
    assert not np.array_equal(queue.next.values, other[12])
    assert np.array_equal(queue.continuation().prev_chunk, other[12:])


def test_rtc_eases_only_a_chunk_that_came_later_than_it_was_told():
    for meanwhile, eased in ((6, False), (7, True)):  # 0.2 s are 6 periods
        queue, ask, _ = halfway("rtc", meanwhile)
        assert ask.delay == 6
        other = line(60)
        queue.join(other, ask, 0.0)
        assert np.array_equal(queue.next.values, other[meanwhile]) is not eased


def test_the_delay_is_never_longer_than_the_tail():
    queue = ChunkQueue(CHUNKINGS["rtc"], 50, PERIOD_S, tracker(10.0))
    queue.join(line(0), queue.continuation(), 0.0)
    execute(queue, 47)
    assert queue.continuation().delay == 3


def test_a_starved_rtc_asks_without_a_tail():
    queue, _, _ = halfway("rtc", meanwhile=25)
    assert queue.continuation() == chunks.Continuation(executed=50, prev_chunk=None, delay=0)


def test_what_the_arm_rejected_was_not_executed():
    queue, ask, last = halfway("async", meanwhile=3)
    queue.done(followed=False)
    queue.done(followed=False)
    assert len(queue) == 20
    seam = queue.join(line(25), ask, 0.0)
    assert queue.next.values[0] == 28  # the third row after the ask, not the fifth
    assert seam.gap.tolist() == (last - line(25)[2]).tolist()


def test_while_the_arm_is_on_its_way_the_whole_schedule_waits():
    queue = queue_of("sync", rows=3)
    queue.join(line(0), queue.continuation(), 5.0)
    for _ in range(7):
        queue.wait()
    assert [a.due_s for a in queue._actions] == pytest.approx(
        [5 + (7 + i) * PERIOD_S for i in range(3)]
    )
    assert execute(queue, 3)[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("chunking", ["async", "rtc"])
def test_after_a_stop_nothing_of_the_past_is_left(chunking):
    queue, _, _ = halfway(chunking)
    queue.clear()
    assert len(queue) == 0
    assert queue.wants_chunk
    ask = queue.continuation()
    assert ask.prev_chunk is None
    assert queue.join(line(500), ask, 0.0) is None  # no seam
    assert queue.next.values[0] == 500  # no easing: the arm approaches it slowly


def run_queue(queue, latencies_s, *, work_s=0.005):
    """One action a tick, asking and joining like the control loop; -> ticks without an action since
    the first."""
    starved, now_s, under_way, acted = 0, 0.0, None, False
    latencies = iter(latencies_s)
    while True:
        if under_way and under_way[1] <= now_s:
            ask, _, latency_s = under_way
            queue.latency.add(latency_s)
            queue.join(line(0), ask, now_s)
            under_way = None
        if queue.next is not None:
            queue.done()
            acted = True
        else:
            starved += acted
        if under_way is None and queue.wants_chunk:
            latency_s = next(latencies, None)
            if latency_s is None:
                return starved
            under_way = queue.continuation(), now_s + work_s + latency_s, latency_s
        now_s += PERIOD_S


@pytest.mark.parametrize("chunking", ["async", "rtc"])
@pytest.mark.parametrize(
    ("share", "spike"), [(0.02, 0.51), (0.2, 0.51), (0.3, 0.59), (0.4, 0.58), (0.47, 0.51)]
)
def test_no_tick_starves_where_a_chunk_takes_under_half_of_what_it_lasts(chunking, share, spike):
    """300 chunks around `share` of the 1.67 s that one lasts, every 40th a spike of more than half
    of it."""
    lasts_s = 50 * PERIOD_S
    latencies = lasts_s * share * np.random.default_rng(1).uniform(0.8, 1.04, 300)
    latencies[39::40] = spike * lasts_s
    queue = ChunkQueue(CHUNKINGS[chunking], 50, PERIOD_S, tracker(latencies[0]))
    assert run_queue(queue, latencies) == 0


def test_sync_starves_at_every_chunk():
    queue = queue_of("sync", latency_s=0.2)
    assert run_queue(queue, [0.2] * 11) == 10 * 6  # the first one moves nothing yet


def test_an_early_spike_starves_once_and_not_for_the_next_twenty_chunks():
    spike = [0.2, 3.0, *[0.2] * 40]
    assert run_queue(queue_of("async"), spike) <= 3.0 * FPS


def test_where_a_chunk_takes_longer_than_half_the_next_is_asked_for_when_none_is_left():
    queue = queue_of("async", latency_s=0.51 * 50 * PERIOD_S)
    assert not queue.keeps_up
    queue.join(line(0), queue.continuation(), 0.0)
    execute(queue, 49)
    assert not queue.wants_chunk
    execute(queue, 1)
    assert queue.wants_chunk


def test_nothing_is_known_before_the_first_latency():
    latency = LatencyTracker()
    assert latency.p95_s == math.inf
    assert not latency.is_late(60.0)
    assert not ChunkQueue(CHUNKINGS["async"], 50, PERIOD_S, latency).keeps_up


def test_p95_follows_the_newest_fifty():
    latency = tracker(*[9.0] * 50, *[0.1] * 47)
    assert latency.p95_s == pytest.approx(0.1)
    assert tracker(*[0.1] * 18, 0.7, 0.8).p95_s == pytest.approx(0.7)


def test_late_is_over_a_second_and_over_three_times_the_usual():
    assert not tracker(0.1).is_late(0.9)
    assert tracker(0.1).is_late(1.1)
    assert not tracker(2.0).is_late(5.9)
    assert tracker(2.0).is_late(6.1)


def test_the_seam_in_degrees_is_the_widest_of_the_joints_that_have_any():
    assert chunks.degrees(np.float32([3, -4, 90]), [1.0, 2.0, 0.0]) == 8.0
