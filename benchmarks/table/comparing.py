"""Which orderings hold: columns compared image by image, under the same noise.

Two columns certify the same images under the same noise, so that their difference is judged by the images on which they
differ. With d_i in {-1, 0, 1} the difference at one image (and, of several seeds, their mean), the mean difference has
the standard error sd(d) / sqrt(m) over m images: images are the sample, and the seeds' spread is shown beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from defender_client.certify import Row

_Z = 1.96  # 95 %, two-sided


@dataclass(frozen=True)
class Difference:
    """Certified accuracy of one column less that of another at one radius, in 0..1.

    `half`: half of the 95 % interval over images; `by_seed`: the difference of each seed.
    """

    radius: float
    mean: float
    half: float
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """`holds` or `reversed` where the interval leaves zero out, else `undecided`."""
        if abs(self.mean) <= self.half or self.mean == 0.0:
            return "undecided"
        return "holds" if self.mean > 0 else "reversed"


def difference(above: Mapping[int, Sequence[Row]], below: Mapping[int, Sequence[Row]], radius: float) -> Difference:
    """Compare two columns at a radius, over the seeds that both have.

    Args:
        above, below: certified rows by seed, of the same images.

    Raises:
        ValueError: no seed is common, or the images differ.
    """
    seeds = sorted(above.keys() & below.keys())
    if not seeds:
        raise ValueError("no seed has both columns")
    each = []
    for seed in seeds:
        one, other = _hits(above[seed], radius), _hits(below[seed], radius)
        if one.keys() != other.keys():
            raise ValueError("the columns were certified on different images")
        each.append([one[index] - other[index] for index in sorted(one)])
    values = np.array(each, dtype=float)
    over_images = values.mean(axis=0)
    error = float(over_images.std(ddof=1)) / math.sqrt(len(over_images)) if len(over_images) > 1 else math.inf
    return Difference(radius, float(values.mean()), _Z * error, tuple(float(v) for v in values.mean(axis=1)))


def _hits(rows: Sequence[Row], radius: float) -> dict[int, int]:
    return {row.idx: int(bool(row.correct) and row.radius >= radius) for row in rows}
