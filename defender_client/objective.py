"""What a run minimises: a loss per answer, what it is compared with, and how good an answer is.

    stability       l = CE(f'(w), argmax f(x)), or CE(f'(w), y)     (Zhang et al., ICLR 2022, eq. 5)
    reconstruction  l = |f'(w) - f(x)|^2 / k                        (the same, section 5.2)

Estimators, white-box gradients and validation share it, so that each minimises and reports the same thing.
"""

from __future__ import annotations

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
        targets_of: the oracle's answers [n, k] to clean images -> what training is to reach from noisy ones.
    """

    name: str
    losses: Callable[[Tensor, Tensor], Tensor]
    quality: Callable[[Tensor, Tensor], Tensor]
    quality_name: str
    targets_of: Callable[[Tensor], Tensor]


def _agreement(answers: Tensor, targets: Tensor) -> Tensor:
    return (answers.argmax(1) == targets).double()


def _minus_root(answers: Tensor, targets: Tensor) -> Tensor:
    return -squared_error(answers, targets).sqrt()


STABILITY = Objective("stability", cross_entropy, _agreement, "agreement", stability_labels)
RECONSTRUCTION = Objective("reconstruction", squared_error, _minus_root, "-RMSE", torch.Tensor.clone)
OF_TASK = {"classification": STABILITY, "reconstruction": RECONSTRUCTION}
"""By what the oracle answers with."""
