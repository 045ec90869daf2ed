"""What a run minimises: a loss per answer, what it is compared with, and how good an answer is.

    stability       l = CE(f'(w), argmax f(x)), or CE(f'(w), y)     (Zhang et al., ICLR 2022, eq. 5)
    reconstruction  l = |f'(w) - f(x)|^2 / k                        (the same, section 5.2)

All of an answer's slopes, dl/df, and a root of its curvature, d2l/df2 = R R^T, serve estimates of whole answers:

    stability       dl/df = p - e_y,  R = diag(p)^(1/2) - p (p^(1/2))^T,  p = softmax(f'(w))
    reconstruction  dl/df = 2 (f'(w) - f(x)) / k,  R = (2 / k)^(1/2) I

Estimators, white-box gradients and validation share it, so that each minimises and reports the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from defender_client.losses import cross_entropy, squared_error, stability_labels


@dataclass(frozen=True)
class Objective:
    """A loss of answers [n, k] against targets [n, ...].

    Attributes:
        name: of the loss.
        losses: answers, targets -> losses [n], float64, differentiable in the answers.
        quality: answers, targets -> [n], float64, of which more is better: a run keeps the stack with the best mean.
        quality_name: what it is called where people read it.
        root: answers [n, k] -> R [n, k, k], float64, such that the loss's second derivative is R R^T, for any target.
        targets_of: the oracle's answers [n, k] to clean images -> what training is to reach from noisy ones.
    """

    name: str
    losses: Callable[[Tensor, Tensor], Tensor]
    quality: Callable[[Tensor, Tensor], Tensor]
    quality_name: str
    root: Callable[[Tensor], Tensor]
    targets_of: Callable[[Tensor], Tensor]

    def slopes(self, answers: Tensor, targets: Tensor) -> Tensor:
        """dl/df [n, k], float64, at answers [n, k]."""
        at = answers.detach().double().requires_grad_(True)
        (found,) = torch.autograd.grad(self.losses(at, targets).sum(), at)
        return found


def _agreement(answers: Tensor, targets: Tensor) -> Tensor:
    return (answers.argmax(1) == targets).double()


def _minus_root(answers: Tensor, targets: Tensor) -> Tensor:
    return -squared_error(answers, targets).sqrt()


def _softmax_root(answers: Tensor) -> Tensor:
    p = answers.double().softmax(dim=1)
    return torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)


def _square_root(answers: Tensor) -> Tensor:
    n, k = answers.shape
    return math.sqrt(2 / k) * torch.eye(k, dtype=torch.float64).expand(n, k, k)


STABILITY = Objective("stability", cross_entropy, _agreement, "agreement", _softmax_root, stability_labels)
RECONSTRUCTION = Objective("reconstruction", squared_error, _minus_root, "-RMSE", _square_root, torch.Tensor.clone)
OF_TASK = {"classification": STABILITY, "reconstruction": RECONSTRUCTION}
"""By what the oracle answers with."""
