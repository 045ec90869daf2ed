"""How often certificates are wrong: ten thousand on classifiers whose true radius, or whose probabilities, are known.

Each number of wrong ones is held against alpha by an exact binomial test that a sound certification fails once in a
million seeds. That it would notice an unsound one is shown with several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from statistics import NormalDist

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from defender_client import smoothing
from defender_client.smoothing import Certificate, Scored, Smooth, lower_confidence_bound, radius

TRIALS = 10_000
UNSOUND_TRIALS = 2500  # are enough to tell
FALSE_ALARM = 1e-6
SIGMA, N0, N = 0.5, 20, 192
ORIGIN = torch.zeros(1, 1, 2)

Base = Callable[[Tensor], Tensor]
Wrong = Callable[[Certificate], bool]
Bound = Callable[[int, int, float], float]


def half_space(images: Tensor) -> Tensor:
    """Class 1 where the first number is positive, else class 0: the true radius is that number."""
    margin = images[:, 0, 0, :1]
    return torch.cat([-margin, margin], dim=1)


def at_distance(distance: float) -> tuple[Tensor, Wrong]:
    """An image, and what is wrong about it: class 0, or a radius beyond its distance to the boundary."""
    image = torch.tensor([[[distance, 0.3]]])
    return image, lambda found: found.label == 0 or found.radius > float(image[0, 0, 0])


def beyond(probabilities: list[float]) -> Wrong:
    """What is wrong where the classes' probabilities are known: a bound that is above the selected one's."""
    return lambda found: found.pa_lower > probabilities[found.selected]


def slices(images: Tensor) -> Tensor:
    """Ten classes along the first number, of probability 1/10 each around 0."""
    edges = torch.tensor([SIGMA * NormalDist().inv_cdf(k / 10) for k in range(1, 10)])
    return torch.eye(10)[torch.bucketize(images[:, 0, 0, 0].contiguous(), edges)]


OUTSIDE = 0.6


def shell(images: Tensor) -> Tensor:
    """Class 0 outside of a circle around 0, and in it three more, a third of it each."""
    x, y = images[:, 0, 0, 0], images[:, 0, 0, 1]
    # P[x^2 + y^2 > r^2] = exp(-r^2 / (2 sigma^2)), the Rayleigh distribution's
    outside = x.square() + y.square() > -2 * SIGMA**2 * math.log(OUTSIDE)
    third = ((torch.atan2(y, x) + math.pi) * 3 / (2 * math.pi)).long().clamp(0, 2)
    return torch.eye(4)[torch.where(outside, 0, 1 + third)]


def together(base: Base) -> Scored:
    """Many small batches scored as one: all that a base has to cost here is the call."""

    def scored(batches: Iterator[Tensor]) -> Iterator[Tensor]:
        while group := list(islice(batches, 200)):
            yield from base(torch.cat(group)).split([len(batch) for batch in group])

    return scored


def trials(
    base: Base, classes: int, x: Tensor, alpha: float, count: int, *, n0: int = N0, scored: Scored | None = None
) -> Iterator[Certificate]:
    """So many certificates of one image, each from noise of its own."""
    generator = torch.Generator().manual_seed(5)
    smooth = Smooth(base, classes, SIGMA)
    return smooth.certify_each(((x, generator) for _ in range(count)), n0, N, alpha, N, scored or together(base))


def pvalue(wrong: int, count: int, alpha: float) -> float:
    """How likely so many wrong ones are, or more, where each is wrong with a probability of alpha."""
    return float(binomtest(wrong, count, alpha, alternative="greater").pvalue)


@pytest.fixture(autouse=True)
def _each_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same 193 counts come again and again, and their bounds take most of the time."""
    monkeypatch.setattr(smoothing, "lower_confidence_bound", cache(lower_confidence_bound))
    monkeypatch.setattr(smoothing, "radius", cache(radius))


NEAR, MIDDLE, FAR = (at_distance(deviations * SIGMA) for deviations in (0.02, 0.6, 2.1))

SOUND: dict[str, tuple[Base, int, Tensor, Wrong, float]] = {
    "near": (half_space, 2, *NEAR, 0.05),  # the selection errs nearly as often as not
    "middle": (half_space, 2, *MIDDLE, 0.05),
    "far": (half_space, 2, *FAR, 0.05),  # few votes are lost, or none
    "middle, alpha 0.001": (half_space, 2, *MIDDLE, 0.001),
    "ten equal classes": (slices, 10, ORIGIN, beyond([0.1] * 10), 0.05),
    "shell": (shell, 4, ORIGIN, beyond([OUTSIDE] + [(1 - OUTSIDE) / 3] * 3), 0.05),
}


@pytest.mark.parametrize(("base", "classes", "x", "wrong", "alpha"), SOUND.values(), ids=SOUND.keys())
def test_no_more_certificates_are_wrong_than_alpha_allows(
    base: Base, classes: int, x: Tensor, wrong: Wrong, alpha: float
) -> None:
    found = list(trials(base, classes, x, alpha, TRIALS))
    assert len(found) == TRIALS
    amiss = sum(map(wrong, found))
    assert pvalue(amiss, TRIALS, alpha) > FALSE_ALARM
    assert amiss > 0  # else these would be no cases in which it can go wrong


# --- what would be noticed --------------------------------------------------------------------------------------------


def share(successes: int, trials: int, alpha: float) -> float:
    """The point estimate."""
    return successes / trials


def twice(successes: int, trials: int, alpha: float) -> float:
    """As if alpha were two-sided, and then taken twice."""
    return lower_confidence_bound(successes, trials, 2 * alpha)


def one_more(successes: int, trials: int, alpha: float) -> float:
    """A vote too many."""
    return lower_confidence_bound(min(successes + 1, trials), trials, alpha)


def wald(successes: int, trials: int, alpha: float) -> float:
    """The normal approximation, which is too sure of itself near 1."""
    p = successes / trials
    return max(0.0, p - NormalDist().inv_cdf(1 - alpha) * math.sqrt(p * (1 - p) / trials))


@pytest.mark.parametrize(
    ("bound", "case", "alpha"),
    [
        (share, MIDDLE, 0.001),
        (twice, MIDDLE, 0.05),
        (one_more, FAR, 0.05),
        (wald, FAR, 0.05),
    ],
)
def test_a_bound_that_is_none_would_be_noticed(
    bound: Bound, case: tuple[Tensor, Wrong], alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoothing, "lower_confidence_bound", cache(bound))
    x, wrong = case
    amiss = sum(map(wrong, trials(half_space, 2, x, alpha, UNSOUND_TRIALS)))
    assert pvalue(amiss, UNSOUND_TRIALS, alpha) < FALSE_ALARM


@pytest.mark.parametrize(("name", "count"), [("near", TRIALS), ("ten equal classes", UNSOUND_TRIALS)])
def test_an_estimate_from_the_draws_of_the_selection_would_be_noticed(name: str, count: int) -> None:
    base, classes, x, wrong, alpha = SOUND[name]

    def twice_the_same(batches: Iterator[Tensor]) -> Iterator[Tensor]:
        selections = islice(batches, 0, None, 2)  # and the scores of each for the estimation's batch after it, too
        for scores in together(base)(selections):
            yield from (scores, scores)

    amiss = sum(map(wrong, trials(base, classes, x, alpha, count, n0=N, scored=twice_the_same)))
    assert pvalue(amiss, count, alpha) < FALSE_ALARM


def test_less_noise_than_the_radius_is_computed_for_would_be_noticed() -> None:
    x, wrong = MIDDLE
    quieter = trials(lambda images: half_space(x + 0.9 * (images - x)), 2, x, 0.05, UNSOUND_TRIALS)
    amiss = sum(map(wrong, quieter))
    assert pvalue(amiss, UNSOUND_TRIALS, 0.05) < FALSE_ALARM
