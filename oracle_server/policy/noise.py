"""Noise on logits that asking again does not average away.

Fresh noise is a function of the charge, not of the moment it is computed at: whoever asks again for free is told the
same again. Deterministic noise is a function of the image: it is the same however often it is paid for, and whatever
else is in the batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oracle_server.policy.randomness import Randomness
from oracle_server.policy.spec import NoiseSpec
from oracle_server.rows import Rows

_BY_CHARGE, _BY_IMAGE = b"noise by charge", b"noise by image"
_AT_ONCE = 256  # rows


def draw(spec: NoiseSpec, randomness: Randomness, rows: Rows, classes: int, seq: int) -> NDArray[np.float64]:
    """Noise [n, classes] ~ N(0, sigma^2) for n rows of the charge with ledger number `seq`."""
    if spec.kind == "fresh":
        standard = randomness.generator(_BY_CHARGE, seq.to_bytes(16, "little")).standard_normal((len(rows), classes))
    else:
        standard = np.empty((len(rows), classes))
        for start in range(0, len(rows), _AT_ONCE):
            # -0.0 is the same pixel as 0.0, and must not have another noise: adding 0 makes it one.
            images = (rows.images(start, min(start + _AT_ONCE, len(rows))) + np.float32(0)).astype("<f4")
            for image, noise in zip(images, standard[start:], strict=False):
                randomness.generator(_BY_IMAGE, image.tobytes()).standard_normal(out=noise)
    return spec.sigma * standard
