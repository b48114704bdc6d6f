"""One worker thread: it makes calls in the order in which they were submitted."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs submitted calls one by one in a daemon thread. At most about `limit` calls wait."""

    def __init__(self, name: str, limit: int) -> None:
        self._limit = limit
        # SimpleQueue.put may be called from a signal handler; Queue.put may not.
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Calls that have not begun."""
        return self._calls.qsize()

    def submit(self, call: Callable[[], T]) -> "Future[T] | None":
        """Returns at once: the call's result, or what it raised, is in the Future. None: no room.

        Also from a signal handler.
        """
        if self.waiting >= self._limit:
            return None
        future: Future[T] = Future()
        self._calls.put((call, future))
        return future

    def wait(self, timeout_s: float) -> bool:
        """Wait until every call submitted so far is made; False: not within `timeout_s`."""
        done = threading.Event()
        self._calls.put((done.set, Future()))
        return done.wait(timeout_s)

    def stop(self, timeout_s: float = 0.0) -> bool:
        """End the thread after the calls that wait; False: it has not ended within `timeout_s`.

        May be called again.
        """
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _serve(calls: "queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]") -> None:
    while (item := calls.get()) is not None:
        call, future = item
        try:
            future.set_result(call())
        except BaseException as e:  # raised again by Future.result()
            future.set_exception(e)
        # Otherwise this thread would keep the last call and its traceback alive.
        del item, call, future
