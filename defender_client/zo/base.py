"""What every estimator has in common: ask where to evaluate, tell the values, never evaluate itself.

    probes = estimator.ask(points)         # [b, d] -> [b, p, d], p = estimator.queries_per_sample(d)
    losses = ...                           # [b, p], by whatever means the caller has
    gradient = estimator.tell(losses)      # [b, d]

`ask_factored` asks the same as what it is made of, `shared.wire.probes.Probes`, which is small enough to be sent. Where
samples cost differently (see `subspace`) probes are [rows, d] and losses [rows], one sample's after the other's.

An `ask` that is never answered (the oracle refused, say) is forgotten at the next `ask`. Several questions are open at
once by as many `fork`s.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import isfinite
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from shared.wire.probes import Probes

Difference = Literal["forward", "central"]

# The step of the paper and of its public code, for both of its estimators.
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


class Estimator(ABC):
    """A finite-difference gradient estimator over points w [b, d], each row a sample of its own.

    Args:
        mu: step size, in units of the points.
        difference: "forward", l(w + s) - l(w), error O(mu), or "central", l(w + s) - l(w - s), error O(mu^2).

    Attributes:
        guided: whether `ask` needs a guide.

    Raises:
        ValueError: `mu` not positive and finite, or an unknown `difference`.
    """

    name: str
    guided = False

    def __init__(self, mu: float = MU, difference: Difference = "forward") -> None:
        if not (isfinite(mu) and mu > 0):
            raise ValueError(f"mu must be positive and finite, not {mu}")
        if difference not in get_args(Difference):
            raise ValueError(f"difference must be one of {', '.join(get_args(Difference))}, not {difference!r}")
        self.mu = mu
        self.difference: Difference = difference

    @property
    def description(self) -> Description:
        return Description(self.name, self.mu, self.difference)

    def __repr__(self) -> str:
        return f"{self.description}"

    def fork(self) -> Self:
        """This estimator with no question open: same settings, and the same generator, drawn from in turn."""
        other = copy.copy(self)
        other.forget()
        return other

    @abstractmethod
    def forget(self) -> None:
        """Let go of the question that is open."""

    @abstractmethod
    def directions_per_sample(self, dimension: int) -> int:
        """How many directions one sample is probed along, at most."""

    def queries_per_sample(self, dimension: int) -> int:
        """Cost of one estimate at a point of `dimension` coordinates, in queries, known before anything is asked; the
        most that it can be, where it depends on the point.

        Forward differences include the query at the point itself.
        """
        if dimension < 1:
            raise ValueError(f"a point has at least one coordinate, not {dimension}")
        directions = self.directions_per_sample(dimension)
        return directions + 1 if self.difference == "forward" else 2 * directions

    @property
    def varies(self) -> bool:
        """Whether a sample may cost less than `queries_per_sample`, by where its point is."""
        return False

    @abstractmethod
    def ask(self, points: Tensor, guide: Tensor | None = None) -> Tensor:
        """Where to evaluate the loss.

        Args:
            points: w [b, d], float32 or float64. Finite differences have no digits to spare below that.
            guide: a guess of the gradient at each point, [b, d], for an estimator that is `guided`.

        Returns:
            Probes [b, p, d], p = `queries_per_sample(d)`, detached, in the points' dtype and on their device. Forward:
            the point, then w + s_1 ... w + s_m. Central: w + s_1 ... w + s_m, then w - s_1 ... w - s_m. Where samples
            cost differently: the same, [rows, d].

        Raises:
            ValueError: points of another shape or dtype, or not finite.
            StepVanished: `mu` is too small for the magnitude of the points in their dtype.
        """

    @abstractmethod
    def ask_factored(self, points: Tensor, guide: Tensor | None = None, part: tuple[int, int] | None = None) -> Probes:
        """What `ask` asks, unexpanded: row by row, `expand` gives the same bits.

        Args:
            points: w [b, d], float32.
            guide: as `ask`.
            part: (start, stop), at least one: ask about these of the points alone, along the directions that they have
                among all of them. `tell` and `derive` then speak of these. None for all.

        Raises:
            ValueError, StepVanished: as `ask`.
        """

    @abstractmethod
    def skip(self, points: Tensor, guide: Tensor | None = None) -> None:
        """Draw from the generator what `ask_factored` of these points draws, and ask nothing: others ask about them."""

    @abstractmethod
    def tell(self, losses: Tensor) -> Tensor:
        """The gradient estimate [b, d], in the dtype and on the device of the points asked about.

        Args:
            losses: [b, p] or [rows], in the order of the probes; float64 if the differences are to keep their digits.

        Raises:
            NothingAsked: no `ask` since the last `tell`.
            ValueError: losses of another shape, or not finite. The question stays open for a better answer.
        """

    @abstractmethod
    def derive(self, answers: Tensor) -> Tensor:
        """As `tell`, of whole answers: their Jacobian J = df/dw, as far as it was probed; see `jacobian`.

        Args:
            answers: [b, p, k] or [rows, k], in the order of the probes.

        Returns:
            [b, d, k], float64: exact in the span that was probed, 0 across it.

        Raises:
            NothingAsked, ValueError: as `tell`; or the estimator's directions span nothing that is known (RGE).
        """

    def _checked(self, points: Tensor) -> Tensor:
        """The points, detached, for a new question."""
        if points.ndim != 2 or points.shape[1] < 1:
            raise ValueError(f"points must be [b, d] with d >= 1, not {list(points.shape)}")
        if points.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"points must be float32 or float64, not {points.dtype}")
        points = points.detach()
        if not bool(torch.isfinite(points).all()):
            raise ValueError("points must be finite")
        self.forget()
        return points


def check_factored(points: Tensor) -> None:
    """ValueError unless probes of these points can be sent as what they are made of."""
    if points.dtype != torch.float32:
        raise ValueError(f"factored probes are float32, and the points are {points.dtype}")


def check_losses(losses: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The losses on `device`, float64; ValueError unless they are one per probe, and finite."""
    if tuple(losses.shape) != shape:
        raise ValueError(f"losses must be {list(shape)}, one per probe, not {list(losses.shape)}")
    values = losses.detach().to(device=device, dtype=torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("losses must be finite")
    return values
