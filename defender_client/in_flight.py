"""Several pieces of work at a time, their results in order, and never far ahead of whoever takes them.

The work is waiting for an oracle: threads serve it well. What is made for it (a batch drawn, a question asked) is made
by whoever iterates, in order and in one thread, so that nothing random depends on how much is in flight.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Crew:
    """Threads that work on at most `in_flight` tasks at a time; 1 works on them where they are iterated.

    Left with an error or without, it begins no further task, and does not wait for those under way: whoever they use
    (see `RemoteOracle.close`) does, and a second interrupt need not. Its threads therefore are daemons.

    Raises:
        ValueError: `in_flight` below 1.
    """

    def __init__(self, in_flight: int) -> None:
        if in_flight < 1:
            raise ValueError(f"at least one request is in flight at a time, not {in_flight}")
        self.in_flight = in_flight
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def in_order(self, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Results of the tasks in their order; the next tasks are made while earlier ones are worked on.

        At most 2 `in_flight` + 1 tasks are made whose results were not taken yet. The first failure, in the order of
        the tasks, is raised in its place; once one is known, no further task is made.
        """
        if self.in_flight == 1:
            for task in tasks:
                yield task()
            return
        source: Iterator[Callable[[], T]] | None = iter(tasks)
        made: deque[Future[T]] = deque()
        while True:
            open_ = [future for future in made if not future.done()]
            failed = any(future.done() and future.exception() is not None for future in made)
            if source is not None and not failed and len(open_) <= self.in_flight and len(made) <= 2 * self.in_flight:
                following = next(source, None)
                if following is None:
                    source = None
                else:
                    made.append(self._begin(following))
            elif not made:
                return
            elif made[0].done():
                yield made.popleft().result()
            else:
                wait(open_, return_when=FIRST_COMPLETED)

    def _begin(self, task: Callable[[], T]) -> Future[T]:
        if len(self._threads) < self.in_flight:
            self._threads.append(threading.Thread(target=self._work, name="in-flight", daemon=True))
            self._threads[-1].start()
        future: Future[T] = Future()
        self._tasks.put((future, task))
        return future

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            future, task = item
            if self._closed.is_set() or not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
            del item, future, task  # what a task holds is not kept until the next one comes

    def close(self) -> None:
        """Begin no further task."""
        self._closed.set()
        for _ in self._threads:
            self._tasks.put(None)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
