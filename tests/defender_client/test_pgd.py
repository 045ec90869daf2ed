"""PGD against what is known in closed form, and against AutoAttack's APGD."""

from __future__ import annotations

from math import tanh

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from scipy.stats import kstest
from torch import Tensor, nn

from defender_client.losses import cross_entropy
from defender_client.pgd import draws, pgd, project, uniform_in_ball
from shared import datasets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gray(count: int = 4, side: int = 16) -> Tensor:
    """Images that a small ball keeps away from 0 and 1."""
    return torch.full((count, 1, side, side), 0.5)


def norms(added: Tensor) -> Tensor:
    return added.flatten(1).norm(dim=1)


def test_a_linear_loss_is_climbed_as_far_as_steps_of_two_radii_lead() -> None:
    images, epsilon = gray(), 0.3
    weights = torch.randn(images.shape, generator=generator(1))
    moved = pgd(lambda x: (weights * x).flatten(1).sum(dim=1), images, epsilon, 100, generator())
    # The optimum is epsilon w / |w|. In many dimensions the start is at right angles to it, on the sphere; the angle a
    # then falls as da/dt = -sin a, where t = 2 after steps of 2 epsilon in all: cos a = tanh 2.
    gains = (weights * (moved - images)).flatten(1).sum(dim=1) / norms(weights) / epsilon
    assert gains == pytest.approx(torch.full((4,), tanh(2)), abs=0.03)
    assert norms(moved - images) == pytest.approx(torch.full((4,), epsilon), abs=1e-5)


def test_one_step_of_two_radii_ends_at_a_linear_optimum_s_side() -> None:
    images, epsilon = gray(), 0.3
    weights = torch.randn(images.shape, generator=generator(1))
    start = uniform_in_ball(images, epsilon, generator())
    moved = pgd(lambda x: (weights * x).flatten(1).sum(dim=1), images, epsilon, 1, generator())
    ahead = start + 2 * epsilon * weights / norms(weights).view(-1, 1, 1, 1)
    torch.testing.assert_close(moved - images, epsilon * ahead / norms(ahead).view(-1, 1, 1, 1), rtol=0, atol=1e-6)


def test_a_quadratic_s_maximum_inside_the_ball_is_found() -> None:
    images = gray(3, 8)
    best = images + 0.5 * uniform_in_ball(images, 0.3, generator(2))
    moved = pgd(lambda x: -(x - best).square().flatten(1).sum(dim=1), images, 0.3, 100, generator())
    assert float(norms(moved - best).max()) < 2 * 0.3 / 100 + 1e-4  # a step


def test_images_stay_in_the_ball_and_in_0_1() -> None:
    images = torch.rand(8, 3, 8, 8, generator=generator()).round()  # black and white
    weights = torch.randn(images.shape, generator=generator(1))
    moved = pgd(lambda x: (weights * x).flatten(1).sum(dim=1), images, 2.0, 10, generator())
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert float(norms(moved - images).max()) <= 2.0 + 1e-5
    # Where a pixel must go beyond 0 or 1 to add to the loss, it has stayed.
    outward = (weights > 0) == (images > 0.5)
    assert float((moved - images)[outward].abs().mean()) < 0.05 * float((moved - images)[~outward].abs().mean())


def test_projection_moves_nothing_that_is_inside() -> None:
    images = gray()
    inside = images + uniform_in_ball(images, 0.3, generator())
    torch.testing.assert_close(project(inside, images, 0.3), inside, rtol=0, atol=1e-7)


def test_a_zero_gradient_moves_nothing_and_leaves_the_others_alone() -> None:
    images, flat = gray(2), torch.tensor([0.0, 1.0])
    start = images + uniform_in_ball(images, 0.3, generator())
    moved = pgd(lambda x: flat * x.flatten(1).sum(dim=1), images, 0.3, 40, generator())
    torch.testing.assert_close(moved[0], start[0], rtol=0, atol=1e-6)
    assert float((moved[1] - images[1]).sum()) > 0.9 * 0.3 * 16


@pytest.mark.parametrize("scale", [1e-36, 1e36])
def test_gradients_too_small_or_large_to_be_squared_have_a_direction(scale: float) -> None:
    images = gray()
    weights = torch.randn(images.shape, generator=generator(1)).clamp(-1, 1)

    def attacked(factor: float) -> Tensor:
        return pgd(lambda x: (factor * weights * x).flatten(1).sum(dim=1), images, 0.3, 10, generator())

    torch.testing.assert_close(attacked(scale), attacked(1.0), rtol=0, atol=1e-5)


def test_an_image_does_not_feel_its_neighbours() -> None:
    images, weights = gray(2), torch.randn(2, 1, 16, 16, generator=generator(1))

    def attacked(factor: float) -> Tensor:
        factors = torch.tensor([1.0, factor])
        return pgd(lambda x: factors * (weights * x).square().flatten(1).sum(dim=1), images, 0.3, 10, generator())[0]

    assert torch.equal(attacked(1.0), attacked(-1000.0))


def test_the_same_generator_makes_the_same_images() -> None:
    images = gray()
    made = [pgd(lambda x: x.square().flatten(1).sum(dim=1), images, 0.3, 5, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_what_cannot_be_climbed_is_told() -> None:
    images = gray(2)
    for epsilon, steps in ((0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)):
        with pytest.raises(ValueError, match="epsilon must be positive"):
            pgd(lambda x: x.flatten(1).sum(dim=1), images, epsilon, steps, generator())
    with pytest.raises(ValueError, match="a step must be positive"):
        pgd(lambda x: x.flatten(1).sum(dim=1), images, 1.0, 1, generator(), step=0.0)
    with pytest.raises(ValueError, match=r"losses must be \[2\], not \[\]"):
        pgd(lambda x: x.sum(), images, 1.0, 1, generator())
    with pytest.raises(ValueError, match="not finite"):
        pgd(lambda x: (0 * x).flatten(1).sum(dim=1).sqrt(), images, 1.0, 1, generator())


def test_the_start_is_uniform_in_the_ball() -> None:
    added = uniform_in_ball(torch.zeros(2000, 1, 2, 2), 0.7, generator())
    assert kstest((norms(added) / 0.7) ** 4, "uniform").pvalue > 0.01
    assert float(added.mean(dim=0).abs().max()) < 0.03


def test_draws_are_noise_around_each_image_or_the_image_itself() -> None:
    images = torch.rand(2, 1, 16, 16, generator=generator())
    noisy = draws(images, 0.5, 200, generator())
    assert noisy.shape == (200, 2, 1, 16, 16)
    torch.testing.assert_close(noisy.mean(dim=0), images, rtol=0, atol=5 * 0.5 / 200**0.5)
    assert float((noisy - images).std()) == pytest.approx(0.5, rel=0.01)
    assert torch.equal(draws(images, 0.5, 0, generator()), images[None])


def test_the_digits_classifier_falls_as_to_autoattack_s_apgd(classifier: nn.Module) -> None:
    test = datasets.load("digits", None, "test").subset(slice(0, 40))
    images, labels = test.floats(slice(None)), test.labels
    ours = pgd(lambda x: cross_entropy(classifier(x), labels), images, 0.8, 20, generator(), step=0.2)
    reference = APGDAttack(classifier, n_iter=20, norm="L2", eps=0.8, seed=0, loss="ce", device="cpu")
    theirs = reference.perturb(images, labels)
    clean, fallen, expected = (classifier(x).argmax(dim=1) != labels for x in (images, ours, theirs))
    assert int(clean.sum()) <= 1
    assert int(expected.sum()) > 30
    assert abs(int(fallen.sum()) - int(expected.sum())) <= 3
