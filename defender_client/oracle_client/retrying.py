"""How long a request is kept at: a short while for failures, a long one for waits that the server asks for.

A server that says when to come back is alive and knows best: what it asks for counts against `patience_seconds`. A
connection that is lost, or a failure without such a word, counts against `retry_seconds`. Several threads may send at
once: each request has its own patience, and all heed what any answer says of the limits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import tenacity

from defender_client import progress
from defender_client.oracle import WaitGivenUp
from defender_client.oracle_client import pacing
from shared.wire import protocol
from shared.wire.errors import (
    InternalError,
    OracleError,
    RateLimited,
    RequestInFlight,
    RequestTimeout,
    Unavailable,
    UnexpectedAnswer,
    from_problem,
)

RETRY_STATUSES = frozenset({502, 504})
# Never sent, and never will be: nothing that waiting could mend.
OUR_FAULT = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)

_SHORT_SECONDS = 1.0  # waits that are not given up

Send = Callable[[], httpx.Response]


@dataclass(frozen=True)
class Clock:
    """Time, in seconds: what tests replace."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class _Bell:
    """Rung once; until then it can be waited for. A signal's handler may ring it."""

    def __init__(self) -> None:
        self.rung = False
        # An Event's lock is not for handlers: the thread that they interrupt may hold it. A SimpleQueue may be put to.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        self.rung = True
        self._tokens.put(None)

    def wait(self, seconds: float) -> None:
        try:
            self._tokens.get(timeout=seconds)
        except queue.Empty:
            return
        self._tokens.put(None)  # for whoever else waits


class Retrier:
    """Sends requests until an answer comes that retrying cannot better, no sooner than the server's limits allow.

    Args:
        retry_seconds: how long to keep at one request that fails without a word of when to come back.
        patience_seconds: how long to wait in all for one request where the server says when to come back.
        clock: time.
        on_wait: told of every wait before it begins: seconds, and why.
    """

    def __init__(
        self,
        retry_seconds: float,
        patience_seconds: float,
        clock: Clock | None = None,
        on_wait: Callable[[float, str], None] = progress.waiting,
    ) -> None:
        self.retry_seconds, self.patience_seconds = retry_seconds, patience_seconds
        self._bell = _Bell()
        self._clock, self._on_wait = clock or Clock(), on_wait
        self._long_sleep = self._bell.wait if clock is None else clock.sleep
        self._lock = threading.Lock()
        self._not_before = self._clock.now()
        self._paused_at = self._not_before  # when an answer last spoke of a limit that is used up

    def __call__(self, send: Send) -> httpx.Response:
        """A successful answer.

        Raises:
            OracleError: a refusal that may not pass, or did not in the time allowed.
            httpx.TransportError: no answer, within the time allowed.
            WaitGivenUp: `stop_waiting` was called, and the request would have to wait.
        """
        return _Attempts(self, send).until_answered()

    def stop_waiting(self) -> None:
        """Give up the waits of more than a second, those under way and those to come."""
        self._bell.ring()

    # --- what the attempts at one request share ---

    def now(self) -> float:
        """The clock's time."""
        return self._clock.now()

    def sleep(self, seconds: float, why: str) -> float:
        """Wait; returns the seconds it took. WaitGivenUp where no request waits any more."""
        start, long = self._clock.now(), seconds > _SHORT_SECONDS
        if not (long and self._bell.rung):
            self._on_wait(seconds, why)
            (self._long_sleep if long else self._clock.sleep)(seconds)
        if long and self._bell.rung:
            raise WaitGivenUp(why)
        return self._clock.now() - start

    def pause(self) -> float:
        """Seconds until the server's limits have something left, by the last answer that spoke of them."""
        return max(0.0, self._not_before - self._clock.now())

    def heed(self, response: httpx.Response, sent: float) -> None:
        """Note what an answer of any kind, to a request that was sent at `sent`, says of the limits."""
        if protocol.RATELIMIT_HEADER not in response.headers:
            return
        now, pause = self._clock.now(), pacing.pause(response.headers[protocol.RATELIMIT_HEADER])
        with self._lock:
            if pause:
                self._paused_at, self._not_before = now, now + pause
            elif sent >= self._paused_at:  # an answer on its way since before may speak of what was left then
                self._not_before = now


class _Attempts:
    """The attempts at one request, and the time they have taken."""

    def __init__(self, retrier: Retrier, send: Send) -> None:
        self._retrier, self._send = retrier, send
        self._start = retrier.now()
        self._waited = 0.0  # because the server asked for it
        self._failure: BaseException | None = None  # of the last attempt
        self._backoff = tenacity.wait_exponential_jitter(initial=0.1, max=10.0, jitter=0.1)

    def until_answered(self) -> httpx.Response:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=self._wait,
            stop=self._stop,
            sleep=self._sleep,
            reraise=True,
        )(self._attempt)

    def _attempt(self) -> httpx.Response:
        pause = self._retrier.pause()
        # A hint, unlike Retry-After: where it asks for more than there is patience, the server is asked all the same.
        if 0 < pause <= self._retrier.patience_seconds - self._waited:
            self._waited += self._retrier.sleep(pause, _words(RateLimited.code))
        sent = self._retrier.now()
        try:
            response = self._send()
        except httpx.DecodingError as error:
            raise UnexpectedAnswer(f"the oracle's answer cannot be read: {error}") from None
        self._retrier.heed(response, sent)
        if response.is_success:
            return response
        headers = response.headers
        told = pacing.retry_after(headers.get("Retry-After", ""), headers.get("Date"))
        raise from_problem(response.status_code, response.content, told)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        self._failure = state.outcome.exception() if state.outcome else None
        # `Retry-After: 0` backs off: a server that says so again and again would be asked without a pause.
        return self._told if self._told else self._backoff(state)

    def _stop(self, state: tenacity.RetryCallState) -> bool:
        """Whether the wait that comes next would be too long: then it is not begun."""
        if self._told is not None:
            return self._waited + state.upcoming_sleep > self._retrier.patience_seconds
        own = self._retrier.now() - self._start - self._waited
        return own + state.upcoming_sleep > self._retrier.retry_seconds

    def _sleep(self, seconds: float) -> None:
        why = _words(self._failure.code) if isinstance(self._failure, OracleError) else "no answer"
        took = self._retrier.sleep(seconds, why)
        if self._told is not None:
            self._waited += took

    @property
    def _told(self) -> float | None:
        """The seconds that the last answer asked to wait; None if it did not say, or did not come."""
        return self._failure.retry_after if isinstance(self._failure, OracleError) else None


def _words(code: str) -> str:
    return code.replace("-", " ")


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: lost or slow connections, a busy or restarting server, a request in flight."""
    if isinstance(error, OUR_FAULT):
        return False
    if isinstance(error, UnexpectedAnswer):
        return error.extensions.get("answered_status") in RETRY_STATUSES
    passing = RateLimited | Unavailable | RequestInFlight | RequestTimeout | InternalError
    return isinstance(error, httpx.TransportError | passing)
