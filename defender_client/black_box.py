"""The black box that the search queries: f'(w), the oracle with the defender's decoder merged into it.

f'(w) = f(Dec(w))    (Zhang et al., ICLR 2022, section 4; without an autoencoder f(clamp(w)), in pixels)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from defender_client.oracle import Oracle
from defender_client.stack import Stack


class BlackBox:
    """f' of a stack, asked of an oracle; used by several threads at once.

    Args:
        stack: whose decoder is merged in.
        oracle: who answers.
        query_rows: rows of a request, at most.
    """

    def __init__(self, stack: Stack, oracle: Oracle, query_rows: int) -> None:
        self._stack, self._oracle, self._query_rows = stack, oracle, query_rows

    @torch.no_grad()
    def logits(self, points: Tensor, *, purpose: str, label: str) -> Tensor:
        """Logits [n, k] of f' at points [n, d]; n queries."""
        # Decoded in pieces, so that memory is bounded by query_rows and not by the number of points.
        answers = [
            self._oracle.query(self._stack.back(part).numpy(), purpose=purpose, label=f"{label}/{position}")
            for position, part in enumerate(points.split(self._query_rows))
        ]
        return torch.from_numpy(np.concatenate(answers))

    def probed(self, probes: Tensor, *, purpose: str, label: str) -> Tensor:
        """Logits [b, p, k] of f' at an estimator's probes [b, p, d]; b p queries."""
        b, p, d = probes.shape
        return self.logits(probes.reshape(b * p, d), purpose=purpose, label=label).view(b, p, -1)
