"""What every estimator has in common: ask where to evaluate, tell the values, never evaluate itself.

    probes = estimator.ask(points)         # [b, d] -> [b, p, d], p = estimator.queries_per_sample(d)
    losses = ...                           # [b, p], by whatever means the caller has
    gradient = estimator.tell(losses)      # [b, d]

`ask_factored` asks the same as what it is made of, `shared.wire.probes.Probes`, which is small enough to be sent.

An `ask` that is never answered (the oracle refused, say) is forgotten at the next `ask`. Several questions are open at
once by as many `fork`s.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import isfinite
from typing import Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from shared.wire.probes import Along, Probes

Difference = Literal["forward", "central"]

# The step of the paper and of its public code, for both estimators.
MU = 0.005


class NothingAsked(RuntimeError):
    """`tell` without an `ask` before it: its losses belong to no probes."""


class StepVanished(ValueError):
    """w + mu u rounds to w: mu is below the resolution of the points, and the difference would be divided by zero."""


@dataclass(frozen=True)
class Description:
    """How an estimator was set up, for the record a run keeps of itself.

    `q` is the number of directions per sample, None where the dimension decides it.
    """

    name: str
    mu: float
    difference: Difference
    q: int | None = None


@dataclass(frozen=True)
class _Asked:
    """What is needed to make sense of the losses. `steps`: realised steps, [b, m, d] or one per coordinate, [b, d]."""

    steps: Tensor
    dtype: torch.dtype
    shape: tuple[int, int]


class Estimator(ABC):
    """A finite-difference gradient estimator over points w [b, d], each row a sample of its own.

    Args:
        mu: step size, in units of the points.
        difference: "forward", l(w + s) - l(w), error O(mu), or "central", l(w + s) - l(w - s), error O(mu^2).

    Raises:
        ValueError: `mu` not positive and finite, or an unknown `difference`.
    """

    name: str

    def __init__(self, mu: float = MU, difference: Difference = "forward") -> None:
        if not (isfinite(mu) and mu > 0):
            raise ValueError(f"mu must be positive and finite, not {mu}")
        if difference not in get_args(Difference):
            raise ValueError(f"difference must be one of {', '.join(get_args(Difference))}, not {difference!r}")
        self.mu = mu
        self.difference: Difference = difference
        self._asked: _Asked | None = None

    @property
    def description(self) -> Description:
        return Description(self.name, self.mu, self.difference)

    def __repr__(self) -> str:
        return f"{self.description}"

    def fork(self) -> Self:
        """This estimator with no question open: same settings, and the same generator, drawn from in turn."""
        other = copy.copy(self)
        other._asked = None
        return other

    @abstractmethod
    def _directions_per_sample(self, dimension: int) -> int:
        """How many directions one sample is probed along."""

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

    def queries_per_sample(self, dimension: int) -> int:
        """Cost of one estimate at a point of `dimension` coordinates, in queries: known before anything is asked.

        Forward differences include the query at the point itself.
        """
        if dimension < 1:
            raise ValueError(f"a point has at least one coordinate, not {dimension}")
        directions = self._directions_per_sample(dimension)
        return directions + 1 if self.difference == "forward" else 2 * directions

    def ask(self, points: Tensor) -> Tensor:
        """Where to evaluate the loss.

        Args:
            points: w [b, d], float32 or float64. Finite differences have no digits to spare below that.

        Returns:
            Probes [b, p, d], p = `queries_per_sample(d)`, detached, in the points' dtype and on their device. Forward:
            the point, then w + s_1 ... w + s_m. Central: w + s_1 ... w + s_m, then w - s_1 ... w - s_m.

        Raises:
            ValueError: points of another shape or dtype, or not finite.
            StepVanished: `mu` is too small for the magnitude of the points in their dtype.
        """
        points = self._checked(points)
        base, nominal = points.unsqueeze(1), self._steps(points)
        ahead = base + nominal
        # Rounding w + mu u moves the probe, so the step taken is not mu u. Both estimators use the step that was taken:
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

    def ask_factored(self, points: Tensor) -> Probes:
        """What `ask` asks, unexpanded: row by row, `expand` gives the same bits.

        Args:
            points: w [b, d], float32.

        Raises:
            ValueError, StepVanished: as `ask`.
        """
        points = self._checked(points)
        if points.dtype != torch.float32:
            raise ValueError(f"factored probes are float32, and the points are {points.dtype}")
        b, d = points.shape
        steps = np.broadcast_to(np.float32(self.mu), (self._directions_per_sample(d),))
        probes = Probes(points.cpu().numpy(), steps, self._along(points), self.difference)
        kept = self._realised_of(probes).to(points.device)
        self._asked = _Asked(kept, points.dtype, (b, probes.p))
        return probes

    def _checked(self, points: Tensor) -> Tensor:
        """The points, detached, for a new question."""
        if points.ndim != 2 or points.shape[1] < 1:
            raise ValueError(f"points must be [b, d] with d >= 1, not {list(points.shape)}")
        if points.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"points must be float32 or float64, not {points.dtype}")
        points = points.detach()
        if not bool(torch.isfinite(points).all()):
            raise ValueError("points must be finite")
        self._asked = None
        return points

    def tell(self, losses: Tensor) -> Tensor:
        """The gradient estimate [b, d], in the dtype and on the device of the points asked about.

        Args:
            losses: [b, p], in the order of the probes; float64 if the differences are to keep their digits.

        Raises:
            NothingAsked: no `ask` since the last `tell`.
            ValueError: losses of another shape, or not finite. The question stays open for a better answer.
        """
        asked = self._asked
        if asked is None:
            raise NothingAsked("tell answers an ask, once: ask first")
        if tuple(losses.shape) != asked.shape:
            raise ValueError(f"losses must be {list(asked.shape)}, one per probe, not {list(losses.shape)}")
        values = losses.detach().to(device=asked.steps.device, dtype=torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("losses must be finite")
        self._asked = None
        if self.difference == "forward":
            differences = values[:, 1:] - values[:, :1]
        else:
            ahead, behind = values.chunk(2, dim=1)
            differences = ahead - behind
        return self._gradient(differences, asked.steps).to(asked.dtype)
