"""Sharing probes: in proportion, within bounds, to the last one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defender_client.zo.spending import allocate


def counts(weights: list[float], total: int, most: list[int]) -> list[int]:
    found: list[int] = allocate(torch.tensor(weights), total, torch.tensor(most)).tolist()
    return found


def test_in_proportion_to_the_weights_after_one_each() -> None:
    assert counts([3.0, 1.0], 10, [99, 99]) == [7, 3]  # one each, and 8 as 6 : 2
    assert counts([1.0, 1.0, 1.0], 6, [9, 9, 9]) == [2, 2, 2]
    assert counts([0.0, 0.0], 4, [9, 9]) == [2, 2]
    assert counts([5.0, 0.0], 4, [9, 9]) == [3, 1]


def test_what_one_has_no_room_for_goes_to_the_others() -> None:
    assert counts([100.0, 1.0, 1.0], 11, [3, 99, 99]) == [3, 4, 4]
    assert counts([100.0, 0.0], 10, [2, 99]) == [2, 8]
    assert counts([1.0, 1.0], 10, [2, 0]) == [2, 0]
    assert counts([1.0, 1.0, 1.0], 1, [5, 5, 5]) == [1, 1, 1]


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 40)), min_size=1, max_size=30),
    st.integers(0, 400),
)
def test_the_total_is_met_and_no_bound_is_broken(samples: list[tuple[float, int]], total: int) -> None:
    weights, most = [weight for weight, _ in samples], [bound for _, bound in samples]
    found = counts(weights, total, most)
    assert all(min(bound, 1) <= count <= bound for count, bound in zip(found, most, strict=True))
    assert sum(found) == max(min(total, sum(most)), sum(min(bound, 1) for bound in most))


def test_weights_that_say_nothing_are_refused() -> None:
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights"):
            counts([1.0, wrong], 3, [2, 2])
