"""Factored batches against rows made one by one, in float32 arithmetic spelled out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

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
        ahead = [x + steps[j] * one_direction(asked.along, i, j) for j in range(asked.q)]
        behind = [x - steps[j] * one_direction(asked.along, i, j) for j in range(asked.q)]
        rows += [x, *ahead] if asked.difference == "forward" else [*ahead, *behind]
    return np.array(rows, np.float32)


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
