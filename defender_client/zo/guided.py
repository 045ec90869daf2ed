"""Estimators that are given a guess s of the gradient, from a surrogate, say, and ask the oracle what it is worth.

Estimates stay those of the oracle: the guess says where to look (`Prior`) or what is already known (`ControlVariate`),
and how well it is aligned with the truth is measured by the same probes. Where it is of no use, both are `Orthonormal`.
`Distil` takes the guess for the gradient, as others do; it is here to be compared with.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from defender_client.zo.alignment import Alignment
from defender_client.zo.base import MU, Description, Difference, Estimator, NothingAsked, check_factored, check_losses
from defender_client.zo.spending import allocate
from defender_client.zo.subspace import Derivatives, Frame, RandomSubspace, Scale, random_frame
from shared.wire.probes import Directions, Probes

Spread = Literal["even", "guide"]


class Guided(RandomSubspace):
    """q directions a sample, on average where they are spread, and a guide.

    Args:
        q, generator, mu, difference, active: see `RandomSubspace`.
        spread: "even": q for every sample. "guide": as many in all, in proportion to |s| sqrt(d), which is where the
            variance is (Neyman 1934): a sample's part of it is about |g|^2 d / q. At least one each; counts depend on
            the guide alone, and no estimate becomes biased by them.

    Attributes:
        alignment: of the guides so far; shared by forks.
    """

    guided = True

    def __init__(
        self,
        q: int,
        mu: float = MU,
        difference: Difference = "forward",
        *,
        generator: torch.Generator,
        active: bool = False,
        spread: Spread = "even",
    ) -> None:
        super().__init__(q, mu, difference, generator=generator, active=active)
        self.spread = spread
        self.alignment = Alignment()

    def _random(self, points: Tensor, open_: Tensor, guide: Tensor, first: Tensor | None, kept: slice) -> Frame:
        m = self.directions_per_sample(points.shape[1])
        if self.spread == "even":
            return random_frame(m, points, open_, self._generator, first, kept)
        room = open_.sum(dim=1)
        weights = guide.double().norm(dim=1) * room.sqrt()
        counts = allocate(weights.cpu(), m * len(points), room.cpu()).to(points.device)
        most = max(int(counts.max()), 1)
        return random_frame(most, points, open_, self._generator, first, kept).only(counts[kept])

    def _measure(self, told: Derivatives, kappa: Tensor) -> None:
        along = torch.einsum("bmd,bd->bm", told.directions, told.guide)
        self.alignment.tell(
            (kappa * told.values * along).sum(dim=1),
            (kappa * told.values.square()).sum(dim=1),
            told.guide.square().sum(dim=1),
        )


class Prior(Guided):
    """Prior-guided directions: one probe along the guess, the others orthonormal in what is orthogonal to it.

        v = s / |s|,  u_2 ... u_q orthonormal and random in v's complement
        projection:  g = (D_v l) v + sum_i (D_{u_i} l) u_i
        unbiased:    g = (D_v l) v + (d - 1) / (q - 1) sum_i (D_{u_i} l) u_i

    With a = cos(s, gradient) the projection's squared cosine with the gradient is a^2 + (1 - a^2) (q - 1) / (d - 1) on
    average (P-RGF, Cheng et al., NeurIPS 2019, section 3). With q = 1 there is nothing but the guess's direction, and
    its alignment cannot be measured.

    While the guess is no better than a random direction, a^2 < 1 / d as far as is known, none is spent on it.
    """

    name = "prior"

    def __init__(
        self,
        q: int,
        mu: float = MU,
        difference: Difference = "forward",
        *,
        generator: torch.Generator,
        active: bool = False,
        spread: Spread = "even",
        scale: Scale = "projection",
    ) -> None:
        super().__init__(q, mu, difference, generator=generator, active=active, spread=spread)
        self.scale = scale
        self._guide_probed = False

    def _frame(self, points: Tensor, open_: Tensor, guide: Tensor, kept: slice) -> Frame:
        self._guide_probed = self.trusts(float(open_.sum(dim=1).double().mean()))
        return self._random(points, open_, guide, guide if self._guide_probed else None, kept)

    def trusts(self, dimension: float) -> bool:
        """Whether a probe along the guess is worth more than a random one, in `dimension` dimensions."""
        if self.q == 1 or not self.alignment.known:
            return True  # nothing is known against it
        return self.alignment.cosine > 0 and self.alignment.cosine**2 * dimension > 1

    def _gradient(self, told: Derivatives) -> Tensor:
        dimensions, counts = told.dimensions.double(), told.counts.double()
        kappa = torch.ones_like(told.values)
        if self._guide_probed:
            kappa[:, 1:] = ((dimensions - 1) / (counts - 1).clamp(min=1)).unsqueeze(1)
        else:
            kappa *= (dimensions / counts.clamp(min=1)).unsqueeze(1)
        if not self._guide_probed or self.q > 1:
            self._measure(told, kappa)
        return told.combine(told.values if self.scale == "projection" else kappa * told.values)


class ControlVariate(Guided):
    """The guess as a control variate: random probes estimate only what it does not explain.

        g = c s + (d / q) sum_i (D_{u_i} l - c <s, u_i>) u_i

    u_i orthonormal and random. Unbiased as mu -> 0 for any c that does not depend on these probes; the variance is that
    of `Orthonormal` times |gradient - c s|^2 / |gradient|^2. c is the least squares slope of the probes of earlier
    steps on the guess, and 0 until there are some: a useless guess costs nothing.

    Source: control variates (Glynn and Szechtman, MCQMC 2000); with surrogate gradients for ZO: Maheswaranathan et al.,
    "Guided evolutionary strategies", ICML 2019.
    """

    name = "control-variate"

    def _frame(self, points: Tensor, open_: Tensor, guide: Tensor, kept: slice) -> Frame:
        return self._random(points, open_, guide, None, kept)

    def _gradient(self, told: Derivatives) -> Tensor:
        kappa = (told.dimensions.double() / told.counts.clamp(min=1)).unsqueeze(1).expand_as(told.values)
        c = self.alignment.slope
        explained = c * torch.einsum("bmd,bd->bm", told.directions, told.guide)
        self._measure(told, kappa)
        return c * told.guide + told.combine(kappa * (told.values - explained))


class Distil(Estimator):
    """The guess taken for the gradient: what is asked is only what the surrogate learns from.

    One query at the point itself, and `q` at random points around it.

    Args:
        q: points around it, from 0.
        jitter: how far from it, in lengths of the point.
        generator: draws them.
    """

    name = "distil"
    guided = True

    def __init__(self, q: int = 0, jitter: float = 0.1, *, generator: torch.Generator) -> None:
        super().__init__()
        if q < 0 or not 0 < jitter < float("inf"):
            raise ValueError(f"q must be at least 0 and jitter positive, not {q} and {jitter}")
        self.q, self.jitter = q, jitter
        self._generator = generator
        self._asked: tuple[Tensor, tuple[int, ...]] | None = None

    @property
    def description(self) -> Description:
        return Description(self.name, self.mu, self.difference, self.q)

    def forget(self) -> None:
        self._asked = None

    def directions_per_sample(self, dimension: int) -> int:
        return self.q

    def ask(self, points: Tensor, guide: Tensor | None = None) -> Tensor:
        probes = self.ask_factored(points.float(), guide)
        rows = torch.from_numpy(probes.expand(0, len(probes))).to(points)
        return rows.view(len(points), -1, points.shape[1]) if self.q else rows

    def ask_factored(self, points: Tensor, guide: Tensor | None = None, part: tuple[int, int] | None = None) -> Probes:
        points = self._checked(points)
        check_factored(points)
        if guide is None or guide.shape != points.shape:
            raise ValueError(f"{self.name} needs a guide {list(points.shape)} for these points")
        drawn = self._drawn(points)
        if part is not None:
            points, guide, drawn = (values[slice(*part)] for values in (points, guide, drawn))
        b, m, _ = drawn.shape
        drawn /= drawn.norm(dim=2, keepdim=True)
        steps = (self.jitter * points.norm(dim=1, keepdim=True)).expand(b, m).contiguous()
        counts = np.zeros(b, np.int64) if not self.q else None
        self._asked = (guide.detach(), (b, 1 + self.q) if self.q else (b,))
        return Probes(points.cpu().numpy(), steps.cpu().numpy(), Directions(drawn.cpu().numpy()), "forward", counts)

    def skip(self, points: Tensor, guide: Tensor | None = None) -> None:
        self._drawn(points)

    def _drawn(self, points: Tensor) -> Tensor:
        m = max(self.q, 1)  # a factored batch has a direction, used or not
        shape = (len(points), m, points.shape[1])
        return torch.randn(*shape, generator=self._generator, device=self._generator.device).to(points)

    def tell(self, losses: Tensor) -> Tensor:
        if self._asked is None:
            raise NothingAsked("tell answers an ask, once: ask first")
        guide, shape = self._asked
        check_losses(losses, shape, guide.device)
        self._asked = None
        return guide

    def derive(self, answers: Tensor) -> Tensor:
        raise ValueError("distil asks for no derivatives: it has no Jacobian")
