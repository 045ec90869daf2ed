"""Smoothing on a linear classifier, whose smoothed version is known: its radius is the distance to the boundary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import binomtest, norm
from torch import Tensor

from defender_client.smoothing import (
    ABSTAIN,
    NOISE_BLOCK,
    Certificate,
    Smooth,
    largest_radius,
    lower_confidence_bound,
    radius,
)

SHAPE = (1, 3, 5)  # 15 numbers: no multiple of the 16 that torch draws at once
NORMAL = torch.randn(SHAPE, generator=torch.Generator().manual_seed(11))
SIGMA = 0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(images: Tensor) -> Tensor:
    """Class 1 on the side of the boundary that NORMAL points to, else class 0; scores [b, 3], class 2 never."""
    margin: Tensor = torch.einsum("bchw,chw->b", images, NORMAL)
    return torch.stack([-margin, margin, torch.full_like(margin, -1e9)], dim=1)


def at_distance(distance: float) -> Tensor:
    """The image on the positive side with that L2 distance to the boundary: its true radius, whatever sigma is."""
    direction: Tensor = NORMAL / torch.linalg.vector_norm(NORMAL)
    return direction * distance


def coin(images: Tensor) -> Tensor:
    """Votes by the sign of one pixel's noise: both classes have probability 1/2 at zero."""
    return torch.stack([images[:, 0, 0, 0], -images[:, 0, 0, 0]], dim=1)


# The bound and the radius


@pytest.mark.parametrize("alpha", [0.1, 0.001])
@pytest.mark.parametrize("trials", [1, 7, 100, 10_000])
def test_lower_confidence_bound_is_clopper_pearson(trials: int, alpha: float) -> None:
    for successes in sorted({0, 1, trials // 2, trials - trials // 10, trials - 1, trials}):
        reference = binomtest(successes, trials, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        assert lower_confidence_bound(successes, trials, alpha) == pytest.approx(reference, rel=1e-9, abs=1e-12)


def test_radius_is_sigma_times_the_normal_quantile() -> None:
    assert radius(float(norm.cdf(1.7)), 0.25) == pytest.approx(1.7 * 0.25, rel=1e-12)
    assert radius(0.5, 0.25) == 0.0
    assert radius(0.2, 0.25) == 0.0
    assert radius(1.0, 0.25) == float("inf")


def test_largest_radius_is_the_published_one() -> None:
    assert largest_radius(10_000, 0.001, 0.25) == pytest.approx(0.7996, abs=5e-5)
    # The smallest all-correct counts that reach .25, .5 and .75 at alpha = 0.001, sigma = 0.25
    for n, reached in ((40, 0.25), (301, 0.5), (5114, 0.75)):
        assert largest_radius(n, 0.001, 0.25) >= reached > largest_radius(n - 1, 0.001, 0.25)


@pytest.mark.parametrize(
    "call",
    [
        lambda: lower_confidence_bound(3, 2, 0.1),
        lambda: lower_confidence_bound(-1, 2, 0.1),
        lambda: lower_confidence_bound(0, 0, 0.1),
        lambda: lower_confidence_bound(1, 2, 0.0),
        lambda: lower_confidence_bound(1, 2, 1.0),
        lambda: radius(1.1, 0.25),
        lambda: radius(float("nan"), 0.25),
        lambda: radius(0.9, 0.0),
        lambda: radius(0.9, float("nan")),
        lambda: Smooth(linear, 1, 0.25),
        lambda: Smooth(linear, 3, -0.25),
        lambda: Smooth(linear, 3, SIGMA).certify(at_distance(1), 0, 10, 0.1, 8, seeded()),
        lambda: Smooth(linear, 3, SIGMA).certify(at_distance(1), 10, 0, 0.1, 8, seeded()),
        lambda: Smooth(linear, 3, SIGMA).certify(at_distance(1), 10, 10, 1.5, 8, seeded()),
        lambda: Smooth(linear, 3, SIGMA).predict(at_distance(1), 10, 0.1, 0, seeded()),
        lambda: Smooth(linear, 3, SIGMA).predict(at_distance(1)[None], 10, 0.1, 8, seeded()),
        lambda: Smooth(linear, 3, SIGMA).predict(torch.zeros(SHAPE, dtype=torch.uint8), 10, 0.1, 8, seeded()),
        lambda: Smooth(linear, 4, SIGMA).predict(at_distance(1), 10, 0.1, 8, seeded()),
        lambda: Smooth(lambda x: linear(x) * torch.nan, 3, SIGMA).predict(at_distance(1), 10, 0.1, 8, seeded()),
    ],
)
def test_arguments_out_of_range_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must (not )?be"):
        call()


# Certificates


@pytest.mark.parametrize("distance", [0.1, 0.4, 0.8])
def test_certified_radius_comes_close_to_the_distance_to_the_boundary(distance: float) -> None:
    found = Smooth(linear, 3, SIGMA).certify(at_distance(distance), 100, 100_000, 0.001, 4096, seeded())
    assert found.label == 1
    assert 0.96 * distance < found.radius + 0.004
    assert found.radius <= distance


def test_certificates_beyond_the_true_radius_are_as_rare_as_promised() -> None:
    distance, alpha, trials = 0.5, 0.1, 400
    smooth, generator = Smooth(linear, 3, SIGMA), seeded(3)
    found = [smooth.certify(at_distance(distance), 10, 100, alpha, 110, generator) for _ in range(trials)]
    wrong = sum(c.label == 0 or c.radius > distance for c in found)
    assert binomtest(wrong, trials, alpha, alternative="greater").pvalue > 0.001
    # Nor is the bound needlessly loose: at n = 100 the discrete vote leaves a rate of about 0.07.
    assert wrong > 0.03 * trials


def test_a_certificate_says_what_it_rests_on() -> None:
    found = Smooth(linear, 3, SIGMA).certify(at_distance(0.3), 50, 200, 0.01, 64, seeded())
    bound = lower_confidence_bound(found.successes, 200, 0.01)
    assert found == Certificate(1, radius(bound, SIGMA), bound, 1, found.successes, 50, 200, 0.01)
    assert 0 < found.successes < 200
    assert found.queries == 250
    assert not found.abstained


def test_selection_and_estimation_never_share_a_draw() -> None:
    seen: list[Tensor] = []

    def spy(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return linear(images)

    Smooth(spy, 3, SIGMA).certify(at_distance(0.3), 100, 300, 0.01, 32, seeded())
    copies = torch.cat(seen).flatten(1)
    assert copies.shape[0] == 400
    assert torch.unique(copies, dim=0).shape[0] == 400


def test_noise_is_gaussian_with_the_standard_deviation_asked_for() -> None:
    seen: list[Tensor] = []

    def spy(images: Tensor) -> Tensor:
        seen.append(images - at_distance(0.3))
        return linear(images)

    Smooth(spy, 3, SIGMA).predict(at_distance(0.3), 4000, 0.01, 1000, seeded())
    noise = torch.cat(seen).double().flatten()
    count = noise.numel()
    assert abs(float(noise.mean())) < 4 * SIGMA / count**0.5
    assert abs(float(noise.square().mean()) / SIGMA**2 - 1) < 4 * (2 / count) ** 0.5


def test_a_coin_flip_is_no_class() -> None:
    smooth = Smooth(coin, 2, SIGMA)
    found = smooth.certify(torch.zeros(SHAPE), 100, 1000, 0.001, 256, seeded())
    assert (found.label, found.radius, found.abstained) == (ABSTAIN, 0.0, True)
    assert found.selected in (0, 1)
    assert smooth.predict(torch.zeros(SHAPE), 1000, 0.001, 256, seeded()) == ABSTAIN


@pytest.mark.parametrize(("n0", "n"), [(10, 33), (100, 3 * NOISE_BLOCK + 5), (NOISE_BLOCK, 2 * NOISE_BLOCK)])
def test_the_batch_size_changes_nothing_but_the_batches(n0: int, n: int) -> None:
    outcomes = []
    for batch in (1, 7, 16, NOISE_BLOCK - 1, NOISE_BLOCK, NOISE_BLOCK + 1, 150, 10_000):
        sizes: list[int] = []
        copies: list[Tensor] = []

        def spy(images: Tensor, sizes: list[int] = sizes, copies: list[Tensor] = copies) -> Tensor:
            sizes.append(images.shape[0])
            copies.append(images)
            return linear(images)

        generator = seeded(4)
        found = Smooth(spy, 3, SIGMA).certify(at_distance(0.3), n0, n, 0.01, batch, generator)
        assert sum(sizes) == n0 + n
        # Every batch is full, but the last of the selection and the last of the estimation.
        assert sizes == [min(batch, draws - start) for draws in (n0, n) for start in range(0, draws, batch)]
        outcomes.append((found, torch.cat(copies), generator.get_state()))
    for found, copies_seen, state in outcomes[1:]:
        assert found == outcomes[0][0]
        assert torch.equal(copies_seen, outcomes[0][1])
        assert torch.equal(state, outcomes[0][2])


def test_noise_comes_from_the_generator_alone() -> None:
    smooth = Smooth(linear, 3, SIGMA)
    before = torch.random.get_rng_state()
    first, same, other = (smooth.certify(at_distance(0.3), 20, 200, 0.01, 64, seeded(seed)) for seed in (0, 0, 1))
    assert first == same
    assert first.successes != other.successes
    assert torch.equal(torch.random.get_rng_state(), before)


# Predictions


@pytest.mark.parametrize("distance", [0.0, 0.03, 0.06, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("alpha", [0.2, 0.001])
def test_predict_is_the_binomial_test_on_the_two_leading_counts(distance: float, alpha: float) -> None:
    votes = torch.zeros(3, dtype=torch.int64)

    def spy(images: Tensor) -> Tensor:
        nonlocal votes
        scores = linear(images)
        votes += torch.bincount(scores.argmax(1), minlength=3)
        return scores

    answer = Smooth(spy, 3, SIGMA).predict(at_distance(distance), 200, alpha, 64, seeded(6))
    most, next_most = sorted(votes.tolist(), reverse=True)[:2]
    decided = binomtest(most, most + next_most, 0.5).pvalue <= alpha
    assert answer == (int(votes.argmax()) if decided else ABSTAIN)


def test_predict_abstains_exactly_from_alpha_on() -> None:
    def sixty_forty(images: Tensor) -> Tensor:
        return torch.eye(2)[(torch.arange(images.shape[0]) >= 60).long()]

    smooth, pvalue = Smooth(sixty_forty, 2, SIGMA), binomtest(60, 100, 0.5).pvalue
    assert smooth.predict(torch.zeros(SHAPE), 100, pvalue * 1.01, 100, seeded()) == 0
    assert smooth.predict(torch.zeros(SHAPE), 100, pvalue * 0.99, 100, seeded()) == ABSTAIN


def test_predict_decides_when_the_votes_are_clear_and_only_then() -> None:
    smooth = Smooth(linear, 3, SIGMA)
    assert smooth.predict(at_distance(1.0), 200, 0.001, 64, seeded()) == 1
    assert smooth.predict(at_distance(-1.0), 200, 0.001, 64, seeded()) == 0
    assert smooth.predict(at_distance(0.02), 200, 0.001, 64, seeded()) == ABSTAIN


def test_no_autograd_graph_is_built() -> None:
    weight = torch.ones(1, requires_grad=True)

    def learning(images: Tensor) -> Tensor:
        scores = linear(images) * weight
        assert not scores.requires_grad
        return scores

    assert Smooth(learning, 3, SIGMA).predict(at_distance(1.0), 50, 0.1, 16, seeded()) == 1
