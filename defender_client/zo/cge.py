"""CGE, the coordinate-wise gradient estimator: one difference per coordinate, no randomness."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from defender_client.zo.base import StepVanished
from defender_client.zo.even import EvenEstimator
from shared.wire.probes import Coordinates, Probes


class CGE(EvenEstimator):
    """Every coordinate in turn ("CGE" of Zhang et al., ICLR 2022: forward; their public code: central).

        forward:  g = sum_i [l(w + mu e_i) - l(w)] / mu             e_i       d + 1 queries per sample
        central:  g = sum_i [l(w + mu e_i) - l(w - mu e_i)] / (2 mu) e_i      2 d   queries per sample

    Exact for a linear loss; central also for a quadratic one.
    """

    name = "cge"

    def directions_per_sample(self, dimension: int) -> int:
        return dimension

    def _steps(self, points: Tensor) -> Tensor:
        d = points.shape[1]
        return self.mu * torch.eye(d, dtype=points.dtype, device=points.device)

    def _realised(self, steps: Tensor) -> Tensor:
        return self._checked_steps(steps.diagonal(dim1=1, dim2=2).clone())  # a clone, to let go of the [b, d, d]

    def _along(self, points: Tensor) -> Coordinates:
        return Coordinates(np.arange(points.shape[1]))

    def _realised_of(self, probes: Probes) -> Tensor:
        # As if expanded, without the d - 1 coordinates of each row that stay.
        base, mu = torch.from_numpy(probes.base), torch.from_numpy(probes.steps.copy())
        ahead = base + mu
        return self._checked_steps(ahead - (base if self.difference == "forward" else base - mu))

    def _checked_steps(self, along: Tensor) -> Tensor:
        """Steps [b, d], of each coordinate of each point."""
        if not bool(along.all()):
            raise StepVanished(f"mu = {self.mu} is lost in rounding: a probe does not differ from its point")
        return along

    def _gradient(self, differences: Tensor, steps: Tensor) -> Tensor:
        # g_i = [l difference]_i / s_i, with the realised step s_i: (w + mu e_i)_i - w_i, or between both probes.
        return differences / steps.double()

    def _projection(self, differences: Tensor, steps: Tensor) -> Tensor:
        return self._gradient(differences, steps)
