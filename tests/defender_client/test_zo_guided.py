"""Estimators with a guide, in closed form: what a guess of known quality is worth; a useless one costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from zo_support import cross_entropy, estimate, linear, rectified, rows_of, seeded

from defender_client.zo import ControlVariate, Difference, Distil, Guided, NothingAsked, Orthonormal, Prior, make
from defender_client.zo.alignment import DECAY, Alignment

both_differences = pytest.mark.parametrize("difference", get_args(Difference))
D = 16


def guess(gradient: Tensor, cosine: float, draws: int, length: float = 1.0, seed: int = 7) -> Tensor:
    """Vectors [draws, d] of exactly this cosine with the gradient, and of `length` times its length."""
    noise = torch.randn(draws, len(gradient), generator=seeded(seed), dtype=torch.float64)
    unit = gradient / gradient.norm()
    across = F.normalize(noise - (noise @ unit).unsqueeze(1) * unit, dim=1)
    return length * gradient.norm() * (cosine * unit + math.sqrt(1 - cosine**2) * across)


def cosines(result: Tensor, gradient: Tensor) -> Tensor:
    return F.cosine_similarity(result, gradient.expand_as(result))


def origin(draws: int, d: int = D) -> Tensor:
    return torch.zeros(draws, d, dtype=torch.float64)


GUIDED: dict[str, Callable[..., Guided]] = {"prior": Prior, "control-variate": ControlVariate}
every_guided = pytest.mark.parametrize("kind", GUIDED.values(), ids=GUIDED)


# Prior-guided directions


@pytest.mark.parametrize(("q", "a"), [(1, 0.7), (2, 0.7), (5, 0.3), (8, 0.0)])
def test_squared_cosine_of_the_projection(q: int, a: float) -> None:
    """a^2 + (1 - a^2) (q - 1) / (d - 1)    (Cheng et al. 2019)."""
    gradient, loss = linear(D)
    draws = 4000
    result = estimate(
        Prior(q, difference="central", generator=seeded()), origin(draws), loss, guess(gradient, a, draws)
    )
    squared = cosines(result, gradient).square()
    expected = a**2 + (1 - a**2) * (q - 1) / (D - 1)
    assert float(squared.mean()) == pytest.approx(expected, abs=4 * float(squared.std()) / math.sqrt(draws) + 1e-6)


def test_the_first_direction_is_the_guess_within_the_active_coordinates() -> None:
    points, guide = rectified(5, D), torch.randn(5, D, generator=seeded(3))
    rows = Prior(3, generator=seeded(), active=True).ask(points, guide)
    steps = rows[:, 1] - rows[:, 0]
    inside = torch.where(points != 0, guide, 0.0)
    assert float(F.cosine_similarity(steps, inside).abs().min()) > 0.999


def test_scaled_it_is_unbiased_whatever_the_guess() -> None:
    gradient, loss = linear(D)
    draws = 20_000
    fixed = guess(gradient, 0.4, 1).expand(draws, D)
    result = estimate(Prior(3, difference="central", generator=seeded(), scale="unbiased"), origin(draws), loss, fixed)
    error = (result.mean(0) - gradient) / (result.std(0) / math.sqrt(draws)).clamp(min=1e-9)
    assert float(error.abs().max()) < 4.5


def test_a_guess_that_is_no_better_than_chance_is_left_alone() -> None:
    gradient, loss = linear(D)
    estimator = Prior(3, difference="central", generator=seeded())
    bad, good = guess(gradient, 0.05, 500), guess(gradient, 0.8, 500)
    estimate(estimator, origin(500), loss, bad)
    assert estimator.trusts(D)  # what is told counts from the next step on
    estimator.alignment.settle()
    assert not estimator.trusts(D)
    result = estimate(estimator, origin(500), loss, bad)
    assert float(cosines(result, gradient).square().mean()) == pytest.approx(3 / D, rel=0.15)  # as `Orthonormal`
    for _ in range(30):  # its alignment is still measured, and a guess that becomes good is taken up again
        estimate(estimator, origin(500), loss, good)
        estimator.alignment.settle()
    assert estimator.trusts(D)
    assert estimator.alignment.cosine == pytest.approx(0.8, abs=0.1)
    assert float(cosines(estimate(estimator, origin(500), loss, good), gradient).mean()) > 0.8


# The control variate


@pytest.mark.parametrize("length", [0.5, 1.0, 3.0])
def test_variance_is_that_of_what_the_guess_does_not_explain(length: float) -> None:
    """E|g - gradient|^2 = (d/q - 1) |gradient - c s|^2, c the slope."""
    gradient, loss = linear(D)
    a, q, draws = 0.8, 4, 4000
    s = guess(gradient, a, draws, length)
    estimator = ControlVariate(q, difference="central", generator=seeded())
    estimate(estimator, origin(draws), loss, s)
    estimator.alignment.settle()
    assert estimator.alignment.slope == pytest.approx(a / length, rel=0.05)
    assert estimator.alignment.cosine == pytest.approx(a, rel=0.05)
    c = estimator.alignment.slope
    result = estimate(estimator, origin(draws), loss, s)
    error = (result - gradient).square().sum(1)
    expected = (D / q - 1) * (gradient - c * s).square().sum(1).mean()
    assert float(error.mean()) == pytest.approx(float(expected), rel=0.05)


def test_control_variate_is_unbiased_whatever_the_guess() -> None:
    gradient, loss = linear(D)
    draws = 20_000
    fixed = guess(gradient, 0.6, 1).expand(draws, D)
    estimator = ControlVariate(3, difference="central", generator=seeded())
    estimate(estimator, origin(100), loss, fixed[:100])
    estimator.alignment.settle()
    assert estimator.alignment.slope > 0.1
    result = estimate(estimator, origin(draws), loss, fixed)
    error = (result.mean(0) - gradient) / (result.std(0) / math.sqrt(draws))
    assert float(error.abs().max()) < 4.5


def test_without_knowledge_the_control_variate_is_orthonormal() -> None:
    gradient, loss = linear(D)
    guide = guess(gradient, 0.9, 6)
    plain = estimate(Orthonormal(4, generator=seeded()), origin(6), loss)
    assert torch.equal(estimate(ControlVariate(4, generator=seeded()), origin(6), loss, guide), plain)
    against = ControlVariate(4, generator=seeded())
    estimate(against, origin(6), loss, -guide)
    against.alignment.settle()
    assert against.alignment.slope == 0.0


# Both


@every_guided
@both_differences
@pytest.mark.parametrize("spread", ["even", "guide"])
def test_what_is_asked_factored_is_the_same_to_the_bit(
    kind: Callable[..., Guided], difference: Difference, spread: str
) -> None:
    points, guide = rectified(6, 9), torch.randn(6, 9, generator=seeded(2))
    dense, factored = (kind(2, difference=difference, generator=seeded(), active=True, spread=spread) for _ in range(2))
    for _ in range(2):
        probes, asked = dense.ask(points, guide), factored.ask_factored(points, guide)
        assert torch.equal(rows_of(probes), torch.from_numpy(asked.expand(0, len(asked))))
        losses = cross_entropy(9)(rows_of(probes)).view(probes.shape[:-1])
        assert torch.equal(dense.tell(losses), factored.tell(losses))
        for estimator in (dense, factored):
            estimator.alignment.settle()


@every_guided
def test_probes_are_spread_by_the_guide_at_the_same_cost(kind: Callable[..., Guided]) -> None:
    points = torch.ones(4, 10)
    guide = torch.tensor([8.0, 1.0, 1.0, 0.0]).unsqueeze(1).expand(4, 10)
    estimator = kind(3, generator=seeded(), spread="guide")
    asked = estimator.ask_factored(points, guide)
    assert asked.counts is not None
    assert int(asked.counts.sum()) == 4 * 3 == len(asked) - 4
    assert asked.counts[0] > asked.counts[1] >= asked.counts[2] >= asked.counts[3] == 1


@every_guided
def test_forks_share_what_is_known_and_it_survives_a_checkpoint(kind: Callable[..., Guided]) -> None:
    gradient, loss = linear(D)
    estimator, other = kind(3, generator=seeded()), kind(3, generator=seeded())
    estimate(estimator.fork(), origin(50), loss, guess(gradient, 0.7, 50))
    assert estimator.alignment.cosine == 0.0
    estimator.alignment.settle()
    assert estimator.alignment.cosine > 0.3
    other.alignment.restore(estimator.alignment.state())
    assert other.alignment.cosine == estimator.alignment.cosine
    assert other.alignment.slope == estimator.alignment.slope


@every_guided
def test_a_guide_is_needed_and_must_fit(kind: Callable[..., Guided]) -> None:
    estimator = kind(2, generator=seeded())
    with pytest.raises(ValueError, match="needs a guide"):
        estimator.ask(origin(3))
    for wrong in (torch.zeros(3, D - 1), torch.full((3, D), float("nan"))):
        with pytest.raises(ValueError, match="guide must"):
            estimator.ask(origin(3), wrong)
    with pytest.raises(ValueError, match="q must"):
        kind(0, generator=seeded())


def test_a_guide_of_zeros_is_no_direction() -> None:
    _, loss = linear(D)
    for kind in GUIDED.values():
        assert bool(torch.isfinite(estimate(kind(2, generator=seeded()), origin(3), loss, origin(3))).all())


def test_what_was_known_is_forgotten_slowly() -> None:
    alignment, one = Alignment(), torch.ones(1)
    assert (alignment.cosine, alignment.slope) == (0.0, 0.0)
    alignment.tell(one, one, one)
    alignment.settle()
    alignment.settle()  # nothing new: nothing is forgotten either
    assert alignment.cosine == 1.0
    alignment.tell(-one, one, one)
    alignment.settle()
    assert alignment.state()["product"] == pytest.approx(DECAY - 1)


# Distil


@pytest.mark.parametrize("q", [0, 2])
def test_distil_asks_about_the_point_and_takes_the_guess(q: int) -> None:
    points, guide = rectified(4, D), torch.randn(4, D, generator=seeded(1))
    estimator = Distil(q, 0.1, generator=seeded())
    assert estimator.queries_per_sample(D) == 1 + q
    asked = estimator.ask_factored(points, guide)
    rows = torch.from_numpy(asked.expand(0, len(asked)))
    assert len(rows) == 4 * (1 + q)
    assert torch.equal(rows[:: 1 + q], points)
    away = (rows.view(4, 1 + q, D)[:, 1:] - points.unsqueeze(1)).norm(dim=2)
    torch.testing.assert_close(away, (0.1 * points.norm(dim=1, keepdim=True)).expand(4, q), rtol=1e-4, atol=1e-5)
    losses = torch.zeros(4, 1 + q) if q else torch.zeros(4)
    assert torch.equal(estimator.tell(losses), guide)
    with pytest.raises(NothingAsked):
        estimator.tell(losses)
    with pytest.raises(ValueError, match="no Jacobian"):
        estimator.derive(losses)
    with pytest.raises(ValueError, match="needs a guide"):
        estimator.ask(points)


def test_make_knows_them() -> None:
    for name, kind in {**GUIDED, "distil": Distil}.items():
        assert type(make(name, q=2, generator=seeded())) is kind
