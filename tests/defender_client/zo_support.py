"""Losses with known gradients, and how an estimator is put to one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defender_client import zo

Loss = Callable[[Tensor], Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(d: int, seed: int = 1) -> tuple[Tensor, Loss]:
    """A gradient [d], float64, and the loss that has it everywhere."""
    gradient = torch.randn(d, generator=seeded(seed), dtype=torch.float64)
    return gradient, lambda w: w @ gradient + 0.7


def network(d: int, k: int = 5) -> Callable[[Tensor], Tensor]:
    """What an oracle does, in float64: a smooth network's answers [n, k]."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(d, 32), nn.Tanh(), nn.Linear(32, k)).double().requires_grad_(False)
    return lambda w: net(w.double())


def cross_entropy(d: int) -> Loss:
    answers = network(d)
    return lambda w: F.cross_entropy(answers(w), torch.full((len(w),), 3), reduction="none")


def rectified(b: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Points as an encoder gives them: about half of the coordinates are zero, another half each time."""
    return torch.randn(b, d, generator=seeded(seed), dtype=dtype).relu()


def rows_of(probes: Tensor) -> Tensor:
    """Probes [b, p, d] or [rows, d] as rows."""
    return probes.flatten(0, -2)


def estimate(estimator: zo.Estimator, points: Tensor, loss: Loss, guide: Tensor | None = None) -> Tensor:
    probes = estimator.ask(points, guide)
    return estimator.tell(loss(rows_of(probes).double()).view(probes.shape[:-1]))
