"""Zeroth-order gradient estimators: `ask` says where to evaluate, `tell` turns the losses into a gradient.

The caller owns the evaluation: nothing here knows of oracles, networks or losses.
"""

from __future__ import annotations

import torch

from defender_client.zo.base import MU, Description, Difference, Estimator, NothingAsked, StepVanished
from defender_client.zo.cge import CGE
from defender_client.zo.rge import RGE

NAMES = ("rge", "cge")

__all__ = [
    "CGE",
    "MU",
    "NAMES",
    "RGE",
    "Description",
    "Difference",
    "Estimator",
    "NothingAsked",
    "StepVanished",
    "make",
]


def make(
    name: str,
    *,
    q: int | None = None,
    mu: float = MU,
    difference: Difference = "forward",
    generator: torch.Generator | None = None,
) -> Estimator:
    """The estimator a configuration names.

    Args:
        name: "rge" or "cge".
        q: directions per sample, for "rge"; "cge" always probes every coordinate and has no use for it.
        mu: step size, in units of the points.
        difference: "forward" or "central".
        generator: draws the directions of "rge"; "cge" is deterministic.

    Raises:
        ValueError: an unknown name, a value out of range, or "rge" without `q` or `generator`.
    """
    if name == "cge":
        return CGE(mu, difference)
    if name == "rge":
        if q is None or generator is None:
            raise ValueError("rge needs q, the number of directions, and a generator to draw them from")
        return RGE(q, mu, difference, generator=generator)
    raise ValueError(f"no estimator is called {name!r}; there are {', '.join(NAMES)}")
