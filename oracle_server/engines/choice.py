"""Which engine: the fastest of those whose float32 answers are eager's to 1e-4, as measured at start."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from oracle_server.engines.blocks import BlockEngine
from oracle_server.engines.candidate import NotACandidate, first_line
from oracle_server.engines.crew import Crew
from oracle_server.engines.engine import Compute
from oracle_server.engines.ladder import VaryingAnswers, climb

log = logging.getLogger(__name__)
TOLERANCE = 1e-4
_COMPARED = 16  # images
_LADDER_S = 0.6  # for a candidate's block sizes; one row is always measured
_BUILD_S = 10.0  # no further candidate is built after so long
_ROUNDS, _ROUND_S, _RACE_S = 5, 0.02, 1.0


@dataclass(frozen=True)
class Chosen:
    """`rates`: images a second of every engine measured; `difference`: max |answer - eager's| of the one chosen."""

    engine: BlockEngine
    rates: dict[str, float]
    difference: float


def choose(
    makers: Mapping[str, Callable[[], Compute]], shape: tuple[int, ...], crew: Crew, most: int, wanted: str | None
) -> Chosen:
    """Build and measure each; take the one `wanted`, or the fastest.

    Args:
        makers: how to build each, `eager` first, to which the others are compared.
        shape: of one image.
        most: rows of the largest block that a thread may compute.

    Raises:
        NotACandidate: the one wanted cannot be built.
        VaryingAnswers: eager's answers vary from one time to the next.
    """
    eager, *others = makers
    engines = {eager: _build(eager, makers[eager], shape, crew, most)}
    compared = min(_COMPARED, engines[eager].block)
    images = torch.rand(compared, *shape, generator=torch.Generator().manual_seed(1))
    exact = engines[eager](images)
    differences = {eager: 0.0}
    began = time.perf_counter()
    for name in others:
        if wanted is None and time.perf_counter() - began > _BUILD_S:
            log.info("engine %s is not tried: the others took %.0f s already; --engine %s does", name, _BUILD_S, name)
            continue
        try:
            engine = _build(name, makers[name], shape, crew, most)
            difference = float((engine(images) - exact).abs().max())
        except (NotACandidate, VaryingAnswers, RuntimeError) as error:
            if wanted == name:
                raise NotACandidate(first_line(error)) from error
            log.info("engine %s is not a candidate: %s", name, first_line(error))
            continue
        if not difference <= TOLERANCE:
            said = "engine %s differs from eager by %.1e, more than %.0e"
            if wanted is None:
                log.info(said + ": not a candidate", name, difference, TOLERANCE)
                continue
            log.warning(said, name, difference, TOLERANCE)
        engines[name], differences[name] = engine, difference
    rates = _race(engines, shape, crew)
    best = wanted or max(rates, key=rates.__getitem__)
    return Chosen(engines[best], rates, differences[best])


def _build(name: str, make: Callable[[], Compute], shape: tuple[int, ...], crew: Crew, most: int) -> BlockEngine:
    began = time.perf_counter()
    compute = make()
    built = time.perf_counter()
    engine = BlockEngine(name, compute, climb(compute, shape, crew, most, _LADDER_S), crew)
    log.debug("engine %s: built in %.2f s, measured in %.2f s", name, built - began, time.perf_counter() - built)
    return engine


def _race(engines: Mapping[str, BlockEngine], shape: tuple[int, ...], crew: Crew) -> dict[str, float]:
    """Images a second of each at its own block, the best of interleaved rounds."""
    blocks = {name: torch.rand(engine.block, *shape) for name, engine in engines.items()}
    times = {name: max(1, int(_ROUND_S * engine.ladder.rate / engine.block)) for name, engine in engines.items()}
    rates = dict.fromkeys(engines, 0.0)
    deadline = crew.seconds() + _RACE_S
    for lap in range(_ROUNDS):
        if lap and crew.seconds() > deadline:
            break
        for name, engine in engines.items():
            began = crew.seconds()
            for _ in range(times[name]):
                engine(blocks[name])
            rates[name] = max(rates[name], times[name] * engine.block / (crew.seconds() - began))
    return rates
