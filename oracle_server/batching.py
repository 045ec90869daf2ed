"""Dynamic batching: the rows of requests that wait together are computed together, a block at a time.

One thread, or two that take turns, fills blocks and computes them. The order is decided anew for each block, by *fair
sojourn* (Friedman and Henderson, "Fairness and efficiency in web server protocols", SIGMETRICS 2003): requests are
served one after the other, in the order in which they would end if the engine were shared by all of them at once. So
each is answered no later than if it had its share of the engine all the time, plus the blocks that were begun when it
came; a small request overtakes a large one, equal ones are served in the order they came, and nobody starves: when a
request is due is fixed when it comes, and whoever comes later is due ever later.

The shares are the clients': one that has k requests here has a k-th of a share for the newest of them, so that many
connections get no more than one.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from oracle_server.rows import Float32, Rows

log = logging.getLogger(__name__)
_DECAY = 0.9  # of what is known of the engine's speed, for each block


class FairOrder:
    """When each request would end if all of them were computed at the same time, each at the rate of its weight.

    Time is virtual (weighted fair queueing; Parekh and Gallager, IEEE/ACM Transactions on Networking 1(3), 1993): it
    passes at the rate of rows of a request of weight 1.

        dV/dt = 1 / sum_i w_i,   over the requests with V < F_i          (their equation 8)
        F = V(arrival) + n / w,  of a request of n rows and weight w
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._sharing: list[tuple[float, float]] = []  # a heap of (F, w)
        self._weights = 0.0

    def due(self, rows: int, weight: float) -> float:
        """F of a request that comes now."""
        finish = self._now + rows / weight
        heapq.heappush(self._sharing, (finish, weight))
        self._weights += weight
        return finish

    def advance(self, rows: int) -> None:
        """So many rows have been computed."""
        left = float(rows)
        while self._sharing:
            finish, weight = self._sharing[0]
            until = (finish - self._now) * self._weights
            if until > left:
                self._now += left / self._weights
                return
            left -= until
            self._now = finish
            heapq.heappop(self._sharing)
            self._weights -= weight
        self._weights = 0.0

    def reset(self) -> None:
        """Nobody is there any more."""
        self._now, self._weights = 0.0, 0.0
        self._sharing.clear()


@dataclass(order=True)
class _Request:
    """A request that waits, or is computed in part. Ordered by when it is due, then by when it came."""

    due: float
    number: int
    rows: Rows = field(compare=False)
    client: Hashable = field(compare=False)
    future: Future[Float32] = field(compare=False)
    came: float = field(compare=False)
    taken: int = field(default=0, compare=False)  # rows that were put into blocks
    done: int = field(default=0, compare=False)  # rows whose logits are known
    logits: Float32 | None = field(default=None, compare=False)
    ended: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class _Part:
    """The rows `start` to `stop` of a request, in a block."""

    request: _Request
    start: int
    stop: int


class Batcher:
    """Computes the logits of many requests, in blocks that they share. Methods may be called from any thread.

    Args:
        predict: images float32 [n, c, h, w], n <= block -> logits float32 [n, k]. Called by
            `lanes` threads.
        block: most rows of a call.
        lanes: calls of `predict` at a time. Two are for an engine of several threads, none of which then waits for the
            others between two blocks, nor for the next block to be put together.
        wait: seconds for which an idle engine waits for company before it computes less than a block.
        on_block: called with the rows and the seconds of every call that succeeded.
        on_start: called with the seconds that a request waited until its first rows were taken.
    """

    def __init__(
        self,
        predict: Callable[[Float32], Float32],
        block: int,
        *,
        lanes: int = 1,
        wait: float = 0.0,
        on_block: Callable[[int, float], object] = lambda _rows, _seconds: None,
        on_start: Callable[[float], object] = lambda _seconds: None,
    ) -> None:
        self._predict, self._block, self._wait = predict, block, wait
        self._on_block, self._on_start = on_block, on_start
        self._changed = threading.Condition()
        # Everything below is touched under the condition's lock.
        self._waiting: list[_Request] = []  # a heap
        self._rows = 0  # of `_waiting`, that were not taken yet
        self._unfinished: Counter[Hashable] = Counter()
        self._order = FairOrder()
        self._numbers = itertools.count()
        self._recent_rows = self._recent_seconds = self._last_end = 0.0
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"lane-{n}", daemon=True) for n in range(lanes)]
        for thread in self._threads:
            thread.start()

    def submit(self, rows: Rows, client: Hashable = None) -> Future[Float32]:
        """Queue a request; the future has its logits [n, k] as soon as its last row is computed.

        It raises what `rows.images` or the engine raised for its rows, not for others'. Once it is cancelled, rows that
        are not in a block yet are not computed.
        """
        if not len(rows):
            raise ValueError("a request has at least one row")
        future: Future[Float32] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._unfinished[client] += 1
            due = self._order.due(len(rows), 1 / self._unfinished[client])
            request = _Request(due, next(self._numbers), rows, client, future, time.monotonic())
            heapq.heappush(self._waiting, request)
            self._rows += len(rows)
            self._changed.notify()
        return future

    @property
    def rate(self) -> float | None:
        """Rows a second, of late and while it computes; None before the first block."""
        with self._changed:
            return self._recent_rows / self._recent_seconds if self._recent_seconds else None

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while self._await_work():
            made = self._assemble(self._take())
            if made:
                self._compute(made)

    def _compute(self, made: list[tuple[_Part, Float32]]) -> None:
        """Compute a block. Where that fails, the parts are tried alone: one may have brought it upon the others."""
        rows = sum(part.stop - part.start for part, _ in made)
        start = time.perf_counter()
        try:
            logits = self._predict(made[0][1] if len(made) == 1 else np.concatenate([images for _, images in made]))
            if len(logits) != rows:
                raise ValueError(f"the engine answered {len(logits)} rows to {rows}")
        except BaseException as error:
            if len(made) == 1:
                self._end(made[0][0].request, error)
                return
            for single in made:
                self._compute([single])
            return
        with self._changed:
            # Of two blocks at a time, the second's seconds are those that it took beyond the first.
            end = time.perf_counter()
            seconds, self._last_end = end - max(start, self._last_end), end
            self._recent_rows = _DECAY * self._recent_rows + rows
            self._recent_seconds = _DECAY * self._recent_seconds + seconds
        self._on_block(rows, seconds)
        self._deliver([part for part, _ in made], logits)

    def _await_work(self) -> bool:
        """Sleep until a block should be computed; False once there will be none."""
        with self._changed:
            if not self._waiting:
                self._order.reset()
                while not self._waiting:
                    if self._closed:
                        return False
                    self._changed.wait()
                # Only here: behind a block that was computed, company has had its time to come.
                deadline = self._waiting[0].came + self._wait
                while self._rows < self._block and not self._closed:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
            return True

    def _take(self) -> list[_Part]:
        """The rows of the next block: of whoever is due first, then of the next, until it is full."""
        parts: list[_Part] = []
        room = self._block
        now = time.monotonic()
        with self._changed:
            while room and self._waiting:
                request = self._waiting[0]
                left = len(request.rows) - request.taken
                if request.future.done():  # cancelled, or it has failed
                    heapq.heappop(self._waiting)
                    self._rows -= left
                    self._forget(request)
                    continue
                if not request.taken:
                    self._on_start(now - request.came)
                rows = min(room, left)
                parts.append(_Part(request, request.taken, request.taken + rows))
                request.taken += rows
                room -= rows
                self._rows -= rows
                if rows == left:
                    heapq.heappop(self._waiting)
            self._order.advance(self._block - room)
            if self._waiting:
                self._changed.notify()  # the other lane: whoever came woke one
        return parts

    def _assemble(self, parts: list[_Part]) -> list[tuple[_Part, Float32]]:
        """The images of each part; a request whose images cannot be made fails alone."""
        made = []
        for part in parts:
            try:
                images = part.request.rows.images(part.start, part.stop)
            except BaseException as error:
                self._end(part.request, error)
            else:
                made.append((part, images))
        return made

    def _deliver(self, parts: list[_Part], logits: Float32) -> None:
        at = 0
        for part in parts:
            request, rows = part.request, part.stop - part.start
            piece = logits[at : at + rows]
            at += rows
            if rows == len(request.rows):
                request.logits = piece.copy()  # not a view, which would keep the whole block's
            else:
                with self._changed:
                    if request.logits is None:
                        request.logits = np.empty((len(request.rows), *logits.shape[1:]), logits.dtype)
                request.logits[part.start : part.stop] = piece
            with self._changed:
                request.done += rows
            if request.done == len(request.rows):
                self._end(request, None)

    def _end(self, request: _Request, error: BaseException | None) -> None:
        """Tell whoever waits; what is left in the queue of a request that failed is dropped when its turn comes."""
        with self._changed:
            if request.ended:  # two of its parts failed, in two blocks at a time
                return
            request.ended = True
        if request.future.set_running_or_notify_cancel():
            if error is not None:
                request.future.set_exception(error)
            else:
                assert request.logits is not None  # noqa: S101  (said to mypy)
                request.future.set_result(request.logits)
        with self._changed:
            if request.taken == len(request.rows):
                self._forget(request)

    def _forget(self, request: _Request) -> None:
        self._unfinished[request.client] -= 1
        if not self._unfinished[request.client]:
            del self._unfinished[request.client]
