"""A policy at work: what a request meets on its way, from the door to its answer.

Nothing that is refused here is charged, and only an answer takes of a rate limit: whatever else becomes of a request,
what was taken for it is put back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from oracle_server.policy import downtime
from oracle_server.policy.answers import Answers
from oracle_server.policy.failures import Failures
from oracle_server.policy.fields import rate_limit_fields
from oracle_server.policy.latency import Latency
from oracle_server.policy.limits import RateLimits, largest_batch, quotas
from oracle_server.policy.randomness import Randomness
from oracle_server.policy.spec import PolicySpec
from oracle_server.rows import Float32, Rows
from shared.wire import protocol
from shared.wire.errors import InternalError, OracleError, RateLimited, TooLarge, Unavailable

_RETRY_AFTER_S = 1.0
_SECOND_NS = 10**9


class Policy:
    """The parts of a policy. All but `check_rows` and `announced` are for the event loop only.

    Args:
        spec: the file; the default does nothing.
        max_batch_rows: what the server takes at once without a policy.
        clock: nanoseconds, never going back.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        spec: PolicySpec,
        *,
        max_batch_rows: int,
        clock: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        randomness = Randomness.of(spec.seed)
        self._spec, self._clock, self._sleep, self._start = spec, clock, sleep, clock()
        self._max_rows = largest_batch(spec.limits, max_batch_rows)
        self._answers = Answers(spec.answers, randomness)
        self._latency = Latency(spec.latency, randomness.generator(b"latency"))
        self._failures = Failures(spec.failures, randomness.generator(b"failures"))
        self._limits = RateLimits(quotas(spec.limits), clock)

    def announced(self) -> dict[str, Any]:
        """What the model's metadata says of this: what a real service documents."""
        told: dict[str, Any] = {}
        if self._spec.limits.announce_batch_rows:
            told[protocol.MAX_BATCH_ROWS_PARAMETER] = self._max_rows
        if self._spec.answers.scores != "logits":
            told[protocol.SCORES_PARAMETER] = self._spec.answers.scores
        return told

    @property
    def down_for(self) -> float:
        """Seconds until the downtime ends; 0 where there is none."""
        return downtime.remaining(self._spec.downtime, (self._clock() - self._start) / _SECOND_NS)

    def check_ready(self) -> None:
        """Raise `Unavailable`, with the time until it ends, during a downtime."""
        left = self.down_for
        if left > 0:
            raise Unavailable("the service is down: try again later", retry_after=left)

    def check_rows(self, rows: int) -> None:
        """Raise `TooLarge` for a batch that is never taken, however long one waits."""
        if rows <= self._max_rows:
            return
        if not self._spec.limits.tell_limit:
            raise TooLarge(f"the batch has {rows} rows, more than are taken at once: send fewer")
        raise TooLarge(
            f"the batch has {rows} rows and at most {self._max_rows} are taken at once", max_rows=self._max_rows
        )

    @contextmanager
    def visit(self, client_id: int) -> Iterator[Visit]:
        """The time from a request's arrival to its answer; every refusal meanwhile carries the RateLimit fields.

        Raises:
            Unavailable: a downtime, or a failure by chance.
        """
        visit = Visit(client_id, self._limits, self._latency, self._sleep)
        try:
            self.check_ready()
            if self._failures.unavailable():
                raise Unavailable("the service is temporarily unavailable: try again", retry_after=_RETRY_AFTER_S)
            yield visit
        except BaseException as error:
            visit.give_back()
            if isinstance(error, OracleError):
                error.headers.update(visit.headers)
            raise

    def fail_by_chance(self) -> None:
        """Raise `InternalError`, as often as the file says, for an answer that was computed."""
        if self._failures.internal():
            raise InternalError("the model failed on this batch; nothing was charged")

    async def transform(self, logits: Float32, rows: Rows, seq: int) -> Float32:
        """What is answered: see `Answers.transform`. Done in a thread where there is something to do."""
        if not self._answers.changes:
            return logits
        return await asyncio.to_thread(self._answers.transform, logits, rows, seq)


class Visit:
    """One request of a client."""

    def __init__(
        self, client_id: int, limits: RateLimits, latency: Latency, sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self._client_id, self._limits, self._latency, self._sleep = client_id, limits, latency, sleep
        self._taken: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The RateLimit fields as they stand now; empty where there are no limits."""
        return rate_limit_fields(self._limits.standings(self._client_id))

    async def admit(self, rows: int) -> None:
        """Take a request of `rows` rows in, and let it wait as long as the latency has it wait.

        The wait comes before anything is charged, and so before anything is held for the client.

        Raises:
            RateLimited: a quota is short; nothing was taken of any. The batch must have passed `check_rows`.
        """
        short = self._limits.take(self._client_id, rows)
        if short:
            names = " and ".join(short)
            raise RateLimited(
                f"the limit of {names} per minute is reached and nothing was charged: wait as long as Retry-After says",
                retry_after=max(short.values()) / _SECOND_NS,
                **{"violated-policies": list(short)},
            )
        self._taken = rows
        delay = self._latency.seconds(rows)
        if delay > 0:
            await self._sleep(delay)

    def give_back(self) -> None:
        """Put back what `admit` took; once."""
        if self._taken is not None:
            self._limits.give_back(self._client_id, self._taken)
            self._taken = None
