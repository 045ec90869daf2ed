"""CGE, the coordinate-wise gradient estimator: one difference per coordinate, no randomness."""

from __future__ import annotations

import torch
from torch import Tensor

from defender_client.zo.base import Estimator, StepVanished


class CGE(Estimator):
    """Every coordinate in turn ("CGE" of Zhang et al., ICLR 2022: forward; their public code: central).

        forward:  g = sum_i [l(w + mu e_i) - l(w)] / mu             e_i       d + 1 queries per sample
        central:  g = sum_i [l(w + mu e_i) - l(w - mu e_i)] / (2 mu) e_i      2 d   queries per sample

    Exact for a linear loss; central also for a quadratic one.
    """

    name = "cge"

    def _directions_per_sample(self, dimension: int) -> int:
        return dimension

    def _steps(self, points: Tensor) -> Tensor:
        d = points.shape[1]
        return self.mu * torch.eye(d, dtype=points.dtype, device=points.device)

    def _realised(self, steps: Tensor) -> Tensor:
        along = steps.diagonal(dim1=1, dim2=2).clone()  # [b, d]; a clone, to let go of the [b, d, d]
        if not bool(along.all()):
            raise StepVanished(f"mu = {self.mu} is lost in rounding: a probe does not differ from its point")
        return along

    def _gradient(self, differences: Tensor, steps: Tensor) -> Tensor:
        # g_i = [l difference]_i / s_i, with the realised step s_i: (w + mu e_i)_i - w_i, or between both probes.
        return differences / steps.double()
