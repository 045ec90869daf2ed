"""Token buckets: what a client may ask for is refilled at a steady rate, up to a size.

    tokens(t) = min(burst, tokens(t0) + rate * (t - t0))

All in whole numbers, so that nothing is lost or gained by rounding however often it is looked at: times in nanoseconds,
and a token cut into as many parts as a minute has nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oracle_server.policy.spec import LimitSpec

_MINUTE_NS = 60 * 10**9


@dataclass(frozen=True)
class Quota:
    """How much of what a client may have: `per_minute`, and `burst` at once after a pause."""

    name: str
    per_minute: int
    burst: int
    counts_rows: bool

    def amount(self, rows: int) -> int:
        """What a request of `rows` rows takes."""
        return rows if self.counts_rows else 1


@dataclass(frozen=True)
class Standing:
    """What is left of a quota: whole tokens, and nanoseconds until there is one more; None where it is full."""

    quota: Quota
    tokens: int
    next_ns: int | None


def quotas(spec: LimitSpec) -> tuple[Quota, ...]:
    """The quotas that a file asks for."""
    found = []
    if spec.requests_per_minute is not None:
        rate = spec.requests_per_minute
        found.append(Quota("requests", rate, spec.request_burst or rate, counts_rows=False))
    if spec.rows_per_minute is not None:
        rate = spec.rows_per_minute
        found.append(Quota("rows", rate, spec.row_burst or rate, counts_rows=True))
    return tuple(found)


def largest_batch(spec: LimitSpec, otherwise: int) -> int:
    """Most rows that can ever be taken at once: the cap, the size of the rows' bucket, or what the server takes."""
    sizes = [quota.burst for quota in quotas(spec) if quota.counts_rows]
    return min(otherwise, spec.batch_rows or otherwise, *sizes)


class TokenBucket:
    """The tokens of one quota, full at first.

    Args:
        quota: its rate and its size.
        now: nanoseconds of a clock that never goes back; each method is given the time of the same clock.
    """

    def __init__(self, quota: Quota, now: int) -> None:
        self._rate, self._size = quota.per_minute, quota.burst * _MINUTE_NS
        self._parts, self._at = self._size, now

    def tokens(self, now: int) -> int:
        """Whole tokens there are."""
        return self._refill(now) // _MINUTE_NS

    def wait(self, tokens: int, now: int) -> int:
        """Nanoseconds until there are so many, of at most the bucket's size; 0 if there are."""
        return max(0, -((self._refill(now) - tokens * _MINUTE_NS) // self._rate))

    def next(self, now: int) -> int | None:
        """Nanoseconds until there is one whole token more; None where the bucket is full."""
        parts = self._refill(now)
        return None if parts == self._size else self.wait(parts // _MINUTE_NS + 1, now)

    def take(self, tokens: int, now: int) -> None:
        """Take tokens that are there."""
        self._parts = self._refill(now) - tokens * _MINUTE_NS

    def give_back(self, tokens: int, now: int) -> None:
        """Put back what was taken for nothing; what no longer fits is lost, as if it had never been taken."""
        self._parts = self._refill(now) + tokens * _MINUTE_NS  # whoever looks next caps it

    def _refill(self, now: int) -> int:
        self._parts = min(self._size, self._parts + self._rate * (now - self._at))
        self._at = now
        return self._parts


class RateLimits:
    """Every client's buckets. There are as many as clients that ever asked: each has a key, so nobody can add to them.

    Args:
        quotas: those of each client.
        now: a clock that never goes back, in nanoseconds.
    """

    def __init__(self, quotas: tuple[Quota, ...], now: Callable[[], int]) -> None:
        self._quotas, self._now = quotas, now
        self._clients: dict[int, tuple[TokenBucket, ...]] = {}

    def take(self, client_id: int, rows: int) -> dict[str, int]:
        """Take what a request of `rows` rows needs, of each quota; or of none, where one is short.

        Returns:
            Nanoseconds until there is enough, by the name of each quota that is short: empty if all was taken.
        """
        now = self._now()
        needs = [(quota, bucket, quota.amount(rows)) for quota, bucket in self._buckets(client_id, now)]
        short = {quota.name: wait for quota, bucket, amount in needs if (wait := bucket.wait(amount, now))}
        if not short:
            for _, bucket, amount in needs:
                bucket.take(amount, now)
        return short

    def give_back(self, client_id: int, rows: int) -> None:
        """Put back what `take` took for a request that was not answered."""
        now = self._now()
        for quota, bucket in self._buckets(client_id, now):
            bucket.give_back(quota.amount(rows), now)

    def standings(self, client_id: int) -> tuple[Standing, ...]:
        """What is left to a client of each quota."""
        now = self._now()
        return tuple(
            Standing(quota, bucket.tokens(now), bucket.next(now)) for quota, bucket in self._buckets(client_id, now)
        )

    def _buckets(self, client_id: int, now: int) -> list[tuple[Quota, TokenBucket]]:
        if client_id not in self._clients:
            self._clients[client_id] = tuple(TokenBucket(quota, now) for quota in self._quotas)
        return list(zip(self._quotas, self._clients[client_id], strict=True))
