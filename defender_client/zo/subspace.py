"""Estimators that probe each sample along orthonormal directions of a subspace of its own: all of R^d, or, where the
points end in a ReLU, what it lets through.

    w = ReLU(v), loss l(w):    dl/dv_i = [v_i > 0] dl/dw_i

A coordinate at zero passes no gradient on, and a probe along it buys nothing: without it the gradient of every
parameter behind the ReLU is the same, and a sample costs no more than its active coordinates. Samples then cost
differently.

    g = kappa sum_i (D_{u_i} l) u_i,   D_u l = [l(w + mu u) - l(w)] / mu  or  [l(w + mu u) - l(w - mu u)] / (2 mu)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from defender_client.zo.base import (
    MU,
    Description,
    Difference,
    Estimator,
    NothingAsked,
    StepVanished,
    check_factored,
    check_losses,
)
from shared.wire.probes import Along, Coordinates, Directions, Probes

Scale = Literal["unbiased", "projection"]


@dataclass(frozen=True)
class Frame:
    """Where samples are probed.

    Attributes:
        directions: orthonormal u, [b, m, d].
        counts: along how many of its m each sample is probed, [b], int64.
        dimensions: of each sample's subspace, [b], int64.
        along: the directions as they are sent.
    """

    directions: Tensor
    counts: Tensor
    dimensions: Tensor
    along: Along

    @property
    def used(self) -> Tensor:
        """Which directions are probed, [b, m], bool."""
        return torch.arange(self.directions.shape[1], device=self.counts.device) < self.counts.unsqueeze(1)

    def only(self, counts: Tensor) -> Frame:
        """The same, but no more than `counts` [b] of each sample's directions."""
        return replace(self, counts=torch.minimum(self.counts, counts))


@dataclass(frozen=True)
class Derivatives:
    """What the losses told.

    Attributes:
        values: D_u l, [b, m], float64; 0 along directions that were not probed.
        directions: the unit vectors u that were really taken, [b, m, d], float64.
        counts, dimensions: of the frame.
        guide: as given to `ask`, within the subspace, [b, d], float64; 0 without.
    """

    values: Tensor
    directions: Tensor
    counts: Tensor
    dimensions: Tensor
    guide: Tensor

    def combine(self, weights: Tensor) -> Tensor:
        """sum_i weight_i u_i: weights [b, m] -> [b, d]."""
        return torch.einsum("bm,bmd->bd", weights, self.directions)


@dataclass(frozen=True)
class _Asked:
    steps: Tensor  # realised, [b, m, d]
    rows: Tensor  # which of the [b, p] rows of the sample with the most were asked for
    frame: Frame
    guide: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]


class Subspace(Estimator):
    """Asks along a frame of each sample's own.

    Args:
        mu, difference: see `Estimator`.
        active: stay within the coordinates of a point that are not zero.
    """

    def __init__(self, mu: float = MU, difference: Difference = "forward", *, active: bool = False) -> None:
        super().__init__(mu, difference)
        self.active = active
        self._asked: _Asked | None = None

    @property
    def varies(self) -> bool:
        return self.active

    def forget(self) -> None:
        self._asked = None

    @abstractmethod
    def _frame(self, points: Tensor, open_: Tensor, guide: Tensor, kept: slice) -> Frame:
        """Where to probe those of `points` [b, d] that are `kept`; `open_` [b, d], bool, are the coordinates that
        count, and the guide's others are 0."""

    @abstractmethod
    def _gradient(self, told: Derivatives) -> Tensor:
        """The gradient [b, d], float64."""

    def ask(self, points: Tensor, guide: Tensor | None = None) -> Tensor:
        points = self._checked(points)
        _, rows, asked = self._posed(points, guide, slice(None))
        self._asked = asked
        return rows if len(asked.shape) == 2 else rows[asked.rows]

    def ask_factored(self, points: Tensor, guide: Tensor | None = None, part: tuple[int, int] | None = None) -> Probes:
        points = self._checked(points)
        check_factored(points)
        kept = slice(None) if part is None else slice(*part)
        frame, _, asked = self._posed(points, guide, kept)
        self._asked, points = asked, points[kept]
        steps = np.broadcast_to(np.float32(self.mu), (frame.directions.shape[1],))
        counts = None if len(asked.shape) == 2 else frame.counts.cpu().numpy()
        return Probes(points.cpu().numpy(), steps, frame.along, self.difference, counts)

    def skip(self, points: Tensor, guide: Tensor | None = None) -> None:
        """Nothing is drawn, but by those who say so."""

    def _posed(self, points: Tensor, guide: Tensor | None, kept: slice) -> tuple[Frame, Tensor, _Asked]:
        """The frame, the rows [b, p, d] of all its directions, probed or not, and what to keep of the question."""
        open_, hint = self._hinted(points, guide)
        frame = self._frame(points, open_, hint, kept)
        points, hint = points[kept], hint[kept]
        base, used = points.unsqueeze(1), frame.used
        # As `Probes.expand` does it: the step times the direction, rounded, then the sum, rounded.
        nominal = frame.directions * torch.tensor(self.mu, dtype=points.dtype)
        ahead = base + nominal
        if self.difference == "forward":
            rows, steps = torch.cat([base, ahead], dim=1), ahead - base
            asked_for = torch.cat([used.new_ones(len(used), 1), used], dim=1)
        else:
            behind = base - nominal
            rows, steps = torch.cat([ahead, behind], dim=1), ahead - behind
            asked_for = torch.cat([used, used], dim=1)
        if bool((used & ~steps.any(dim=2)).any()):
            raise StepVanished(f"mu = {self.mu} is lost in rounding: no coordinate of a probe differs from its point")
        shape = tuple(asked_for.shape) if bool(used.all()) else (int(asked_for.sum()),)
        return frame, rows, _Asked(steps, asked_for, frame, hint, points.dtype, shape)

    def _hinted(self, points: Tensor, guide: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which coordinates count, [b, d], bool, and the guide within them, 0 without one."""
        if self.guided and guide is None:
            raise ValueError(f"{self.name} needs a guide, {list(points.shape)}")
        if guide is not None and (guide.shape != points.shape or not bool(torch.isfinite(guide).all())):
            raise ValueError(
                f"the guide must be finite and {list(points.shape)}, as the points, not {list(guide.shape)}"
            )
        open_ = points != 0 if self.active else torch.ones_like(points, dtype=torch.bool)
        return open_, torch.zeros_like(points) if guide is None else guide.detach().to(points) * open_

    def tell(self, losses: Tensor) -> Tensor:
        asked = self._open_question()
        values = check_losses(losses, asked.shape, asked.steps.device)
        self._asked = None
        return self._gradient(self._derivatives(values, asked)).to(asked.dtype)

    def derive(self, answers: Tensor) -> Tensor:
        asked = self._open_question()
        values = check_losses(answers, (*asked.shape, answers.shape[-1]), asked.steps.device)
        self._asked = None
        told = self._derivatives(values, asked)
        return torch.einsum("bmk,bmd->bdk", told.values, told.directions)

    def _open_question(self) -> _Asked:
        if self._asked is None:
            raise NothingAsked("tell answers an ask, once: ask first")
        return self._asked

    def _derivatives(self, given: Tensor, asked: _Asked) -> Derivatives:
        """Of values [b, p, ...] or [rows, ...], one for each probe."""
        trailing = given.shape[len(asked.shape) :]
        values = given.new_zeros(*asked.rows.shape, *trailing)
        values[asked.rows] = given.reshape(-1, *trailing)
        if self.difference == "forward":
            differences = values[:, 1:] - values[:, :1]
        else:
            ahead, behind = values.chunk(2, dim=1)
            differences = ahead - behind
        # D_u l = difference / |s| along u = s / |s|, s the step that was taken
        steps = asked.steps.double()
        lengths = steps.norm(dim=2)
        lengths[lengths == 0] = 1.0  # only where nothing was probed
        used = asked.frame.used.view(*asked.frame.used.shape, *(1 for _ in trailing))
        scaled = differences / lengths.view(*lengths.shape, *(1 for _ in trailing))
        return Derivatives(
            torch.where(used, scaled, 0.0),
            steps / lengths.unsqueeze(2),
            asked.frame.counts,
            asked.frame.dimensions,
            asked.guide.double(),
        )


class ActiveCGE(Subspace):
    """CGE without the coordinates at which the encoder's ReLU holds a latent: kappa = 1, u the axes that are left.

    The gradient of the parameters equals that of CGE. d is the most that a sample costs (twice that, if central); one
    whose coordinates are all zero costs the query at the point itself, or nothing.
    """

    name = "active-cge"

    def __init__(self, mu: float = MU, difference: Difference = "forward") -> None:
        super().__init__(mu, difference, active=True)

    def directions_per_sample(self, dimension: int) -> int:
        return dimension

    def _frame(self, points: Tensor, open_: Tensor, guide: Tensor, kept: slice) -> Frame:
        d, open_ = points.shape[1], open_[kept]
        counts = open_.sum(dim=1)
        # The open axes of each point first, in their order.
        axes = torch.argsort((~open_).to(torch.uint8), dim=1, stable=True)[:, : max(int(counts.max()), 1)]
        directions = torch.zeros(*axes.shape, d, dtype=points.dtype, device=points.device)
        directions.scatter_(2, axes.unsqueeze(2), 1.0)
        return Frame(directions, counts, counts, Coordinates(axes.cpu().numpy()))

    def _gradient(self, told: Derivatives) -> Tensor:
        return told.combine(told.values)


class RandomSubspace(Subspace):
    """q random directions a sample, or as many as its subspace has.

    Args:
        q: directions per sample.
        generator: draws them; on any device.
        mu, difference, active: see `Subspace`.

    Raises:
        ValueError: `q` below 1, or as `Estimator`.
    """

    def __init__(
        self,
        q: int,
        mu: float = MU,
        difference: Difference = "forward",
        *,
        generator: torch.Generator,
        active: bool = False,
    ) -> None:
        super().__init__(mu, difference, active=active)
        if q < 1:
            raise ValueError(f"q must be at least 1, not {q}")
        self.q = q
        self._generator = generator

    @property
    def description(self) -> Description:
        return Description(self.name, self.mu, self.difference, self.q)

    def directions_per_sample(self, dimension: int) -> int:
        return min(self.q, dimension)

    def skip(self, points: Tensor, guide: Tensor | None = None) -> None:
        points = self._checked(points)
        self._frame(points, *self._hinted(points, guide), slice(0, 0))


class Orthonormal(RandomSubspace):
    """q orthonormal directions, uniform among all frames of the subspace, drawn anew for every sample.

        unbiased:    kappa = d / q      E[g] = gradient
        projection:  kappa = 1          the nearest point to the gradient in the span that was probed

    The squared cosine of either with the gradient is Beta(q / 2, (d - q) / 2): q / d on average, 1 at q = d, where q
    independent directions (RGE) have about q / (d + q - 1). d is the dimension of the sample's subspace, and no sample
    is probed along more directions than that. Central differences are antithetic pairs.

    Args:
        q, generator, mu, difference, active: see `RandomSubspace`.
        scale: which of the two.

    Source: Haar-distributed frames by QR (Mezzadri, Notices of the AMS 54, 2007); orthogonal directions for ZO in
    Kozak et al., Computational Optimization and Applications 79, 2021.
    """

    name = "orthonormal"

    def __init__(
        self,
        q: int,
        mu: float = MU,
        difference: Difference = "forward",
        *,
        generator: torch.Generator,
        active: bool = False,
        scale: Scale = "unbiased",
    ) -> None:
        super().__init__(q, mu, difference, generator=generator, active=active)
        self.scale = scale

    def _frame(self, points: Tensor, open_: Tensor, guide: Tensor, kept: slice) -> Frame:
        return random_frame(self.directions_per_sample(points.shape[1]), points, open_, self._generator, kept=kept)

    def _gradient(self, told: Derivatives) -> Tensor:
        if self.scale == "projection":
            return told.combine(told.values)
        kappa = told.dimensions / told.counts.clamp(min=1)
        return told.combine(kappa.unsqueeze(1) * told.values)


def random_frame(
    m: int,
    points: Tensor,
    open_: Tensor,
    generator: torch.Generator,
    first: Tensor | None = None,
    kept: slice = slice(None),
) -> Frame:
    """m random orthonormal directions within the open coordinates, or as many as there are of these.

    Args:
        points: w [b, d], for their shape and dtype.
        open_: [b, d], bool.
        generator: of the directions.
        first: [b, d], of which the first direction is the unit vector, as far as it lies in the open coordinates; where
            nothing of it does, all are random.
        kept: the points whose directions are returned; all are drawn.
    """
    b, d = points.shape
    drawn = torch.randn(b, d, m, generator=generator, device=generator.device, dtype=torch.float64)[kept]
    open_ = open_[kept]
    drawn = drawn.to(points.device) * open_.unsqueeze(2)
    if first is not None:
        inside = first[kept].double() * open_
        length = inside.norm(dim=1, keepdim=True)
        drawn[:, :, 0] = torch.where(length > 0, inside / length.clamp(min=1e-300), drawn[:, :, 0])
    # Q of QR, up to signs, which are as good as random and of no matter to any estimate: f(w + mu u) is symmetric in
    # what it says of u and -u up to O(mu).
    directions = torch.linalg.qr(drawn).Q.mT
    dimensions = open_.sum(dim=1)
    counts = dimensions.clamp(max=m)
    # Beyond the rank of what is open, Q leaves it: those are not probed.
    used = torch.arange(m, device=counts.device) < counts.unsqueeze(1)
    directions = torch.where((used.unsqueeze(2) & open_.unsqueeze(1)), directions, 0.0).to(points.dtype).contiguous()
    return Frame(directions, counts, dimensions, Directions(directions.cpu().numpy().astype(np.float32, copy=False)))
