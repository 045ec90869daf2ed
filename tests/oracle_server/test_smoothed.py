"""The smoothed classifier: its votes, its abstentions, and that an image's answer is a function of the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle_support import digits
from scipy.stats import binomtest, norm
from torch import Tensor

from oracle_server.policy.randomness import Randomness
from oracle_server.smoothed import SmoothedEngine, Smoothing, decided, needed

SECRET = Randomness.of(1)


class Brightness:
    """f(x) = (0, mean of the pixels - 1/2): a classifier whose smoothed probabilities are known."""

    def __init__(self, block: int = 64) -> None:
        self.block = block
        self.asked: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.asked.append(len(images))
        above = images.flatten(1).double().mean(dim=1) - 0.5
        return torch.stack([torch.zeros_like(above), above], dim=1).float()


def smoothed(draws: int, alpha: float | None = None, *, block: int = 64, secret: Randomness = SECRET) -> SmoothedEngine:
    return SmoothedEngine(Brightness(block), 2, Smoothing(0.5, draws, alpha), secret)


def test_shares_are_the_probabilities_of_the_base_classifiers_labels_under_noise() -> None:
    # The mean of 64 pixels with noise of sigma is N(mean, sigma^2 / 64).
    levels = np.array([0.45, 0.5, 0.53], np.float32)
    shares = smoothed(4000)(torch.from_numpy(np.ones((3, 1, 8, 8), np.float32) * levels[:, None, None, None]))
    expected = norm.cdf((levels - 0.5) / (0.5 / 8))
    assert shares.dtype == torch.float32
    np.testing.assert_allclose(shares.sum(dim=1), 1, rtol=1e-6)
    np.testing.assert_allclose(shares[:, 1], expected, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("draws", [1, 5, 63, 64, 65, 200])
def test_an_answer_depends_on_the_image_and_on_nothing_beside_it(draws: int) -> None:
    images = torch.from_numpy(digits(7))
    together = smoothed(draws)(images)
    alone = torch.cat([smoothed(draws)(image[None]) for image in images])
    assert torch.equal(together, alone)
    assert torch.equal(together, smoothed(draws, block=9)(images)), "the base classifier's blocks change the noise"
    assert torch.equal(together.flip(0), smoothed(draws)(images.flip(0)))


def test_the_noise_is_a_secrets() -> None:
    image = torch.full((1, 1, 8, 8), 0.5)
    answers = {float(smoothed(501, secret=Randomness.of(seed))(image)[0, 1]) for seed in range(8)}
    assert len(answers) > 1
    nearly = torch.cat([image + bit * torch.finfo(torch.float32).eps for bit in range(8)])
    assert len(set(smoothed(501)(nearly)[:, 1].tolist())) > 1, "other images have other noise"
    half = torch.ones(1, 1, 8, 8)
    half[..., :4] = 0.0
    negative = torch.where(half == 0, -0.0, half)
    assert torch.equal(smoothed(501)(half), smoothed(501)(negative)), "-0.0 is the same pixel as 0.0"


def test_copies_fill_the_engines_blocks() -> None:
    base = Brightness(block=64)
    engine = SmoothedEngine(base, 2, Smoothing(0.5, 20), SECRET)
    assert engine.block == 3
    engine(torch.from_numpy(digits(7)))
    assert base.asked == [64, 64, 12]
    assert SmoothedEngine(base, 2, Smoothing(0.5, 1000), SECRET).block == 1


def test_an_answer_that_is_no_number_is_no_vote() -> None:
    def broken(images: Tensor) -> Tensor:
        scores = Brightness()(images)
        scores[images.flatten(1).mean(dim=1) > 2] = torch.nan
        return scores

    base = Brightness()
    base.__class__ = type("Broken", (Brightness,), {"__call__": lambda self, images: broken(images)})
    images = torch.stack([torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), 5.0)])
    answers = SmoothedEngine(base, 2, Smoothing(0.5, 50), SECRET)(images)
    assert not answers[0].isnan().any()
    assert answers[1].isnan().all()


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05, 0.5])
def test_needed_is_where_the_binomial_test_rejects(alpha: float) -> None:
    for votes in [*range(1, 20), 100, 301]:
        least = needed(votes, alpha)
        rejected = [n for n in range((votes + 1) // 2, votes + 1) if binomtest(n, votes, 0.5).pvalue <= alpha]
        assert least == (min(rejected) if rejected else votes + 1), votes


def test_it_abstains_where_the_first_two_classes_may_be_alike() -> None:
    votes = np.array([[60, 40, 0], [0, 9, 91], [50, 50, 0], [0, 100, 0], [5, 0, 0]])
    labels = decided(votes, 0.001)
    assert labels.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    answers = smoothed(100, alpha=0.001)(torch.stack([torch.full((1, 8, 8), level) for level in (0.2, 0.5, 0.8)]))
    assert answers.tolist() == [[1, 0], [0, 0], [0, 1]]
