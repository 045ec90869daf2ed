"""What RGE and CGE have in common: every sample is probed along as many directions, whatever the points are."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defender_client.zo.base import MU, Difference, Estimator, NothingAsked, check_factored, check_losses
from shared.wire.probes import Along, Probes


@dataclass(frozen=True)
class _Asked:
    """What is needed to make sense of the losses. `steps`: realised steps, [b, m, d] or one per coordinate, [b, d]."""

    steps: Tensor
    dtype: torch.dtype
    shape: tuple[int, int]


class EvenEstimator(Estimator):
    """An estimator whose samples cost the same; see `Estimator`."""

    def __init__(self, mu: float = MU, difference: Difference = "forward") -> None:
        super().__init__(mu, difference)
        self._asked: _Asked | None = None

    def forget(self) -> None:
        self._asked = None

    @abstractmethod
    def _steps(self, points: Tensor) -> Tensor:
        """Nominal steps mu u, broadcastable to [b, m, d]."""

    @abstractmethod
    def _along(self, points: Tensor) -> Along:
        """The directions of `_steps`, for the same state of the generator."""

    @abstractmethod
    def _realised(self, steps: Tensor) -> Tensor:
        """What to keep of the realised steps [b, m, d]; checked for being nonzero."""

    def _realised_of(self, probes: Probes) -> Tensor:
        """The same of factored probes."""
        rows = torch.from_numpy(probes.expand(0, len(probes))).view(probes.n, probes.p, probes.d)
        if self.difference == "forward":
            return self._realised(rows[:, 1:] - rows[:, :1])
        ahead, behind = rows.chunk(2, dim=1)
        return self._realised(ahead - behind)

    @abstractmethod
    def _gradient(self, differences: Tensor, steps: Tensor) -> Tensor:
        """Differences of losses [b, m], float64, and what `_realised` kept -> gradient [b, d], float64."""

    @abstractmethod
    def _projection(self, differences: Tensor, steps: Tensor) -> Tensor:
        """As `_gradient`, of one output's differences: its gradient's part in the span that was probed."""

    def ask(self, points: Tensor, guide: Tensor | None = None) -> Tensor:
        points = self._checked(points)
        base, nominal = points.unsqueeze(1), self._steps(points)
        ahead = base + nominal
        # Rounding w + mu u moves the probe, so the step taken is not mu u. All estimators use the step that was taken:
        # nominal ones leave an error of <gradient, rounding> / mu in every directional derivative. The subtraction is
        # exact where |w| >= |mu u| (Dekker 1971) and correctly rounded elsewhere.
        if self.difference == "forward":
            probes, steps = torch.cat([base, ahead], dim=1), ahead - base
        else:
            behind = base - nominal
            probes, steps = torch.cat([ahead, behind], dim=1), ahead - behind
        kept = self._realised(steps)
        self._asked = _Asked(kept, points.dtype, (probes.shape[0], probes.shape[1]))
        return probes

    def ask_factored(self, points: Tensor, guide: Tensor | None = None, part: tuple[int, int] | None = None) -> Probes:
        points = self._checked(points)
        check_factored(points)
        steps = np.broadcast_to(np.float32(self.mu), (self.directions_per_sample(points.shape[1]),))
        probes = Probes(points.cpu().numpy(), steps, self._along(points), self.difference)
        if part is not None:
            probes = probes.of(*part)
        kept = self._realised_of(probes).to(points.device)
        self._asked = _Asked(kept, points.dtype, (probes.n, probes.p))
        return probes

    def skip(self, points: Tensor, guide: Tensor | None = None) -> None:
        self._along(points)

    def tell(self, losses: Tensor) -> Tensor:
        asked = self._open_question()
        values = check_losses(losses, asked.shape, asked.steps.device)
        self._asked = None
        return self._gradient(self._differences(values), asked.steps).to(asked.dtype)

    def derive(self, answers: Tensor) -> Tensor:
        asked = self._open_question()
        values = check_losses(answers, (*asked.shape, answers.shape[-1]), asked.steps.device)
        columns = self._differences(values).unbind(dim=2)
        derived = torch.stack([self._projection(column, asked.steps) for column in columns], dim=2)
        self._asked = None
        return derived

    def _open_question(self) -> _Asked:
        if self._asked is None:
            raise NothingAsked("tell answers an ask, once: ask first")
        return self._asked

    def _differences(self, values: Tensor) -> Tensor:
        """Of values [b, p, ...]: [b, m, ...]."""
        if self.difference == "forward":
            return values[:, 1:] - values[:, :1]
        ahead, behind = values.chunk(2, dim=1)
        return ahead - behind
