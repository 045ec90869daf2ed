"""Factored query batches: points that lie a step from a base point along directions, sent as what they are made of.

    forward:  x_i,  x_i + s_1 u_1, ..., x_i + s_q u_q                           p = q + 1 rows for each base point x_i
    central:  x_i + s_1 u_1, ..., x_i + s_q u_q,  x_i - s_1 u_1, ..., x_i - s_q u_q      p = 2 q

A request of n base points stands for the n p rows x_1's, x_2's ..., and costs what they cost. Each row is
`base + (step * direction)`, every operation rounded to float32 once, so that whoever expands gets the same bits as
whoever would have sent the rows.

On the wire they are plain inputs (datatype, shape):

    base         FP32   [n, ...]                 the points; the trailing axes have d values together
    steps        FP32   [1], [q] or [n, q]       one step for all directions, each its own, or for each point too
    directions   FP32   [q, d] or [n, q, d]      shared by all points, or each its own
    coordinates  INT64  [q] or [n, q]            instead of directions: the unit vectors of these axes, counted from 0
    seed         UINT64 [1] or [n]               instead of both: drawn as `directions.unit_directions` says
    counts       INT64  [n]                      optional: how many of the q directions point i is stepped along

and request parameters: `difference` ("forward", the default, or "central") and `rows` ([start, stop], the default all):
which of the n p rows are asked for, where a client cuts what is too large for one request.

A batch with `counts` is ragged: point i is stepped along the first c_i = counts[i] of its q directions, 0 <= c_i <= q,
and has 1 + c_i rows (forward) or 2 c_i (central) in the place of p. Its other directions and steps are padding, which
is checked as all are: finite, and axes that there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from shared.wire.directions import MAX_DIMENSION, unit_directions
from shared.wire.errors import MalformedRequest, UnacceptableValues

Float32 = NDArray[np.float32]
Difference = Literal["forward", "central"]

BASE: Final = "base"
STEPS: Final = "steps"
DIRECTIONS: Final = "directions"
COORDINATES: Final = "coordinates"
SEED: Final = "seed"
COUNTS: Final = "counts"
KINDS: Final = (DIRECTIONS, COORDINATES, SEED)
DIFFERENCE_PARAMETER: Final = "difference"
ROWS_PARAMETER: Final = "rows"

_INDEX_DTYPES = ("INT64", "INT32", "UINT64", "UINT32", "UINT16", "UINT8", "INT16", "INT8")


class Along(Protocol):
    """Which ways the probes of each point go."""

    @property
    def q(self) -> int:
        """Directions per point; 0 where any number can be had, and the steps say how many."""

    def check(self, n: int, q: int, d: int) -> None:
        """Refuse what does not fit n points of d values and q steps each; MalformedRequest or UnacceptableValues."""

    def move(self, points: Float32, point: int, start: int, stop: int, steps: Float32) -> None:
        """Add `steps` [m] along directions `start` to `stop` of point number `point` to `points` [m, d], in place."""

    def of(self, start: int, stop: int) -> Along:
        """The same for points `start` to `stop`."""

    def inputs(self) -> dict[str, NDArray[Any]]:
        """Its tensor, by its name on the wire."""


@dataclass(frozen=True)
class Directions:
    """Directions that are given: float32 [q, d] for all points, or [n, q, d]."""

    values: Float32

    @property
    def q(self) -> int:
        return int(self.values.shape[-2])

    def check(self, n: int, q: int, d: int) -> None:
        shape = self.values.shape
        if len(shape) not in (2, 3) or shape[-1] != d or (len(shape) == 3 and shape[0] != n):
            raise MalformedRequest(f"'{DIRECTIONS}' is {list(shape)}: send [q, {d}] or [{n}, q, {d}]")
        check_finite(DIRECTIONS, self.values)

    def move(self, points: Float32, point: int, start: int, stop: int, steps: Float32) -> None:
        values = self.values if self.values.ndim == 2 else self.values[point]
        points += steps[:, None] * values[start:stop]

    def of(self, start: int, stop: int) -> Directions:
        return self if self.values.ndim == 2 else Directions(self.values[start:stop])

    def inputs(self) -> dict[str, NDArray[Any]]:
        return {DIRECTIONS: self.values}


@dataclass(frozen=True)
class Coordinates:
    """Unit vectors of axes: int64 [q] for all points, or [n, q]."""

    values: NDArray[np.int64]

    @property
    def q(self) -> int:
        return int(self.values.shape[-1])

    def check(self, n: int, q: int, d: int) -> None:
        shape = self.values.shape
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != n):
            raise MalformedRequest(f"'{COORDINATES}' is {list(shape)}: send [q] or [{n}, q]")
        outside = (self.values < 0) | (self.values >= d)
        if outside.any():
            bad = int(self.values[outside].flat[0])
            raise UnacceptableValues(
                f"'{COORDINATES}' names axis {bad}: the points have axes 0 to {d - 1}; nothing was charged"
            )

    def move(self, points: Float32, point: int, start: int, stop: int, steps: Float32) -> None:
        values = self.values if self.values.ndim == 1 else self.values[point]
        points[np.arange(stop - start), values[start:stop]] += steps

    def of(self, start: int, stop: int) -> Coordinates:
        return self if self.values.ndim == 1 else Coordinates(self.values[start:stop])

    def inputs(self) -> dict[str, NDArray[Any]]:
        return {COORDINATES: self.values}


@dataclass(frozen=True)
class Seeds:
    """Random unit vectors (`directions.unit_directions`): uint64 [1] for all points, or [n]."""

    values: NDArray[np.uint64]

    @property
    def q(self) -> int:
        return 0

    def check(self, n: int, q: int, d: int) -> None:
        if self.values.shape not in ((1,), (n,)):
            raise MalformedRequest(f"'{SEED}' is {list(self.values.shape)}: send [1] or [{n}]")
        if d > MAX_DIMENSION:
            raise MalformedRequest(f"'{SEED}' draws directions of up to {MAX_DIMENSION} values, not {d}: send them")

    def move(self, points: Float32, point: int, start: int, stop: int, steps: Float32) -> None:
        seed = int(self.values[0 if len(self.values) == 1 else point])
        drawn = unit_directions(seed, start, stop, points.shape[1])
        drawn *= steps[:, None]
        points += drawn

    def of(self, start: int, stop: int) -> Seeds:
        return self if len(self.values) == 1 else Seeds(self.values[start:stop])

    def inputs(self) -> dict[str, NDArray[Any]]:
        return {SEED: self.values}


@dataclass(frozen=True)
class Probes:
    """A factored batch.

    Attributes:
        base: points float32 [n, d].
        steps: float32 [q], or [n, q].
        along: the directions.
        difference: "forward" or "central".
        counts: int64 [n], from 0 to q, of a ragged batch: along how many directions each point is stepped, its first
            ones. None: along all.
    """

    base: Float32
    steps: Float32
    along: Along
    difference: Difference
    counts: NDArray[np.int64] | None = None

    @property
    def n(self) -> int:
        """Base points."""
        return int(self.base.shape[0])

    @property
    def d(self) -> int:
        """Values of a point."""
        return int(self.base.shape[1])

    @property
    def q(self) -> int:
        """Directions per point."""
        return int(self.steps.shape[-1])

    @property
    def p(self) -> int:
        """Rows per point; of a ragged batch, those of a point that is stepped along all its directions."""
        return self.q + 1 if self.difference == "forward" else 2 * self.q

    @property
    def row_counts(self) -> NDArray[np.int64]:
        """Rows of each point, int64 [n]."""
        if self.counts is None:
            return np.full(self.n, self.p, np.int64)
        return self.counts + 1 if self.difference == "forward" else 2 * self.counts

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The first row of each point, int64 [n]: where it would be, if the point has none."""
        ends = np.cumsum(self.row_counts)
        return np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends

    def __len__(self) -> int:
        return self.n * self.p if self.counts is None else int(self.row_counts.sum())

    def rows_of(self, point: int) -> int:
        """Rows of a point."""
        count = self._count(point)
        return count + 1 if self.difference == "forward" else 2 * count

    def _count(self, point: int) -> int:
        return self.q if self.counts is None else int(self.counts[point])

    def locate(self, row: int) -> tuple[int, int]:
        """(point, which of the point's rows) of a row."""
        if self.counts is None:
            return divmod(row, self.p)
        # Of the points that start at this row, only the last has rows.
        point = int(np.searchsorted(self.starts, row, side="right")) - 1
        return point, row - int(self.starts[point])

    def expand(self, start: int, stop: int) -> Float32:
        """Rows `start` to `stop` of all, float32 [stop - start, d]; the same bits whatever the range."""
        rows = np.empty((stop - start, self.d), np.float32)
        offset = 0
        for point, first, last in self._by_point(start, stop):
            part = rows[offset : offset + last - first]
            part[:] = self.base[point]
            self._move(part, point, first, last)
            offset += last - first
        return rows

    def _by_point(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(point, first, last): which of each point's rows lie in a range of all rows, of points that have any."""
        while start < stop:
            point, first = self.locate(start)
            last = min(self.rows_of(point), first + stop - start)
            if last <= first:
                raise IndexError(f"there is no row {start}: these probes have {len(self)}")
            yield point, first, last
            start += last - first

    def _move(self, part: Float32, point: int, first: int, last: int) -> None:
        steps = self.steps if self.steps.ndim == 1 else self.steps[point]
        count = self._count(point)
        # Rows of a point that step ahead, then, if central, those that step back; the point itself has no direction.
        offset = 1 if self.difference == "forward" else 0
        for begin, sign in ((offset, 1), (offset + count, -1)):
            low, high = max(first, begin), min(last, begin + count)
            if low < high:
                a, b = low - begin, high - begin
                # x + (-s) u is x - s u to the bit: rounding is symmetric.
                with np.errstate(over="ignore"):  # what overflows is found by whoever checks the rows
                    self.along.move(part[low - first : high - first], point, a, b, np.float32(sign) * steps[a:b])

    def of(self, start: int, stop: int) -> Probes:
        """The probes of base points `start` to `stop`."""
        steps = self.steps if self.steps.ndim == 1 else self.steps[start:stop]
        counts = None if self.counts is None else self.counts[start:stop]
        return Probes(self.base[start:stop], steps, self.along.of(start, stop), self.difference, counts)

    def inputs(self) -> dict[str, NDArray[Any]]:
        """Its tensors, by their names on the wire."""
        # One step for all, repeated, is one step on the wire, where something else says how many directions there are.
        same = self.steps.strides == (0,) and self.along.q > 1
        ragged = {} if self.counts is None else {COUNTS: self.counts}
        return {BASE: self.base, STEPS: self.steps[:1] if same else self.steps, **self.along.inputs(), **ragged}


def read(
    inputs: Mapping[str, NDArray[Any]], datatypes: Mapping[str, str], parameters: Mapping[str, Any], d: int
) -> Probes:
    """Probes of points of d values, from a request's inputs and parameters; all there is to check short of the rows.

    Raises:
        MalformedRequest: an input is missing, unknown, or of another datatype or shape.
        UnacceptableValues: a value is not finite, an axis or a count of directions does not exist, or there is no row.
    """
    kinds = [name for name in KINDS if name in inputs]
    unknown = sorted(set(inputs) - {BASE, STEPS, COUNTS, *KINDS})
    if unknown:
        raise MalformedRequest(f"beside '{BASE}', these inputs are not known: {', '.join(unknown)}")
    if len(kinds) != 1 or STEPS not in inputs:
        given = ", ".join(name for name in inputs if name != BASE) or "nothing"
        raise MalformedRequest(
            f"'{BASE}' comes with '{STEPS}' and one of {', '.join(KINDS)}; this one comes with {given}"
        )
    base = _float32(BASE, inputs, datatypes)
    if base.ndim < 2 or not len(base) or base[0].size != d:
        raise MalformedRequest(f"'{BASE}' is {list(base.shape)}: send [n, ...] with n >= 1 and {d} values a point")
    base = base.reshape(len(base), d)
    check_finite(BASE, base)
    along = _along(kinds[0], inputs, datatypes)
    steps = _steps(_float32(STEPS, inputs, datatypes), len(base), along)
    along.check(len(base), steps.shape[-1], d)
    difference = parameters.get(DIFFERENCE_PARAMETER, "forward")
    if difference not in get_args(Difference):
        raise MalformedRequest(f"parameter '{DIFFERENCE_PARAMETER}' is forward or central, not {difference!r}")
    asked = Probes(base, steps, along, difference, _counts(inputs, datatypes, len(base), steps.shape[-1]))
    if not len(asked):
        raise UnacceptableValues(
            f"'{COUNTS}' are all 0, and central differences have no row at the point itself: nothing is asked; nothing "
            "was charged"
        )
    return asked


def read_range(parameters: Mapping[str, Any], rows: int) -> tuple[int, int] | None:
    """The `rows` parameter of a request that stands for `rows` rows; None where all are asked for.

    Raises:
        MalformedRequest: it is not [start, stop] with 0 <= start < stop <= rows.
    """
    asked = parameters.get(ROWS_PARAMETER)
    if asked is None:
        return None
    whole = isinstance(asked, list) and len(asked) == 2 and all(type(bound) is int for bound in asked)
    if not whole or not 0 <= asked[0] < asked[1] <= rows:
        raise MalformedRequest(f"parameter '{ROWS_PARAMETER}' is [start, stop] with 0 <= start < stop <= {rows}")
    return asked[0], asked[1]


def _along(kind: str, inputs: Mapping[str, NDArray[Any]], datatypes: Mapping[str, str]) -> Along:
    if kind == DIRECTIONS:
        directions = _float32(DIRECTIONS, inputs, datatypes)
        if directions.ndim < 2:
            raise MalformedRequest(f"'{DIRECTIONS}' is {list(directions.shape)}: send [q, d] or [n, q, d]")
        return Directions(directions)
    if kind == COORDINATES:
        if datatypes[COORDINATES] not in _INDEX_DTYPES:
            raise MalformedRequest(f"'{COORDINATES}' is {datatypes[COORDINATES]}: send INT64")
        if not inputs[COORDINATES].ndim:
            raise MalformedRequest(f"'{COORDINATES}' is []: send [q] or [n, q]")
        # What is beyond int64 becomes negative, and is refused as that.
        return Coordinates(inputs[COORDINATES].astype(np.int64, copy=False))
    if datatypes[SEED] not in _INDEX_DTYPES:
        raise MalformedRequest(f"'{SEED}' is {datatypes[SEED]}: send UINT64")
    if (inputs[SEED] < 0).any():
        raise UnacceptableValues(f"'{SEED}' is negative: send whole numbers from 0 to 2**64 - 1; nothing was charged")
    return Seeds(inputs[SEED].astype(np.uint64, copy=False))


def _steps(steps: Float32, n: int, along: Along) -> Float32:
    check_finite(STEPS, steps)
    q = along.q
    if steps.shape == (1,) and q > 1:
        return np.broadcast_to(steps, (q,))
    if (
        not 1 <= steps.ndim <= 2
        or not steps.size
        or (steps.ndim == 2 and len(steps) != n)
        or q not in (0, steps.shape[-1])
    ):
        wanted = f"[1], [{q}] or [{n}, {q}]" if q else f"[q] or [{n}, q]"
        raise MalformedRequest(f"'{STEPS}' is {list(steps.shape)}: send {wanted}, with at least one direction")
    return steps


def _counts(
    inputs: Mapping[str, NDArray[Any]], datatypes: Mapping[str, str], n: int, q: int
) -> NDArray[np.int64] | None:
    counts = inputs.get(COUNTS)
    if counts is None:
        return None
    # No smaller integers: what is sent is then not much less than what it takes up here.
    if datatypes[COUNTS] != "INT64":
        raise MalformedRequest(f"'{COUNTS}' is {datatypes[COUNTS]}: send INT64")
    if counts.shape != (n,):
        raise MalformedRequest(f"'{COUNTS}' is {list(counts.shape)}: send [{n}], one for each base point")
    outside = (counts < 0) | (counts > q)
    if outside.any():
        point = int(outside.argmax())
        raise UnacceptableValues(
            f"{COUNTS}[{point}] = {counts[point]}: a point is stepped along 0 to {q} directions; nothing was charged",
            index=[point],
        )
    return counts


def _float32(name: str, inputs: Mapping[str, NDArray[Any]], datatypes: Mapping[str, str]) -> Float32:
    if datatypes[name] != "FP32":
        raise MalformedRequest(f"'{name}' is {datatypes[name]}: send datatype FP32")
    return inputs[name]


def check_finite(name: str, values: NDArray[Any]) -> None:
    """Raise `UnacceptableValues` unless all values are finite."""
    # A NaN anywhere makes both extremes NaN.
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        index = [int(i) for i in np.unravel_index(int((~np.isfinite(values)).argmax()), values.shape)]
        raise UnacceptableValues(
            f"{name}{index} = {values[tuple(index)]} is not finite; nothing was charged", index=index
        )
