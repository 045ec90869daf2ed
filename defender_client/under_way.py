"""Requests that several threads are making: counted, and waited for at the end."""

from __future__ import annotations

import threading


class UnderWay:
    """The requests being made: a context for each."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._ended = False
        self._least: int | None = None

    def __enter__(self) -> None:
        with self._changed:
            if self._ended:
                raise RuntimeError("the oracle was closed: it cannot be asked any more")
            if self._count == 0:
                self._least = None
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def least(self, left: int) -> int:
        """The smallest such number since requests have been under way: answers may come in another order than their
        charges were made."""
        with self._changed:
            self._least = left if self._least is None else min(left, self._least)
            return self._least

    def end(self, seconds: float) -> None:
        """Let none begin any more, and wait, so long at most, until there is none."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: self._count == 0, seconds)
