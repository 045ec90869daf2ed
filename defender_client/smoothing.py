"""Randomized smoothing: predict and certify by voting under Gaussian noise.

After Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019, and its code
(locuslab/smoothing). It knows only a function from images to class scores: local, behind a wire, or a linear toy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from typing import Literal

import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor

from defender_client.sequential import BLOCK, Design

Scored = Callable[[Iterator[Tensor]], Iterator[Tensor]]
"""From batches of images [b, c, h, w] to the scores [b, classes] of each, in the same order."""

ABSTAIN = -1
"""The label of an ordinary outcome: the votes do not tell the classes apart at the confidence asked for."""

BATCH = 1000
"""Images per call of the base classifier, unless said."""

NOISE_BLOCK = BLOCK
"""Noisy copies drawn by one call of the generator, whatever the batch size: see `Smooth._noisy_copies`."""


@dataclass(frozen=True)
class Certificate:
    """What `Smooth.certify` or `certify_sequentially` found out about one image, and from what.

    Attributes:
        label: the certified class, or `ABSTAIN`.
        radius: L2 radius in the units of the image (pixels in [0, 1]); 0 where abstained.
        pa_lower: lower confidence bound on the probability of `selected` under noise; of a sequential abstention 0.
        selected: the class that won the selection draws; equal to `label` unless abstained.
        successes: votes for `selected` among the n estimation draws (n_A).
        n0, alpha: as asked for.
        n: estimation draws: as many as asked for, or as a sequential certification made.
        method: by which it was made.
        looks: how often a sequential certification looked at its draws.
    """

    label: int
    radius: float
    pa_lower: float
    selected: int
    successes: int
    n0: int
    n: int
    alpha: float
    method: Literal["fixed", "sequential"] = "fixed"
    looks: int = 1

    @property
    def abstained(self) -> bool:
        return self.label == ABSTAIN

    @property
    def queries(self) -> int:
        """What the certificate cost, in queries."""
        return self.n0 + self.n


def lower_confidence_bound(successes: int, trials: int, alpha: float) -> float:
    """One-sided Clopper-Pearson bound: at most the true probability with probability at least 1 - alpha.

    Args:
        successes: 0 to `trials`.
        trials: at least 1.
        alpha: failure probability, in (0, 1).

    Raises:
        ValueError: an argument out of range.

    Source: Clopper and Pearson, Biometrika 1934; LowerConfBound in Cohen et al. 2019, section 3.2.2.
    """
    _check_alpha(alpha)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must be in 0 ... trials, and trials at least 1, not {successes} of {trials}")
    if successes == 0:
        return 0.0
    if successes == trials:
        return float(alpha ** (1 / trials))  # the quantile below in closed form
    # p = Beta^-1(alpha; s, n - s + 1), the p at which s or more successes have probability alpha
    return float(beta.ppf(alpha, successes, trials - successes + 1))


def radius(pa_lower: float, sigma: float) -> float:
    """Certified L2 radius from a lower bound on the top class's probability; 0 where that is not above 1/2.

    Args:
        pa_lower: in [0, 1].
        sigma: standard deviation of the noise, in the units of the image.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= pa_lower <= 1:
        raise ValueError(f"pa_lower must be a probability, not {pa_lower}")
    _check_sigma(sigma)
    if pa_lower <= 0.5:
        return 0.0
    # R = sigma Phi^-1(pA), Cohen et al. 2019, section 3.2.2 (Theorem 1 with pB = 1 - pA)
    return float(sigma * norm.ppf(pa_lower))


def largest_radius(n: int, alpha: float, sigma: float) -> float:
    """The radius when all `n` votes agree: no image can be certified beyond it at these settings."""
    return radius(lower_confidence_bound(n, n, alpha), sigma)


class Smooth:
    """The smoothed classifier g(x) = argmax_c P[base(x + delta) = c], delta ~ N(0, sigma^2 I).

    (Cohen et al. 2019, eq. (1).)

    Args:
        base: images [b, c, h, w] -> scores [b, classes]; the vote is their argmax. It decides about devices, and about
            evaluation mode; gradients are off while it is called.
        classes: number of classes k, at least 2.
        sigma: standard deviation of the noise, in the units of the images.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, base: Callable[[Tensor], Tensor], classes: int, sigma: float) -> None:
        if classes < 2:
            raise ValueError(f"there must be at least 2 classes to tell apart, not {classes}")
        _check_sigma(sigma)
        self.base = base
        self.classes = classes
        self.sigma = sigma

    def certify(
        self,
        x: Tensor,
        n0: int,
        n: int,
        alpha: float,
        batch: int = BATCH,
        generator: torch.Generator = torch.default_generator,
    ) -> Certificate:
        """CERTIFY of Cohen et al. 2019: a class, and an L2 radius around x within which g answers nothing else.

        With probability at least 1 - alpha over the noise, the result is either an abstention or a label and a radius R
        such that g(x + eps) = label for every eps with |eps|_2 < R. That holds per image: of many certificates, a share
        of alpha may be wrong. It is a statement about `base` as a deterministic function of its input.

        Args:
            x: one image [c, h, w].
            n0: draws to select the class.
            n: further draws to estimate its probability. They are never the same draws: a class chosen for its luck
                would be credited with it.
            alpha: failure probability, in (0, 1).
            batch: images per call of `base`; of no influence on the noise.
            generator: draws the noise; by default torch's own, which `torch.manual_seed` seeds.

        Returns:
            The certificate; its cost is n0 + n queries.

        Raises:
            ValueError: an argument out of range, or scores that are NaN or not [b, classes].
        """
        return next(self.certify_each([(x, generator)], n0, n, alpha, batch))

    @torch.no_grad()
    def certify_each(
        self,
        images: Iterable[tuple[Tensor, torch.Generator]],
        n0: int,
        n: int,
        alpha: float,
        batch: int,
        scored: Scored | None = None,
    ) -> Iterator[Certificate]:
        """`certify` of several images, in their order, each with the generator of its noise.

        Which draws are made does not depend on any answer, so that the noise of the next batches, and of the next
        images, may be drawn while those before are scored.

        Args:
            images: one after the other, taken when their noise is drawn.
            n0, n, alpha, batch: as for `certify`.
            scored: from batches of noisy images to the scores of each, in the same order; it may take batches ahead of
                the scores that it gives. `base` by default, one batch after the other.

        Raises:
            ValueError: as for `certify`.
        """
        _check_alpha(alpha)

        def batches() -> Iterator[Tensor]:
            for x, generator in images:
                for draws in (n0, n):
                    yield from self._noisy_copies(x, draws, batch, generator)

        scores = (scored or self._one_by_one)(batches())
        while (first := next(scores, None)) is not None:
            selected = int(self._votes(chain([first], scores), n0, batch).argmax())
            successes = int(self._votes(scores, n, batch)[selected])
            yield self._certificate(selected, successes, n0, n, alpha)

    def _certificate(self, selected: int, successes: int, n0: int, n: int, alpha: float) -> Certificate:
        pa_lower = lower_confidence_bound(successes, n, alpha)
        certain = pa_lower > 0.5
        return Certificate(
            label=selected if certain else ABSTAIN,
            radius=radius(pa_lower, self.sigma),
            pa_lower=pa_lower,
            selected=selected,
            successes=successes,
            n0=n0,
            n=n,
            alpha=alpha,
        )

    @torch.no_grad()
    def certify_sequentially(
        self, x: Tensor, n0: int, design: Design, batch: int, generator: torch.Generator
    ) -> Certificate:
        """`certify` with draws until the design's targets are reached or given up, and the same guarantee.

        With probability at least 1 - alpha over the noise, the result is either an abstention or a label and a radius R
        such that g(x + eps) = label for every eps with |eps|_2 <= R. R is the largest radius of the design's grid that
        was reached; it may be 0, and is certain then too. See `sequential`.

        Args:
            x, n0, batch, generator: as for `certify`.
            design: tests of radii, for this sigma. It says after how many draws to look.

        The noise is that of `certify` with the design's n, draw by draw, but for what is not drawn.

        Returns:
            The certificate; its cost is n0 + n queries, n at most the design's.

        Raises:
            ValueError: as for `certify`, or a design for another sigma.
        """
        if design.sigma != self.sigma:
            raise ValueError(f"the design must be for sigma {self.sigma}, not {design.sigma}")

        def voted(draws: int) -> Tensor:
            return self._votes(self._one_by_one(self._noisy_copies(x, draws, batch, generator)), draws, batch)

        selected = int(voted(n0).argmax())
        n = failures = reached = look = 0
        for look, t in enumerate(design.at):
            failures += t - n - int(voted(t - n)[selected])
            n = t
            reached = max(reached, int(design.reached(look, failures)))
            if design.done(look, failures, reached):
                break
        found = design.radii[reached - 1] if reached else 0.0
        return Certificate(
            label=selected if reached else ABSTAIN,
            radius=found,
            pa_lower=float(norm.cdf(found / self.sigma)) if reached else 0.0,
            selected=selected,
            successes=n - failures,
            n0=n0,
            n=n,
            alpha=design.alpha,
            method="sequential",
            looks=look + 1,
        )

    def predict(
        self,
        x: Tensor,
        n: int,
        alpha: float,
        batch: int = BATCH,
        generator: torch.Generator = torch.default_generator,
    ) -> int:
        """PREDICT of Cohen et al. 2019: the class g(x), or `ABSTAIN`.

        With probability at least 1 - alpha over the noise, the result is g(x) or `ABSTAIN`.

        Args, errors: as for `certify`. The cost is n queries.
        """
        _check_alpha(alpha)
        votes = self.votes(x, n, batch, generator)
        first, second = votes.topk(2).indices.tolist()
        count_a, count_b = int(votes[first]), int(votes[second])
        # Two-sided binomial test of n_A ~ Binomial(n_A + n_B, 1/2) (Hung and Fithian 2019)
        undecided = binomtest(count_a, count_a + count_b, 0.5).pvalue > alpha
        return ABSTAIN if undecided else int(first)

    def votes(
        self, x: Tensor, n: int, batch: int = BATCH, generator: torch.Generator = torch.default_generator
    ) -> Tensor:
        """Votes [classes], int64 on the CPU, of n noisy copies of x; arguments, errors and cost as for `predict`."""
        return self._votes(self._one_by_one(self._noisy_copies(x, n, batch, generator)), n, batch)

    @torch.no_grad()
    def _one_by_one(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        return map(self.base, batches)

    @torch.no_grad()
    def _votes(self, scores: Iterator[Tensor], draws: int, batch: int) -> Tensor:
        """Votes [classes], int64 on the CPU, of the next `draws` noisy copies, from their scores in batches."""
        _check_draws(draws, batch)
        counts = torch.zeros(self.classes, dtype=torch.int64)
        for start, part in zip(range(0, draws, batch), scores, strict=False):  # beyond them, another image's
            expected = [min(batch, draws - start), self.classes]
            if list(part.shape) != expected:
                raise ValueError(f"scores must be {expected}, not {list(part.shape)}")
            if bool(torch.isnan(part).any()):
                raise ValueError("scores must not be NaN: their argmax is no vote")
            counts += torch.bincount(part.argmax(dim=1).cpu(), minlength=self.classes)
        if int(counts.sum()) != draws:
            raise ValueError(f"there must be scores of all {draws} draws, not of {int(counts.sum())}")
        return counts

    def _noisy_copies(self, x: Tensor, n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """x + sigma N(0, I), `n` times, as images [at most `batch`, c, h, w].

        torch's generators fill a tensor in vectors of 16, so one draw of 100 copies is not in general two draws of 50.
        Noise is therefore drawn in blocks of a fixed size and regrouped: a seed gives the same copies for any `batch`.
        """
        if x.ndim != 3 or not x.is_floating_point():
            raise ValueError(f"x must be one floating-point image [c, h, w], not {list(x.shape)} of {x.dtype}")
        _check_draws(n, batch)
        held: list[Tensor] = []
        count = 0
        for start in range(0, n, NOISE_BLOCK):
            shape = (min(NOISE_BLOCK, n - start), *x.shape)
            noise = torch.randn(shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
            held.append(x + self.sigma * noise)
            count += shape[0]
            last = start + NOISE_BLOCK >= n
            if count < batch and not last:
                continue
            copies = torch.cat(held)
            ready = count if last else count - count % batch
            for first in range(0, ready, batch):
                yield copies[first : min(first + batch, ready)]
            held, count = [copies[ready:]], count - ready


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), not {alpha}")


def _check_draws(n: int, batch: int) -> None:
    if n < 1 or batch < 1:
        raise ValueError(f"the number of draws and the batch size must be at least 1, not {n} and {batch}")


def _check_sigma(sigma: float) -> None:
    if not (isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
