"""Which block sizes give the same answers bit for bit, and how fast each is: measured, not assumed.

A kernel may choose another algorithm, and with it another order of summation, for another number of rows. Two rows of
one block may differ too: those at a block's end often go through a kernel of their own. So each size is asked about the
same few images, once in every position of a block and once among others, in every thread. Sizes that agree with each
other to the last bit form a group; the engine keeps one group and pads what lies between its sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oracle_server.engines.crew import Crew
from oracle_server.engines.engine import Compute

_IMAGES = 4  # different images: kernels that sum in another order do not agree on all answers to these by chance
_SLOW_S, _FEWER = 0.05, 2  # unless one row takes so long: then so few
_LEAST_S, _ROUNDS = 0.01, 3  # a round shorter than this is not timed alone
_ENOUGH_S = 0.08  # a block that takes this long is not made larger
_AS_FAST = 0.98
_NEAR = 0.85  # groups this near the fastest are as good; the one with the smallest block is taken


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


def climb(
    compute: Compute, shape: Sequence[int], crew: Crew, most: int, budget_s: float, anchor: int | None = None
) -> Ladder:
    """Measure sizes 1, 2, 4, ... `most` within about `budget_s` seconds, and choose.

    Args:
        compute: one block in one thread.
        shape: of one row.
        anchor: a power of two, at most `most`, whose answers are to be given if they are steady, however fast others
            are: what is answered then does not depend on a measurement of time.

    Raises:
        VaryingAnswers: not even a block of one row has one answer.
    """
    rungs: list[Rung] = []
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(_IMAGES, *shape, generator=generator)
    began = crew.seconds()
    if _everywhere(compute, images[:1], crew)[0] > _SLOW_S:
        images = images[:_FEWER]
    worse = 0
    for size in _sizes(most):
        started = crew.seconds()
        rungs.append(_try(compute, images, crew, size))
        now = crew.seconds()
        best = max(rung.rate for rung in rungs)
        worse = 0 if rungs[-1].rate == best else worse + 1
        slow = crew.threads * size / rungs[-1].rate > _ENOUGH_S
        if anchor is not None and size < anchor:
            continue
        if worse == 3 or slow or (now - began) + 2 * (now - started) > budget_s:
            break
    timed = [_again(rung, compute, images, crew) if rung.rate > _NEAR * best else rung for rung in rungs]
    return choose(timed, anchor)


def choose(rungs: Sequence[Rung], anchor: int | None = None) -> Ladder:
    """The group of sizes to use, up to its fastest; that of size `anchor`, if it is steady.

    Raises:
        VaryingAnswers: no size is steady.
    """
    groups: dict[bytes, list[Rung]] = {}
    for rung in rungs:
        if rung.steady:
            groups.setdefault(rung.answers.numpy().tobytes(), []).append(rung)
    if not groups:
        raise VaryingAnswers("the same images have other answers from one time to the next")
    fastest = max(rung.rate for group in groups.values() for rung in group)
    able = [group for group in groups.values() if any(rung.size == anchor for rung in group)] or [
        group for group in groups.values() if max(rung.rate for rung in group) >= _NEAR * fastest
    ]
    group = min(able, key=lambda rungs: rungs[0].size)
    best = max(rung.rate for rung in group)
    # Of sizes as fast as each other the largest: fewer blocks to hand over. Small batches have the smaller ones.
    last = max(i for i, rung in enumerate(group) if rung.rate >= _AS_FAST * best)
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
    answers, steady, seconds = [], True, float("inf")
    for image in images:
        took, found = _everywhere(compute, image.expand(size, *image.shape).contiguous(), crew)
        answers.append(found[0][0])
        seconds = min(seconds, took)
        steady = steady and all(_same_bits(answer, answers[-1].expand_as(answer)) for answer in found)
    turns = torch.arange(size) % len(images)
    took, found = _everywhere(compute, images[turns], crew)
    steady = steady and all(_same_bits(answer, torch.stack(answers)[turns]) for answer in found)
    return Rung(size, crew.threads * size / min(seconds, took), torch.stack(answers), steady)


def _again(rung: Rung, compute: Compute, images: Tensor, crew: Crew) -> Rung:
    """Timed as an engine runs, task by task: handing tasks to threads is part of what small blocks cost."""
    block = images[torch.arange(rung.size) % len(images)]
    rounds = 1 + int(_LEAST_S * rung.rate / (crew.threads * rung.size))
    tasks = [lambda: compute(block)] * (crew.threads * rounds)
    rates = []
    for _ in range(_ROUNDS):
        began = crew.seconds()
        crew.run(tasks)
        rates.append(len(tasks) * rung.size / (crew.seconds() - began))
    return dataclasses.replace(rung, rate=max(rates) if rounds > 1 else max(rung.rate, *rates))


def _everywhere(compute: Compute, block: Tensor, crew: Crew) -> tuple[float, list[Tensor]]:
    """The block in every thread at once: seconds, and what each thread answered."""
    found: list[Tensor] = []
    began = crew.seconds()
    crew.everywhere(lambda: found.append(compute(block).clone()))
    return crew.seconds() - began, found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Bits, not values: a NaN equals itself, and zero is not minus zero."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
