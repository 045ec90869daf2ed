"""Factored batches against rows made one by one, in float32 arithmetic spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.wire import codec, probes
from shared.wire.directions import unit_directions
from shared.wire.errors import MalformedRequest, OracleError, UnacceptableValues
from shared.wire.probes import Along, Coordinates, Difference, Directions, Probes, Seeds

N, Q, D = 3, 5, 12
RNG = np.random.default_rng(1)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


BASE = floats(N, D)
KINDS: dict[str, Along] = {
    "shared directions": Directions(floats(Q, D)),
    "own directions": Directions(floats(N, Q, D)),
    "shared coordinates": Coordinates(np.array([3, 0, 11, 3, 7])),
    "own coordinates": Coordinates(RNG.integers(0, D, (N, Q))),
    "shared seed": Seeds(np.array([9], np.uint64)),
    "own seeds": Seeds(np.array([1, 2**64 - 1, 3], np.uint64)),
}
STEPS = {"shared": np.full(Q, 0.005, np.float32), "each": floats(Q), "own": floats(N, Q)}


def one_direction(along: Along, point: int, j: int) -> np.ndarray:
    match along:
        case Directions(values):
            return values[j] if values.ndim == 2 else values[point, j]
        case Coordinates(values):
            u = np.zeros(D, np.float32)
            u[values[j] if values.ndim == 1 else values[point, j]] = 1
            return u
        case Seeds(values):
            return unit_directions(int(values[0 if len(values) == 1 else point]), j, j + 1, D)[0]
    raise AssertionError(along)


def row_by_row(asked: Probes) -> np.ndarray:
    rows = []
    for i, x in enumerate(asked.base):
        steps = asked.steps if asked.steps.ndim == 1 else asked.steps[i]
        own = range(asked.q if asked.counts is None else asked.counts[i])
        ahead = [x + steps[j] * one_direction(asked.along, i, j) for j in own]
        behind = [x - steps[j] * one_direction(asked.along, i, j) for j in own]
        rows += [x, *ahead] if asked.difference == "forward" else [*ahead, *behind]
    return np.array(rows, np.float32).reshape(-1, D)


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("along", KINDS.values(), ids=KINDS)
def test_rows_are_those_that_would_be_sent(along: Along, steps: np.ndarray, difference: Difference) -> None:
    asked = Probes(BASE, steps, along, difference)
    expected = row_by_row(asked)
    assert len(asked) == len(expected) == N * (Q + 1 if difference == "forward" else 2 * Q)
    np.testing.assert_array_equal(asked.expand(0, len(asked)), expected)
    for start, stop in [(0, 1), (1, 2), (asked.p - 1, asked.p + 1), (2, len(asked) - 1), (4, 4)]:
        np.testing.assert_array_equal(asked.expand(start, stop), expected[start:stop])
    np.testing.assert_array_equal(asked.of(1, 3).expand(0, 2 * asked.p), expected[asked.p :])


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("along", KINDS.values(), ids=KINDS)
def test_what_is_written_is_read(along: Along, difference: Difference) -> None:
    asked = Probes(BASE, STEPS["own"], along, difference)
    encoded = codec.encode_request(asked.inputs(), parameters={"difference": difference})
    request = codec.decode_request(encoded.body(), encoded.json_length)
    assert request.wants_binary("logits")
    read = probes.read(request.inputs, request.datatypes, request.parameters, D)
    np.testing.assert_array_equal(read.expand(0, len(read)), asked.expand(0, len(asked)))


# --- ragged: a number of directions for each point --------------------------------------------------------------------

COUNTS = np.array([Q, 0, 2])


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("along", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_ragged_rows_are_the_first_of_each_point(along: Along, steps: np.ndarray, difference: Difference) -> None:
    asked = Probes(BASE, steps, along, difference, COUNTS)
    expected = row_by_row(asked)
    assert len(asked) == len(expected) == (3 + 7 if difference == "forward" else 2 * 7)
    assert asked.row_counts.tolist() == ([6, 1, 3] if difference == "forward" else [10, 0, 4])
    assert asked.starts.tolist() == ([0, 6, 7] if difference == "forward" else [0, 10, 10])
    assert asked.row_counts.dtype == asked.starts.dtype == np.int64
    assert [asked.rows_of(point) for point in range(N)] == asked.row_counts.tolist()
    for start in range(len(asked) + 1):
        for stop in range(start, len(asked) + 1):
            np.testing.assert_array_equal(asked.expand(start, stop), expected[start:stop])
    rest = asked.of(1, 3)
    np.testing.assert_array_equal(rest.expand(0, len(rest)), expected[asked.starts[1] :])


def test_each_row_has_a_point_and_rows_beyond_have_none() -> None:
    counts = np.array([0, 0, 2, 0, 1, 0, 0])
    asked = Probes(floats(7, D), STEPS["each"], KINDS["shared seed"], "central", counts)
    assert [asked.locate(row) for row in range(6)] == [(2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1)]
    for start, stop in [(0, 7), (6, 7), (9, 10)]:
        with pytest.raises(IndexError, match=r"no row \d+: these probes have 6"):
            asked.expand(start, stop)


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_points_that_are_all_stepped_along_all_are_those_of_a_uniform_batch(difference: Difference) -> None:
    uniform = Probes(BASE, STEPS["own"], KINDS["own seeds"], difference)
    ragged = Probes(BASE, STEPS["own"], KINDS["own seeds"], difference, np.full(N, Q))
    np.testing.assert_array_equal(ragged.starts, uniform.starts)
    np.testing.assert_array_equal(ragged.row_counts, uniform.row_counts)
    assert [ragged.locate(row) for row in range(len(ragged))] == [uniform.locate(row) for row in range(len(uniform))]
    np.testing.assert_array_equal(ragged.expand(0, len(ragged)), uniform.expand(0, len(uniform)))
    assert list(uniform.inputs()) == list(ragged.inputs())[:-1] == ["base", "steps", "seed"]


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.data(), st.sampled_from(["forward", "central"]), st.sampled_from(sorted(KINDS)))
def test_any_range_of_any_ragged_batch_is_that_of_its_rows(data: st.DataObject, difference: Any, kind: str) -> None:
    counts = np.array(data.draw(st.lists(st.integers(0, Q), min_size=N, max_size=N)))
    asked = Probes(BASE, STEPS["own"], KINDS[kind], difference, counts)
    expected = row_by_row(asked)
    assert len(asked) == len(expected)
    start = data.draw(st.integers(0, len(asked)))
    stop = data.draw(st.integers(start, len(asked)))
    np.testing.assert_array_equal(asked.expand(start, stop), expected[start:stop])


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("along", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("binary", [True, False])
def test_a_ragged_batch_that_is_written_is_read(along: Along, difference: Difference, binary: bool) -> None:
    asked = Probes(BASE, np.broadcast_to(np.float32(0.1), (Q,)), along, difference, COUNTS)
    encoded = codec.encode_request(asked.inputs(), parameters={"difference": difference}, binary=binary)
    request = codec.decode_request(encoded.body(), encoded.json_length)
    read = probes.read(request.inputs, request.datatypes, request.parameters, D)
    assert read.counts is not None
    np.testing.assert_array_equal(read.counts, COUNTS)
    np.testing.assert_array_equal(read.expand(0, len(read)), row_by_row(asked))


def test_golden_bytes_are_these_rows() -> None:
    """The request of `golden/cases.json`, and one of the same bytes made of probes."""
    body = (Path(__file__).parent / "golden" / "ragged_request.bin").read_bytes()
    base = np.array([[0.25, 0.5], [0.75, 0.0], [1.0, 0.125]], np.float32)
    steps = np.broadcast_to(np.float32(0.5), (2,))
    asked = Probes(base, steps, Coordinates(np.array([[1, 0], [0, 0], [0, 1]])), "forward", np.array([1, 0, 2]))
    encoded = codec.encode_request(asked.inputs(), outputs=("logits",))
    assert encoded.body() == body
    request = codec.decode_request(body, encoded.json_length)
    rows = probes.read(request.inputs, request.datatypes, request.parameters, 2).expand(0, 6)
    assert rows.tolist() == [[0.25, 0.5], [0.25, 1.0], [0.75, 0.0], [1.0, 0.125], [1.5, 0.125], [1.0, 0.625]]


def test_points_without_directions_are_asked_about_forward_only() -> None:
    none = np.zeros(N, np.int64)
    inputs = Probes(BASE, STEPS["each"], KINDS["shared seed"], "forward", none).inputs()
    datatypes = {name: codec.datatype_of(value) for name, value in inputs.items()}
    read = probes.read(inputs, datatypes, {}, D)
    np.testing.assert_array_equal(read.expand(0, len(read)), BASE)
    with pytest.raises(UnacceptableValues, match=r"all 0.*nothing was charged"):
        probes.read(inputs, datatypes, {"difference": "central"}, D)


@pytest.mark.parametrize(("point", "count"), [(0, -1), (1, Q + 1), (2, 2**63 - 1), (2, -(2**63))])
def test_a_count_of_directions_that_there_are_not_is_unacceptable(point: int, count: int) -> None:
    counts = COUNTS.copy()
    counts[point] = count
    wrong = refusal({"counts": counts})
    assert isinstance(wrong, UnacceptableValues)
    assert wrong.extensions == {"index": [point]}
    assert wrong.detail.startswith(f"counts[{point}] = {count}: a point is stepped along 0 to {Q} directions")


def test_what_is_not_stepped_along_is_checked_all_the_same() -> None:
    axes, own, steps = np.zeros((N, Q), np.int64), floats(N, Q, D), floats(N, Q)
    axes[1, 4], own[1, 4, 0], steps[1, 4] = D, np.nan, np.inf
    assert "names axis 12" in refusal({"directions": None, "coordinates": axes, "counts": COUNTS}).detail
    assert refusal({"directions": own, "counts": COUNTS}).extensions == {"index": [1, 4, 0]}
    assert refusal({"steps": steps, "counts": COUNTS}).extensions == {"index": [1, 4]}


def test_base_points_of_any_shape_and_one_step_for_all() -> None:
    inputs = {"base": BASE.reshape(N, 3, 2, 2), "steps": np.array([0.5], np.float32), "coordinates": np.arange(D)}
    read = probes.read(inputs, {"base": "FP32", "steps": "FP32", "coordinates": "INT64"}, {}, D)
    assert (read.n, read.q, read.p, read.difference) == (N, D, D + 1, "forward")
    np.testing.assert_array_equal(read.expand(1, D + 1), BASE[0] + 0.5 * np.eye(D, dtype=np.float32))


def refusal(changed: dict[str, Any], parameters: dict[str, Any] | None = None) -> OracleError:
    inputs: dict[str, Any] = {"base": BASE, "steps": STEPS["shared"], "directions": floats(Q, D), **changed}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    datatypes = {name: codec.datatype_of(value) for name, value in inputs.items()}
    with pytest.raises(OracleError) as refused:
        probes.read(inputs, datatypes, parameters or {}, D)
    return refused.value


MALFORMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no steps": ({"steps": None}, {}),
    "no directions": ({"directions": None}, {}),
    "two kinds": ({"seed": np.array([1], np.uint64)}, {}),
    "an unknown input": ({"images": BASE}, {}),
    "base of float64": ({"base": BASE.astype(np.float64)}, {}),
    "base of another size": ({"base": floats(N, D + 1)}, {}),
    "one base point, not a batch": ({"base": BASE[0]}, {}),
    "no base point": ({"base": BASE[:0]}, {}),
    "a scalar base": ({"base": np.float32(1)}, {}),
    "steps too many": ({"steps": floats(Q + 1)}, {}),
    "steps of other points": ({"steps": floats(N + 1, Q)}, {}),
    "steps of three axes": ({"steps": floats(1, N, Q)}, {}),
    "no step": ({"steps": floats(0), "directions": floats(0, D)}, {}),
    "a scalar step": ({"steps": np.array(1, np.float32)}, {}),
    "steps of float64": ({"steps": np.full(Q, 0.1)}, {}),
    "directions of another size": ({"directions": floats(Q, D - 1)}, {}),
    "directions of other points": ({"directions": floats(N + 1, Q, D)}, {}),
    "a flat direction": ({"directions": floats(D)}, {}),
    "fractional coordinates": ({"directions": None, "coordinates": floats(Q)}, {}),
    "a scalar coordinate": ({"directions": None, "coordinates": np.array(1), "steps": floats(1)}, {}),
    "coordinates of other points": ({"directions": None, "coordinates": np.zeros((N + 1, Q), int)}, {}),
    "two seeds for three": ({"directions": None, "seed": np.array([1, 2], np.uint64)}, {}),
    "a fractional seed": ({"directions": None, "seed": floats(1)}, {}),
    "counts of other points": ({"counts": np.zeros(N + 1, np.int64)}, {}),
    "counts of directions": ({"counts": np.zeros((N, Q), np.int64)}, {}),
    "a count for all": ({"counts": np.zeros(1, np.int64)}, {}),
    "a scalar count": ({"counts": np.array(1)}, {}),
    "fractional counts": ({"counts": np.zeros(N, np.float32)}, {}),
    "counts in bytes": ({"counts": np.zeros(N, np.uint8)}, {}),
    "counts without directions": ({"directions": None, "counts": np.zeros(N, np.int64)}, {}),
    "a difference that is none": ({}, {"difference": "backward"}),
    "a difference of another type": ({}, {"difference": ["forward"]}),
}


@pytest.mark.parametrize(("changed", "parameters"), MALFORMED.values(), ids=MALFORMED)
def test_what_does_not_fit_is_malformed(changed: dict[str, Any], parameters: dict[str, Any]) -> None:
    assert isinstance(refusal(changed, parameters), MalformedRequest)


def test_what_is_not_finite_or_no_axis_is_unacceptable() -> None:
    bad = BASE.copy()
    bad[1, 7] = np.nan
    assert refusal({"base": bad}).extensions == {"index": [1, 7]}
    assert isinstance(refusal({"steps": np.full(Q, np.inf, np.float32)}), UnacceptableValues)
    directions = floats(Q, D)
    directions[4, 0] = -np.inf
    assert refusal({"directions": directions}).extensions == {"index": [4, 0]}
    for axis in (-1, D, 2**62):
        wrong = refusal({"directions": None, "coordinates": np.array([0, 1, 2, 3, axis])})
        assert isinstance(wrong, UnacceptableValues)
        assert str(axis) in wrong.detail
    huge = np.array([0, 1, 2, 3, 2**63 + 1], np.uint64)
    assert isinstance(refusal({"directions": None, "coordinates": huge}), UnacceptableValues)
    assert isinstance(refusal({"directions": None, "seed": np.array([-1])}), UnacceptableValues)


@pytest.mark.parametrize("asked", [[0, 0], [2, 1], [-1, 2], [0, 11], [0], [0, 1, 2], "01", [0, True], [0.0, 1.0], 3])
def test_a_range_that_is_none_is_malformed(asked: Any) -> None:
    with pytest.raises(MalformedRequest, match="start"):
        probes.read_range({"rows": asked}, 10)


def test_a_range_is_read() -> None:
    assert probes.read_range({}, 10) is None
    assert probes.read_range({"rows": [3, 10]}, 10) == (3, 10)
