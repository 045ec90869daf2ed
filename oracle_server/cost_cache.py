"""Values that are dear to compute are kept for longer, so that asking for them often costs no more than asking now and
then."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
_AT_LEAST_S = 1.0
_SHARE = 0.05  # of the time that may be spent on computing one value again


class CostCache(Generic[T]):
    """Keeps each value for a second, or for as long as makes its computation 5 % of the time. For one thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[Hashable, tuple[float, T]] = {}

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of this key, computed where none is kept or it is too old."""
        begun = self._clock()
        if key in self._kept and begun < self._kept[key][0]:
            return self._kept[key][1]
        value = compute()
        ended = self._clock()
        self._kept = {other: kept for other, kept in self._kept.items() if ended < kept[0]}
        self._kept[key] = ended + max(_AT_LEAST_S, (ended - begun) / _SHARE), value
        return value
