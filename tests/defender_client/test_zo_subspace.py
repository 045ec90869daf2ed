"""Orthonormal directions and active coordinates, in closed form: what they cost, what they estimate, how well."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zo_support import cross_entropy, estimate, linear, network, rectified, rows_of, seeded

from defender_client.zo import CGE, ActiveCGE, Difference, Estimator, NothingAsked, Orthonormal, StepVanished, make

both_differences = pytest.mark.parametrize("difference", get_args(Difference))


def orthonormal(
    q: int, difference: Difference = "central", *, active: bool = False, scale: str = "unbiased", seed: int = 0
) -> Orthonormal:
    return Orthonormal(q, difference=difference, generator=seeded(seed), active=active, scale=scale)  # type: ignore[arg-type]


ALL: dict[str, Callable[[Difference], Estimator]] = {
    "active-cge": lambda difference: ActiveCGE(difference=difference),
    "orthonormal": lambda difference: orthonormal(3, difference),
    "orthonormal-active": lambda difference: orthonormal(3, difference, active=True),
}
every_estimator = pytest.mark.parametrize("made", ALL.values(), ids=ALL)


# Active coordinates


@both_differences
def test_active_cge_asks_for_the_coordinates_that_are_not_zero_and_no_others(difference: Difference) -> None:
    points = torch.tensor([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    rows = ActiveCGE(mu=0.5, difference=difference).ask(points)
    moved = [[0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]], [], torch.eye(4).mul(0.5).tolist()
    expected = []
    for point, steps in zip(points, moved, strict=True):
        ahead = [point + torch.tensor(step) for step in steps]
        behind = [point - torch.tensor(step) for step in steps]
        expected += [point, *ahead] if difference == "forward" else [*ahead, *behind]
    assert torch.equal(rows, torch.stack(expected))
    assert ActiveCGE(difference=difference).queries_per_sample(4) == (5 if difference == "forward" else 8)


@both_differences
def test_behind_a_relu_every_parameter_gets_the_gradient_of_cge(difference: Difference) -> None:
    """dl/dtheta = (dw/dtheta)^T g with w = ReLU(...): what CGE probes beyond the active coordinates is lost."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()).double()
    images = torch.randn(32, 10, generator=seeded(), dtype=torch.float64)
    loss = cross_entropy(16)
    gradients, costs = [], []
    for estimator in (CGE(difference=difference), ActiveCGE(difference=difference)):
        encoder.zero_grad()
        points = encoder(images)
        probes = estimator.ask(points)
        costs.append(len(rows_of(probes)))
        g = estimator.tell(loss(rows_of(probes)).view(probes.shape[:-1]))
        (points * g).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])  # type: ignore[union-attr]
    for whole, active in zip(*gradients, strict=True):
        torch.testing.assert_close(active, whole, rtol=1e-12, atol=1e-12)
    assert any(bool(gradient.any()) for gradient in gradients[1])
    assert costs[1] < 0.7 * costs[0]


# Orthonormal directions


@pytest.mark.parametrize("active", [False, True])
def test_directions_are_orthonormal_and_within_the_subspace(active: bool) -> None:
    points = rectified(6, 20)
    estimator = orthonormal(5, "forward", active=active)
    rows = estimator.ask(points)
    assert rows.shape == (6, 6, 20)
    steps = (rows[:, 1:] - rows[:, :1]).double() / 0.005
    torch.testing.assert_close(steps @ steps.mT, torch.eye(5, dtype=torch.float64).expand(6, 5, 5), atol=1e-3, rtol=0)
    outside = (points == 0).unsqueeze(1).expand_as(steps)
    assert bool(steps[outside].any()) is not active


def test_a_sample_is_probed_along_no_more_directions_than_its_subspace_has() -> None:
    points = torch.zeros(3, 8)
    points[0, :2], points[1] = 1.0, 1.0
    gradient, loss = linear(8)
    estimator = orthonormal(4, "forward", active=True)
    rows = estimator.ask(points)
    assert len(rows) == (1 + 2) + (1 + 4) + 1
    result = estimator.tell(loss(rows.double()))
    torch.testing.assert_close(result[0, :2], gradient[:2].float(), rtol=1e-4, atol=1e-4)  # q = d: exact
    assert not result[0, 2:].any()
    assert not result[2].any()
    assert orthonormal(20).queries_per_sample(8) == 16


def test_as_many_directions_as_dimensions_give_the_gradient_itself() -> None:
    gradient, loss = linear(12)
    for scale in ("unbiased", "projection"):
        result = estimate(orthonormal(12, scale=scale), torch.zeros(3, 12, dtype=torch.float64), loss)
        torch.testing.assert_close(result, gradient.expand(3, 12), rtol=1e-9, atol=1e-9)


@both_differences
@pytest.mark.parametrize(("q", "d"), [(1, 6), (4, 12), (12, 24)])
def test_squared_cosine_is_q_over_d_and_the_cosine_is_a_ratio_of_gammas(q: int, d: int, difference: Difference) -> None:
    """cos^2 ~ Beta(q/2, (d - q)/2): E[cos^2] = q/d, E[cos] = G((q+1)/2) G(d/2) / (G(q/2) G((d+1)/2))."""
    gradient, loss = linear(d)
    draws = 4000
    result = estimate(orthonormal(q, difference), torch.zeros(draws, d, dtype=torch.float64), loss)
    cosine = F.cosine_similarity(result, gradient.expand_as(result))
    a, b = q / 2, (d - q) / 2
    deviation = math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)) / draws)
    assert float(cosine.square().mean()) == pytest.approx(q / d, abs=4 * deviation)
    expected = math.exp(math.lgamma((q + 1) / 2) + math.lgamma(d / 2) - math.lgamma(q / 2) - math.lgamma((d + 1) / 2))
    assert float(cosine.mean()) == pytest.approx(expected, abs=4 * float(cosine.std()) / math.sqrt(draws))


def test_antithetic_pairs_have_no_error_of_even_order() -> None:
    """On a quadratic loss central differences are exact along a direction, forward ones are off by mu u^T H u / 2."""
    d, q = 10, 10
    matrix = torch.randn(d, d, generator=seeded(3), dtype=torch.float64)
    points = torch.randn(4, d, generator=seeded(4), dtype=torch.float64)
    truth = points @ (matrix + matrix.T)
    loss = lambda w: ((w @ matrix) * w).sum(1)  # noqa: E731
    torch.testing.assert_close(estimate(orthonormal(q, "central"), points, loss), truth, rtol=1e-8, atol=1e-8)
    forward = estimate(orthonormal(q, "forward"), points, loss)
    assert 1e-4 < float((forward - truth).abs().max()) < 0.1


@pytest.mark.parametrize("active", [False, True])
def test_unbiased_within_its_standard_error(active: bool) -> None:
    d, q, draws = 10, 3, 20_000
    gradient, loss = linear(d)
    point = torch.ones(d, dtype=torch.float64)
    if active:
        point[6:] = 0.0
    results = estimate(orthonormal(q, active=active), point.expand(draws, d), loss)
    expected = torch.where(point != 0, gradient, 0.0)
    error = (results.mean(0) - expected) / (results.std(0) / math.sqrt(draws)).clamp(min=1e-12)
    assert float(error.abs().max()) < 4.5
    projected = estimate(orthonormal(q, active=active, scale="projection"), point.expand(draws, d), loss)
    size = int((point != 0).sum())
    torch.testing.assert_close(projected.mean(0), expected * q / size, rtol=0.1, atol=0.05)


# What all have in common


@every_estimator
@both_differences
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_what_is_asked_factored_is_the_same_to_the_bit(
    made: Callable[[Difference], Estimator], difference: Difference, scale: float
) -> None:
    points = scale * rectified(5, 9)
    points[3] = 0.0
    points[3, 4] = scale
    dense, factored = made(difference), made(difference)
    for _ in range(2):  # the second draws further on
        probes, asked = dense.ask(points), factored.ask_factored(points)
        assert torch.equal(rows_of(probes), torch.from_numpy(asked.expand(0, len(asked))))
        assert (asked.counts is None) == (probes.ndim == 3)
        losses = cross_entropy(9)(rows_of(probes)).view(probes.shape[:-1])
        assert torch.equal(dense.tell(losses), factored.tell(losses))


@every_estimator
@both_differences
def test_the_jacobian_is_that_of_each_answer(made: Callable[[Difference], Estimator], difference: Difference) -> None:
    points, answers = rectified(5, 9), network(9)
    first, second = made(difference), made(difference)
    probes = first.ask(points)
    given = answers(rows_of(probes)).view(*probes.shape[:-1], 5)
    derived = first.derive(given)
    assert derived.shape == (5, 9, 5)
    for k in range(5):
        second.ask(points)
        if isinstance(second, Orthonormal):
            second = made(difference)  # the same directions each time
            second.scale = "projection"  # type: ignore[attr-defined]
            second.ask(points)
        torch.testing.assert_close(derived[:, :, k].float(), second.tell(given[..., k]))
    with pytest.raises(NothingAsked):
        first.derive(given)


@every_estimator
def test_refusals_and_open_questions(made: Callable[[Difference], Estimator]) -> None:
    points = rectified(4, 6)
    estimator = made("forward")
    with pytest.raises(NothingAsked):
        estimator.tell(torch.zeros(4, 2))
    probes = estimator.ask(points)
    losses = rows_of(probes).sum(1).view(probes.shape[:-1])
    with pytest.raises(ValueError, match="one per probe"):
        estimator.tell(losses[:1])
    broken = losses.clone()
    broken.view(-1)[1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        estimator.tell(broken)
    assert estimator.fork().forget() is None
    assert estimator.tell(losses).shape == (4, 6)
    with pytest.raises(NothingAsked):
        estimator.tell(losses)
    estimator.ask(points)
    with pytest.raises(StepVanished):
        estimator.ask(torch.full((2, 6), 1e8))
    with pytest.raises(NothingAsked):
        estimator.tell(losses)
    with pytest.raises(ValueError, match="float32"):
        estimator.ask_factored(points.double())
    for wrong in (torch.zeros(3), torch.zeros(2, 0), torch.full((1, 2), float("nan"))):
        with pytest.raises(ValueError, match="points must"):
            estimator.ask(wrong)


def test_make_knows_them_and_says_what_is_missing() -> None:
    assert isinstance(make("active-cge"), ActiveCGE)
    assert isinstance(make("orthonormal", q=2, generator=seeded()), Orthonormal)
    with pytest.raises(ValueError, match="needs q"):
        make("orthonormal", generator=seeded())
    with pytest.raises(ValueError, match="q must"):
        make("orthonormal", q=0, generator=seeded())


def test_the_generator_decides_the_directions() -> None:
    points = rectified(3, 8)
    asked = orthonormal(2, seed=1).ask(points)
    first = orthonormal(2, seed=1)
    assert torch.equal(first.ask(points), asked)
    assert not torch.equal(first.ask(points), asked)
    assert not torch.equal(orthonormal(2, seed=2).ask(points), asked)


def test_no_gradient_leaks() -> None:
    points: Tensor = rectified(3, 8).requires_grad_(True)
    estimator = orthonormal(2)
    probes = estimator.ask(points)
    assert not probes.requires_grad
    assert not estimator.tell(probes.sum(2)).requires_grad


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_the_step_is_the_one_that_was_taken_after_rounding(difference: Difference) -> None:
    """Points so large that float32 rounds a step of 0.005 by per cents: a linear loss has its gradient even so."""
    dimension = 6
    points = 20_000 + 1000 * torch.rand(9, dimension, generator=seeded(1))
    slope = torch.randn(dimension, generator=seeded(2), dtype=torch.float64)
    estimator = ActiveCGE(difference=difference)
    probes = estimator.ask(points)
    gradient = estimator.tell(probes.double() @ slope)
    torch.testing.assert_close(gradient.double(), slope.expand(9, dimension), rtol=1e-4, atol=1e-6)
