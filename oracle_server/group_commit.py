"""Group commit: what waits while one transaction reaches the disk goes into the next one, all of it.

One thread writes. A caller that comes alone is served at once; callers that come together share one transaction, and so
one wait for the disk (DeWitt et al., "Implementation techniques for main memory database systems", SIGMOD 1984).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_MOST = 512  # operations in a transaction: a bound on how long the first of them waits


class GroupCommit(Generic[T]):
    """Hands operations in groups to `apply`, in the order they came.

    Args:
        apply: performs a group in one durable transaction and returns an outcome for each operation, in order: a value,
            or an exception that is raised to whoever waits for it. It raises only where nothing at all was done.
        alone: exceptions of `apply` that one operation may have brought upon its group: each is then tried alone.
            Any other exception is everybody's.
        name: the thread's.
    """

    def __init__(
        self,
        apply: Callable[[Sequence[T]], Sequence[object]],
        *,
        alone: tuple[type[Exception], ...] = (),
        name: str = "group-commit",
    ) -> None:
        self._apply = apply
        self._alone = alone
        self._waiting: queue.SimpleQueue[tuple[T, Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, operation: T) -> Future[Any]:
        """Queue an operation; the future has its outcome once it is durable. It cannot be taken back."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise RuntimeError("the ledger is closed")
            self._waiting.put((operation, future))
        return future

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            group = self._next()
            if group is None:
                return
            self._serve(group)

    def _next(self) -> list[tuple[T, Future[Any]]] | None:
        first = self._waiting.get()
        if first is None:
            return None
        group = [first]
        while len(group) < _MOST:
            try:
                another = self._waiting.get_nowait()
            except queue.Empty:
                break
            if another is None:
                self._waiting.put(None)  # for the next round
                break
            group.append(another)
        return group

    def _serve(self, group: list[tuple[T, Future[Any]]]) -> None:
        try:
            outcomes = self._apply([operation for operation, _ in group])
        except Exception as error:
            if len(group) > 1 and isinstance(error, self._alone):
                for single in group:
                    self._serve([single])
                return
            outcomes = [error] * len(group)
        for (_, future), outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
