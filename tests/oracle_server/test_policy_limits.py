"""Token buckets against a simulation that does nothing clever, and what the header fields say of them."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle_server.policy.fields import rate_limit_fields
from oracle_server.policy.limits import Quota, RateLimits, TokenBucket, largest_batch, quotas
from oracle_server.policy.spec import LimitSpec

SECOND = 10**9
TICK = SECOND // 4


class Clock:
    def __init__(self) -> None:
        self.now = 12345

    def __call__(self) -> int:
        return self.now


class Simulated:
    """A bucket that is stepped from tick to tick in exact fractions, never looking ahead."""

    def __init__(self, per_minute: int, burst: int) -> None:
        self.tokens, self.burst, self.rate = Fraction(burst), burst, Fraction(per_minute, 240)

    def pass_ticks(self, ticks: int) -> None:
        for _ in range(ticks):
            self.tokens = min(Fraction(self.burst), self.tokens + self.rate)

    def ticks_until(self, wanted: int) -> int:
        later = Simulated(1, self.burst)
        later.tokens, later.rate, ticks = self.tokens, self.rate, 0
        while later.tokens < wanted:
            later.pass_ticks(1)
            ticks += 1
        return ticks


rates, bursts = st.integers(1, 2000), st.integers(1, 40)
steps = st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["take", "give back"]), st.integers(1, 45)), max_size=30)


@given(rates, bursts, steps)
def test_a_bucket_is_the_simulated_one(rate: int, burst: int, walk: list[tuple[int, str, int]]) -> None:
    now = 777
    bucket, simulated = TokenBucket(Quota("rows", rate, burst, True), now), Simulated(rate, burst)
    for ticks, what, amount in walk:
        now += ticks * TICK
        simulated.pass_ticks(ticks)
        amount = min(amount, burst)
        assert bucket.tokens(now) == int(simulated.tokens)
        if what == "give back":
            bucket.give_back(amount, now)
            simulated.tokens = min(Fraction(burst), simulated.tokens + amount)
        elif simulated.tokens >= amount:
            assert bucket.wait(amount, now) == 0
            bucket.take(amount, now)
            simulated.tokens -= amount
        elif rate >= 240:  # else the simulation of the wait is long
            assert -(-bucket.wait(amount, now) // TICK) == simulated.ticks_until(amount)


@given(rates, bursts, st.integers(1, 40), st.integers(0, 10**11))
def test_after_the_wait_it_passes_and_not_a_nanosecond_sooner(rate: int, burst: int, amount: int, later: int) -> None:
    amount = min(amount, burst)
    bucket = TokenBucket(Quota("rows", rate, burst, True), 0)
    bucket.take(burst, 0)
    per_ns = Fraction(rate, 60 * SECOND)
    wait = bucket.wait(amount, later)
    assert wait == math.ceil(max(0, amount / per_ns - later))
    if wait:
        until_next = bucket.next(later)
        assert until_next is not None
        assert until_next <= wait
        assert bucket.tokens(later + wait - 1) == amount - 1
    assert bucket.tokens(later + wait) >= amount


@given(rates, bursts, st.lists(st.tuples(st.integers(0, 20 * SECOND), st.integers(1, 40)), min_size=1, max_size=60))
def test_no_stretch_of_time_sees_more_than_burst_and_rate(rate: int, burst: int, tries: list[tuple[int, int]]) -> None:
    clock = Clock()
    limits = RateLimits((Quota("rows", rate, burst, True),), clock)
    taken: list[tuple[int, int]] = []
    for pause, rows in tries:
        clock.now += pause
        if not limits.take(1, min(rows, burst)):
            taken.append((clock.now, min(rows, burst)))
    for i, (start, _) in enumerate(taken):
        for j in range(i, len(taken)):
            rows = sum(rows for _, rows in taken[i : j + 1])
            assert rows <= burst + Fraction(rate * (taken[j][0] - start), 60 * SECOND)


def test_a_refusal_takes_nothing_of_any_quota() -> None:
    clock = Clock()
    limits = RateLimits(quotas(LimitSpec(requests_per_minute=3, rows_per_minute=60, row_burst=10)), clock)
    assert limits.take(1, 9) == {}
    before = limits.standings(1)
    assert limits.take(1, 2) == {"rows": SECOND}
    assert limits.standings(1) == before
    assert limits.take(1, 1) == {}
    assert limits.take(1, 1) == {"rows": SECOND}
    clock.now += SECOND
    assert limits.take(1, 1) == {}
    assert limits.take(1, 3) == {"requests": 19 * SECOND, "rows": 3 * SECOND}


def test_what_is_given_back_is_there_again_but_never_more_than_fits() -> None:
    clock = Clock()
    limits = RateLimits(quotas(LimitSpec(rows_per_minute=60, row_burst=10)), clock)
    limits.take(1, 10)
    limits.give_back(1, 10)
    assert limits.take(1, 10) == {}
    clock.now += 5 * SECOND
    limits.give_back(1, 10)
    (standing,) = limits.standings(1)
    assert (standing.tokens, standing.next_ns) == (10, None)


def test_clients_have_nothing_of_each_other() -> None:
    limits = RateLimits(quotas(LimitSpec(requests_per_minute=1)), Clock())
    assert limits.take(1, 1) == {}
    assert limits.take(1, 1)
    assert limits.take(2, 1) == {}


@pytest.mark.parametrize(
    ("spec", "largest"),
    [
        (LimitSpec(), 4096),
        (LimitSpec(batch_rows=100), 100),
        (LimitSpec(batch_rows=5000), 4096),
        (LimitSpec(rows_per_minute=50), 50),
        (LimitSpec(batch_rows=100, rows_per_minute=50, row_burst=200), 100),
        (LimitSpec(batch_rows=100, rows_per_minute=5000, row_burst=20), 20),
        (LimitSpec(requests_per_minute=5), 4096),
    ],
    ids=str,
)
def test_the_largest_batch_is_the_smallest_limit(spec: LimitSpec, largest: int) -> None:
    assert largest_batch(spec, 4096) == largest


# A list of strings with whole numbers as parameters: RFC 9651, sections 3.1, 3.1.2 and 3.3.
MEMBER = r'"[a-z]+"(?:;[a-z][a-z-]*=[0-9]+)+'


def test_the_fields_say_what_is_left_and_when_there_is_more() -> None:
    clock = Clock()
    limits = RateLimits(quotas(LimitSpec(requests_per_minute=60, rows_per_minute=100, row_burst=250)), clock)
    assert rate_limit_fields(limits.standings(1)) == {
        "RateLimit-Policy": '"requests";q=60;w=60, "rows";q=100;w=60;oracle-burst=250',
        "RateLimit": '"requests";r=60, "rows";r=250',
    }
    limits.take(1, 250)
    clock.now += SECOND // 2
    fields = rate_limit_fields(limits.standings(1))
    assert fields["RateLimit"] == '"requests";r=59;t=1, "rows";r=0;t=1'
    for value in fields.values():
        assert re.fullmatch(f"{MEMBER}, {MEMBER}", value)
    slow = RateLimits(quotas(LimitSpec(requests_per_minute=2)), clock)
    slow.take(1, 1)
    clock.now += SECOND
    assert rate_limit_fields(slow.standings(1))["RateLimit"] == '"requests";r=1;t=29'
    assert rate_limit_fields(RateLimits((), clock).standings(1)) == {}
