"""How far a guess of the gradient can be trusted, from what probes of the truth have said of it so far.

    <g, s>   ~  sum_i kappa_i (D_{u_i} l) <s, u_i>          kappa_i such that E[sum_i kappa_i u_i u_i^T] = I
    |g|^2    ~  sum_i kappa_i (D_{u_i} l)^2

Both are unbiased and are summed over samples before anything is divided, in float64, and forgotten slowly: the guess is
trained meanwhile. What is told counts from the next step on (`settle`), so that no decision depends on the order of
answers in flight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

DECAY = 0.95
"""What a step's sums are multiplied by at the next."""


class Alignment:
    """Running sums of <g, s>, |g|^2 and |s|^2 over samples."""

    def __init__(self) -> None:
        self._known = [0.0, 0.0, 0.0]
        self._pending = [0.0, 0.0, 0.0]

    def tell(self, products: Tensor, squares: Tensor, guesses: Tensor) -> None:
        """Estimates of <g, s> and |g|^2, and |s|^2, of samples: [b] each."""
        for index, values in enumerate((products, squares, guesses)):
            self._pending[index] += float(values.sum())

    @property
    def pending(self) -> list[float]:
        """The three sums over what was told since `settle`."""
        return list(self._pending)

    def settle(self, pending: Sequence[float] | None = None) -> None:
        """What was told since counts from now on; `pending` in its place, where others were told of other samples."""
        if pending is not None:
            self._pending = list(pending)
        if self._pending[2] > 0:
            self._known = [DECAY * old + new for old, new in zip(self._known, self._pending, strict=True)]
        self._pending = [0.0, 0.0, 0.0]

    @property
    def known(self) -> bool:
        """Whether anything was told, up to the last step."""
        return self._known[2] > 0

    @property
    def cosine(self) -> float:
        """<g, s> / (|g| |s|), pooled over samples, in -1..1; 0 before anything is known."""
        product, square, guess = self._known
        if square <= 0 or guess <= 0:
            return 0.0
        return max(-1.0, min(1.0, product / math.sqrt(square * guess)))

    @property
    def slope(self) -> float:
        """The c >= 0 for which c s is nearest to g: <g, s> / |s|^2."""
        product, _, guess = self._known
        return max(0.0, product / guess) if guess > 0 else 0.0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, between steps."""
        return dict(zip(("product", "square", "guess"), self._known, strict=True))

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from `state`; KeyError where something is missing."""
        self._known = [state["product"], state["square"], state["guess"]]
