"""How much may wait for the engine: a bounded queue, and who may take how much of it.

What does not fit is refused at once: a request that would wait for longer than anybody cares to is worth less than the
work of keeping it, and its sender can go elsewhere or come again.

A client may take as much as it would leave free (dynamic thresholds; Choudhury and Hahne, IEEE/ACM Transactions on
Networking 6(2), 1998, with alpha = 1):

    held by the client <= free,   hence with N clients that ask for all they can get, each has 1 / (N + 1) of the queue

so that one alone has half of it, and there is always room for one who comes new.

Used from the event loop only, so that a look and the step after it are never interrupted.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.wire.errors import Overloaded

_LEAST_S, _MOST_S = 1.0, 60.0  # of Retry-After
_CALLERS = 4096  # whose keys are remembered


@dataclass
class _Held:
    """What one client, or all of them, have in the queue."""

    requests: int = 0
    rows: int = 0


class Admission:
    """Counts the requests and rows that were let in and are not answered yet.

    Args:
        max_rows: of all requests. One request alone always fits: its own limit is not this one's matter.
        max_requests: at once.
        rate: the engine's rows a second, None while it is not known.
    """

    def __init__(self, max_rows: int, max_requests: int, rate: Callable[[], float | None] = lambda: None) -> None:
        self._max_rows, self._max_requests, self._rate = max_rows, max_requests, rate
        self._all = _Held()
        self._clients: dict[int, _Held] = {}
        self._callers: OrderedDict[bytes, tuple[int, str]] = OrderedDict()

    @property
    def rows(self) -> int:
        """Rows in the queue."""
        return self._all.rows

    @property
    def requests(self) -> int:
        """Requests in the queue; of those whose bodies are not read yet, too."""
        return self._all.requests

    def remember(self, authorization: bytes, client_id: int, name: str) -> None:
        """The caller that an Authorization header was found to be of. Only ever used to refuse him sooner."""
        self._callers[_digest(authorization)] = client_id, name
        if len(self._callers) > _CALLERS:
            self._callers.popitem(last=False)

    def recall(self, authorization: bytes) -> tuple[int, str] | None:
        """Id and name of the caller who last came with this header; it may have been revoked since."""
        return self._callers.get(_digest(authorization))

    def check(self, client_id: int | None, rows: int) -> None:
        """Raise `Overloaded` where a request of so many rows would not be let in.

        Args:
            client_id: None where it is not known yet: then only what holds for everybody is looked at.
            rows: or what is known of them; at least 1.
        """
        mine = self._clients.get(client_id, _Held()) if client_id is not None else _Held()
        self._check(mine, _Held(self._all.requests - mine.requests, self._all.rows - mine.rows), rows)

    @contextmanager
    def enter(self, client_id: int | None, rows: int, *, bounded: bool = True) -> Iterator[Place]:
        """Be in the queue for the time of an inference request.

        Args:
            client_id: whose it is; None where that is to be found out, and then `Place.claim`ed.
            rows: what is known of its rows before its body is read; at least 1.
            bounded: whether it must fit; not for what will be refused for another reason.

        Raises:
            Overloaded: it does not fit.
        """
        if bounded:
            self.check(client_id, rows)
        place = Place(self, client_id, rows)
        self._add(client_id, 1, rows)
        try:
            yield place
        finally:
            self._add(place.client_id, -1, -place.rows)

    def move(self, place: Place, client_id: int | None, rows: int) -> None:
        """Let a place be a client's, and of `rows` rows; raises `Overloaded` where that does not fit."""
        self._add(place.client_id, -1, -place.rows)
        try:
            if client_id != place.client_id or rows > place.rows:
                self.check(client_id, rows)
            place.client_id, place.rows = client_id, rows
        finally:
            self._add(place.client_id, 1, place.rows)

    def _add(self, client_id: int | None, requests: int, rows: int) -> None:
        held = [self._all]
        if client_id is not None:
            held.append(self._clients.setdefault(client_id, _Held()))
        for each in held:
            each.requests += requests
            each.rows += rows
        if client_id is not None and not held[-1].requests:
            del self._clients[client_id]

    def _check(self, mine: _Held, others: _Held, rows: int) -> None:
        """Whether a request of `rows` rows fits beside its client's own requests and the others'."""
        if not mine.requests and not others.requests:
            return
        # The first of a client takes what room there is, so that a large one is not kept out for ever.
        factor = 2 if mine.requests else 1
        if factor * (mine.requests + 1) + others.requests > self._max_requests:
            raise self._overloaded("requests")
        if factor * (mine.rows + rows) + others.rows > self._max_rows:
            raise self._overloaded("rows")

    def _overloaded(self, what: str) -> Overloaded:
        rate = self._rate()
        # Half of what waits: until then there will be room, and the engine does not run dry before they come again.
        seconds = self._all.rows / 2 / rate if rate else _LEAST_S
        return Overloaded(
            f"there are more {what} than can be answered soon: try again later; nothing was charged",
            retry_after=min(max(seconds, _LEAST_S), _MOST_S),
        )


class Place:
    """One request's place in the queue: whose it is, and for how many rows it counts now."""

    def __init__(self, admission: Admission, client_id: int | None, rows: int) -> None:
        self.client_id, self.rows = client_id, rows
        self._admission = admission

    def claim(self, client_id: int) -> None:
        """Count it for a client, now that its key was looked up; raises `Overloaded` where it has its share already."""
        self._admission.move(self, client_id, self.rows)

    def resize(self, rows: int) -> None:
        """Count it for `rows` rows, as the body says; raises `Overloaded` where they do not fit."""
        self._admission.move(self, self.client_id, rows)


def _digest(authorization: bytes) -> bytes:
    # The key itself is nowhere kept.
    return hashlib.sha256(authorization).digest()
