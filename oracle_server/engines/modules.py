"""Any module as a batch-invariant engine, made in a moment: for what clients bring at run time."""

from __future__ import annotations

from torch import nn

from oracle_server.engines.blocks import BlockEngine
from oracle_server.engines.crew import Crew, default_crew
from oracle_server.engines.eager import eager
from oracle_server.engines.ladder import climb

MOST = 256


def build_block_engine(
    module: nn.Module,
    example_shape: tuple[int, ...],
    *,
    most: int = MOST,
    budget_s: float = 0.3,
    anchor: int | None = None,
    crew: Crew | None = None,
) -> BlockEngine:
    """Wrap a module [n, *example_shape] -> [n, ...], float32, in evaluation mode, in verified and padded blocks.

    Args:
        most: the largest block a thread may compute, in rows.
        budget_s: seconds for measuring, about; a block of one row is always measured.
        anchor: the size whose answers are given, see `climb`; without it the fastest sizes'.
        crew: the threads that compute; by default those of all engines.

    Raises:
        VaryingAnswers: the module answers the same rows differently from one time to the next.
        RuntimeError: the module cannot read such rows.
    """
    crew = default_crew() if crew is None else crew
    compute = eager(module)
    return BlockEngine("eager", compute, climb(compute, example_shape, crew, most, budget_s, anchor), crew)
