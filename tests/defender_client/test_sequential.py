"""Tests of radii, look by look: errors a second time, term by term and in trials; what they cost and what they miss."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import cache
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, norm

from defender_client.sequential import HOPE, POWER, RESERVED, Boundary, Design, boundary, design, farthest, looks
from defender_client.smoothing import NOISE_BLOCK, largest_radius, lower_confidence_bound, radius

SIGMA, ALPHA, N = 0.25, 0.001, 10_000
THREE, FOUR = (0.0, 0.25, 0.5), (0.0, 0.25, 0.5, 0.75)
TRIALS = 10_000
FALSE_ALARM = 1e-6


@cache
def usual(targets: tuple[float, ...] = FOUR, alpha: float = ALPHA, n: int = N) -> Design:
    return design(SIGMA, alpha, n, targets)


def failures(q: NDArray[np.float64], at: tuple[int, ...], seed: int = 0) -> NDArray[np.int64]:
    """Failures up to each look [images, looks], of images that fail with probabilities q [images]."""
    steps = np.diff((0, *at))
    return np.random.default_rng(seed).binomial(steps, q[:, None]).cumsum(axis=1)


def crossing(test: Boundary, at: tuple[int, ...], q: float) -> float:
    """P[F(t_j) <= a_j at any look], one draw after the other: no step's distribution, nothing cut off."""
    state, rejected, drawn = np.array([1.0]), 0.0, 0
    for t, a in zip(at, test.reject, strict=True):
        for _ in range(t - drawn):
            state = np.append(state * (1 - q), 0.0) + np.append(0.0, state * q)
        drawn = t
        rejected += state[: a + 1].sum()
        state[: a + 1] = 0
    return rejected


# --- the looks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 63, 64, 65, 100, 512, 1000, 5000, 10_000, 123_457])
def test_looks_are_at_whole_blocks_and_the_last_at_n(n: int) -> None:
    at = looks(n)
    assert at[-1] == n
    assert all(t % NOISE_BLOCK == 0 for t in at[:-1])
    steps = np.diff((0, *at))
    assert (steps > 0).all()
    assert (np.diff(steps[:-1]) >= 0).all()  # never denser again
    assert at[0] == min(n, NOISE_BLOCK)
    assert len(at) < 90


# --- the error --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0.0, 0.1, 0.25, 0.5, 0.6])
@pytest.mark.parametrize(("n", "alpha"), [(700, 0.001), (700, 0.2), (333, 0.05), (40, 0.1)])
def test_the_error_of_a_boundary_is_that_of_a_recursion_draw_by_draw(r: float, n: int, alpha: float) -> None:
    at, q = looks(n), float(norm.sf(r / SIGMA))
    test = boundary(q, at, alpha)
    assert test.error == pytest.approx(crossing(test, at, q), rel=1e-9, abs=1e-11 * alpha)
    assert test.error <= alpha


def test_the_error_is_that_of_whole_numbers() -> None:
    """Against a fair coin, in fractions: every path counted."""
    at, alpha = looks(150), 0.05
    test = boundary(0.5, at, alpha)
    ways, rejected, drawn = {0: 1}, Fraction(0), 0
    for t, a in zip(at, test.reject, strict=True):
        step, following = t - drawn, dict[int, int]()
        for k, count in ways.items():
            for more in range(step + 1):
                following[k + more] = following.get(k + more, 0) + count * comb(step, more)
        drawn = t
        rejected += Fraction(sum(count for k, count in following.items() if k <= a), 2**t)
        ways = {k: count for k, count in following.items() if k > a}
    assert rejected <= Fraction(alpha)
    assert test.error == pytest.approx(float(rejected), rel=1e-9)


def test_no_radius_of_a_design_has_more_error_than_alpha_and_the_targets_have_nearly_it() -> None:
    for plan in (usual(), usual(alpha=0.05), design(0.7, 0.01, 2000, (0.0, 0.3, 1.1)), design(1.0, 1e-6, 1000, (0.0,))):
        errors = [boundary(float(norm.sf(r / plan.sigma)), plan.at, plan.alpha).error for r in plan.radii]
        assert max(errors) <= plan.alpha
        # What is written may only be lower than a single test: a larger radius is never reached by more failures.
        single = [boundary(float(norm.sf(r / plan.sigma)), plan.at, plan.alpha).reject for r in plan.radii]
        assert (plan.reject <= np.array(single)).all()
        assert (np.diff(plan.reject, axis=0) <= 0).all()
        assert (np.diff(plan.reject, axis=1) >= 0).all()
    of_targets = [boundary(float(norm.sf(r / SIGMA)), usual().at, ALPHA).error for r in FOUR]
    assert min(of_targets) > 0.9 * ALPHA


def test_the_last_look_has_nearly_the_fixed_test() -> None:
    for r, reject in zip(usual().radii, usual().reject, strict=True):
        q, last = float(norm.sf(r / SIGMA)), int(reject[-1])
        assert binom.cdf(last, N, q) <= ALPHA < binom.cdf(last + 1, N, q) / (1 - RESERVED)


# --- ten thousand images, known ---------------------------------------------------------------------------------------


def wrong(plan: Design, p: NDArray[np.float64], seed: int) -> int:
    """How many of these images get a radius that is not theirs: r with p <= Phi(r / sigma)."""
    reached, _ = plan.follow(failures(1 - p, plan.at, seed))
    radii = np.array([-1.0, *plan.radii])[reached]
    return int(((radii >= 0) & (p <= norm.cdf(radii / plan.sigma))).sum())


def pvalue(amiss: int, count: int, alpha: float) -> float:
    return float(binomtest(amiss, count, alpha, alternative="greater").pvalue)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("r", [0.0, 0.02, 0.25, 0.26, 0.5, 0.75])
def test_at_the_edge_of_a_radius_no_more_are_wrong_than_alpha_allows(r: float, alpha: float) -> None:
    """The least favourable image of each radius: its true radius is that one, and no more is certain."""
    plan = usual(alpha=alpha)
    amiss = wrong(plan, np.full(TRIALS, norm.cdf(r / SIGMA)), seed=round(1e6 * r))
    assert pvalue(amiss, TRIALS, alpha) > FALSE_ALARM
    if alpha > 0.01 and r in FOUR:  # between targets the draws end before it could be wrong so often
        assert amiss > 0.3 * alpha * TRIALS  # else these would be no cases in which it can go wrong


@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_of_all_kinds_of_images_no_more_are_wrong_than_alpha_allows(alpha: float) -> None:
    p = np.random.default_rng(3).choice([0.1, 0.5, 0.6, *norm.cdf(np.linspace(0, 3.4, 60)), 0.99999, 1.0], TRIALS)
    assert pvalue(wrong(usual(alpha=alpha), p, seed=4), TRIALS, alpha) > FALSE_ALARM


def test_looking_as_if_each_look_were_the_only_one_would_be_noticed() -> None:
    plan, alpha = usual(alpha=0.05), 0.05
    q = norm.sf(0.25 / SIGMA)
    naive = np.array([binom.ppf(alpha, t, q) - 1 for t in plan.at])
    amiss = int((failures(np.full(TRIALS, q), plan.at) <= naive).any(axis=1).sum())
    assert pvalue(amiss, TRIALS, alpha) < FALSE_ALARM


def test_giving_up_never_makes_an_error() -> None:
    """Whoever ignores the futility rule reaches at least as much, and is still wrong no more often than alpha."""
    plan = usual(alpha=0.05)
    p = norm.cdf(np.random.default_rng(5).uniform(-0.2, 3.2, TRIALS))
    seen = failures(1 - p, plan.at, 6)
    with_it, _ = plan.follow(seen)
    without = (seen[:, None, :] <= plan.reject).any(axis=2).sum(axis=1)
    assert (without >= with_it).all()
    assert (without > with_it).any()
    radii = np.array([-1.0, *plan.radii])[without]
    assert pvalue(int(((radii >= 0) & (p <= norm.cdf(radii / SIGMA))).sum()), TRIALS, 0.05) > FALSE_ALARM


# --- cost and power ---------------------------------------------------------------------------------------------------


def published(size: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """p of images, and whether the class is the label: near Cohen et al. on CIFAR-10 at sigma 0.25."""
    rng = np.random.default_rng(0)
    share = rng.random(size)
    right = share < 0.77
    z = np.interp(share, [0, 0.17, 0.28, 0.44, 0.61, 0.77], [5.5, 3.8, 3, 2, 1, 0])
    other = np.where(rng.random(size) < 0.3, -rng.exponential(0.4, size), rng.exponential(0.7, size))
    return norm.cdf(np.where(right, z, other)), right


@pytest.mark.parametrize(("targets", "saving"), [(THREE, 5.0), (FOUR, 2.5)])
def test_it_certifies_within_a_point_of_ten_thousand_draws_at_a_fraction_of_their_cost(
    targets: tuple[float, ...], saving: float
) -> None:
    plan = usual(targets)
    p, right = published(20_000)
    seen = failures(1 - p, plan.at, 1)
    reached, draws = plan.follow(seen)
    radii = np.array([-1.0, *plan.radii])[reached]
    assert (100 + N) / (100 + draws.mean()) > saving
    fixed = cache(lambda k: radius(lower_confidence_bound(N - k, N, ALPHA), SIGMA))
    of_fixed = np.array([fixed(int(k)) for k in seen[:, -1]])
    for r in targets:
        expected = (right & (of_fixed > 0) & (of_fixed >= r)).mean()
        assert abs((right & (radii >= r)).mean() - expected) < 0.01


def test_an_image_without_a_failure_is_decided_soon() -> None:
    reached, draws = usual(THREE).follow(np.zeros((1, len(usual(THREE).at)), np.int64))
    assert draws == [384]  # of at least 301, at looks 64 draws apart
    assert usual(THREE).radii[reached[0] - 1] >= 0.5
    _, draws = usual().follow(np.zeros((1, len(usual().at)), np.int64))
    assert 5114 < draws[0] <= 6500


def test_a_hopeless_image_is_given_up_soon() -> None:
    reached, draws = usual().follow(failures(np.full(1000, 0.9), usual().at))
    assert not reached.any()
    assert draws.max() <= 256


def test_giving_up_costs_no_more_power_than_the_theorem_says() -> None:
    """Lan, Simon and Halperin: misses at q1 rise from 1 - POWER to (1 - POWER) / (1 - HOPE) at most."""
    for r in FOUR:
        at = usual().at
        test = boundary(float(norm.sf(r / SIGMA)), at, ALPHA)
        q1 = next(q for q in np.geomspace(1e-5, 0.5, 4000) if binom.cdf(test.reject[-1], N, q) < POWER)
        seen = failures(np.full(TRIALS, q1), at, 9)
        given_up, hit = (seen >= test.futile), (seen <= test.reject)
        first = np.where(hit.any(1), hit.argmax(1), len(at))
        missed = (np.where(given_up.any(1), given_up.argmax(1), len(at)) < first) | ~hit.any(1)
        assert pvalue(int(missed.sum()), TRIALS, (1 - POWER) / (1 - HOPE)) > FALSE_ALARM
    assert all((np.diff(usual().futile, axis=0) <= 0).ravel())


# --- the design -------------------------------------------------------------------------------------------------------


def test_radii_are_the_targets_and_a_grid_up_to_what_can_be_reached() -> None:
    plan = usual()
    assert set(FOUR) <= set(plan.radii)
    assert list(plan.radii) == sorted(plan.radii)
    assert max(np.diff(plan.radii)) < SIGMA / 25 + 1e-6
    assert min(np.diff(plan.radii)) > 1e-6
    limit = largest_radius(N, ALPHA, SIGMA)
    assert farthest(N, ALPHA, SIGMA) == pytest.approx(limit, rel=1e-9)
    assert limit - SIGMA / 25 <= plan.radii[-1] <= limit


def test_following_many_is_following_each() -> None:
    plan, rng = design(0.5, 0.01, 1000, (0.0, 0.5)), random.Random(2)
    q = np.array([rng.choice([0.0, 0.1, rng.random()]) for _ in range(300)])
    seen = failures(q, plan.at, 3)
    reached, draws = plan.follow(seen)
    for path, most, t in zip(seen, reached, draws, strict=True):
        best = 0
        for look, k in enumerate(path):
            best = max(best, sum(k <= a for a in plan.reject[:, look]))
            unmet = [i for i, r in enumerate(plan.targets) if not (best and plan.radii[best - 1] >= r)]
            if all(k >= plan.futile[i, look] for i in unmet):
                break
        assert (best, plan.at[look]) == (most, t)


@pytest.mark.parametrize(
    ("sigma", "alpha", "n", "targets", "said"),
    [
        (0.25, 0.001, 10_000, (0.0, 0.8), "must be at most 0.7996"),
        (0.25, 0.001, 5, (0.0,), "5 draws reach no further"),
        (0.25, 0.001, 0, (0.0,), "at least 1 draw"),
        (0.25, 0.6, 100, (0.0,), "alpha must be"),
        (0.0, 0.1, 100, (0.0,), "sigma must be"),
        (0.25, 0.1, 100, (), "targets must be"),
        (0.25, 0.1, 100, (0.1, 0.1), "targets must be"),
        (0.25, 0.1, 100, (-0.1,), "targets must be"),
    ],
)
def test_what_cannot_be_designed_is_refused(
    sigma: float, alpha: float, n: int, targets: tuple[float, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        design(sigma, alpha, n, targets)
