"""How much of all bodies together may be in memory at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shared.wire.errors import Unavailable

_RETRY_AFTER_S = 1.0


class BodyRoom:
    """Bytes for the bodies of the requests in flight; used from any thread.

    Args:
        size: bytes in all. One body alone always finds room: its own limit is not this one's matter.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes held now."""
        return self._taken

    @contextmanager
    def share(self) -> Iterator[Share]:
        """One request's part of the room, given back at the end of the block."""
        share = Share(self)
        try:
            yield share
        finally:
            with self._lock:
                self._taken -= share.bytes

    def take(self, share: Share, size: int) -> None:
        """Let a share grow by `size` bytes; raises `Unavailable` where others leave no room for it."""
        with self._lock:
            others = self._taken - share.bytes
            if others and self._taken + size > self._size:
                raise Unavailable(
                    "the bodies of other requests take all the room there is: try again soon",
                    retry_after=_RETRY_AFTER_S,
                )
            self._taken += size
            share.bytes += size


class Share:
    """What one request holds of the room."""

    def __init__(self, room: BodyRoom) -> None:
        self.bytes = 0
        self._room = room

    def take(self, size: int) -> None:
        """Hold `size` bytes more; raises `Unavailable` where there is no room."""
        self._room.take(self, size)
