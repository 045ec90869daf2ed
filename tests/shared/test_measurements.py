"""Measurements against a second implementation in plain Python, and against what they are to be."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from philox_support import philox4x64
from pydantic import ValidationError
from scipy.special import ndtri
from scipy.stats import kstest

from shared.measurements import BackProjection, Measurement, calibrate, gaussian_matrix, usual_rows

SHAPE = (3, 2, 2)
D, M = 12, 5


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, *SHAPE), dtype=np.float32)


def words(seed: int) -> Iterator[int]:
    for block in itertools.count(1):  # numpy's stream begins with the counter 1
        for value in philox4x64([block, 0, 0, 0], [seed, 1]):
            yield from (value >> shift & 0xFFFF for shift in (0, 16, 32, 48))


def matrix(seed: int, d: int, m: int) -> list[list[float]]:
    t = [round(2**15 * float(ndtri((word + 0.5) / 2**16))) for word in itertools.islice(words(seed), d * m)]
    return [[value / (2**15 * math.sqrt(m)) for value in t[i * m : (i + 1) * m]] for i in range(d)]


def unscaled(x: np.ndarray, seed: int, m: int) -> list[float]:
    """A A^T x in rational numbers, rounded once."""
    a = [[Fraction(value) for value in row] for row in matrix(seed, x.size, m)]
    pixels = [Fraction(float(value)) for value in x.ravel()]
    y = [sum((a[i][j] * pixels[i] for i in range(x.size)), Fraction(0)) for j in range(m)]
    return [float(sum((a[i][j] * y[j] for j in range(m)), Fraction(0))) for i in range(x.size)]


@pytest.mark.parametrize(("seed", "d", "m"), [(0, 1, 1), (7, D, M), (2**63 - 1, 5, 3)])
def test_the_matrix_is_what_the_formula_says(seed: int, d: int, m: int) -> None:
    np.testing.assert_array_equal(gaussian_matrix(seed, d, m), np.array(matrix(seed, d, m)))


def test_the_bits_are_pinned() -> None:
    """Another version of either side must measure the same."""
    digest = hashlib.sha256(gaussian_matrix(2024, 784, 576).tobytes()).hexdigest()
    assert digest == "ebe36f5b3c5845eb2eebcd00b8f6bda648a5f843c39f3aa9cceba839dba0103c"


def test_its_entries_are_independent_normals_of_variance_1_over_m() -> None:
    d, m = 784, 576
    a = gaussian_matrix(1, d, m)
    assert kstest(a.ravel() * math.sqrt(m), "norm").pvalue > 1e-3
    # E[A A^T] = I; an entry off the diagonal has a standard deviation of 1 / sqrt(m), one on it of sqrt(2 / m).
    error = a @ a.T - np.eye(d)
    assert np.abs(error).max() < 6 * math.sqrt(2 / m)
    assert error.std() == pytest.approx(1 / math.sqrt(m), rel=0.01)
    assert abs(np.corrcoef(a.ravel(), gaussian_matrix(2, d, m).ravel())[0, 1]) < 5 / math.sqrt(d * m)


def test_a_back_projection_is_what_the_formula_says() -> None:
    measurement = Measurement(seed=7, rows=M, low=-0.25, high=1.5)
    x = images(4)
    seen = BackProjection(measurement, SHAPE)(x)
    assert (seen.dtype, seen.shape) == (np.float32, x.shape)
    expected = [[min(1.0, max(0.0, (value + 0.25) / 1.75)) for value in unscaled(image, 7, M)] for image in x]
    np.testing.assert_array_equal(seen.reshape(4, D), np.array(expected).astype(np.float32))
    assert {0.0, 1.0} <= set(seen.ravel().tolist())  # both ends were met


def test_an_image_is_measured_alike_in_any_company() -> None:
    project = BackProjection(Measurement(seed=3, rows=500, low=-2.5, high=3.3), (1, 28, 28))
    x = np.random.default_rng(0).random((40, 1, 28, 28), dtype=np.float32)
    alone = np.concatenate([project(image[None]) for image in x])
    np.testing.assert_array_equal(project(x), alone)


def test_the_ends_are_those_of_the_training_images_rounded_outwards() -> None:
    x = images(30)
    every = [value for image in x for value in unscaled(image, 9, M)]
    found = calibrate([x[:11], x[11:]], 9, M)
    assert found == Measurement(
        seed=9, rows=M, low=math.floor(min(every) * 100) / 100, high=math.ceil(max(every) * 100) / 100
    )
    seen = BackProjection(found, SHAPE)(x)
    assert 0.0 < seen.min() < 0.02
    assert 0.98 < seen.max() < 1.0


def test_the_papers_ratio() -> None:
    assert [usual_rows(pixels) for pixels in (784, 64, 3072, 1)] == [576, 47, 2257, 1]


@pytest.mark.parametrize("rows", [0, 13])
def test_there_are_no_more_measurements_than_pixels(rows: int) -> None:
    with pytest.raises(ValueError, match=f"12 pixels has 1 to 12 measurements, not {rows}"):
        gaussian_matrix(0, D, rows)


def test_what_cannot_be_measured_is_told() -> None:
    project = BackProjection(Measurement(seed=0, rows=M, low=0.0, high=1.0), SHAPE)
    with pytest.raises(ValueError, match=r"images are \[2, 3, 4\]: expected \[n, 3, 2, 2\]"):
        project(np.zeros((2, 3, 4), np.float32))
    for nothing in ([], [np.zeros((2, *SHAPE), np.float32)]):
        with pytest.raises(ValueError, match="all black"):
            calibrate(nothing, 0, M)


GOOD = {"seed": 5, "rows": 3, "low": -2.41, "high": 3.36}


def test_a_measurement_survives_json() -> None:
    measurement = Measurement(**GOOD)
    assert Measurement.model_validate_json(measurement.model_dump_json()) == measurement
    assert measurement.model_dump() == GOOD


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"seed": 2**63}, {"rows": 0}, {"rows": "3"}, {"low": 3.36}, {"high": math.nan}, {"pixels": 784}],
    ids=str,
)
def test_a_measurement_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Measurement.model_validate(GOOD | change)
