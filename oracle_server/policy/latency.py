"""How long an answer takes: a fixed time, one for each row, and jitter."""

from __future__ import annotations

import numpy as np

from oracle_server.policy.spec import LatencySpec


class Latency:
    """Draws delays.

    Args:
        spec: their distribution.
        generator: what the jitter is drawn from.
    """

    def __init__(self, spec: LatencySpec, generator: np.random.Generator) -> None:
        self._spec, self._generator = spec, generator

    def seconds(self, rows: int) -> float:
        """The delay of an answer to `rows` rows; never negative."""
        spec = self._spec
        jitter = 0.0
        if spec.jitter_milliseconds and spec.distribution == "uniform":
            jitter = spec.jitter_milliseconds * self._generator.random()
        elif spec.jitter_milliseconds:
            jitter = spec.jitter_milliseconds * abs(self._generator.standard_normal())
        return (spec.milliseconds + jitter) / 1e3 + spec.per_row_microseconds * rows / 1e6
