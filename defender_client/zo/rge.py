"""RGE, the randomised gradient estimator: averages differences along random directions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from defender_client.zo.base import MU, Description, Difference, StepVanished
from defender_client.zo.even import EvenEstimator
from shared.wire.directions import unit_directions
from shared.wire.probes import Seeds


class RGE(EvenEstimator):
    """Random directions, uniform on the unit sphere, drawn anew for every sample ("RGE" of Zhang et al., ICLR 2022).

        forward:  g = (1/q) sum_i (d/mu)     [l(w + mu u_i) - l(w)]           u_i       q + 1 queries per sample
        central:  g = (1/q) sum_i (d/(2 mu)) [l(w + mu u_i) - l(w - mu u_i)]  u_i       2 q   queries per sample

    Unbiased for the gradient as mu -> 0. Its squared cosine with the gradient is about q / (d + q - 1). A sample's
    directions are those of a seed (`shared.wire.directions`), so that 8 bytes can name them.

    Args:
        q: directions per sample.
        mu, difference: see `Estimator`.
        generator: draws the seeds; on any device, the points may be on another.

    Raises:
        ValueError: `q` below 1, or as `Estimator`.
    """

    name = "rge"

    def __init__(
        self, q: int, mu: float = MU, difference: Difference = "forward", *, generator: torch.Generator
    ) -> None:
        super().__init__(mu, difference)
        if q < 1:
            raise ValueError(f"q must be at least 1, not {q}")
        self.q = q
        self._generator = generator

    @property
    def description(self) -> Description:
        return Description(self.name, self.mu, self.difference, self.q)

    def directions_per_sample(self, dimension: int) -> int:
        return self.q

    def _steps(self, points: Tensor) -> Tensor:
        seeds, d = self._along(points).values.tolist(), points.shape[1]
        directions = torch.from_numpy(np.stack([unit_directions(seed, 0, self.q, d) for seed in seeds]))
        return directions.to(points).mul(self.mu)

    def _along(self, points: Tensor) -> Seeds:
        seeds = torch.randint(
            0, 2**63 - 1, (points.shape[0],), generator=self._generator, device=self._generator.device
        )
        return Seeds(seeds.cpu().numpy().astype(np.uint64))

    def _realised(self, steps: Tensor) -> Tensor:
        if not bool(steps.any(dim=2).all()):
            raise StepVanished(f"mu = {self.mu} is lost in rounding: no coordinate of a probe differs from its point")
        return steps

    def _gradient(self, differences: Tensor, steps: Tensor) -> Tensor:
        # With s = mu u (forward) or 2 mu u (central), both of the above are
        #   g = (1/q) sum_i d (s_i / |s_i|^2) [l difference]_i,
        # d times the projection of the gradient onto the line probed; with the realised s it is that exactly, for a
        # linear loss, however coarse the rounding.
        s = steps.double()
        d = s.shape[2]
        weights = d * differences / s.square().sum(dim=2)
        return torch.matmul(weights.unsqueeze(1), s).squeeze(1) / self.q

    def _projection(self, differences: Tensor, steps: Tensor) -> Tensor:
        raise ValueError("rge's directions are not orthogonal, and their span is not worth a Jacobian: use orthonormal")
