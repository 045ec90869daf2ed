"""What an engine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

# One block: rows float32 [b, ...], contiguous, on the CPU -> answers float32 [b, ...], on the CPU; in this thread.
Compute = Callable[[Tensor], Tensor]


class Engine(Protocol):
    """Images float32 [n, c, h, w] in [0, 1], on the CPU -> answers float32 [n, k], on the CPU; n >= 1.

    `block`: rows that it computes at once, at most; more are cut into so many.
    """

    @property
    def block(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor: ...
