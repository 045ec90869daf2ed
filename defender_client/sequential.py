"""Certification that stops as soon as it knows: group-sequential tests of radii, exact, at the error of the fixed one.

The draws of an image are looked at several times. Of each radius r of a grid a null hypothesis is tested,

    H(r): p <= Phi(r / sigma)    p the probability of the selected class under noise (Cohen et al. 2019, Theorem 1)

and rejected at look j, after t_j draws, where no more than a_j(r) of them failed. The boundaries a_j(r) are frozen
before the first draw, and such that

    P[F(t_j) <= a_j(r) at any look | p = Phi(r / sigma)] <= alpha                                                  (1)

which is computed exactly, look by look (`boundary`): the binomial form of Lan and DeMets, "Discrete sequential
boundaries for clinical trials", Biometrika 1983. More failures are likelier under a smaller p, so that (1) holds for
all of H(r).

Several radii cost nothing: they are tested in a fixed sequence, the smallest first, and one counts only where all
before it are rejected (Maurer, Hothorn and Lehmacher 1995; Westfall and Krishen, J. Statist. Plann. Inference 2001).
Let r* be the smallest radius of the grid whose hypothesis is true. All beyond it are true as well; a wrong certificate
has rejected one of those, therefore H(r*) too, and that has a probability of at most alpha.

This module knows counts, and nothing of images, classifiers or noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, isfinite

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom, norm

BLOCK = 64
"""Draws between two looks, or a multiple: noise is drawn in blocks of so many (`smoothing.NOISE_BLOCK`)."""

GRID_STEPS = 25
"""Radii of the grid in one sigma, beside the targets."""

RESERVED = 0.25
"""Share of alpha that is kept from the last look, for the looks before it."""

SPENDING = 0.15
"""Exponent of the spending function of what is reserved; 1 spends evenly, 0 all at the first look."""

POWER, HOPE = 0.8, 0.3
"""A radius is given up where an image that n draws certify with probability POWER has a chance of less than HOPE."""

_STEPS = ((512, 64), (1024, 128), (2560, 256), (10_240, 512))
_CUT = 1e-12  # of alpha: tails of the recursion that are cut off, and counted as errors
_SAME = 1e-6  # radii that differ by less are one: they are written with six decimals

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Design:
    """The tests of all radii, frozen before the first draw: see `design`.

    Attributes:
        sigma: standard deviation of the noise; of its unit are all radii.
        alpha: probability that a certificate is wrong, at most.
        n: draws, at most.
        targets: radii that are aimed at, rising: no draw is made once each is reached or given up.
        radii: of the grid, rising, from 0 on, the targets among them.
        at: draws at each look, rising; the last is n.
        reject: [radii, looks] a radius is reached at a look where at most so many draws failed; -1: it is not.
        futile: [targets, looks] a target is given up at a look where at least so many failed.

    `reject` falls along the radii, so that whoever reaches one reaches all before it: the fixed sequence needs no
    further rule. It is lowered where single tests do not fall by themselves, which only takes from their error.
    """

    sigma: float
    alpha: float
    n: int
    targets: tuple[float, ...]
    radii: tuple[float, ...]
    at: tuple[int, ...]
    reject: Counts
    futile: Counts

    def reached(self, look: int, failures: ArrayLike) -> Counts:
        """How many radii of the grid are reached at a look, of failures [...] among the draws so far: [...]."""
        return np.asarray((np.asarray(failures)[..., None] <= self.reject[:, look]).sum(axis=-1))

    def done(self, look: int, failures: ArrayLike, reached: ArrayLike) -> NDArray[np.bool_]:
        """Whether no further draw is worth its cost, of failures [...] and of the most reached so far [...]: [...]."""
        beyond = np.asarray(reached)[..., None] <= np.searchsorted(self.radii, self.targets)
        open_ = beyond & (np.asarray(failures)[..., None] < self.futile[:, look])
        return np.asarray(~open_.any(axis=-1) | (look == len(self.at) - 1))

    def follow(self, failures: Counts) -> tuple[Counts, Counts]:
        """What becomes of many images at once.

        Args:
            failures: [images, looks] among the draws up to each look; those after the end are not regarded.

        Returns:
            The radii of the grid that each reaches [images], as a number of them; its draws [images].
        """
        reached, draws = np.zeros(len(failures), np.int64), np.zeros(len(failures), np.int64)
        going = np.arange(len(failures))
        for look, t in enumerate(self.at):
            here = failures[going, look]
            reached[going] = np.maximum(reached[going], self.reached(look, here))
            draws[going] = t
            going = going[~self.done(look, here, reached[going])]
        return reached, draws


@lru_cache(maxsize=16)
def design(sigma: float, alpha: float, n: int, targets: tuple[float, ...]) -> Design:
    """Tests of the targets, and of a grid of radii beside them, within n draws.

    The grid has steps of sigma / 25 up to what n draws without a failure reach. It decides how far the written radius
    comes, and never how long is drawn: that the targets do.

    Args:
        sigma: positive.
        alpha: in (0, 1/2).
        n: at least 1.
        targets: at least one radius, rising, not negative.

    Raises:
        ValueError: an argument out of range, or a target that n draws cannot reach.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must be in (0, 1/2), not {alpha}")
    if not (isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if not targets or targets[0] < 0 or any(b - a < _SAME for a, b in pairwise(targets)):
        raise ValueError(f"targets must be rising radii from 0 on, not {targets}")
    at, limit = looks(n), farthest(n, alpha, sigma)
    steps = (k * sigma / GRID_STEPS for k in range(int(limit / sigma * GRID_STEPS) + 1))
    between = [r for r in steps if all(abs(r - target) >= _SAME for target in targets)]
    tests = {r: boundary(float(norm.sf(r / sigma)), at, alpha) for r in sorted({*between, *targets})}
    if tests[targets[-1]].reject[-1] < 0:
        raise ValueError(f"radius {targets[-1]:g} must be at most {limit:.6f}: {n} draws reach no further")
    return Design(
        sigma=sigma,
        alpha=alpha,
        n=n,
        targets=targets,
        radii=tuple(tests),
        at=at,
        reject=np.minimum.accumulate([test.reject for test in tests.values()]),
        futile=np.minimum.accumulate([tests[target].futile for target in targets]),
    )


def farthest(n: int, alpha: float, sigma: float) -> float:
    """The radius that n draws without a failure reach: sigma Phi^-1(alpha^(1/n)); 0 where that is not positive."""
    return max(0.0, float(sigma * norm.isf(-np.expm1(np.log(alpha) / n))))


def looks(n: int) -> tuple[int, ...]:
    """After how many draws to look: dense at first, thinning out, the last after all `n`.

    Every 64 draws up to 512, 128 up to 1024, 256 up to 2560, 512 up to 10,240, then a 20th of what is drawn.
    """
    if n < 1:
        raise ValueError(f"there must be at least 1 draw, not {n}")
    found, t = [], BLOCK
    while t < n:
        found.append(t)
        t += next((step for until, step in _STEPS if t < until), BLOCK * ceil(t / 20 / BLOCK))
    return (*found, n)


@dataclass(frozen=True)
class Boundary:
    """One radius' test, by look.

    Attributes:
        reject: rejected where at most so many draws failed (a_j); -1 where no count rejects.
        futile: given up where at least so many failed (b_j). Not binding: the error is that without it.
        error: probability of a rejection at the edge of the hypothesis; at most alpha.
    """

    reject: tuple[int, ...]
    futile: tuple[int, ...]
    error: float


@lru_cache(maxsize=4096)
def boundary(q0: float, at: tuple[int, ...], alpha: float) -> Boundary:
    """The test of "a draw fails with a probability of at least q0" at these looks, with an error of at most alpha.

    Args:
        q0: in (0, 1/2].
        at: draws at each look, rising.
        alpha: in (0, 1).

    The last look has nearly the test of a fixed n: a = max {k: P[F(n) <= k] <= (1 - RESERVED) alpha}. What is left,
    epsilon = alpha - P[F(n) <= a], is for the looks before it, and pays only for paths that the last look would not
    have rejected; epsilon (t / n)^SPENDING of it are spent by draw t (the family of Kim and DeMets, Biometrika 1987).
    So an image without a failure is decided soon, and one in doubt is not much worse off than with a fixed n.

    Given up is what has become hopeless (stochastic curtailment: Lan, Simon and Halperin, Commun. Statist. C 1982):

        P[F(n) <= a | F(t), q1] < HOPE    at q1 where P[F(n) <= a | q1] = POWER

    which raises the rate of misses at q1, 1 - POWER, to no more than (1 - POWER) / (1 - HOPE). The error keeps what
    giving up takes from it: (1) holds for whoever draws on.
    """
    n = at[-1]
    last = _largest(n, q0, (1 - RESERVED) * alpha)
    if last < 0:
        last = _largest(n, q0, alpha)
    if last < 0:  # not even n draws without a failure
        return Boundary((-1,) * len(at), (0,) * len(at), 0.0)
    delta = _CUT * alpha
    # Each look cuts two tails of the state and two of the step: their errors are set aside before anything is spent.
    epsilon = alpha - float(binom.cdf(last, n, q0)) - 4 * len(at) * delta
    # state[i]: probability of low + i failures so far, and no rejection
    low, state = 0, np.ones(1)
    spent = error = 0.0
    reject = []
    for before, t in pairwise((0, *at)):
        if not len(state):  # as many failures as at the last look are rejected already
            reject.append(last)
            continue
        first, step, lost = _step(t - before, q0, delta)
        state = np.convolve(state, step)
        low += first
        error += lost
        state = state[: max(0, last - low + 1)]  # beyond `last`, nothing is rejected any more
        low, state, lost = _trimmed(low, state, delta)
        error += lost
        if t < n:
            k = np.arange(low, low + len(state))
            beyond = np.cumsum(state * binom.sf(last - k, n - t, q0))
            count = int(np.searchsorted(beyond, epsilon * (t / n) ** SPENDING - spent, side="right"))
            spent += float(beyond[count - 1]) if count else 0.0
        else:
            count = len(state)
        error += float(state[:count].sum())
        low, state = low + count, state[count:]
        reject.append(low - 1)
    reject[-1] = last
    q1 = float(beta.ppf(1 - POWER, last + 1, n - last))
    # As many failures as may still come: the smallest number that has HOPE at q1
    futile = [last + 1 - (int(binom.ppf(HOPE, n - t, q1)) if t < n else 0) for t in at]
    return Boundary(tuple(reject), tuple(futile), error)


def _largest(n: int, q: float, alpha: float) -> int:
    """max {k: P[Binomial(n, q) <= k] <= alpha}, or -1."""
    k = int(binom.ppf(alpha, n, q))  # the first k of which the probability is alpha or more
    while k >= 0 and binom.cdf(k, n, q) > alpha:
        k -= 1
    return k


@lru_cache(maxsize=1024)
def _step(draws: int, q: float, delta: float) -> tuple[int, NDArray[np.float64], float]:
    """Binomial(draws, q): the first count, the probabilities from it on, and what the cut tails had."""
    return _trimmed(0, binom.pmf(np.arange(draws + 1), draws, q), delta)


def _trimmed(low: int, mass: NDArray[np.float64], delta: float) -> tuple[int, NDArray[np.float64], float]:
    """Without tails of at most delta each."""
    first = int(np.searchsorted(np.cumsum(mass), delta, side="right"))
    behind = int(np.searchsorted(np.cumsum(mass[first:][::-1]), delta, side="right"))
    stop = len(mass) - behind
    lost = float(mass[:first].sum() + mass[stop:].sum())
    return low + first, mass[first:stop], lost
