"""What a request asks about: rows for the classifier, made a block at a time where they are needed.

A factored request is small and stands for many rows: they are never all in memory at once.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class Rows(Protocol):
    """The n rows of one request, in the order in which they are answered."""

    def __len__(self) -> int:
        """n, which is what the request costs in queries."""

    def images(self, start: int, stop: int) -> Float32:
        """Images float32 [stop - start, c, h, w] in [0, 1] of rows `start` to `stop`.

        The same bits for a row whatever the range it is asked for in. Called in the thread that computes.

        Raises:
            UnacceptableValues: a row that can only be found out to be unacceptable when it is made.
        """

    def arrange(self, answers: Float32) -> Float32:
        """Answers [n, k] to the rows in the shape that the request is answered in; the last axis stays k."""


class DenseRows:
    """Rows that were sent as they are: images [n, c, h, w]."""

    def __init__(self, images: Float32) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def images(self, start: int, stop: int) -> Float32:
        return self._images[start:stop]

    def arrange(self, answers: Float32) -> Float32:
        return answers
