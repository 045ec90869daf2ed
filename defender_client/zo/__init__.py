"""Zeroth-order gradient estimators: `ask` says where to evaluate, `tell` turns the losses into a gradient.

The caller owns the evaluation: nothing here knows of oracles, networks or losses.

    rge, cge            the paper's: independent random directions, all coordinates            `rge`, `cge`
    active-cge          CGE without the coordinates that a ReLU holds at zero                   `subspace`
    orthonormal         random directions that do not tell the same thing twice                 `subspace`
    prior               one probe along a guess of the gradient, the others orthogonal to it    `guided`
    control-variate     random probes of what the guess does not explain                        `guided`
    distil              the guess itself: no estimate of the oracle's gradient, to compare with `guided`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from defender_client.zo.alignment import Alignment
from defender_client.zo.base import MU, Description, Difference, Estimator, NothingAsked, StepVanished
from defender_client.zo.cge import CGE
from defender_client.zo.guided import ControlVariate, Distil, Guided, Prior, Spread
from defender_client.zo.rge import RGE
from defender_client.zo.subspace import ActiveCGE, Orthonormal, Scale

NAMES = ("rge", "cge", "active-cge", "orthonormal", "prior", "control-variate", "distil")
GUIDED = ("prior", "control-variate", "distil")

__all__ = [
    "CGE",
    "GUIDED",
    "MU",
    "NAMES",
    "RGE",
    "ActiveCGE",
    "Alignment",
    "ControlVariate",
    "Description",
    "Difference",
    "Distil",
    "Estimator",
    "Guided",
    "NothingAsked",
    "Options",
    "Orthonormal",
    "Prior",
    "Scale",
    "Spread",
    "StepVanished",
    "make",
]


@dataclass(frozen=True)
class Options:
    """What only some estimators take; see their classes.

    Attributes:
        active: of those with orthonormal directions.
        scale: of `orthonormal` and `prior`; None for each one's own.
        spread: of `prior` and `control-variate`.
        jitter: of `distil`.
    """

    active: bool = False
    scale: Scale | None = None
    spread: Spread = "even"
    jitter: float = 0.1


def make(
    name: str,
    *,
    q: int | None = None,
    mu: float = MU,
    difference: Difference = "forward",
    generator: torch.Generator | None = None,
    options: Options = Options(),
) -> Estimator:
    """The estimator a configuration names.

    Args:
        name: one of `NAMES`.
        q: directions per sample; "cge" and "active-cge" probe coordinates and have no use for it.
        mu: step size, in units of the points.
        difference: "forward" or "central".
        generator: draws directions; "cge" and "active-cge" are deterministic.
        options: what only some take.

    Raises:
        ValueError: an unknown name, a value out of range, or one that draws directions without `q` or `generator`.
    """
    if name == "cge":
        return CGE(mu, difference)
    if name == "active-cge":
        return ActiveCGE(mu, difference)
    if name not in NAMES:
        raise ValueError(f"no estimator is called {name!r}; there are {', '.join(NAMES)}")
    if q is None or generator is None:
        raise ValueError(f"{name} needs q, the number of directions, and a generator to draw them from")
    if name == "rge":
        return RGE(q, mu, difference, generator=generator)
    active = options.active
    if name == "orthonormal":
        scale = options.scale or "unbiased"
        return Orthonormal(q, mu, difference, generator=generator, active=active, scale=scale)
    if name == "prior":
        scale, spread = options.scale or "projection", options.spread
        return Prior(q, mu, difference, generator=generator, active=active, spread=spread, scale=scale)
    if name == "control-variate":
        return ControlVariate(q, mu, difference, generator=generator, active=active, spread=options.spread)
    return Distil(q, options.jitter, generator=generator)
