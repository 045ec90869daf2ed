"""Random directions that two machines draw alike, to the bit, from a seed of 8 bytes.

Direction j of seed s in d dimensions, all in integers but for one square root and one division:

    w   = the 16-bit words 16 j b ... of the stream of Philox4x64-10 under the key s, b = ceil(d / 16), low words first
          (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; numpy's `Philox`, whose raw stream is
          guaranteed not to change, NEP 19)
    t_i = round(2^15 Phi^-1((w_i + 1/2) / 2^16))          the w_i-th of 65,536 normal quantiles, never 0
    u   = t / sqrt(sum_i t_i^2)                           the sum, of whole numbers, is exact

so that nothing depends on a library's logarithm or on the order of a sum. Coordinates are independent, symmetric and
alike before the division, hence E[u u^T] = I / d exactly, which is what makes RGE unbiased; the distribution is that of
the uniform one on the unit sphere with each coordinate on a grid of 65,536 values within +-4.3 standard deviations.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

MAX_DIMENSION = 448_000
"""Up to it the sum of squares is exact in float64 in whatever order it is taken: d (4.325 * 2^15)^2 < 2^53."""

SCALE = 2**15
"""What a normal quantile is multiplied by before it is rounded."""

_LEVELS = 2**16
_WORDS = 16  # 16-bit words in a block of Philox4x64


def unit_directions(seed: int, start: int, stop: int, dimension: int) -> Float32:
    """Directions `start` to `stop` of a seed.

    Args:
        seed: 0 to 2^64 - 1.
        start, stop: which of its directions; drawing them in parts gives the same.
        dimension: d, 1 to `MAX_DIMENSION`.

    Returns:
        float32 [stop - start, d], each row of length 1 but for rounding.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is a whole number from 0 to 2**64 - 1, not {seed}")
    if not 1 <= dimension <= MAX_DIMENSION:
        raise ValueError(f"a direction has 1 to {MAX_DIMENSION} coordinates, not {dimension}")
    if not 0 <= start <= stop:
        raise ValueError(f"directions are counted upwards from 0, not from {start} to {stop}")
    blocks = math.ceil(dimension / _WORDS)
    stream = np.random.Philox(key=seed, counter=start * blocks)
    raw = stream.random_raw((stop - start) * blocks * _WORDS // 4)
    words = raw.astype("<u8", copy=False).view("<u2").reshape(stop - start, blocks * _WORDS)[:, :dimension]
    normal = normal_quantiles().take(words)
    normal /= np.sqrt(np.einsum("ij,ij->i", normal, normal))[:, None]
    return normal.astype(np.float32)


@cache
def normal_quantiles() -> NDArray[np.float64]:
    """The 65,536 values of t, whole numbers, by the word; not to be written to."""
    normal = NormalDist()
    upper = [round(SCALE * normal.inv_cdf((level + 0.5) / _LEVELS)) for level in range(_LEVELS // 2, _LEVELS)]
    # Mirrored and not computed twice: E[u] = 0 is to hold to the bit.
    table = np.array([-value for value in reversed(upper)] + upper, np.float64)
    table.flags.writeable = False
    return table
