"""Oracles as plain callables: images in, scores out; the defended stack and a vote make new ones of them.

    Defended(stack, oracle)     f(Dec(Enc(D(x))))
    Smoothed(smooth, n)         shares of n votes: the smoothed classifier, to be attacked, say

A run's own jobs name their batches, so that a run that is started again pays nothing twice (`certify.DefendedOracle`).
Here each call is a purchase of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from defender_client.smoothing import ABSTAIN, BATCH, Smooth
from shared.models.stack import Stack

AnyOracle = Callable[[Tensor], Any]
"""Images float32 [n, c, h, w] in [0, 1] -> scores [n, k], a tensor or an array: a `RemoteOracle`, a network..."""


def cost_of(oracle: AnyOracle) -> int | None:
    """Queries that an oracle has been paid so far; None for one that keeps no account."""
    cost = getattr(oracle, "cost", None)
    return cost if isinstance(cost, int) else None


def predicted(scores: Tensor) -> Tensor:
    """The class of each row of scores [n, k], int64 [n]; `ABSTAIN` for a row of zeros.

    So a smoothed oracle says that it abstains (`OracleInfo.abstains`).
    """
    classes = scores.argmax(dim=1)
    return torch.where((scores == 0).all(dim=1), torch.full_like(classes, ABSTAIN), classes)


class Defended:
    """The defended stack in front of an oracle, f(Dec(Enc(D(x)))): images [n, c, h, w] -> scores [n, k].

    A row is a query of the oracle. Images may be noisy, beyond [0, 1]; what the oracle is asked about is within.

    Args:
        stack: denoiser, encoder and decoder (`load_stack`), put into evaluation mode.
        oracle: who is asked.

    Attributes:
        image_shape: (c, h, w).
        classes: k.
        sigma: of the noise that the stack was trained under.
    """

    def __init__(self, stack: Stack, oracle: AnyOracle) -> None:
        self._stack, self._oracle = stack.eval(), oracle
        self.image_shape, self.classes, self.sigma = stack.spec.image_shape, stack.spec.classes, stack.spec.sigma

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self._oracle(self._stack(images)))

    @property
    def cost(self) -> int | None:
        """Queries paid so far, by the oracle's own account; None where it keeps none."""
        return cost_of(self._oracle)

    def smooth(self, sigma: float | None = None) -> Smooth:
        """The smoothed classifier g of it, by default with the noise that the stack was trained under."""
        return Smooth(self, self.classes, self.sigma if sigma is None else sigma)


class Smoothed:
    """A smoothed classifier as an oracle: images [b, c, h, w] -> shares of the votes [b, k], float32, each row's sum 1.

    A row costs n queries. The noise is drawn anew for each row.

    Args:
        smooth: what is smoothed.
        n: noisy copies of an image.
        batch: copies in one call of what is smoothed.
        generator: draws the noise.

    Attributes:
        classes: k.
    """

    def __init__(
        self, smooth: Smooth, n: int, batch: int = BATCH, generator: torch.Generator = torch.default_generator
    ) -> None:
        self._smooth, self._n, self._batch, self._generator = smooth, n, batch, generator
        self.classes = smooth.classes
        self.image_shape = getattr(smooth.base, "image_shape", None)
        self._asked = 0

    def __call__(self, images: Tensor) -> Tensor:
        shares = torch.zeros(len(images), self.classes)
        for row, x in zip(shares, images, strict=True):
            row += self._smooth.votes(x, self._n, self._batch, self._generator) / self._n
            self._asked += self._n
        return shares

    @property
    def cost(self) -> int:
        """Queries paid so far, by the account of what is smoothed, or by counting copies where it keeps none."""
        paid = cost_of(self._smooth.base)
        return self._asked if paid is None else paid
