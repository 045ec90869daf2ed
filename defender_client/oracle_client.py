"""Logits over HTTP: the only module that knows httpx.

Every request carries an Idempotency-Key made of the run, the step and the body's digest. A retry, or the same step of a
run that was killed and started again, therefore asks under the same key and is answered without a second charge; other
bytes make another key and are a new purchase.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import httpx
import numpy as np
import tenacity
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from defender_client.query_log import QueryLog
from shared.version import VERSION
from shared.wire import codec, protocol
from shared.wire.errors import (
    InternalError,
    MalformedRequest,
    NotFound,
    OracleError,
    RateLimited,
    RequestInFlight,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
    from_problem,
)

M = TypeVar("M", bound=protocol.Message)

_CHUNK = 256 * 1024
_DEFAULT_MAX_ROWS = 1024
_RETRY_STATUSES = frozenset({502, 504})
# After these nobody knows whether the request was charged: it is being answered, or a proxy lost the answer.
_UNKNOWN_STATUSES = _RETRY_STATUSES | {RequestInFlight.status}
# Never sent, and never will be: nothing that waiting could mend.
_OUR_FAULT = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
_HEADER_BYTES = 1024  # more than the JSON part of a request


class OracleUnreachable(OracleError):
    """No answer within the time allowed for retries."""

    code, title = "oracle-unreachable", "The oracle cannot be reached"


@dataclass(frozen=True)
class OracleInfo:
    """What the oracle says of itself.

    Attributes:
        image_shape: (c, h, w) of the images it takes.
        classes: length k of a vector of logits.
        max_rows: the largest batch it takes in one request, by its limits on rows and on bytes.
    """

    image_shape: tuple[int, int, int]
    classes: int
    max_rows: int


class RemoteOracle:
    """A classifier behind HTTP: images in, logits out, every query charged.

    Usable wherever a callable from images [n, c, h, w] in [0, 1] to logits [n, k] is.

    Args:
        url: the server's address, without a route.
        api_key: sent as `Authorization: Bearer`; None for a server that asks for none.
        log: where requests are recorded; in memory by default.
        run_id: first part of every Idempotency-Key; random by default.
        retry_seconds: how long to keep trying one request that fails in a way that may pass.
        transport: an httpx transport, for tests.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        log: QueryLog | None = None,
        run_id: str | None = None,
        retry_seconds: float = 120.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"User-Agent": f"zo-defense/{VERSION}"}
        if api_key:
            if not re.fullmatch(r"[!-~]+", api_key):
                # Not shown, and not left to httpx, whose complaint would show it.
                raise Unauthorized("the API key holds a character that no key has, such as a space or a line's end")
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            self._http = httpx.Client(
                base_url=url.rstrip("/"),
                headers=headers,
                # Reading waits for the model: a large batch on a small machine takes its time.
                timeout=httpx.Timeout(30.0, connect=10.0, read=600.0, write=120.0),
                transport=transport,
            )
            if self._http.base_url.scheme not in ("http", "https") or not self._http.base_url.host:
                raise ValueError("write http://HOST:PORT")
        except (httpx.InvalidURL, ValueError) as error:
            raise OracleUnreachable(f"'{url}' is not an address of a server: {error}") from None
        self.url = url
        self.log = log if log is not None else QueryLog(None)
        self.run_id = run_id or uuid.uuid4().hex
        self.remaining: int | None = None
        self._retry_seconds = retry_seconds
        self._info: OracleInfo | None = None
        self._sequence = 0

    # --- what the oracle says of itself; none of this costs a query ---

    @property
    def info(self) -> OracleInfo:
        """Shapes and limits, from the model's metadata; asked once."""
        if self._info is None:
            metadata = self._get(protocol.METADATA_ROUTE, protocol.ModelMetadata)
            inputs = {tensor.name: tensor for tensor in metadata.inputs}
            outputs = {tensor.name: tensor for tensor in metadata.outputs}
            image, logits = inputs.get(protocol.INPUT_NAME), outputs.get(protocol.OUTPUT_NAME)
            if image is None or logits is None or len(image.shape) != 4 or len(logits.shape) != 2:
                raise UnexpectedAnswer(
                    f"{self.url} is not a classifier of this protocol: expected input '{protocol.INPUT_NAME}' "
                    f"[-1, c, h, w] and output '{protocol.OUTPUT_NAME}' [-1, k]"
                )
            _, c, h, w = image.shape
            rows = _limit(metadata, "max_batch_rows") or _DEFAULT_MAX_ROWS
            body = _limit(metadata, "max_body_bytes")
            if body is not None:
                rows = max(1, min(rows, (body - _HEADER_BYTES) // max(1, 4 * c * h * w)))
            self._info = OracleInfo((c, h, w), logits.shape[1], rows)
        return self._info

    def budget(self) -> protocol.BudgetStatement | None:
        """The caller's account; None if the server keeps none (it is not ours)."""
        try:
            statement = self._get(protocol.BUDGET_ROUTE, protocol.BudgetStatement)
        except NotFound:
            return None
        self.remaining = statement.remaining
        return statement

    def charges(self) -> Iterator[protocol.ChargeEntry]:
        """The caller's own ledger entries, oldest first."""
        after: int | None = 0
        while after is not None:
            route = f"{protocol.CHARGES_ROUTE}?after={after}&limit={protocol.CHARGES_PAGE}"
            page = self._get(route, protocol.ChargePage)
            yield from page.entries
            after = page.next_after

    def metrics(self) -> str:
        """The server's metrics in Prometheus' text form."""
        return self._retrying(lambda: self._http.get(protocol.METRICS_ROUTE)).text

    # --- queries ---

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, k] of images [n, c, h, w] in [0, 1]; costs n queries."""
        array = images.detach().to("cpu", torch.float32).numpy()
        self._sequence += 1
        label = f"call-{self._sequence}-{uuid.uuid4().hex[:8]}"
        return torch.from_numpy(self.query(array, purpose="call", label=label))

    def query(self, images: NDArray[np.float32], *, purpose: str, label: str) -> NDArray[np.float32]:
        """Logits of a batch, in requests of at most the server's batch limit.

        Args:
            images: float32 [n, c, h, w] in [0, 1].
            purpose: what the queries are for (`labels`, `train`, `certify`, ...); kept in the log.
            label: names this batch within the run; the same label and bytes are charged once, however often asked.

        Returns:
            Logits float32 [n, k].

        Raises:
            OracleError: the refusal, as the server gave it; `OracleUnreachable` when retries ran out.
        """
        rows = self.info.max_rows
        if len(images) <= rows:
            return self._request(images, purpose, f"{label}/0")
        parts = [
            self._request(images[start : start + rows], purpose, f"{label}/{start}")
            for start in range(0, len(images), rows)
        ]
        return np.concatenate(parts)

    def _request(self, images: NDArray[np.float32], purpose: str, label: str) -> NDArray[np.float32]:
        encoded = codec.encode_request({protocol.INPUT_NAME: images}, outputs=(protocol.OUTPUT_NAME,))
        digest = hashlib.sha256()
        for chunk in encoded.chunks:
            digest.update(chunk)
        key = f"{self.run_id}/{label}/{digest.hexdigest()[:24]}"
        headers = {
            protocol.IDEMPOTENCY_KEY_HEADER: key,
            protocol.JSON_LENGTH_HEADER: str(encoded.json_length),
            "Content-Length": str(encoded.size),
            "Content-Type": "application/octet-stream",
        }
        # Whether an attempt, now or before a kill, may have been charged without our knowing. A refusal after it says
        # nothing about that attempt: the log then keeps the request as unanswered, for the ledger to settle.
        known = self.log.requests.get(key)
        lost = known is not None and known.charged is None and not known.refused
        self.log.sending(key, purpose, len(images))

        def send() -> httpx.Response:
            nonlocal lost
            try:
                response = self._http.post(protocol.INFER_ROUTE, content=_stream(encoded), headers=headers)
            except (httpx.ConnectError, httpx.ConnectTimeout, *_OUR_FAULT):
                raise
            except httpx.RequestError:
                lost = True
                raise
            lost = lost or response.status_code in _UNKNOWN_STATUSES
            return response

        try:
            response = self._retrying(send)
        except (OracleUnreachable, UnexpectedAnswer):
            raise
        except OracleError as error:
            if not lost:
                self.log.refused(key, error.code)
            raise
        logits = self._read_logits(response, len(images))
        charge = _whole(response.headers.get(protocol.QUERY_CHARGE_HEADER))
        left = _whole(response.headers.get(protocol.QUERY_REMAINING_HEADER))
        if left is not None:
            self.remaining = left
        self.log.answered(
            key,
            len(images) if charge is None else charge,
            receipt=response.headers.get(protocol.QUERY_RECEIPT_HEADER),
            bytes_up=encoded.size,
            bytes_down=len(response.content),
        )
        return logits

    def _read_logits(self, response: httpx.Response, rows: int) -> NDArray[np.float32]:
        length = response.headers.get(protocol.JSON_LENGTH_HEADER)
        try:
            json_length = _whole(length)
            if length is not None and json_length is None:
                raise MalformedRequest(f"{protocol.JSON_LENGTH_HEADER} is not a number of bytes: {length[:20]!r}")
            answer = codec.decode_response(response.content, json_length)
        except MalformedRequest as error:
            raise UnexpectedAnswer(f"the oracle's answer cannot be read: {error.detail}") from None
        logits = answer.outputs.get(protocol.OUTPUT_NAME)
        expected = (rows, self.info.classes)
        if logits is None or logits.shape != expected:
            shape = None if logits is None else list(logits.shape)
            raise UnexpectedAnswer(f"expected '{protocol.OUTPUT_NAME}' {list(expected)}, the oracle sent {shape}")
        if not np.isfinite(logits).all():
            raise UnexpectedAnswer(f"the oracle sent '{protocol.OUTPUT_NAME}' that are not finite")
        return np.array(logits, dtype=np.float32)

    # --- HTTP ---

    def _get(self, route: str, message: type[M]) -> M:
        response = self._retrying(lambda: self._http.get(route))
        try:
            return message.model_validate_json(response.content)
        except ValidationError as error:
            raise UnexpectedAnswer(
                f"{self.url}{route} did not answer as expected: {error.errors()[0]['msg']}"
            ) from None

    def _retrying(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """Send until an answer comes that retrying cannot better; refusals are raised as what they are."""
        deadline = time.monotonic() + self._retry_seconds

        def attempt() -> httpx.Response:
            try:
                response = send()
            except httpx.DecodingError as error:
                raise UnexpectedAnswer(f"the oracle's answer cannot be read: {error}") from None
            if response.is_success:
                return response
            raise from_problem(response.status_code, response.content, _retry_after(response))

        backoff = tenacity.wait_exponential_jitter(initial=0.1, max=10.0, jitter=0.1)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            told = error.retry_after if isinstance(error, OracleError) else None
            return told if told is not None else backoff(state)

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception(_may_pass),
                wait=wait,
                stop=lambda state: time.monotonic() + (state.upcoming_sleep or 0.0) > deadline,
                reraise=True,
            )(attempt)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise OracleUnreachable(
                f"no answer from {self.url} within {self._retry_seconds:.0f} s ({type(error).__name__}: {error}); "
                "is the server running and the address right?"
            ) from error

    def close(self) -> None:
        """Close the connections and the log."""
        self._http.close()
        self.log.close()

    def __enter__(self) -> RemoteOracle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stream(encoded: codec.Encoded) -> Iterator[bytes]:
    """The body in pieces: httpcore copies what is left of a buffer at every partial send, so pieces stay small."""
    for chunk in encoded.chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _CHUNK):
            yield bytes(view[start : start + _CHUNK])


def _limit(metadata: protocol.ModelMetadata, name: str) -> int | None:
    """A limit that our own server states among its model's parameters; None if this one does not."""
    value = metadata.parameters.get(name)
    return value if isinstance(value, int) and value > 0 else None


def _whole(header: str | None) -> int | None:
    """A header that is a whole number, and of a length that one can have."""
    return int(header) if header is not None and re.fullmatch(r"[0-9]{1,15}", header) else None


def _retry_after(response: httpx.Response) -> float | None:
    # The other form, a date, is left to our own backoff.
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) else None


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: lost connections, a busy or restarting server, the same request in flight."""
    if isinstance(error, _OUR_FAULT):
        return False
    if isinstance(error, UnexpectedAnswer):
        return error.extensions.get("answered_status") in _RETRY_STATUSES
    return isinstance(error, httpx.TransportError | RateLimited | Unavailable | RequestInFlight | InternalError)
