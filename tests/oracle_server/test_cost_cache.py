from __future__ import annotations

from collections.abc import Callable

from oracle_server.cost_cache import CostCache


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def costing(self, seconds: float, value: str) -> Callable[[], str]:
        def compute() -> str:
            self.now += seconds
            return value

        return compute


def test_a_value_is_kept_until_its_computation_was_a_twentieth_of_the_time() -> None:
    clock = Clock()
    cache = CostCache[str](clock)
    assert cache.get("dear", clock.costing(2.0, "first")) == "first"
    clock.now += 39.9
    assert cache.get("dear", clock.costing(2.0, "second")) == "first"
    clock.now += 0.2
    assert cache.get("dear", clock.costing(2.0, "second")) == "second"


def test_a_cheap_value_is_kept_for_a_second_and_others_apart() -> None:
    clock = Clock()
    cache = CostCache[str](clock)
    assert cache.get("a", clock.costing(0.0, "a1")) == "a1"
    assert cache.get("b", clock.costing(0.0, "b1")) == "b1"
    clock.now += 0.9
    assert cache.get("a", clock.costing(0.0, "a2")) == "a1"
    clock.now += 0.2
    assert cache.get("a", clock.costing(0.0, "a2")) == "a2"
    assert len(cache._kept) == 1, "what is too old is forgotten"
