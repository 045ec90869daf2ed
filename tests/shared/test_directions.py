"""Directions against a second implementation, in plain Python after the paper, and against what they are to be."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from philox_support import MASK, philox4x64
from scipy.special import ndtri
from scipy.stats import kstest

from shared.wire.directions import MAX_DIMENSION, unit_directions


def direction(seed: int, number: int, d: int) -> list[float]:
    blocks = math.ceil(d / 16)
    words = []
    for block in range(blocks):
        # numpy's stream begins with the counter 1.
        for value in philox4x64([number * blocks + block + 1, 0, 0, 0], [seed, 0]):
            words += [value >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    t = [round(2**15 * float(ndtri((word + 0.5) / 2**16))) for word in words[:d]]
    return [value / math.sqrt(sum(v * v for v in t)) for value in t]


def test_the_reference_is_philox() -> None:
    """The known answers that the authors publish with their code (Random123, kat_vectors)."""
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip
    assert philox4x64([MASK] * 4, [MASK] * 2) == [
        0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0,
    ]  # fmt: skip


@pytest.mark.parametrize(("seed", "d"), [(0, 1), (5, 16), (2**64 - 1, 17), (123456789, 192)])
def test_directions_are_what_the_formula_says(seed: int, d: int) -> None:
    drawn = unit_directions(seed, 3, 6, d)
    assert drawn.dtype == np.float32
    expected = np.array([direction(seed, number, d) for number in (3, 4, 5)])
    np.testing.assert_array_equal(drawn, expected.astype(np.float32))


def test_parts_make_the_whole() -> None:
    whole = unit_directions(7, 0, 50, 21)
    parts = [unit_directions(7, start, start + 1, 21) for start in range(50)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert unit_directions(7, 4, 4, 21).shape == (0, 21)


def test_the_bits_are_pinned() -> None:
    """Another version of either side must draw the same."""
    digest = hashlib.sha256(unit_directions(2024, 0, 64, 3072).tobytes()).hexdigest()
    assert digest == "ec0c4d64410ff8f8653519b98f9d37e3eebcf2ff58eee4ee3ab45bb71419e9c0"


def test_they_are_uniform_on_the_sphere() -> None:
    d, q = 8, 40_000
    u = unit_directions(1, 0, q, d).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1.0, atol=1e-6)
    # E[u] = 0 and E[u u^T] = I / d; standard errors about sqrt(1 / (d q)) and sqrt(2) / (d sqrt(q)).
    np.testing.assert_allclose(u.mean(axis=0), 0.0, atol=5 / math.sqrt(d * q))
    np.testing.assert_allclose(u.T @ u / q, np.eye(d) / d, atol=5 * math.sqrt(2) / (d * math.sqrt(q)))
    # (u_1 + 1) / 2 ~ Beta((d - 1) / 2, (d - 1) / 2) for the uniform distribution.
    assert kstest((u[:, 0] + 1) / 2, "beta", ((d - 1) / 2, (d - 1) / 2)).pvalue > 1e-3
    other = unit_directions(2, 0, q, d).astype(np.float64)
    assert abs((u * other).sum(axis=1).mean()) < 5 / math.sqrt(d * q)  # of another seed


def test_the_largest_dimension_is_exact() -> None:
    largest = round(2**15 * float(ndtri(1 - 0.5 / 2**16)))
    assert MAX_DIMENSION * largest**2 < 2**53


@pytest.mark.parametrize(
    ("seed", "start", "stop", "d"), [(-1, 0, 1, 1), (2**64, 0, 1, 1), (0, 2, 1, 1), (0, -1, 1, 1), (0, 0, 1, 0)]
)
def test_what_is_out_of_range_is_refused(seed: int, start: int, stop: int, d: int) -> None:
    with pytest.raises(ValueError, match=r"from|coordinates"):
        unit_directions(seed, start, stop, d)
