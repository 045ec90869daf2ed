"""Who may enter: nobody while the server drains, and each Idempotency-Key only once at a time.

Used from the event loop only, so that a look and the step after it are never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shared.wire.errors import RequestInFlight, Unavailable

_RETRY_AFTER_S = 1.0


class Gate:
    """Counts the inference requests inside, and closes when the server is told to stop."""

    def __init__(self) -> None:
        self._inside = 0
        self._keys: set[tuple[int, str]] = set()
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether the gate is closed for good."""
        return self._draining

    @property
    def idle(self) -> bool:
        """Whether nobody is inside."""
        return self._inside == 0

    def close(self) -> None:
        """Let nobody in any more; those inside may finish."""
        self._draining = True

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside for the time of an inference request. Raises `Unavailable` while draining."""
        self.check()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def check(self) -> None:
        """Raise `Unavailable` while draining."""
        if self._draining:
            raise Unavailable("the server is shutting down: try again, here or elsewhere", retry_after=_RETRY_AFTER_S)

    @contextmanager
    def hold(self, client_id: int, idempotency_key: str | None) -> Iterator[None]:
        """Hold a client's idempotency key, if there is one. Raises `RequestInFlight` where it is held already."""
        if idempotency_key is None:
            yield
            return
        held = (client_id, idempotency_key)
        if held in self._keys:
            raise RequestInFlight(
                "a request with this Idempotency-Key is being answered now: its answer can be had for free afterwards",
                retry_after=_RETRY_AFTER_S,
            )
        self._keys.add(held)
        try:
            yield
        finally:
            self._keys.discard(held)
