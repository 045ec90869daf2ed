"""Questions, cut to what an oracle takes: every row once, whole points where there is room for them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defender_client.oracle import OracleInfo
from defender_client.questions import Factored, Images, Latents, Question
from shared.wire import codec, probes
from shared.wire.probes import Coordinates, Directions, Probes, Seeds

D = 12
RNG = np.random.default_rng(0)
BASE = RNG.random((5, D), dtype=np.float32)


def info(rows: int | None = None, body: int | None = None) -> OracleInfo:
    return OracleInfo(image_shape=(1, 3, 4), classes=2, max_rows=7, row_limit=rows, body_limit=body, factored=True)


def cut(question: Question, oracle: OracleInfo) -> list[Question]:
    """As the client cuts it."""
    parts, start = [], 0
    while start < len(question):
        rest = question.take(start, len(question))
        parts.append(rest.take(0, rest.fitting(oracle, len(rest))))
        start += len(parts[-1])
    return parts


def rows_of(question: Question) -> np.ndarray:
    """What the server makes of the body."""
    encoded = question.encode()
    request = codec.decode_request(encoded.body(), encoded.json_length)
    asked = probes.read(request.inputs, request.datatypes, request.parameters, D)
    return asked.expand(*(probes.read_range(request.parameters, len(asked)) or (0, len(asked))))


@pytest.mark.parametrize("limit", [1, 4, 7, 13, 14, 26, 30, 100])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_parts_are_the_rows_of_the_whole(difference: probes.Difference, limit: int) -> None:
    for along in (Coordinates(np.arange(6)), Seeds(np.arange(5, dtype=np.uint64))):
        question = Factored(Probes(BASE, np.full(6, 0.1, np.float32), along, difference), None)
        parts = cut(question, info(rows=limit))
        assert all(len(part) <= limit for part in parts)
        np.testing.assert_array_equal(np.concatenate([rows_of(part) for part in parts]), rows_of(question))
        shapes = [part.answered(2) for part in parts]
        assert [int(np.prod(shape)) for shape in shapes] == [2 * len(part) for part in parts]


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 6), min_size=5, max_size=5),
    st.sampled_from(["forward", "central"]),
    st.integers(1, 40),
    st.none() | st.integers(1024 + 30, 1024 + 600),
)
def test_parts_of_a_ragged_batch_are_its_rows(
    counts: list[int], difference: probes.Difference, limit: int, body: int | None
) -> None:
    own = Coordinates(np.arange(30).reshape(5, 6) % D)
    asked = Probes(BASE, np.full((5, 6), 0.1, np.float32), own, difference, np.array(counts))
    question = Factored(asked, None)
    assert question.answered(2) == (len(asked), 2)
    parts = cut(question, info(rows=limit, body=body))
    assert all(0 < len(part) <= limit for part in parts)
    assert [part.answered(2) for part in parts] == [(len(part), 2) for part in parts]
    sent = [rows_of(part) for part in parts]
    assert [len(rows) for rows in sent] == [len(part) for part in parts]
    np.testing.assert_array_equal(np.concatenate([np.empty((0, D)), *sent]), asked.expand(0, len(asked)))


def test_parts_of_parts_of_a_ragged_batch_are_its_rows() -> None:
    counts = np.array([3, 0, 6, 0, 1])
    asked = Probes(BASE, np.full(6, 0.1, np.float32), Seeds(np.arange(5, dtype=np.uint64)), "central", counts)
    rows, whole = asked.expand(0, len(asked)), Factored(asked, None)
    for start, stop in itertools.combinations(range(len(asked) + 1), 2):
        part = whole.take(start, stop)
        np.testing.assert_array_equal(rows_of(part), rows[start:stop])
        np.testing.assert_array_equal(rows_of(part.take(0, 1)), rows[start : start + 1])
        np.testing.assert_array_equal(rows_of(part.take(len(part) - 1, len(part))), rows[stop - 1 : stop])
    points = [whole.take(start, stop) for start, stop in [(0, 6), (5, 7), (6, 18), (18, 20)]]
    assert [(part.probes.n, part.part) for part in points] == [(1, None), (3, (5, 7)), (1, None), (1, None)]


def test_ragged_points_are_sent_whole_where_they_fit() -> None:
    """4, 1, 7, 1 and 2 rows: none of them is begun that would not be ended, but where it is the first and too large."""
    counts = np.array([3, 0, 6, 0, 1])
    asked = Probes(BASE, np.full(6, 0.1, np.float32), Seeds(np.arange(5, dtype=np.uint64)), "forward", counts)
    for limit, sizes in [
        (100, [15]),
        (14, [13, 2]),
        (11, [5, 10]),
        (8, [5, 8, 2]),
        (7, [5, 7, 3]),
        (4, [4, 1, 4, 4, 2]),
    ]:
        parts = cut(Factored(asked, None), info(rows=limit))
        assert [len(part) for part in parts] == sizes
    central = Probes(BASE, np.full(6, 0.1, np.float32), Seeds(np.arange(5, dtype=np.uint64)), "central", counts)
    assert [len(part) for part in cut(Factored(central, None), info(rows=18))] == [18, 2]


def test_points_are_sent_whole_where_they_fit() -> None:
    """7 rows a point: a limit of 20 holds two points, and no base point travels twice."""
    question = Factored(Probes(BASE, np.full(6, 0.1, np.float32), Coordinates(np.arange(6)), "forward"), None)
    parts = cut(question, info(rows=20))
    assert [len(part) for part in parts] == [14, 14, 7]
    assert all(isinstance(part, Factored) and part.part is None for part in parts)


def test_bytes_are_limited_too() -> None:
    own = Directions(RNG.standard_normal((5, 6, D)).astype(np.float32))
    question = Factored(Probes(BASE, np.full(6, 0.1, np.float32), own, "forward"), None)
    parts = cut(question, info(rows=100, body=1024 + 2 * 7 * 4 * D + 100))
    assert len(parts) > 1
    assert max(part.encode().size for part in parts) < 1024 + 2 * 7 * 4 * D + 100
    np.testing.assert_array_equal(np.concatenate([rows_of(part) for part in parts]), rows_of(question))


def test_images_and_latents_are_cut_by_rows() -> None:
    images, latents = Images(np.zeros((20, 1, 3, 4), np.float32)), Latents(np.zeros((20, 3), np.float32), "d")
    assert [len(part) for part in cut(images, info())] == [7, 7, 6]
    assert [len(part) for part in cut(latents, info(rows=9))] == [9, 9, 2]
    assert [len(part) for part in cut(latents, info(rows=9, body=1024 + 4 * 12))] == [4] * 5
    assert images.fitting(info(), 3) == latents.fitting(info(), 3) == 3
    for start, stop in itertools.combinations(range(0, 20, 6), 2):
        assert len(images.take(start, stop)) == len(latents.take(start, stop)) == stop - start
