"""The measurements of the reconstruction task: public physics, which both sides compute alike.

An image x of d pixels is known by m < d linear measurements y, and shown as their back-projection x_b, an image again
(Zhang et al., ICLR 2022, "image reconstruction": d = 784, m = 576):

    A   d x m, A_ij ~ N(0, 1/m), fixed
    y   = A^T x
    x_b = clamp((A y - low) / (high - low), 0, 1)        what a reconstructor R is given; R(x_b) is near x

A and both constants are public; only R is hidden. A has the same bits on every machine: its entries are those normal
quantiles that `shared.wire.directions` makes directions of,

    w    = the 16-bit words of the stream of Philox4x64-10 under the key (seed, 1), low words first
    A_ij = t(w_(im + j)) / (2^15 sqrt(m))                t(w) = round(2^15 Phi^-1((w + 1/2) / 2^16))

(Salmon et al., SC 2011; the key (seed, 0) is that of directions). Products are summed in float64 and rounded to float32
once, so that another order of summation gives another float32 only where the sum is next to a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from shared.wire.directions import SCALE, normal_quantiles

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Shape = tuple[int, int, int]

PAPER_ROWS, PAPER_PIXELS = 576, 784
_HUNDREDTHS = 100


class Measurement(BaseModel):
    """How images are measured: A by its seed and its number of measurements, and the ends of A A^T x.

    Attributes:
        seed: of A, 0 to 2^63 - 1.
        rows: m, the measurements of an image.
        low, high: the values of A A^T x that become 0 and 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    seed: int = Field(ge=0, lt=2**63)
    rows: PositiveInt
    low: float
    high: float

    @model_validator(mode="after")
    def _has_a_range(self) -> Measurement:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} must be less than high = {self.high:g}")
        return self


class BackProjection:
    """x -> x_b: images float32 [n, *image_shape] in [0, 1] -> images of the same shape, in [0, 1].

    Args:
        measurement: how.
        image_shape: (c, h, w); d = c h w.

    Raises:
        ValueError: there are more measurements than pixels.
    """

    def __init__(self, measurement: Measurement, image_shape: Shape) -> None:
        self.measurement, self.image_shape = measurement, image_shape
        self._matrix = gaussian_matrix(measurement.seed, math.prod(image_shape), measurement.rows)

    def __call__(self, images: Float32) -> Float32:
        """The back-projections of images. Raises `ValueError` for images of another shape."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images are {list(images.shape)}: expected [n, {', '.join(map(str, self.image_shape))}]")
        low, high = self.measurement.low, self.measurement.high
        # x_b = clamp((A A^T x - low) / (high - low), 0, 1)
        scaled = (_unscaled(images, self._matrix) - low) / (high - low)
        return np.clip(scaled, 0.0, 1.0).astype(np.float32).reshape(images.shape)


def gaussian_matrix(seed: int, pixels: int, rows: int) -> Float64:
    """A, float64 [pixels, rows]; the same bits on every machine.

    Raises:
        ValueError: there are more measurements than pixels.
    """
    if not 1 <= rows <= pixels:
        raise ValueError(f"an image of {pixels} pixels has 1 to {pixels} measurements, not {rows}")
    stream = np.random.Philox(key=seed + (1 << 64))
    words = stream.random_raw(math.ceil(pixels * rows / 4)).astype("<u8", copy=False).view("<u2")
    # A_ij = t(w_(im + j)) / (2^15 sqrt(m))
    matrix: Float64 = normal_quantiles().take(words[: pixels * rows]).reshape(pixels, rows)
    matrix /= SCALE * math.sqrt(rows)
    return matrix


def usual_rows(pixels: int) -> int:
    """m in the paper's ratio to d."""
    return max(1, round(pixels * PAPER_ROWS / PAPER_PIXELS))


def calibrate(batches: Iterable[Float32], seed: int, rows: int) -> Measurement:
    """The measurement whose `low` and `high` are the extremes of A A^T x over these images, rounded outwards to
    hundredths: none of them is clamped.

    Args:
        batches: images float32 [n, c, h, w] in [0, 1], of the training set; n >= 1.
        seed, rows: of A.

    Raises:
        ValueError: more measurements than pixels, no image, or black ones only.
    """
    matrix: Float64 | None = None
    low, high = math.inf, -math.inf
    for images in batches:
        if matrix is None:
            matrix = gaussian_matrix(seed, math.prod(images.shape[1:]), rows)
        unscaled = _unscaled(images, matrix)
        low, high = min(low, float(unscaled.min())), max(high, float(unscaled.max()))
    if not low < high:
        raise ValueError("there is nothing to measure: give images that are not all black")
    return Measurement(
        seed=seed,
        rows=rows,
        low=math.floor(low * _HUNDREDTHS) / _HUNDREDTHS,
        high=math.ceil(high * _HUNDREDTHS) / _HUNDREDTHS,
    )


def _unscaled(images: Float32, matrix: Float64) -> Float64:
    """A A^T x, float64 [n, d]."""
    pixels = images.reshape(len(images), -1).astype(np.float64)
    projected: Float64 = (pixels @ matrix) @ matrix.T
    return projected
