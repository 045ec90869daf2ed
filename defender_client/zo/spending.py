"""Sharing a number of probes among samples: whole numbers, in proportion to weights, within bounds."""

from __future__ import annotations

import torch
from torch import Tensor


def allocate(weights: Tensor, total: int, most: Tensor) -> Tensor:
    """How many of `total` probes each sample gets.

    In proportion to the weights, but at least 1 and at most `most`, by largest remainders; what the bounds of some
    leave goes to the others. A sample with `most` = 0 gets none.

    Args:
        weights: [b], >= 0; if all are 0, all are alike.
        total: probes in all; fewer are given where `most` leaves no room, more where each needs its one.
        most: [b], int64, >= 0.

    Returns:
        [b], int64.

    Raises:
        ValueError: weights that are negative or not finite.
    """
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("weights must be finite and not negative")
    weights = weights.double()
    shares = torch.clamp(most, max=1).double()
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    left = min(float(total), float(most.sum())) - float(shares.sum())
    # Water-filling: what a full sample cannot take is shared among the others, until nothing is left.
    while left > 1e-9:
        room = most - shares
        free = room > 1e-9
        part = torch.where(free, weights, 0.0)
        if not bool(part.any()):
            part = free.double()
        # As far as the first sample is full.
        fraction = min(left / float(part.sum()), float((room / part.clamp(min=1e-300))[free & (part > 0)].min()))
        shares += fraction * part
        left -= fraction * float(part.sum())
    counts = (shares + 1e-9).floor().to(torch.int64)
    missing = round(float(shares.sum())) - int(counts.sum())
    if missing > 0:
        counts[torch.argsort(counts - shares, stable=True)[:missing]] += 1
    return torch.minimum(counts, most)
