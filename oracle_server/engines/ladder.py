"""Which block sizes give the same answers bit for bit, and how fast each is: measured, not assumed.

A kernel may choose another algorithm, and with it another order of summation, for another number of rows. Two rows of
one block may differ too: those at a block's end often go through a kernel of their own. So each size is asked about the
same few images, once in every position of a block and once among others, in every thread. Sizes that agree with each
other to the last bit form a group; the engine keeps one group and pads what lies between its sizes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oracle_server.engines.crew import Crew
from oracle_server.engines.engine import Compute

_IMAGES = 4  # different images; kernels that sum in another order agree on all logits of all of these by no chance
_LEAST_S = 0.004  # a round shorter than this is not timed alone
_ENOUGH_S = 0.08  # a block that takes this long is not made larger
_BETTER = 1.02  # a larger block must be so much faster
_NEAR = 0.9  # groups this near the fastest are as good; the one with the smallest block is taken


class VaryingAnswers(Exception):
    """The same block gave two answers: no size can be trusted."""


@dataclass(frozen=True)
class Rung:
    """A block size: `rate` rows a second with all threads busy, `answers` to the probe images, float32 [j, ...].

    `steady`: each image had the same answer in every position, thread and company.
    """

    size: int
    rate: float
    answers: Tensor
    steady: bool


@dataclass(frozen=True)
class Ladder:
    """Sizes, ascending, that agree bit for bit; `rate` rows a second at the largest; `shape` of one row's answer.

    `spread`: the largest difference, max |a - b|, between any two answers measured, at sizes left out too.
    """

    sizes: tuple[int, ...]
    rate: float
    shape: tuple[int, ...]
    spread: float


def climb(compute: Compute, shape: Sequence[int], crew: Crew, most: int, budget_s: float) -> Ladder:
    """Measure sizes 1, 2, 4, ... `most` within about `budget_s` seconds, and choose.

    Args:
        compute: one block in one thread.
        shape: of one row.

    Raises:
        VaryingAnswers: not even a block of one row has one answer.
    """
    rungs: list[Rung] = []
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(_IMAGES, *shape, generator=generator)
    deadline = time.perf_counter() + budget_s
    stale = 0
    for size in _sizes(most):
        began = time.perf_counter()
        rungs.append(_try(compute, images, crew, size))
        took = time.perf_counter() - began
        best = max(rung.rate for rung in rungs[:-1]) if len(rungs) > 1 else 0.0
        stale = 0 if rungs[-1].rate > _BETTER * best else stale + 1
        slow = crew.threads * size / rungs[-1].rate > _ENOUGH_S
        if stale == 3 or slow or time.perf_counter() + 2 * took > deadline:
            break
    return choose(rungs)


def choose(rungs: Sequence[Rung]) -> Ladder:
    """The group of sizes to use, up to its fastest. Raises `VaryingAnswers` where no size is steady."""
    groups: dict[bytes, list[Rung]] = {}
    for rung in rungs:
        if rung.steady:
            groups.setdefault(rung.answers.numpy().tobytes(), []).append(rung)
    if not groups:
        raise VaryingAnswers("the same images have other answers from one time to the next")
    fastest = max(rung.rate for group in groups.values() for rung in group)
    able = [group for group in groups.values() if max(rung.rate for rung in group) >= _NEAR * fastest]
    group = min(able, key=lambda rungs: rungs[0].size)
    best = max(rung.rate for rung in group)
    last = next(i for i, rung in enumerate(group) if _BETTER * rung.rate >= best)
    first = group[0].answers
    spread = max(float((rung.answers - first).abs().max()) for rung in rungs) if first.numel() else 0.0
    return Ladder(tuple(rung.size for rung in group[: last + 1]), group[last].rate, tuple(first.shape[1:]), spread)


def _sizes(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _try(compute: Compute, images: Tensor, crew: Crew, size: int) -> Rung:
    """One size: each image in all positions at once, then all images in turn beside each other."""
    blocks = [image.expand(size, *image.shape).contiguous() for image in images]
    blocks.append(images[torch.arange(size) % len(images)])
    answers, steady, fastest = [], True, float("inf")
    for position, block in enumerate(blocks):
        seconds, found = _round(compute, block, crew)
        fastest = min(fastest, seconds)
        if position < len(images):
            answers.append(found[0][0])
        expected = torch.stack(answers)[torch.arange(size) % len(images)] if position == len(images) else None
        for answer in found:
            wanted = answers[-1].expand_as(answer) if expected is None else expected
            steady = steady and _same_bits(answer, wanted)
    if fastest < _LEAST_S:
        times = int(_LEAST_S / fastest) + 1
        fastest = min(fastest, *(_round(compute, blocks[-1], crew, times)[0] / times for _ in range(3)))
    return Rung(size, crew.threads * size / fastest, torch.stack(answers), steady)


def _round(compute: Compute, block: Tensor, crew: Crew, times: int = 1) -> tuple[float, list[Tensor]]:
    """The block in every thread at once: seconds until the last one ended, and what each answered."""
    found: list[Tensor] = []
    spans: list[tuple[float, float]] = []
    lock = threading.Lock()

    def ask() -> None:
        began = time.perf_counter()
        for _ in range(times):
            answer = compute(block)
        ended = time.perf_counter()
        with lock:
            spans.append((began, ended))
            found.append(answer.clone())

    crew.everywhere(ask)
    return max(end for _, end in spans) - min(begin for begin, _ in spans), found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Bits, not values: a NaN equals itself, and zero is not minus zero."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
