"""The worker thread: order, bound, results, end."""

import threading
import weakref

import pytest

from smolvla_edge.core.worker import Worker

LIMIT_S = 30.0


@pytest.fixture
def gate():
    opened = threading.Event()
    yield opened
    opened.set()


def test_calls_are_made_in_their_order_and_their_results_can_be_waited_for():
    worker, made = Worker("test", 100), []
    futures = [worker.submit(lambda i=i: made.append(i) or 2 * i) for i in range(100)]
    assert [f.result(LIMIT_S) for f in futures] == [2 * i for i in range(100)]
    assert made == list(range(100))
    assert worker.stop(LIMIT_S)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_a_call_raises_is_in_its_future_and_the_next_call_is_made(kind):
    worker = Worker("test", 10)

    def fail():
        raise kind("broken")

    assert isinstance(worker.submit(fail).exception(LIMIT_S), kind)
    assert worker.submit(lambda: 7).result(LIMIT_S) == 7
    assert worker.stop(LIMIT_S)


def test_a_call_that_finds_no_room_is_refused_at_once(gate):
    worker = Worker("test", 2)
    running = threading.Event()
    worker.submit(lambda: running.set() or gate.wait(LIMIT_S))
    assert running.wait(LIMIT_S)
    assert [worker.submit(int) is not None for _ in range(3)] == [True, True, False]
    assert worker.waiting == 2
    assert not worker.wait(0.01)
    gate.set()
    assert worker.wait(LIMIT_S)
    assert worker.waiting == 0
    assert worker.stop(LIMIT_S)


def test_stopping_does_not_wait_longer_than_told_and_finishes_what_waits(gate):
    worker, made = Worker("test", 10), []
    worker.submit(lambda: gate.wait(LIMIT_S))
    worker.submit(lambda: made.append(1))
    assert not worker.stop(0.01)
    gate.set()
    assert worker.stop(LIMIT_S)
    assert made == [1]
    assert worker.stop(0.0)


def test_a_finished_call_is_not_kept_alive():
    class Large:
        def __call__(self):
            raise ValueError("with a traceback")

    worker, call = Worker("test", 10), Large()
    kept = weakref.ref(call)
    future = worker.submit(call)
    assert worker.wait(LIMIT_S)
    del call, future
    assert kept() is None
    worker.stop(LIMIT_S)
