"""Scores over HTTP: a batch becomes requests, answers become scores, and the books are kept.

Every request carries an Idempotency-Key made of the run, the step and the body's digest. A retry, or the same step of a
run that was killed and started again, therefore asks under the same key and is answered without a second charge; other
bytes make another key and are a new purchase.

Several threads may ask at once. What is asked, under which keys, and what it costs in all is the same in any order.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from defender_client import progress, request_key
from defender_client.oracle import SCORES, OracleInfo
from defender_client.oracle_client.connection import Connection, OracleUnreachable
from defender_client.oracle_client.retrying import Clock, Retrier
from defender_client.query_log import QueryLog
from defender_client.questions import HEADER_BYTES, Images, Question
from defender_client.recording import Recorder
from defender_client.request_key import RequestKey
from defender_client.under_way import UnderWay
from shared.measurements import Measurement
from shared.wire import codec, protocol
from shared.wire.errors import (
    DecodersNotAllowed,
    DecoderUnknown,
    MalformedRequest,
    NotFound,
    OracleError,
    TooLarge,
    UnacceptableValues,
    UnexpectedAnswer,
)

M = TypeVar("M", bound=protocol.Message)

_DEFAULT_MAX_ROWS = 1024
_CLOSING_SECONDS = 30.0
_REGISTRATIONS = 3  # of a decoder that the server forgot, for one request


class RemoteOracle:
    """A model behind HTTP: images in, logits out, every query charged.

    Usable wherever a callable from images [n, c, h, w] in [0, 1] to logits [n, k] is. A reconstructor's answers are its
    images, flat, [n, c h w]: whatever is said of logits below is true of them.

    An oracle whose scores are probabilities (parameter `scores` of its model's metadata) is read as log(max(p, tiny)):
    logits up to a constant of each row. See `OracleInfo.logits`.

    Args:
        url: the server's address, without a route.
        api_key: sent as `Authorization: Bearer`; None for a server that asks for none.
        log: where requests are noted; in memory by default.
        recorder: where answers are kept; None keeps none.
        run_id: first part of every Idempotency-Key; random by default.
        retry_seconds: how long to keep trying one request that fails in a way that may pass.
        patience_seconds: how long to wait in all for one request where the server says when to come back.
        ca: PEM file of the authorities to trust, for a server with a private one.
        transport: an httpx transport, for tests.
        clock: time, for tests.
        on_wait: told of every wait before it begins: seconds, and why.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        log: QueryLog | None = None,
        recorder: Recorder | None = None,
        run_id: str | None = None,
        retry_seconds: float = 120.0,
        patience_seconds: float = 3600.0,
        ca: Path | None = None,
        transport: httpx.BaseTransport | None = None,
        clock: Clock | None = None,
        on_wait: Callable[[float, str], None] = progress.waiting,
    ) -> None:
        retrier = Retrier(retry_seconds, patience_seconds, clock, on_wait)
        self._connection = Connection(url, api_key, retrier, ca=ca, transport=transport)
        self.url = url
        self.log = log if log is not None else QueryLog(None)
        self.run_id = run_id or uuid.uuid4().hex
        self.remaining: int | None = None
        self._recorder = recorder
        self._info: OracleInfo | None = None
        self._sequence = itertools.count(1)
        self._asking = threading.RLock()  # for what the oracle says of itself
        self._books = threading.Lock()  # what is recorded of an answer and what is logged of it belong together
        self._trial = threading.Lock()  # for a batch larger than any that was answered
        self._largest = 0
        self._under_way = UnderWay()
        self._decoders: dict[str, bytes] = {}  # registered ones, by id

    # --- what the oracle says of itself; none of this costs a query ---

    @property
    def info(self) -> OracleInfo:
        """Shapes and limits, from the model's metadata; asked once."""
        if self._info is None:
            with self._asking:
                if self._info is None:
                    info = _read_info(self.url, self._get(protocol.METADATA_ROUTE, protocol.ModelMetadata))
                    if self._recorder is not None:
                        self._recorder.describe(info)
                    self._info = info
        return self._info

    @property
    def cost(self) -> int:
        """Queries paid for this run's answers so far."""
        return self.log.total

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

    def ledger(self) -> protocol.LedgerStatement | None:
        """Which ledger the server keeps, its key and its signed end; None if it shows none."""
        try:
            return self._get(protocol.LEDGER_ROUTE, protocol.LedgerStatement)
        except NotFound:
            return None

    def metrics(self) -> str:
        """The server's metrics in Prometheus' text form."""
        return self._connection.get(protocol.METRICS_ROUTE).text

    def _get(self, route: str, message: type[M]) -> M:
        return self._read(route, self._connection.get(route), message)

    def _read(self, route: str, response: httpx.Response, message: type[M]) -> M:
        try:
            return message.model_validate_json(response.content)
        except ValidationError as error:
            raise UnexpectedAnswer(
                f"{self.url}{route} did not answer as expected: {error.errors()[0]['msg']}"
            ) from None

    # --- queries ---

    @overload
    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...

    @overload
    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]: ...

    def __call__(self, images: torch.Tensor | NDArray[Any]) -> torch.Tensor | NDArray[np.float32]:
        """Logits float32 [n, k] of images [n, c, h, w] in [0, 1], a tensor's as a tensor; costs n queries."""
        label = f"call-{next(self._sequence)}-{uuid.uuid4().hex[:8]}"
        if isinstance(images, torch.Tensor):
            array = images.detach().to("cpu", torch.float32).numpy()
            return torch.from_numpy(self.query(array, purpose="call", label=label))
        return self.query(np.asarray(images, np.float32), purpose="call", label=label)

    def query(self, images: NDArray[np.float32], *, purpose: str, label: str) -> NDArray[np.float32]:
        """Logits of a batch: `ask`, about images.

        Args:
            images: float32 [n, c, h, w] in [0, 1].
            purpose, label: as for `ask`.
        """
        return self.ask(Images(images), purpose=purpose, label=label)

    def ask(self, question: Question, *, purpose: str, label: str) -> NDArray[np.float32]:
        """Logits of a question's rows, in requests of at most what the server takes at once.

        A batch that the server refuses as too large is asked in smaller ones, and so is every later one.

        Args:
            question: rows to ask about.
            purpose: what the queries are for (`labels`, `train`, `certify`, ...); kept in the log.
            label: names this batch within the run; the same label and bytes are charged once, however often asked.

        Returns:
            Logits float32 [rows, k].

        Raises:
            OracleError: the refusal, as the server gave it; `OracleUnreachable` when retries ran out; `TooLarge` if a
                single row is.
        """
        parts: list[NDArray[np.float32]] = []
        start = 0
        while not parts or start < len(question):
            rest = question.take(start, len(question)) if start else question
            parts.append(self._first_rows(rest, purpose, f"{label}/{start}"))
            start += len(parts[-1])
        return self.info.logits(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _first_rows(self, question: Question, purpose: str, label: str) -> NDArray[np.float32]:
        """Scores of the first of these rows, of as many as the server takes at once."""
        most = len(question)
        while True:
            limit = self.log.max_rows
            asked = self._batch(question, most, label)
            untried = asked.rows > self._largest
            # One thread at a time tries a batch larger than any that was answered: what a refusal teaches then does not
            # depend on which of several came first.
            with self._trial if untried else nullcontext():
                if untried and (self.log.max_rows != limit or asked.rows <= self._largest):
                    continue
                try:
                    scores = self._request(asked, purpose)
                except TooLarge as refusal:
                    if asked.rows <= 1:
                        raise
                    if limit is None or asked.rows <= limit:
                        self.log.learn_max_rows(_smaller(refusal, asked.rows))
                    most = asked.rows - 1  # also where the log says that more were taken once
                    continue
                self._largest = max(self._largest, asked.rows)
                return scores

    def _batch(self, question: Question, most: int, label: str) -> _Batch:
        """The first `most` of these rows, or as many as when they were asked about before, for those are paid under
        that key; else all that fit."""
        fit = question.fitting(self.info, min(most, self.log.max_rows or most)) if len(question) else 0
        before = self.log.last_asked(f"{self.run_id}/{label}")
        if before is not None and before.rows != fit and before.rows <= most:
            asked = self._encoded(question.take(0, before.rows), label)
            if asked.key == before.key:
                return asked
        return self._encoded(question if fit == len(question) else question.take(0, fit), label)

    def _encoded(self, question: Question, label: str) -> _Batch:
        encoded = question.encode(self.info.output_name)
        return _Batch(str(RequestKey(self.run_id, label, request_key.digest(encoded))), encoded, question)

    def _request(self, asked: _Batch, purpose: str) -> NDArray[np.float32]:
        key, encoded = asked.key, asked.encoded
        headers = {
            protocol.IDEMPOTENCY_KEY_HEADER: key,
            protocol.JSON_LENGTH_HEADER: str(encoded.json_length),
            "Content-Length": str(encoded.size),
            "Content-Type": "application/octet-stream",
        }
        # Whether an attempt, now or before a kill, may have been charged without our knowing. A refusal after it says
        # nothing about that attempt: the log then keeps the request as unanswered, for the ledger to settle.
        lost = self.log.in_doubt(key)

        def in_doubt() -> None:
            nonlocal lost
            lost = True

        with self._under_way:
            self.log.sending(key, purpose, asked.rows)
            try:
                response = self._post(asked, headers, in_doubt)
            except (OracleUnreachable, UnexpectedAnswer):
                raise
            except OracleError as error:
                if not lost:
                    self.log.refused(key, error.code)
                raise
            scores = self._read_scores(response, asked.question)
            self._book(asked, response, scores)
        return scores

    def _book(self, asked: _Batch, response: httpx.Response, scores: NDArray[np.float32]) -> None:
        """Keep an answer, and what it cost."""
        charge = _whole(response.headers.get(protocol.QUERY_CHARGE_HEADER))
        charged = asked.rows if charge is None else charge
        left = _whole(response.headers.get(protocol.QUERY_REMAINING_HEADER))
        with self._books:
            if left is not None:
                self.remaining = self._under_way.least(left)
            if self._recorder is not None:
                # Before the log: what the log calls answered is on record.
                self._recorder.keep(asked.key, scores, self.log.total_after(asked.key, charged))
            self.log.answered(
                asked.key,
                charged,
                receipt=response.headers.get(protocol.QUERY_RECEIPT_HEADER),
                bytes_up=asked.encoded.size,
                bytes_down=len(response.content),
            )

    def _post(self, asked: _Batch, headers: Mapping[str, str], in_doubt: Callable[[], None]) -> httpx.Response:
        for _ in range(_REGISTRATIONS):
            try:
                return self._connection.post(protocol.INFER_ROUTE, asked.encoded, headers, in_doubt)
            except DecoderUnknown:
                # It was started again, or others registered theirs: nothing was charged, and under its key nothing is
                # charged twice.
                content = self._decoders.get(asked.question.decoder or "")
                if content is None:
                    raise
                self._send_decoder(content)
        return self._connection.post(protocol.INFER_ROUTE, asked.encoded, headers, in_doubt)

    def register(self, decoder: bytes) -> str | None:
        """Register a decoder's file; its id, or None where the server does not take it. Costs no query.

        Raises:
            OracleError: the server could not be asked.
        """
        if not self.info.decoders:
            return None
        try:
            name = self._send_decoder(decoder)
        except (DecodersNotAllowed, NotFound, MalformedRequest, TooLarge, UnacceptableValues) as refusal:
            progress.console.print(f"the oracle does not take the decoder ({refusal}): it is asked about images")
            with self._asking:
                self._info = self.info.model_copy(update={"decoders": False})
                if self._recorder is not None:
                    self._recorder.describe(self._info)
            return None
        self._decoders[name] = decoder
        return name

    def _send_decoder(self, content: bytes) -> str:
        encoded = codec.Encoded((content,), None)
        headers = {"Content-Length": str(len(content)), "Content-Type": "application/octet-stream"}
        response = self._connection.post(protocol.DECODERS_ROUTE, encoded, headers, lambda: None)
        return self._read(protocol.DECODERS_ROUTE, response, protocol.DecoderStatement).decoder

    def _read_scores(self, response: httpx.Response, question: Question) -> NDArray[np.float32]:
        length = response.headers.get(protocol.JSON_LENGTH_HEADER)
        try:
            json_length = _whole(length)
            if length is not None and json_length is None:
                raise MalformedRequest(f"{protocol.JSON_LENGTH_HEADER} is not a number of bytes: {length[:20]!r}")
            answer = codec.decode_response(response.content, json_length)
        except MalformedRequest as error:
            raise UnexpectedAnswer(f"the oracle's answer cannot be read: {error.detail}") from None
        name = self.info.output_name
        scores = answer.outputs.get(name)
        expected = self.info.answered(question.answered(self.info.classes))
        if scores is None or scores.shape != expected:
            shape = None if scores is None else list(scores.shape)
            raise UnexpectedAnswer(f"expected '{name}' {list(expected)}, the oracle sent {shape}")
        if not np.isfinite(scores).all():
            raise UnexpectedAnswer(f"the oracle sent '{name}' that are not finite")
        return np.array(scores, dtype=np.float32).reshape(len(question), self.info.classes)

    def stop_waiting(self) -> None:
        """No request waits for long from now on; those that would have to raise `WaitGivenUp`."""
        self._connection.stop_waiting()

    def close(self) -> None:
        """Let the requests of other threads be answered, if that is not long; close connections, log and recording."""
        self.stop_waiting()
        try:
            self._under_way.end(_CLOSING_SECONDS)
        finally:
            self._close()

    def _close(self) -> None:
        self._connection.close()
        self.log.close()
        if self._recorder is not None:
            self._recorder.close()

    def __enter__(self) -> RemoteOracle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Batch:
    """A request's key and body, and what it asks."""

    key: str
    encoded: codec.Encoded
    question: Question

    @property
    def rows(self) -> int:
        return len(self.question)


def _read_info(url: str, metadata: protocol.ModelMetadata) -> OracleInfo:
    inputs = {tensor.name: tensor for tensor in metadata.inputs}
    image = inputs.get(protocol.INPUT_NAME)
    if image is None or len(image.shape) != 4 or min(image.shape[1:]) < 1:
        raise _not_ours(url)
    _, c, h, w = image.shape
    row_limit = _limit(metadata, protocol.MAX_BATCH_ROWS_PARAMETER)
    rows = row_limit or _DEFAULT_MAX_ROWS
    body = _limit(metadata, "max_body_bytes")
    if body is not None:
        rows = max(1, min(rows, (body - HEADER_BYTES) // max(1, 4 * c * h * w)))
    return OracleInfo(
        image_shape=(c, h, w),
        max_rows=rows,
        row_limit=row_limit,
        body_limit=body,
        factored=metadata.parameters.get(protocol.FACTORED_PARAMETER) is True,
        counts=metadata.parameters.get(protocol.COUNTS_PARAMETER) is True,
        decoders=metadata.parameters.get(protocol.DECODERS_PARAMETER) is True,
        **_read_output(url, metadata),
    )


def _read_output(url: str, metadata: protocol.ModelMetadata) -> dict[str, Any]:
    """What an answer is, by the name of the output."""
    outputs = {tensor.name: tensor.shape for tensor in metadata.outputs}
    scores, images = outputs.get(protocol.OUTPUT_NAME), outputs.get(protocol.RECONSTRUCTION_NAME)
    if scores is not None and len(scores) == 2 and scores[1] >= 1:
        kind = metadata.parameters.get(protocol.SCORES_PARAMETER, "logits")
        if kind not in SCORES:
            raise UnexpectedAnswer(f"{url} answers with {kind!r}, and only {', '.join(SCORES)} can be read here")
        abstains = metadata.parameters.get(protocol.ABSTAINS_PARAMETER) is True
        return {"classes": scores[1], "scores": kind, "abstains": abstains}
    if scores is not None or images is None or len(images) != 4 or min(images[1:]) < 1:
        raise _not_ours(url)
    try:
        measurement = Measurement.model_validate(metadata.parameters.get(protocol.MEASUREMENT_PARAMETER))
    except ValidationError:
        raise UnexpectedAnswer(
            f"{url} is a reconstructor and does not say how its images are measured (parameter "
            f"'{protocol.MEASUREMENT_PARAMETER}' of its metadata: seed, rows, low, high)"
        ) from None
    return {
        "task": "reconstruction",
        "classes": math.prod(images[1:]),
        "output_shape": images[1:],
        "measurement": measurement,
    }


def _not_ours(url: str) -> UnexpectedAnswer:
    return UnexpectedAnswer(
        f"{url} is not a model that can be read here: expected input '{protocol.INPUT_NAME}' [-1, c, h, w] and output "
        f"'{protocol.OUTPUT_NAME}' [-1, k] or '{protocol.RECONSTRUCTION_NAME}' [-1, c, h, w]"
    )


def _limit(metadata: protocol.ModelMetadata, name: str) -> int | None:
    """A limit that our own server states among its model's parameters; None if this one does not."""
    value = metadata.parameters.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _smaller(refusal: TooLarge, refused: int) -> int:
    """Rows to try after a refusal of `refused` rows: what the server says that it takes, else half."""
    told = refusal.extensions.get("max_rows")
    if isinstance(told, int) and not isinstance(told, bool) and 1 <= told < refused:
        return told
    return refused // 2


def _whole(header: str | None) -> int | None:
    """A header that is a whole number, and of a length that one can have."""
    return int(header) if header is not None and re.fullmatch(r"[0-9]{1,15}", header) else None
