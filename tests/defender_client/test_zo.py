"""Estimators in closed form: exact where they should be, unbiased within their standard error, honest about cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defender_client.zo import CGE, RGE, Difference, Estimator, NothingAsked, StepVanished, make

NAMES = ("rge", "cge")  # the others: test_zo_subspace, test_zo_guided

DIFFERENCES: tuple[Difference, ...] = get_args(Difference)
both_differences = pytest.mark.parametrize("difference", DIFFERENCES)
every_estimator = pytest.mark.parametrize("name", NAMES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str, difference: Difference = "forward", q: int = 3, mu: float = 0.005, seed: int = 0) -> Estimator:
    return make(name, q=q, mu=mu, difference=difference, generator=seeded(seed))


def estimate(estimator: Estimator, points: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """`loss`: points [n, d], float64 -> losses [n]."""
    probes = estimator.ask(points)
    return estimator.tell(loss(probes.double().flatten(0, 1)).view(probes.shape[:2]))


def linear(d: int, seed: int = 1) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A gradient [d] and the loss that has it everywhere."""
    gradient = torch.randn(d, generator=seeded(seed), dtype=torch.float64)
    return gradient, lambda w: w @ gradient + 0.7


def nonlinear(d: int) -> Callable[[Tensor], Tensor]:
    """A local copy of what an oracle does: cross-entropy of a smooth network."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(d, 32), nn.Tanh(), nn.Linear(32, 5)).double()
    return lambda w: F.cross_entropy(net(w), torch.full((w.shape[0],), 3), reduction="none")


# What it costs


@pytest.mark.parametrize(
    ("name", "difference", "q", "d", "cost"),
    [
        ("rge", "forward", 1, 7, 2),
        ("rge", "forward", 20, 7, 21),
        ("rge", "central", 1, 7, 2),
        ("rge", "central", 20, 7, 40),
        ("rge", "forward", 4, 1, 5),
        ("cge", "forward", 1, 7, 8),
        ("cge", "central", 1, 7, 14),
        ("cge", "forward", 1, 1, 2),
        ("cge", "central", 20, 192, 384),
    ],
)
def test_the_cost_stated_is_the_number_of_probes(name: str, difference: Difference, q: int, d: int, cost: int) -> None:
    estimator = build(name, difference, q)
    assert estimator.queries_per_sample(d) == cost
    assert estimator.ask(torch.randn(3, d, generator=seeded())).shape == (3, cost, d)


@every_estimator
@both_differences
def test_probes_lie_where_the_docstring_says(name: str, difference: Difference) -> None:
    points = torch.randn(4, 6, generator=seeded(), dtype=torch.float64)
    probes = build(name, difference, mu=0.01).ask(points)
    offsets = probes - points.unsqueeze(1)
    if difference == "forward":
        assert torch.equal(probes[:, 0], points)
        offsets = offsets[:, 1:]
    else:
        ahead, behind = offsets.chunk(2, dim=1)
        torch.testing.assert_close(ahead, -behind, rtol=0.0, atol=1e-12)
    lengths = torch.linalg.vector_norm(offsets, dim=2)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01), rtol=1e-6, atol=0.0)


@every_estimator
@both_differences
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_what_is_asked_factored_is_the_same_to_the_bit(name: str, difference: Difference, scale: float) -> None:
    points = scale * torch.randn(4, 18, generator=seeded())
    dense, factored = build(name, difference), build(name, difference)
    for _ in range(2):  # the second draws further on
        probes, asked = dense.ask(points), factored.ask_factored(points)
        assert torch.equal(probes.flatten(0, 1), torch.from_numpy(asked.expand(0, len(asked))))
        losses = nonlinear(18)(probes.flatten(0, 1).double()).detach().view(probes.shape[:2])
        assert torch.equal(dense.tell(losses), factored.tell(losses))


def test_factored_probes_are_float32_and_must_move() -> None:
    with pytest.raises(ValueError, match="float32"):
        build("cge").ask_factored(torch.zeros(1, 3, dtype=torch.float64))
    for name in NAMES:
        with pytest.raises(StepVanished):
            build(name, mu=1e-6).ask_factored(torch.full((1, 3), 1000.0))
        with pytest.raises(ValueError, match="finite"):
            build(name).ask_factored(torch.full((1, 3), float("nan")))


# What it estimates


@both_differences
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_cge_is_exact_on_a_linear_loss(difference: Difference, dtype: torch.dtype, scale: float) -> None:
    """At scale 300 float32 rounds mu by up to 0.3 %: the realised step, not mu, must be divided by."""
    d = 24
    gradient, loss = linear(d)
    points = (scale * torch.randn(5, d, generator=seeded())).to(dtype)
    result = estimate(CGE(difference=difference), points, loss)
    assert result.dtype == dtype
    rtol = 1e-6 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(result, gradient.to(dtype).expand(5, d), rtol=rtol, atol=1e-7)


@both_differences
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_rge_projects_a_linear_loss_onto_the_line_it_really_probed(difference: Difference, scale: float) -> None:
    """With q = 1, g = d s <s, gradient> / |s|^2 for the float32 step s, whatever rounding made of mu u."""
    d = 24
    gradient, loss = linear(d)
    points = scale * torch.randn(5, d, generator=seeded())
    estimator = build("rge", difference, q=1)
    probes = estimator.ask(points).double()
    s = probes[:, 1] - probes[:, 0]  # forward: point to probe; central: w + s to w - s, a sign that cancels
    expected = d * s * (s @ gradient / s.square().sum(1)).unsqueeze(1)
    result = estimator.tell(loss(probes.flatten(0, 1)).view(5, 2))
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_central_cge_is_the_gradient_of_a_network() -> None:
    d = 16
    loss = nonlinear(d)
    points = torch.randn(64, d, generator=seeded(), dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(loss(points).sum(), points)
    with torch.no_grad():
        central = estimate(CGE(difference="central"), points, loss)
        forward = estimate(CGE(difference="forward"), points, loss)
    assert float(F.cosine_similarity(central, truth).min()) > 0.999
    ratios = torch.linalg.vector_norm(central, dim=1) / torch.linalg.vector_norm(truth, dim=1)
    assert float((ratios - 1).abs().max()) < 1e-3
    # The error is O(mu^2) for the central and O(mu) for the forward difference.
    assert float((central - truth).norm()) < 0.05 * float((forward - truth).norm())


@both_differences
def test_rge_averages_to_the_gradient_within_its_standard_error(difference: Difference) -> None:
    d, q, draws = 12, 5, 20_000
    gradient, loss = linear(d)
    points = torch.zeros(draws, d, dtype=torch.float64)
    mean = estimate(build("rge", difference, q), points, loss).mean(0)
    # u uniform on the sphere: E[u_j^2 u_k^2] = (1 + 2 [j = k]) / (d (d + 2)), so for one direction
    # Var[d <g, u> u_j] = d (|g|^2 + 2 g_j^2) / (d + 2) - g_j^2
    variance = d * (gradient.square().sum() + 2 * gradient.square()) / (d + 2) - gradient.square()
    z = (mean - gradient) / (variance / (q * draws)).sqrt()
    assert float(z.abs().max()) < 4
    # ... and no closer than chance allows either: |z|^2 is chi-squared with d degrees of freedom.
    assert float(z.square().sum()) > 1


@pytest.mark.parametrize(("q", "d"), [(1, 10), (10, 10), (20, 10), (192, 192)])
def test_rge_squared_cosine_is_about_q_over_d_plus_q(q: int, d: int) -> None:
    gradient, loss = linear(d)
    points = torch.zeros(8000 // q + 8, d, dtype=torch.float64)
    result = estimate(build("rge", "central", q), points, loss)
    squared = F.cosine_similarity(result, gradient.expand_as(result)).square().mean()
    assert float(squared) == pytest.approx(q / (d + q - 1), rel=0.08)


def test_every_sample_has_directions_of_its_own() -> None:
    probes = build("rge", "forward", q=1).ask(torch.zeros(2, 50))
    assert abs(float(F.cosine_similarity(probes[0, 1], probes[1, 1], dim=0))) < 0.6


@every_estimator
@both_differences
def test_losses_are_differenced_in_float64(name: str, difference: Difference) -> None:
    d = 6
    _, loss = linear(d)
    points = torch.zeros(2, d)
    small = estimate(build(name, difference), points, loss)
    # An offset of 2^20 would leave float32 no digit of a difference of 0.005.
    large = estimate(build(name, difference), points, lambda w: loss(w) + 2.0**20)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
    assert large.dtype == torch.float32


# How it behaves


@every_estimator
@both_differences
def test_the_generator_decides_everything(name: str, difference: Difference) -> None:
    points = torch.randn(3, 8, generator=seeded(5))
    global_state = torch.random.get_rng_state()
    first, same, other = (build(name, difference, seed=seed) for seed in (0, 0, 1))
    asked = first.ask(points)
    assert torch.equal(asked, same.ask(points))
    assert torch.equal(asked, other.ask(points)) == (name == "cge")
    assert torch.equal(asked, first.ask(points)) == (name == "cge")
    assert torch.equal(torch.random.get_rng_state(), global_state)


@every_estimator
def test_no_gradient_leaks_and_points_stay_as_they_are(name: str) -> None:
    points = torch.randn(3, 8, generator=seeded(), requires_grad=True)
    before = points.detach().clone()
    estimator = build(name)
    probes = estimator.ask(points)
    assert not probes.requires_grad
    gradient = estimator.tell(probes.sum(2))
    assert not gradient.requires_grad
    assert torch.equal(points.detach(), before)


@every_estimator
def test_probes_may_be_overwritten_before_the_answer(name: str) -> None:
    _, loss = linear(5)
    estimators = [build(name), build(name)]
    points = torch.zeros(2, 5, dtype=torch.float64)
    asked = [estimator.ask(points) for estimator in estimators]
    losses = loss(asked[0].flatten(0, 1)).view(asked[0].shape[:2])
    asked[1].zero_()
    assert torch.equal(estimators[0].tell(losses), estimators[1].tell(losses))


@every_estimator
def test_an_answer_belongs_to_one_question(name: str) -> None:
    estimator = build(name)
    with pytest.raises(NothingAsked):
        estimator.tell(torch.zeros(2, 4))
    losses = estimator.ask(torch.zeros(2, 3)).sum(2)
    estimator.tell(losses)
    with pytest.raises(NothingAsked):
        estimator.tell(losses)


@every_estimator
def test_losses_that_do_not_fit_are_refused_and_may_be_sent_again(name: str) -> None:
    estimator = build(name)
    losses = estimator.ask(torch.zeros(2, 3)).sum(2)
    for wrong in (losses[:1], losses[:, 1:], losses.flatten(), losses.unsqueeze(2)):
        with pytest.raises(ValueError, match="one per probe"):
            estimator.tell(wrong)
    for value in (float("nan"), float("inf")):
        broken = losses.clone()
        broken[1, 2] = value
        with pytest.raises(ValueError, match="finite"):
            estimator.tell(broken)
    assert estimator.tell(losses).shape == (2, 3)


@every_estimator
def test_a_refused_question_leaves_none_open(name: str) -> None:
    estimator = build(name)
    losses = estimator.ask(torch.zeros(2, 3)).sum(2)
    with pytest.raises(StepVanished):
        estimator.ask(torch.full((2, 3), 1e8))
    with pytest.raises(NothingAsked):
        estimator.tell(losses)


@every_estimator
@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        (torch.zeros(3), r"\[b, d\]"),
        (torch.zeros(2, 3, 4), r"\[b, d\]"),
        (torch.zeros(2, 0), r"\[b, d\]"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "float32 or float64"),
        (torch.zeros(2, 3, dtype=torch.int64), "float32 or float64"),
        (torch.tensor([[0.0, float("nan")]]), "finite"),
    ],
    ids=["1d", "3d", "empty", "bfloat16", "int64", "nan"],
)
def test_points_that_cannot_be_probed_are_refused(name: str, points: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build(name).ask(points)


@every_estimator
@both_differences
def test_a_step_below_the_resolution_of_the_points_is_an_error(name: str, difference: Difference) -> None:
    points = torch.full((2, 3), 1e6)
    with pytest.raises(StepVanished, match="lost in rounding"):
        build(name, difference).ask(points)
    build(name, difference).ask(points.double())


@every_estimator
def test_settings_out_of_range_are_refused(name: str) -> None:
    for mu in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mu"):
            build(name, mu=mu)
    with pytest.raises(ValueError, match="difference"):
        build(name, "backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coordinate"):
        build(name).queries_per_sample(0)


def test_make_refuses_what_it_cannot_build() -> None:
    with pytest.raises(ValueError, match="rge, cge"):
        make("adam")
    with pytest.raises(ValueError, match="needs q"):
        make("rge", generator=seeded())
    with pytest.raises(ValueError, match="generator"):
        make("rge", q=3)
    with pytest.raises(ValueError, match="q must"):
        make("rge", q=0, generator=seeded())


def test_an_estimator_describes_itself() -> None:
    rge = make("rge", q=20, mu=0.01, difference="central", generator=seeded())
    assert isinstance(rge, RGE)
    assert asdict(rge.description) == {"name": "rge", "mu": 0.01, "difference": "central", "q": 20}
    assert asdict(make("cge").description) == {"name": "cge", "mu": 0.005, "difference": "forward", "q": None}
