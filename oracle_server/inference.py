"""One inference request from its bytes to its answer: prepare, charge, predict, encode, in this order.

Everything that can be refused is refused before the charge; what fails after it is refunded.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass

import numpy as np

from oracle_server.body import Buffer, decompress
from oracle_server.ledger import Client, Receipt
from oracle_server.oracle import Float32
from oracle_server.service import Service
from shared.wire import codec, protocol
from shared.wire.errors import InternalError, MalformedRequest, TooLarge

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A request that may be charged: `images` [n, c, h, w] passed every check; `sha256` is of the uncompressed body."""

    request: codec.InferRequest
    images: Float32
    sha256: str


@dataclass(frozen=True)
class Answer:
    """The encoded logits and what they cost."""

    encoded: codec.Encoded
    receipt: Receipt


def prepare(service: Service, body: Buffer, content_encoding: str, json_length: int | None) -> Prepared:
    """Read and check a request. It is the caller's to run this off the event loop.

    Raises:
        MalformedRequest, TooLarge, UnacceptableValues: as their names say; nothing was charged.
    """
    body = decompress(body, content_encoding, limit=service.settings.max_body_bytes)
    request = codec.decode_request(body, json_length)
    if set(request.inputs) != {protocol.INPUT_NAME}:
        raise MalformedRequest(f"the one input is '{protocol.INPUT_NAME}', not {', '.join(sorted(request.inputs))}")
    if set(request.outputs) - {protocol.OUTPUT_NAME}:
        raise MalformedRequest(f"the one output is '{protocol.OUTPUT_NAME}', not {', '.join(sorted(request.outputs))}")
    if request.datatypes[protocol.INPUT_NAME] != "FP32":
        raise MalformedRequest(f"images are {request.datatypes[protocol.INPUT_NAME]}: send datatype FP32")
    images = request.inputs[protocol.INPUT_NAME]
    limit = service.settings.max_batch_rows
    if images.ndim and len(images) > limit:
        raise TooLarge(f"the batch has {len(images)} rows and at most {limit} are taken at once", max_rows=limit)
    service.oracle.check(images)
    return Prepared(request, images, hashlib.sha256(body).hexdigest())


async def answer(service: Service, client: Client, idempotency_key: str | None, prepared: Prepared) -> Answer:
    """Charge a prepared request, then answer it.

    A client that goes away after the charge has paid; with its idempotency key it can have the answer again for free.

    Raises:
        RequestInFlight: the same client's same key is being answered.
        BudgetExhausted, ClientRevoked, IdempotencyConflict, Unavailable: nothing was charged.
        InternalError: the answer failed; the charge was refunded.
    """
    with service.gate.hold(client.id, idempotency_key):
        receipt = await service.on_ledger(
            service.ledger.charge, client.id, len(prepared.images), idempotency_key, prepared.sha256
        )
        try:
            start = time.perf_counter()
            logits = await service.on_engine(service.oracle, prepared.images)
            service.metrics.inference.observe(time.perf_counter() - start)
            encoded = _encode(prepared.request, logits)
        except Exception as error:
            await service.on_ledger(service.ledger.refund, receipt)
            if isinstance(error, InternalError):
                raise
            log.exception("inference of %d rows failed; its charge was refunded", len(prepared.images))
            raise InternalError("the classifier failed on this batch; its charge was refunded") from error
        service.metrics.batch_rows.observe(len(prepared.images))
        return Answer(encoded, receipt)


def _encode(request: codec.InferRequest, logits: Float32) -> codec.Encoded:
    binary = request.wants_binary(protocol.OUTPUT_NAME)
    if not binary and not np.isfinite(logits).all():
        raise InternalError(
            "the classifier's logits are not all finite, which JSON cannot write: ask for binary outputs "
            "(parameters.binary_data_output); the charge was refunded"
        )
    return codec.encode_response(
        {protocol.OUTPUT_NAME: logits}, binary={protocol.OUTPUT_NAME: binary}, request_id=request.id
    )
