"""An engine that answers a row with the same bits whatever it is asked with: blocks of verified sizes, padded.

Every request is cut into pieces, every piece computed in a block whose size is on the engine's ladder. Sizes on a
ladder agree bit for bit (see `ladder`), so neither the batch's size nor a row's place in it nor its neighbours matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from oracle_server.engines.crew import Crew
from oracle_server.engines.engine import Compute
from oracle_server.engines.ladder import Ladder

_ALIGNMENT = 64  # bytes: what torch allocates; kernels may treat other addresses otherwise
_WASTE = 0.25  # of a block that padding may be, before smaller blocks are taken


class BlockEngine:
    """Rows float32 [n, ...], on the CPU -> answers float32 [n, ...], on the CPU; n >= 1.

    Attributes:
        name: which engine this is.
        block: rows computed at once, by all threads together: a batch of so many wastes nothing.
        ladder: the block sizes that a thread computes.
    """

    def __init__(self, name: str, compute: Compute, ladder: Ladder, crew: Crew) -> None:
        self.name = name
        self.block = crew.threads * ladder.sizes[-1]
        self.ladder = ladder
        self._compute = compute
        self._crew = crew

    def __call__(self, images: Tensor) -> Tensor:
        answers = torch.empty(len(images), *self.ladder.shape)
        pieces = cut(len(images), self.ladder.sizes, self._crew.threads)
        self._crew.run([functools.partial(self._piece, images, answers, *piece) for piece in pieces])
        return answers

    def _piece(self, images: Tensor, answers: Tensor, start: int, rows: int, size: int) -> None:
        mine = images[start : start + rows]
        if rows < size or mine.data_ptr() % _ALIGNMENT or not mine.is_contiguous():
            block = mine.new_zeros(size, *mine.shape[1:])
            block[:rows] = mine
        else:
            block = mine
        answers[start : start + rows] = self._compute(block)[:rows]


def cut(rows: int, sizes: tuple[int, ...], threads: int) -> Iterator[tuple[int, int, int]]:
    """Cut `rows` into pieces for `threads`: (first row, number of rows, block size >= that number).

    Whole rounds of the largest block first; then shares as even as the sizes allow, padded by a quarter at most where
    there is a smaller size.
    """
    start = 0
    while start < rows:
        size = _size(math.ceil((rows - start) / threads), sizes)
        for _ in range(threads):
            if start < rows:
                yield start, min(size, rows - start), _size_of_last(rows - start, size, sizes)
                start += size


def _size(share: int, sizes: tuple[int, ...]) -> int:
    if share >= sizes[-1]:
        return sizes[-1]
    above = next(size for size in sizes if size >= share)
    below = [size for size in sizes if size <= share]
    return above if not below or share >= (1 - _WASTE) * above else below[-1]


def _size_of_last(rows: int, size: int, sizes: tuple[int, ...]) -> int:
    return size if rows >= size else next(other for other in sizes if other >= rows)
