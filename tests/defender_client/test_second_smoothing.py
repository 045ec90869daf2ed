"""Certification a second time, from its definitions: tails summed term by term and solved for by bisection, and no
quantile, no distribution and no count of the implementation that it is compared with."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from defender_client.smoothing import ABSTAIN, Smooth, lower_confidence_bound, radius

FARTHEST = 300.0  # log-odds, and standard deviations: beyond what is asked for


# --- the second implementation ----------------------------------------------------------------------------------------


def bisected(below: Callable[[float], bool], low: float, high: float) -> float:
    """Where `below` turns from true to false, to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def upper_tail(successes: int, trials: int, log_odds: float) -> float:
    """P[Binomial(trials, p) >= successes] at ln(p / (1 - p)) = log_odds; for p of at most (successes + 1) / trials."""
    chosen = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    log_p, log_q = -math.log1p(math.exp(-log_odds)), -math.log1p(math.exp(log_odds))
    first = math.exp(chosen + successes * log_p + (trials - successes) * log_q)
    # P[k + 1] / P[k] = (n - k) / (k + 1) p / (1 - p); a standard deviation is at most sqrt(n) / 2
    k = np.arange(successes, min(trials, successes + 40 * math.isqrt(trials) + 40))
    return float(first * (1 + np.cumprod((trials - k) / (k + 1) * math.exp(log_odds)).sum()))


def second_bound(successes: int, trials: int, alpha: float) -> tuple[float, float]:
    """(p, 1 - p) of the largest p at which so many successes or more have a probability of at most alpha < 1/2."""
    if successes == 0:
        return 0.0, 1.0
    # A median of the binomial is nowhere under floor(n p), so that the tail is 1/2 or more from there on.
    high = math.log((successes + 1) / (trials - successes - 1)) if successes + 1 < trials else FARTHEST
    log_odds = bisected(lambda x: upper_tail(successes, trials, x) < alpha, -FARTHEST, high)
    return 1 / (1 + math.exp(-log_odds)), 1 / (1 + math.exp(log_odds))


def second_radius(successes: int, trials: int, alpha: float, sigma: float) -> float:
    """sigma z, where a normal exceeds z with the probability that all other classes have at most; 0 from 1/2 on."""
    _, others = second_bound(successes, trials, alpha)
    if others >= 0.5:
        return 0.0
    return sigma * bisected(lambda z: math.erfc(z / math.sqrt(2)) / 2 > others, 0.0, FARTHEST)


def certain(successes: int, trials: int, alpha: float) -> bool:
    """Whether a fair coin has so many heads or more with a probability under alpha: in whole numbers, exactly."""
    return Fraction(_ways(trials)[successes], 2**trials) < Fraction(alpha)


@cache
def _ways(tosses: int) -> list[int]:
    """In how many ways there are k heads or more, for each k."""
    return list(accumulate(math.comb(tosses, k) for k in range(tosses, -1, -1)))[::-1]


# --- counts in, radius out --------------------------------------------------------------------------------------------


def counts(trials: int, rng: random.Random) -> int:
    """Every kind of count: none, all, about half, nearly all, any."""
    few = min(trials, rng.randint(0, 5))
    half = min(trials, trials // 2 + rng.randint(0, 2 * math.isqrt(trials)))
    return rng.choice([0, 1, trials, trials - 1, few, trials - few, half, rng.randint(0, trials)])


def test_bound_and_radius_are_those_of_a_second_implementation() -> None:
    rng, certified = random.Random(1), 0
    for _ in range(3000):
        trials = round(10 ** rng.uniform(0, 5))
        successes = counts(trials, rng)
        # From 1e-80 on scipy's own quantile gives up, at counts too small for a radius.
        alpha = rng.choice([0.05, 0.01, 0.001, 10 ** rng.uniform(-15, -0.302), 10 ** rng.uniform(-80, -15)])
        sigma = rng.choice([0.12, 0.25, 0.5, 1.0, 10 ** rng.uniform(-3, 3)])
        case = (successes, trials, alpha, sigma)
        bound = lower_confidence_bound(successes, trials, alpha)
        assert bound == pytest.approx(second_bound(successes, trials, alpha)[0], rel=1e-9, abs=0), case
        found, expected = radius(bound, sigma), second_radius(*case)
        # Just over 1/2 the radius begins at 0, where nothing relative can be said.
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-11 * sigma), case
        certified += found > 0
    assert 800 < certified < 2200


# --- votes in, certificate out ----------------------------------------------------------------------------------------


def voting(votes: list[int], classes: int) -> Callable[[Tensor], Tensor]:
    """A classifier that gives these votes, whatever it is shown: each in scores of any size."""
    generator, left = torch.Generator().manual_seed(len(votes)), torch.tensor(votes)

    def scores(images: Tensor) -> Tensor:
        nonlocal left
        now, left = left.split([len(images), len(left) - len(images)])
        found = 10 * torch.randn(len(images), classes, generator=generator)
        return found.scatter(1, now[:, None], found.amax(1, keepdim=True) + 0.1)

    return scores


def test_a_certificate_is_that_of_a_second_implementation() -> None:
    rng, labels = random.Random(2), Counter[int]()
    for _ in range(1500):
        classes, n0, n = rng.randint(2, 10), rng.randint(1, 40), rng.randint(1, 300)
        alpha, sigma = 10 ** rng.uniform(-6, -0.302), 10 ** rng.uniform(-2, 1)
        weights = [rng.random() for _ in range(classes)]
        weights[rng.randrange(classes)] += rng.choice([0, 1, 10, 100])
        votes = rng.choices(range(classes), weights, k=n0 + n)
        smooth = Smooth(voting(votes, classes), classes, sigma)
        found = smooth.certify(torch.zeros(1, 1, 1), n0, n, alpha, rng.randint(1, 350), torch.Generator())

        first, second = Counter(votes[:n0]), Counter(votes[n0:])
        assert first[found.selected] == max(first.values())  # of several, either
        successes = second[found.selected]
        assert found.successes == successes
        assert found.label == (found.selected if certain(successes, n, alpha) else ABSTAIN)
        expected = second_radius(successes, n, alpha, sigma)
        assert found.radius == pytest.approx(expected, rel=1e-9, abs=1e-11 * sigma)
        assert found.abstained == (found.radius == 0)
        labels[found.label] += 1
    # All classes are certified, and an abstention is as ordinary as a certificate.
    assert set(labels) == {ABSTAIN, *range(10)}
    assert 300 < labels[ABSTAIN] < 1200


def test_it_abstains_for_exactly_the_counts_that_a_fair_coin_may_give() -> None:
    for n in range(1, 26):
        for alpha in (0.3, 0.05, 0.001):
            labels = []
            for successes in range(n + 1):
                votes = [1] + [1] * successes + [0] * (n - successes)
                smooth = Smooth(voting(votes, 2), 2, 0.25)
                found = smooth.certify(torch.zeros(1, 1, 1), 1, n, alpha, n, torch.Generator())
                assert found.successes == successes
                labels.append(found.label)
            assert labels == [1 if certain(k, n, alpha) else ABSTAIN for k in range(n + 1)], (n, alpha)
