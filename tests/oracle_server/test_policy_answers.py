"""Each transform against an independent computation, and the noise against its promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import special, stats

from oracle_server.policy.answers import TOP_K_GAP, Answers
from oracle_server.policy.randomness import Randomness
from oracle_server.policy.spec import AnswerSpec, NoiseSpec
from oracle_server.rows import DenseRows

SEED = Randomness.of(7)
RNG = np.random.default_rng(3)
LOGITS = (4 * RNG.standard_normal((64, 10))).astype(np.float32)
IMAGES = RNG.random((64, 1, 8, 8), dtype=np.float32)


def tell(
    spec: AnswerSpec, logits: Any = LOGITS, images: Any = IMAGES, seq: int = 5, randomness: Randomness = SEED
) -> np.ndarray:
    told = Answers(spec, randomness).transform(logits, DenseRows(images), seq)
    assert told.dtype == np.float32
    assert told.shape == logits.shape
    return told


def fresh(sigma: float = 1.0, **rest: Any) -> AnswerSpec:
    return AnswerSpec(noise=NoiseSpec(sigma=sigma, kind="fresh"), **rest)


def deterministic(sigma: float = 1.0, **rest: Any) -> AnswerSpec:
    return AnswerSpec(noise=NoiseSpec(sigma=sigma, kind="deterministic"), **rest)


# --- transforms ----------------------------------------------------------------------------------------------------


def test_nothing_to_do_is_nothing_done() -> None:
    odd = np.array([[np.nan, -0.0, np.inf]], np.float32)
    assert Answers(AnswerSpec(), SEED).transform(odd, DenseRows(IMAGES[:1]), 5) is odd
    assert Answers(AnswerSpec(scores="logits", temperature=1.0), SEED).transform(odd, DenseRows(IMAGES[:1]), 5) is odd


@pytest.mark.parametrize("temperature", [0.001, 0.5, 1.0, 3.0, 1000.0])
def test_probabilities_are_a_softmax(temperature: float) -> None:
    expected = special.softmax(LOGITS.astype(np.float64) / temperature, axis=1)
    told = tell(AnswerSpec(scores="probabilities", temperature=temperature))
    np.testing.assert_allclose(told, expected, rtol=1e-6, atol=1e-30)
    divided = tell(AnswerSpec(temperature=temperature))
    np.testing.assert_allclose(divided, LOGITS.astype(np.float64) / temperature, rtol=1e-6)


def test_probabilities_of_huge_logits_are_finite() -> None:
    huge = np.array([[3e38, -3e38, 3e38]], np.float32)
    np.testing.assert_array_equal(tell(AnswerSpec(scores="probabilities"), huge, IMAGES[:1]), [[0.5, 0.0, 0.5]])


@pytest.mark.parametrize("decimals", [0, 1, 2, 5, 9])
def test_rounding_is_to_the_nearest(decimals: int) -> None:
    expected = np.array([[float(f"{value:.{decimals}f}") for value in row] for row in LOGITS.astype(np.float64)])
    np.testing.assert_allclose(tell(AnswerSpec(decimals=decimals)), expected, rtol=1e-7, atol=0)


def test_a_rounded_zero_has_no_sign() -> None:
    told = tell(AnswerSpec(decimals=1), np.array([[-0.01, 0.01, -0.3]], np.float32), IMAGES[:1])
    np.testing.assert_array_equal(told, np.array([[0.0, 0.0, -0.3]], np.float32))
    assert not np.signbit(told[0, 0])


def test_a_label_is_one_hot() -> None:
    told = tell(AnswerSpec(scores="label"))
    np.testing.assert_array_equal(told.argmax(axis=1), LOGITS.argmax(axis=1))
    np.testing.assert_array_equal(np.sort(told, axis=1), np.tile([0.0] * 9 + [1.0], (64, 1)))


@pytest.mark.parametrize("k", [1, 3, 10, 12])
def test_top_k_tells_the_largest(k: int) -> None:
    probabilities = special.softmax(LOGITS.astype(np.float64), axis=1)
    told = tell(AnswerSpec(scores="probabilities", top_k=k))
    logits = tell(AnswerSpec(top_k=k))
    for row in range(len(LOGITS)):
        order = sorted(range(10), key=lambda label, row=row: -LOGITS[row, label])
        kept, dropped = order[:k], order[k:]
        np.testing.assert_allclose(told[row, kept], probabilities[row, kept], rtol=1e-6)
        np.testing.assert_array_equal(told[row, dropped], 0.0)
        np.testing.assert_array_equal(logits[row, kept], LOGITS[row, kept])
        np.testing.assert_allclose(logits[row, dropped], LOGITS[row, kept[-1]] - TOP_K_GAP, rtol=1e-6)


def test_of_equals_the_first_are_told() -> None:
    equal = np.zeros((1, 4), np.float32)
    np.testing.assert_array_equal(
        tell(AnswerSpec(scores="probabilities", top_k=2), equal, IMAGES[:1]), [[0.25, 0.25, 0, 0]]
    )
    np.testing.assert_array_equal(tell(AnswerSpec(scores="label"), equal, IMAGES[:1]), [[1, 0, 0, 0]])
    many = np.tile(np.array([1.0, 0.0], np.float32), (1, 500))  # so many that a sort which swaps equals would
    expected = np.where(np.isin(np.arange(1000), 2 * np.arange(3)), 1.0, 1.0 - TOP_K_GAP)
    np.testing.assert_array_equal(tell(AnswerSpec(top_k=3), many, IMAGES[:1]), [expected])


def test_the_order_is_noise_softmax_top_k_rounding() -> None:
    noise = tell(fresh(0.5), np.zeros_like(LOGITS)).astype(np.float64)
    expected = special.softmax((LOGITS + noise) / 2.0, axis=1)
    third = np.sort(expected, axis=1)[:, [-3]]
    expected = np.round(np.where(expected >= third, expected, 0.0), 2)
    told = tell(fresh(0.5, scores="probabilities", temperature=2.0, top_k=3, decimals=2))
    np.testing.assert_allclose(told, expected, atol=1e-6)
    assert not np.allclose(told.sum(axis=1), 1.0)  # what is cut off is not made up for
    labels = tell(fresh(5.0, scores="label")).argmax(axis=1)
    np.testing.assert_array_equal(labels, (LOGITS + 10 * noise).argmax(axis=1))
    assert (labels != LOGITS.argmax(axis=1)).any()


@pytest.mark.parametrize(
    "spec",
    [
        AnswerSpec(decimals=2),
        AnswerSpec(scores="label"),
        AnswerSpec(scores="probabilities", top_k=2),
        fresh(1.0),
        deterministic(1.0, top_k=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_row_stays_visible_and_alone(spec: AnswerSpec, bad: float) -> None:
    logits = LOGITS.copy()
    logits[3, 4] = bad
    told = tell(spec, logits)
    assert np.isnan(told[3]).all()
    whole = np.arange(len(logits)) != 3
    np.testing.assert_array_equal(told[whole], tell(spec)[whole])


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-50, 50, width=32)),
    st.sampled_from(["logits", "probabilities"]),
    st.integers(1, 8),
    st.integers(0, 4),
)
def test_every_answer_is_finite_and_keeps_the_order(logits: np.ndarray, scores: Any, k: int, decimals: int) -> None:
    told = tell(AnswerSpec(scores=scores, top_k=k, decimals=decimals), logits, IMAGES[: len(logits)])
    assert np.isfinite(told).all()
    if scores == "probabilities":
        assert (told >= 0).all()
        assert (told <= 1).all()
    for before, after in zip(logits, told, strict=True):
        ranked = after[np.argsort(-before, kind="stable")]
        assert (np.diff(ranked) <= 0).all()  # rounding may make equal, but never swaps


def test_the_largest_logit_is_told_where_rounding_made_probabilities_equal() -> None:
    near = np.array([[0.0, 1e-17]], np.float32)
    told = tell(AnswerSpec(scores="probabilities", top_k=1), near, IMAGES[:1])
    np.testing.assert_array_equal(told, [[0.0, 0.5]])


# --- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fresh, deterministic])
def test_noise_is_normal_and_independent_over_rows_and_classes(make: Any) -> None:
    images = np.random.default_rng(0).random((2000, 1, 8, 8), dtype=np.float32)
    noise = tell(make(0.5), np.zeros((2000, 10), np.float32), images).astype(np.float64)
    assert stats.kstest(noise.ravel() / 0.5, "norm").pvalue > 0.01
    for one in noise.T:
        assert stats.kstest(one / 0.5, "norm").pvalue > 0.001
    correlations = np.corrcoef(noise.T)[np.triu_indices(10, 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(2000)
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(neighbours) < 4.5 / np.sqrt(20_000)


def test_fresh_noise_is_the_charges() -> None:
    first, again, next_charge = (tell(fresh(), seq=seq) for seq in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != next_charge).all()
    same_image = tell(fresh(), np.zeros((2, 10), np.float32), np.zeros((2, 1, 8, 8), np.float32))
    assert (same_image[0] != same_image[1]).all()


def test_fresh_noise_of_charges_in_a_row_is_independent() -> None:
    zeros = np.zeros((1, 10), np.float32)
    noise = np.concatenate([tell(fresh(), zeros, IMAGES[:1], seq) for seq in range(2000)]).astype(np.float64)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 4.5 / np.sqrt(20_000)


def test_deterministic_noise_is_the_images_whatever_the_batch() -> None:
    whole = tell(deterministic())
    np.testing.assert_array_equal(whole, tell(deterministic(), seq=99))
    order = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(whole[order], tell(deterministic(), LOGITS[order], IMAGES[order]))
    one_by_one = [tell(deterministic(), LOGITS[i : i + 1], IMAGES[i : i + 1]) for i in range(64)]
    np.testing.assert_array_equal(whole, np.concatenate(one_by_one))
    strided = np.asfortranarray(np.repeat(IMAGES, 2, axis=0))[::2]
    np.testing.assert_array_equal(whole, tell(deterministic(), LOGITS, strided))
    nudged = IMAGES.copy()
    nudged[:, 0, 0, 0] = np.nextafter(nudged[:, 0, 0, 0], np.float32(2))
    assert (tell(deterministic(), LOGITS, nudged) != whole).all()


def test_the_sign_of_a_zero_pixel_buys_no_other_noise() -> None:
    zero, zeros = np.zeros((1, 1, 8, 8), np.float32), np.zeros((1, 10), np.float32)
    np.testing.assert_array_equal(tell(deterministic(), zeros, zero), tell(deterministic(), zeros, -zero))


@pytest.mark.parametrize("make", [fresh, deterministic])
def test_noise_follows_the_seed_and_without_one_the_start(make: Any) -> None:
    zeros = np.zeros_like(LOGITS)

    def noise(seed: int | None) -> np.ndarray:
        return tell(make(), zeros, randomness=Randomness.of(seed))

    np.testing.assert_array_equal(noise(1), noise(1))
    assert (noise(1) != noise(2)).all()
    assert (noise(None) != noise(None)).all()


def test_purposes_share_nothing_and_the_key_is_not_shown() -> None:
    draws = [SEED.generator(purpose, data).random() for purpose in (b"a", b"b") for data in (b"", b"x")]
    assert len(set(draws)) == 4
    assert SEED.key.hex() not in repr(SEED)
    assert repr(SEED.key) not in repr(SEED)
