"""One request and its answer: address, key, TLS, and what becomes of a request that gets no answer."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx

from defender_client.config import ConfigError
from defender_client.oracle_client.retrying import OUR_FAULT, RETRY_STATUSES, Retrier
from defender_client.paying import Paying
from shared.version import VERSION
from shared.wire.codec import Encoded
from shared.wire.errors import (
    InternalError,
    OracleError,
    RequestInFlight,
    RequestTimeout,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
)

_CHUNK = 256 * 1024
# After these nobody knows whether the request was charged: it is being answered, a proxy lost the answer, the server
# failed (perhaps in sending what was paid for), or it lost its ledger while writing a charge. Most 503s mean nothing
# of the kind, but do not say so. What is in doubt and was not charged costs nothing: the ledger settles it.
_UNKNOWN_STATUSES = RETRY_STATUSES | {RequestInFlight.status, InternalError.status, Unavailable.status}
_MOST_CONNECTIONS = 64  # as many as a configuration can have requests in flight


class OracleUnreachable(OracleError):
    """No answer within the time allowed for retries, or no connection that could be trusted."""

    code, title = "oracle-unreachable", "The oracle cannot be reached"


class Connection:
    """A server's address, spoken to with one key, by several threads if need be.

    Args:
        url: the server's address, without a route.
        api_key: sent as `Authorization: Bearer`; None for a server that asks for none.
        retrier: how long to keep at a request.
        ca: PEM file of the authorities to trust instead of the usual ones; None for the usual ones.
        secrets: further headers, kept as secret as the key.
        transport: an httpx transport, for tests.

    Raises:
        OracleUnreachable: `url` is not an address of a server.
        Unauthorized: `api_key`, or a secret, cannot be one.
        ConfigError: `ca` holds no certificate.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        retrier: Retrier,
        *,
        ca: Path | None = None,
        secrets: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"User-Agent": f"zo-defense/{VERSION}"}
        if "@" in url or "?" in url:
            # Not shown: an address is printed and kept, so a key must not be in it.
            raise OracleUnreachable("write the oracle's address as http://HOST:PORT: its key goes into ORACLE_API_KEY")
        if api_key:
            if not re.fullmatch(r"[!-~]+", api_key):
                # Not shown, and not left to httpx, whose complaint would show it.
                raise Unauthorized("the API key holds a character that no key has, such as a space or a line's end")
            headers["Authorization"] = f"Bearer {api_key}"
        for name, value in (secrets or {}).items():
            if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", value):
                raise Unauthorized(f"the value for the header {name} holds a character that no header has")
            headers[name] = value
        verify = True if ca is None else _trusting(ca)
        try:
            self._http = httpx.Client(
                base_url=url.rstrip("/"),
                headers=headers,
                # Reading waits for the model: a large batch on a small machine takes its time.
                timeout=httpx.Timeout(30.0, connect=10.0, read=600.0, write=120.0),
                limits=httpx.Limits(max_connections=_MOST_CONNECTIONS, max_keepalive_connections=_MOST_CONNECTIONS),
                transport=transport,
                verify=verify,
            )
            if self._http.base_url.scheme not in ("http", "https") or not self._http.base_url.host:
                self._http.close()
                raise ValueError("write http://HOST:PORT")
        except (httpx.InvalidURL, ValueError) as error:
            raise OracleUnreachable(f"'{url}' is not an address of a server: {error}") from None
        self.url = url
        self._retrier = retrier

    def get(self, route: str) -> httpx.Response:
        """A successful answer; OracleError for a refusal."""
        return self._answered(lambda: self._http.get(route))

    def post(
        self, route: str, encoded: Encoded, headers: Mapping[str, str], in_doubt: Callable[[], None]
    ) -> httpx.Response:
        """A successful answer; OracleError for a refusal.

        `in_doubt` is called for every attempt that the server may have taken without our learning what became of it: a
        refusal of a later attempt says nothing about that one.
        """

        def send() -> httpx.Response:
            try:
                response = self._http.post(route, content=_stream(encoded), headers=headers)
            except (httpx.ConnectError, httpx.ConnectTimeout, *OUR_FAULT):
                raise
            except httpx.RequestError:
                in_doubt()
                raise
            if response.status_code in _UNKNOWN_STATUSES:
                in_doubt()
            return response

        return self._answered(send)

    def post_paid(self, route: str, encoded: Encoded, headers: Mapping[str, str], paying: Paying) -> httpx.Response:
        """A successful answer of a server that knows no Idempotency-Keys: every attempt is paid for by itself.

        The server's own failure (500) is not tried again: it would cost again, and probably fail again.

        Raises:
            BudgetExhausted: the budget does not cover another attempt.
            AnswersLost: too many got no answer.
            OracleError: a refusal.
        """

        def send() -> httpx.Response:
            with paying.attempt() as attempt:
                attempt.bytes_up = encoded.size
                try:
                    response = self._http.post(route, content=_stream(encoded), headers=headers)
                except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, *OUR_FAULT):
                    attempt.free = "not-sent"
                    raise
                attempt.answered = response.is_success
                attempt.bytes_down = len(response.content)
                if response.is_client_error and response.status_code not in _UNKNOWN_STATUSES | {RequestTimeout.status}:
                    attempt.free = f"refused-{response.status_code}"
            if response.status_code == InternalError.status:
                raise UnexpectedAnswer(f"the server failed (HTTP status 500): {response.text[:500]}")
            return response

        return self._answered(send)

    def _answered(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        def attempt() -> httpx.Response:
            try:
                return send()
            except httpx.ConnectError as error:
                if _untrusted(error):
                    raise OracleUnreachable(
                        f"the certificate of {self.url} is not trusted ({error}): name its authority's file by --ca"
                    ) from error
                raise

        try:
            return self._retrier(attempt)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise OracleUnreachable(
                f"no answer from {self.url} within {self._retrier.retry_seconds:.0f} s "
                f"({type(error).__name__}: {error}); is the server running and the address right?"
            ) from error

    def stop_waiting(self) -> None:
        """Give up long waits: see `Retrier.stop_waiting`."""
        self._retrier.stop_waiting()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _trusting(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise ConfigError(f"--ca {ca} holds no certificate in PEM form") from None
    except OSError as error:
        raise ConfigError(f"--ca {ca} cannot be read: {error.strerror}") from None


def _untrusted(error: BaseException | None) -> bool:
    """Whether the server's certificate is what failed: no waiting mends that."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _stream(encoded: Encoded) -> Iterator[bytes]:
    """The body in pieces: httpcore copies what is left of a buffer at every partial send, so pieces stay small.

    As bytes, which h11 passes on: of any other buffer it makes bytes itself. Either way a piece is copied once, in the
    processor's cache; measured, that is a hundredth of what a request costs the client.
    """
    for chunk in encoded.chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _CHUNK):
            yield bytes(view[start : start + _CHUNK])
