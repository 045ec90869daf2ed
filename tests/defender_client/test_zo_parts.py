"""An estimator that is asked about a part of the points asks what it would ask about them among all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from defender_client import zo

POINTS = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)).sub(0.3).relu()
GUIDE = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
KINDS = {
    "cge": ("cge", {}),
    "active-cge": ("active-cge", {}),
    "rge": ("rge", {}),
    "orthonormal": ("orthonormal", {"active": True}),
    "prior": ("prior", {"active": True}),
    "prior-spread": ("prior", {"spread": "guide"}),
    "control-variate": ("control-variate", {}),
    "distil": ("distil", {}),
}


def build(kind: str) -> zo.Estimator:
    name, options = KINDS[kind]
    generator = torch.Generator().manual_seed(5)
    return zo.make(name, q=3, mu=0.05, generator=generator, options=zo.Options(**options))  # type: ignore[arg-type]


def losses(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows).double().pow(3).sum(dim=1).sin()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_ask_and_tell_what_the_whole_does(kind: str) -> None:
    whole = build(kind)
    probes = whole.ask_factored(POINTS, GUIDE)
    rows = probes.expand(0, len(probes))
    shape = (-1,) if probes.counts is not None else (probes.n, probes.p)
    gradient = whole.tell(losses(rows).view(shape))
    found, gradients = [], []
    for part in ((0, 2), (2, 6), (6, 7)):
        one = build(kind)
        asked = one.ask_factored(POINTS, GUIDE, part)
        assert asked.n == part[1] - part[0]
        found.append(asked.expand(0, len(asked)))
        shape = (-1,) if asked.counts is not None else (asked.n, asked.p)
        gradients.append(one.tell(losses(found[-1]).view(shape)))
    assert np.array_equal(np.concatenate(found), rows)
    assert torch.allclose(torch.cat(gradients), gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_skipped_is_drawn(kind: str) -> None:
    """The next question is the same, whether the one before was asked here, in part, or by others."""
    following = []
    for way in ("asked", "part", "skipped"):
        estimator = build(kind)
        if way == "skipped":
            estimator.skip(POINTS, GUIDE)
        else:
            estimator.ask_factored(POINTS, GUIDE, (2, 3) if way == "part" else None)
        probes = estimator.fork().ask_factored(POINTS, GUIDE)
        following.append(probes.expand(0, len(probes)))
    assert np.array_equal(following[0], following[1])
    assert np.array_equal(following[0], following[2])
