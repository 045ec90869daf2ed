"""The surrogate: it learns what the answers say, from nothing else, and goes on where a checkpoint left it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from zo_support import network, seeded

from defender_client.config import SurrogateConfig
from defender_client.objective import STABILITY
from defender_client.surrogate import Surrogate

D, K = 6, 5
SMALL = SurrogateConfig(width=64, steps=20, batch=64, memory=512, lr=3e-3)


def batch(seed: int, b: int = 32, mu: float = 0.01) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Points, rows (each point and one probe of it), owners, answers and the points' own answers, in the scale of an
    oracle's latents and logits."""
    points = 3 * torch.rand(b, D, generator=seeded(seed))
    steps = mu * F.normalize(torch.randn(b, D, generator=seeded(seed + 1000)), dim=1)
    rows = torch.stack([points, points + steps], dim=1).flatten(0, 1)
    answers = 8 * network(D, K)(rows)
    return points, rows, torch.arange(b).repeat_interleave(2), answers.float(), answers[::2].float()


def taught(config: SurrogateConfig, steps: int = 40) -> Surrogate:
    surrogate = Surrogate(config, D, K, seed=0)
    for step in range(steps):
        surrogate.remember(*batch(step))
        surrogate.learn()
    return surrogate


def cosine(surrogate: Surrogate) -> float:
    """With the true gradient, at points it never saw."""
    points = 3 * torch.rand(200, D, generator=seeded(99))
    targets = torch.arange(200) % K
    at = points.double().requires_grad_(True)
    (truth,) = torch.autograd.grad(STABILITY.losses(8 * network(D, K)(at), targets).sum(), at)
    return float(F.cosine_similarity(surrogate.guide(points, targets, STABILITY).double(), truth, dim=1).mean())


def test_it_knows_nothing_before_it_was_taught() -> None:
    surrogate = Surrogate(SMALL, D, K, seed=0)
    surrogate.learn()
    assert not surrogate.ready
    assert not surrogate.guide(torch.rand(3, D), torch.zeros(3, dtype=torch.int64), STABILITY).any()


def test_its_gradient_becomes_that_of_the_oracle() -> None:
    early, late = cosine(taught(SMALL, 2)), cosine(taught(SMALL))
    assert late > 0.9
    assert late > early


def test_differences_teach_what_values_alone_do_not() -> None:
    few = {"steps": 10}
    with_slopes = taught(SMALL.model_copy(update={"slopes": 1.0, **few}), 10)
    without = taught(SMALL.model_copy(update={"slopes": 0.0, **few}), 10)
    assert cosine(with_slopes) > cosine(without)


def test_the_oldest_pairs_are_forgotten() -> None:
    surrogate = Surrogate(SMALL.model_copy(update={"memory": 64}), D, K, seed=0)
    for step in range(3):
        surrogate.remember(*batch(step, b=24))  # 48 rows
    memory = surrogate.state()["memory.points"]
    assert memory.shape == (64, D)
    newest = batch(2, b=24)[0]
    assert all(bool((memory == point).all(1).any()) for point in newest)
    oldest = batch(0, b=24)[0]
    assert not any(bool((memory == point).all(1).any()) for point in oldest)
    surrogate.remember(*batch(7, b=100))  # more than there is room for: the last of them
    assert bool((surrogate.state()["memory.points"] == batch(7, b=100)[0][-1]).all(1).any())


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    whole = taught(SMALL, 6)
    half = taught(SMALL, 3)
    other = Surrogate(SMALL, D, K, seed=5)
    other.restore({name: value.clone() for name, value in half.state().items()})
    for step in range(3, 6):
        other.remember(*batch(step))
        other.learn()
    first, second = whole.state(), other.state()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_another_ones_state_is_refused() -> None:
    state = taught(SMALL, 1).state()
    with pytest.raises(RuntimeError):
        Surrogate(SMALL.model_copy(update={"width": 32}), D, K, seed=0).restore(state)
    del state["written"]
    with pytest.raises(KeyError):
        Surrogate(SMALL, D, K, seed=0).restore(state)


def test_it_remembers_the_last_pairs_and_forgets_the_oldest() -> None:
    surrogate = Surrogate(SMALL.model_copy(update={"memory": 8}), D, K, seed=0)
    points = torch.arange(13.0).unsqueeze(1).expand(13, D)
    for part in points.split(5):
        owners = torch.arange(len(part))
        surrogate.remember(part, part, owners, torch.zeros(len(part), K), torch.zeros(len(part), K))
    kept = surrogate.state()["memory.points"][:, 0]
    assert sorted(kept.tolist()) == list(range(5, 13))
