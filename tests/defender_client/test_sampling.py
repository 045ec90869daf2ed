"""Which images a step takes: each once an epoch, or by their loss with weights that keep the gradient unbiased."""

from __future__ import annotations

import pytest
import torch

from defender_client.config import TrainConfig
from defender_client.data import epoch_order
from defender_client.sampling import EVEN, Sampler, needed

COUNT = 50


def sampler(sampling: str, batch: int = 8, seed: int = 3) -> Sampler:
    return Sampler(COUNT, TrainConfig.model_validate({"batch": batch, "sampling": sampling}), seed)


def test_uniformly_every_image_comes_once_an_epoch() -> None:
    parts = [sampler("uniform").batch(2, number) for number in range(7)]
    assert torch.equal(torch.cat([index for index, _ in parts]), epoch_order(COUNT, 3, 2))
    assert all(bool((weights == 1).all()) for _, weights in parts)


def test_by_loss_images_come_as_often_as_their_loss_says_and_weigh_the_less() -> None:
    drawn = sampler("loss", batch=40)
    losses = torch.linspace(0, 4, COUNT, dtype=torch.float64) ** 2
    drawn.tell(torch.arange(COUNT), losses)
    chances = (1 - EVEN) * losses / losses.sum() + EVEN / COUNT
    indices, weights = (
        torch.cat(parts) for parts in zip(*(drawn.batch(epoch, 0) for epoch in range(500)), strict=True)
    )
    counted = torch.bincount(indices, minlength=COUNT).double()
    z = (counted - len(indices) * chances) / (len(indices) * chances).sqrt()
    assert float(z.abs().max()) < 4.5
    torch.testing.assert_close(weights, 1 / (COUNT * chances[indices]))
    assert float(weights.max()) <= 1 / EVEN + 1e-9
    # Unbiased: the weighted mean of anything is its mean over the images.
    anything = torch.randn(COUNT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = weights * anything[indices]
    assert float((terms.mean() - anything.mean()) / (terms.std() / len(terms) ** 0.5)) == pytest.approx(0, abs=4)


def test_draws_depend_on_seed_step_and_losses_alone() -> None:
    first, same, other = sampler("loss"), sampler("loss"), sampler("loss", seed=4)
    first.batch(0, 0)
    for drawn in (first, same, other):
        drawn.tell(torch.tensor([3, 4]), torch.tensor([9.0, float("nan")]))
    assert torch.equal(first.batch(1, 2)[0], same.batch(1, 2)[0])
    assert not torch.equal(first.batch(1, 2)[0], other.batch(1, 2)[0])
    restored = sampler("loss")
    restored.restore(first.state())
    assert torch.equal(restored.batch(1, 2)[0], first.batch(1, 2)[0])
    assert float(first.state()["losses"][4]) == 1.0  # not finite: not known


def test_no_losses_left_means_no_preference() -> None:
    drawn = sampler("loss")
    drawn.tell(torch.arange(COUNT), torch.zeros(COUNT))
    _, weights = drawn.batch(0, 0)
    torch.testing.assert_close(weights, torch.ones_like(weights))


def test_another_runs_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="losses of 2 images"):
        sampler("loss").restore({"losses": torch.ones(2)})
    assert sampler("uniform").state() == {}


@pytest.mark.parametrize("steps", [1, 3, 6, 7, 8, 0])
def test_needed_are_the_images_that_some_step_takes(steps: int) -> None:
    settings = TrainConfig.model_validate({"batch": 8, "steps": steps, "epochs": 2})
    drawn = Sampler(COUNT, settings, 3)
    total = settings.total_steps(COUNT)
    taken = [drawn.batch(*divmod(step, settings.batches(COUNT)))[0] for step in range(total)]
    assert needed(COUNT, settings, 3).tolist() == torch.cat(taken).unique().tolist()
    by_loss = settings.model_copy(update={"sampling": "loss"})
    assert needed(COUNT, by_loss, 3).tolist() == list(range(COUNT))
