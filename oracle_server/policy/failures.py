"""Requests that fail for no reason of theirs. Each attempt draws anew, so that a retry may succeed."""

from __future__ import annotations

import numpy as np

from oracle_server.policy.spec import FailureSpec


class Failures:
    """Draws failures.

    Args:
        spec: how likely they are.
        generator: what they are drawn from.
    """

    def __init__(self, spec: FailureSpec, generator: np.random.Generator) -> None:
        self._spec, self._generator = spec, generator

    def unavailable(self) -> bool:
        """Whether this request is to be refused before it is looked at."""
        return self._draw(self._spec.unavailable)

    def internal(self) -> bool:
        """Whether this answer, computed already, is to be lost."""
        return self._draw(self._spec.internal)

    def _draw(self, probability: float) -> bool:
        return probability > 0 and self._generator.random() < probability
