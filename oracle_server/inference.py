"""One inference request from its bytes to its answer: prepare; reserve and predict at once; encode; charge.

Everything that can be refused is refused before anything is reserved; what fails after that is released.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from dataclasses import dataclass

import numpy as np

from oracle_server.asked import read_rows
from oracle_server.body import Buffer, decompress
from oracle_server.book import Charge, Payment, Release, Reservation, Reserve
from oracle_server.budget import HeldByOthers
from oracle_server.ledger import Client
from oracle_server.oracle import Oracle
from oracle_server.room import Share
from oracle_server.rows import Float32, Rows
from oracle_server.service import Service
from shared.wire import codec
from shared.wire.errors import InternalError, MalformedRequest, OracleError

log = logging.getLogger(__name__)
_WAIT_FOR_OTHERS_S, _FIRST_PAUSE_S, _LAST_PAUSE_S = 30.0, 0.01, 0.25


@dataclass(frozen=True)
class Prepared:
    """A request that may be charged: its rows passed every check; `sha256` is of the uncompressed body."""

    request: codec.InferRequest
    rows: Rows
    sha256: str


@dataclass(frozen=True)
class Answer:
    """The encoded answer and what it cost."""

    encoded: codec.Encoded
    payment: Payment


def prepare(
    service: Service, client_id: int, body: Buffer, content_encoding: str, json_length: int | None, share: Share
) -> Prepared:
    """Read and check a request. It is the caller's to run this off the event loop.

    Raises:
        MalformedRequest, TooLarge, UnacceptableValues, Unavailable, DecoderUnknown: as their names say; nothing was
            charged.
    """
    body = decompress(body, content_encoding, share, limit=service.settings.max_body_bytes)
    request = codec.decode_request(body, json_length)
    output = service.oracle.output_name
    if set(request.outputs) - {output}:
        raise MalformedRequest(f"the one output is '{output}', not {', '.join(sorted(request.outputs))}")
    rows = read_rows(
        request, service.oracle, service.policy.check_rows, lambda name: service.decoders.get(client_id, name)
    )
    return Prepared(request, rows, hashlib.sha256(body).hexdigest())


async def answer(service: Service, client: Client, idempotency_key: str | None, prepared: Prepared) -> Answer:
    """Reserve and compute, then charge; what is returned is paid for and may be sent.

    A client that goes away meanwhile has paid; with its idempotency key it can have the answer again for free.

    Raises:
        RequestInFlight: the same client's same key is being answered.
        BudgetExhausted, ClientRevoked, IdempotencyConflict, Unavailable: nothing was charged.
        UnacceptableValues: a row turned out to be unacceptable when it was made; nothing was charged.
        InternalError: the answer failed; nothing was charged.
    """
    with service.gate.hold(client.id, idempotency_key):
        rows = len(prepared.rows)
        # The disk and the engine work at the same time, unless there is a reason to expect a refusal.
        begun = service.batcher.submit(prepared.rows, client.id) if rows <= client.account.remaining else None
        try:
            reservation = await _reserve(service, Reserve(client.id, rows, idempotency_key, prepared.sha256))
        except BaseException:
            if begun is not None:
                begun.cancel()
            raise
        try:
            computed = await asyncio.wrap_future(begun or service.batcher.submit(prepared.rows, client.id))
            told = await service.policy.transform(computed, prepared.rows, reservation.seq)
            service.policy.fail_by_chance()
            encoded = await service.on_bodies(_encode, service.oracle, prepared.request, prepared.rows, told)
        except BaseException as error:
            # Not awaited where the server is being ended: the ledger finishes what is queued before it closes.
            released = service.ledger.submit(Release(reservation, "its answer failed"))
            if not isinstance(error, Exception):
                raise
            await asyncio.wrap_future(released)
            if isinstance(error, OracleError):
                raise
            log.exception("inference of %d rows failed; nothing was charged", rows)
            raise InternalError("the model failed on this batch; nothing was charged") from error
        payment = reservation.paid or await _charge(service, reservation)
        service.metrics.batch_rows.observe(rows)
        return Answer(encoded, payment)


async def _reserve(service: Service, wanted: Reserve) -> Reservation:
    """Reserve; where it depends on the client's requests in flight, wait for them, so that the word is final."""
    deadline, pause = time.monotonic() + _WAIT_FOR_OTHERS_S, _FIRST_PAUSE_S
    while True:
        try:
            reservation: Reservation = await asyncio.wrap_future(service.ledger.submit(wanted))
            return reservation
        except HeldByOthers:
            if time.monotonic() + pause > deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE_S)


async def _charge(service: Service, reservation: Reservation) -> Payment:
    # Shielded: a charge that is queued is paid, and whoever waits for the queue to end finds it so.
    payment: Payment = await asyncio.shield(asyncio.wrap_future(service.ledger.submit(Charge(reservation))))
    return payment


def _encode(oracle: Oracle, request: codec.InferRequest, rows: Rows, answers: Float32) -> codec.Encoded:
    """The response to answers [n, k], which are flat up to here."""
    arranged = rows.arrange(answers)
    arranged = arranged.reshape(*arranged.shape[:-1], *oracle.output_shape)
    binary = request.wants_binary(oracle.output_name)
    if not binary and not np.isfinite(arranged).all():
        raise InternalError(
            "the model's answers are not all finite, which JSON cannot write: ask for binary outputs "
            "(parameters.binary_data_output); nothing was charged"
        )
    return codec.encode_response(
        {oracle.output_name: arranged}, binary={oracle.output_name: binary}, request_id=request.id
    )
