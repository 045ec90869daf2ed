"""Noise levels and steps: functions whose noise and derivatives are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import binom

from defender_client import noise
from defender_client.noise import (
    LINE_POINTS,
    Outcome,
    best_step,
    difference_error,
    ecnoise,
    measure_noise,
    measure_slopes,
    slope_rows,
)

Values = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def smooth(t: np.ndarray) -> np.ndarray:
    return np.exp(-t) + np.sin(3 * t)


def normal(sigma: float) -> Values:
    return lambda t, rng: smooth(t) + sigma * rng.standard_normal(t.shape)


def uniform(sigma: float) -> Values:
    return lambda t, rng: smooth(t) + sigma * math.sqrt(3) * rng.uniform(-1, 1, t.shape)


def rounded(decimals: int) -> Values:
    return lambda t, rng: smooth(t).round(decimals)


def single(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return smooth(t).astype(np.float32).astype(np.float64)


# name, function, its noise, spacing
KNOWN = [
    ("normal", normal(1e-6), 1e-6, 3e-4),
    ("normal, coarse", normal(0.1), 0.1, 1e-2),
    ("uniform", uniform(1e-4), 1e-4, 1e-3),
    ("2 decimals", rounded(2), 1e-2 / math.sqrt(12), 0.03),
    ("4 decimals", rounded(4), 1e-4 / math.sqrt(12), 3e-3),
    ("float32", single, 2**-23 / math.sqrt(12), 3e-4),  # values in [1, 2) are 2^-23 apart
]


@pytest.mark.parametrize(("function", "sigma", "spacing"), [k[1:] for k in KNOWN], ids=[k[0] for k in KNOWN])
def test_the_level_is_that_of_the_noise_within_a_factor_of_4(function: Values, sigma: float, spacing: float) -> None:
    rng, ratios = np.random.default_rng(0), []
    for _ in range(400):
        t = rng.uniform(0.1, 0.3) + spacing * np.arange(LINE_POINTS)
        level = ecnoise(function(t, rng)).level
        ratios += [level / sigma] if level is not None else []
    assert len(ratios) > 0.9 * 400
    assert np.mean([0.25 < ratio < 4 for ratio in ratios]) > 0.97
    assert np.median(ratios) == pytest.approx(1, rel=0.35)


@given(seed=st.integers(0, 2**32), exponent=st.floats(-10, 2), points=st.integers(4, 12))
@settings(max_examples=200, deadline=None)
def test_the_level_is_that_of_its_order_s_differences(seed: int, exponent: float, points: int) -> None:
    """Against a sum over binomial coefficients, and free of the values' scale and of any polynomial below order k."""
    values = np.random.default_rng(seed).standard_normal(points)
    found = ecnoise(values)
    if found.order is None:
        assert found.outcome is Outcome.TOO_FAR
        return
    k = found.order
    weights = [(-1) ** (k - j) * binom(k, j) for j in range(k + 1)]
    differences = np.convolve(values, weights[::-1], mode="valid")
    gamma = math.factorial(k) ** 2 / math.factorial(2 * k)
    assert found.level == pytest.approx(math.sqrt(gamma * np.mean(differences**2)))
    scale = 10.0**exponent
    assert ecnoise(scale * values).level == pytest.approx(scale * found.level)
    assert ecnoise(values + 1.0).level == pytest.approx(found.level)


def test_what_shows_nothing_says_why_and_what_to_do() -> None:
    still = ecnoise([1, 1, 1, 1, 1, 2, 3])
    assert (still.level, still.outcome, still.factor) == (None, Outcome.TOO_CLOSE, 100)
    assert ecnoise([1, 1, 1, 2, 1, 2, 3]).outcome is not Outcome.TOO_CLOSE
    steep = ecnoise(smooth(0.1 * np.arange(7)))
    assert (steep.level, steep.outcome, steep.factor) == (None, Outcome.TOO_FAR, 0.01)
    quiet, loud = (ecnoise(normal(s)(1e-5 * np.arange(7), np.random.default_rng(0))) for s in (1e-3, 1.0))
    assert [(e.outcome, e.wide, e.factor) for e in (quiet, loud)] == [
        (Outcome.FOUND, False, 1.0),
        (Outcome.FOUND, True, 0.01),  # noise, or a function that swings: a smaller spacing tells
    ]
    for bad in ([1, 2, 3], [1, 2, np.nan, 3], [[1, 2, 3, 4]]):
        with pytest.raises(ValueError, match="at least 4 finite"):
            ecnoise(np.array(bad, dtype=float))


class Along:
    """A function of points [p, d] that depends on their sum only, with noise; remembers how often it was asked."""

    def __init__(self, values: Values, seed: int = 0) -> None:
        self._values, self._rng = values, np.random.default_rng(seed)
        self.rows: list[int] = []

    def __call__(self, points: np.ndarray) -> np.ndarray:
        self.rows.append(len(points))
        return self._values(points.sum(axis=1), self._rng)


def lines(rounds: int, b: int, d: int) -> np.ndarray:
    directions = np.random.default_rng(1).standard_normal((rounds, b, d))
    return directions / np.linalg.norm(directions, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("values", "sigma", "start"),
    [
        (normal(1e-5), 1e-5, 1e-3),
        (normal(1e-5), 1e-5, 1.0),  # too far at first
        (rounded(2), 1e-2 / math.sqrt(12), 1e-4),  # too close at first
        (single, 2**-23 / math.sqrt(12), 0.5),
    ],
)
def test_the_search_finds_a_spacing(values: Values, sigma: float, start: float) -> None:
    f = Along(values)
    points = np.full((3, 5), 0.04)
    found = measure_noise(f, points, lines(4, 3, 5), start, 2.0)
    assert f.rows == [3 * LINE_POINTS] * 4
    assert [line.outcome for line in found] == [Outcome.FOUND] * 3
    for line in found:
        assert line.level is not None
        assert sigma / 4 < line.level < 4 * sigma


def test_a_function_that_stands_still_is_searched_up_to_the_limit() -> None:
    found = measure_noise(Along(lambda t, rng: np.zeros_like(t)), np.zeros((2, 3)), lines(4, 2, 3), 1e-3, 0.7)
    assert [(line.level, line.spacing, line.outcome) for line in found] == [(None, 0.7, Outcome.TOO_CLOSE)] * 2


def test_between_too_close_and_too_far_lies_the_geometric_mean() -> None:
    search = noise._Search(1e-2, 10.0)
    spacings = []
    for outcome in (Outcome.TOO_CLOSE, Outcome.TOO_FAR, Outcome.TOO_FAR):
        search.tell(noise.NoiseEstimate(None, None, outcome, wide=False), last=False)
        spacings.append(search.spacing)
    assert spacings == pytest.approx([1.0, 0.1, math.sqrt(1e-3)])


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("sigma", [1e-8, 1e-5])
def test_derivatives_are_those_of_the_function(difference: noise.Difference, sigma: float) -> None:
    f = Along(normal(sigma))
    directions = lines(2, 6, 4)
    found = measure_slopes(f, np.full((2, 4), 0.1), directions, np.full(2, sigma), difference, 5.0)
    assert f.rows == [2 * slope_rows(difference, 6)] * 2
    t, along = 0.4, directions.sum(axis=2)  # d/ds of g(t + s sum(u)) = sum(u) g'
    first = (-math.exp(-t) + 3 * math.cos(3 * t)) * along
    higher = (math.exp(-t) - 9 * math.sin(3 * t)) * along**2
    if difference == "central":
        higher = (-math.exp(-t) - 27 * math.cos(3 * t)) * along**3
    assert found.first == pytest.approx(math.sqrt(np.mean(first**2)), rel=0.05)
    # Coarse, and on the safe side by a standard error.
    assert 0.9 < found.higher / math.sqrt(np.mean(higher**2)) < 1.8


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("sigma", [1e-7, 1e-4, 1e-2])
def test_the_step_chosen_is_nearly_the_best_one(difference: noise.Difference, sigma: float) -> None:
    """From measurement to step: the true error there, over many draws, is near the least over a grid of steps."""
    f, rng = Along(normal(sigma)), np.random.default_rng(3)
    points, directions = np.full((3, 4), 0.1), lines(3, 8, 4)
    levels = [line.level for line in measure_noise(f, points, lines(4, 3, 4), 1e-3, 1.0)]
    level = math.sqrt(np.mean([x * x for x in levels if x is not None]))
    slopes = measure_slopes(f, points, directions, np.full(3, level), difference, 2.0)
    chosen = best_step(difference, level, slopes.higher)
    t, along = 0.4, directions.sum(axis=2)[..., None]
    slope = (-math.exp(-t) + 3 * math.cos(3 * t)) * along

    def error(h: float) -> float:
        ahead, base, behind = (
            smooth(t + s * along * h) + sigma * rng.standard_normal((3, 8, 500)) for s in (1.0, 0.0, -1.0)
        )
        estimate = (ahead - base) / h if difference == "forward" else (ahead - behind) / (2 * h)
        return float(np.sqrt(np.mean((estimate - slope) ** 2)))

    least = min(error(h) for h in np.logspace(-5, 0.3, 60))
    assert error(chosen) < 1.7 * least
    # What is predicted for it is true within a factor.
    assert 0.4 < difference_error(difference, chosen, level, slopes.higher) / error(chosen) < 2.5


@given(
    difference=st.sampled_from(["forward", "central"]),
    level=st.floats(1e-12, 10),
    higher=st.floats(1e-6, 1e6),
    factor=st.floats(0.01, 100),
)
def test_no_step_has_a_smaller_expected_error(
    difference: noise.Difference, level: float, higher: float, factor: float
) -> None:
    best = best_step(difference, level, higher)
    at_best = difference_error(difference, best, level, higher)
    assert at_best <= difference_error(difference, factor * best, level, higher) * (1 + 1e-12)
    if difference == "forward":  # sqrt(sqrt(2) |f''| eps_f)
        assert at_best == pytest.approx(math.sqrt(math.sqrt(2) * higher * level))


def test_curvature_that_the_noise_hides_is_not_taken_to_be_none() -> None:
    f = Along(lambda t, rng: 0.5 * t + 0.1 * rng.standard_normal(t.shape))
    found = measure_slopes(f, np.zeros((3, 4)), lines(3, 8, 4), np.full(3, 0.1), "forward", 50.0)
    assert found.higher > 0
    assert math.isinf(best_step("forward", 0.1, 0.0))


def test_what_swings_is_not_taken_for_noise_and_much_noise_is() -> None:
    points, along = np.full((3, 5), 0.04), lines(4, 3, 5)
    swings = measure_noise(
        Along(lambda t, rng: np.cos(40 * t) + 1e-6 * rng.standard_normal(t.shape)), points, along, 0.5, 2
    )
    assert all(line.level is not None and 2e-7 < line.level < 5e-6 for line in swings)
    loud = measure_noise(Along(normal(3.0)), points, along, 1e-3, 2)
    assert all(line.level is not None and 0.7 < line.level < 12 for line in loud)
