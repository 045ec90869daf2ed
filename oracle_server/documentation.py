"""What /docs says of the routes that read raw bytes, which FastAPI cannot see for itself."""

from __future__ import annotations

from typing import Any

from shared.wire import protocol
from shared.wire.errors import (
    PROBLEM_CONTENT_TYPE,
    BudgetExhausted,
    ClientRevoked,
    IdempotencyConflict,
    InternalError,
    MalformedRequest,
    NotFound,
    OracleError,
    RequestInFlight,
    TooLarge,
    UnacceptableValues,
    Unauthorized,
    Unavailable,
)

TITLE = "Oracle"
DESCRIPTION = (
    "A classifier that can only be queried. Open Inference Protocol v2 with binary tensors; one query is one row: one "
    "image in, one vector of logits out. Each query is charged to a lifetime budget before it is answered; whatever is "
    "refused is not charged. Errors are problem+json (RFC 9457) that also carry the protocol's `error`."
)

_PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "error", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "error": {"type": "string"},
        "code": {"type": "string"},
    },
}


def _refusals(*classes: type[OracleError]) -> dict[int | str, dict[str, Any]]:
    """The answers these errors give, those of one status together."""
    titles: dict[int, list[str]] = {}
    for cls in classes:
        titles.setdefault(cls.status, []).append(f"{cls.title} (`{cls.code}`)")
    return {
        status: {"description": "; ".join(names), "content": {PROBLEM_CONTENT_TYPE: {"schema": _PROBLEM_SCHEMA}}}
        for status, names in titles.items()
    }


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _request_header(name: str, description: str, kind: str = "string") -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, **_header(description, kind)}


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_JSON = {"schema": {"type": "object"}}
_JSON_LENGTH = "Bytes of JSON at the start of the uncompressed body; absent where the whole body is JSON."

REFUSALS = _refusals(Unauthorized, ClientRevoked, MalformedRequest, Unavailable)

INFER: dict[str, Any] = {
    "summary": "Query the classifier: images in, logits out",
    "description": (
        f"Input `{protocol.INPUT_NAME}` FP32 [n, c, h, w] in [0, 1]; output `{protocol.OUTPUT_NAME}` FP32 [n, k]. "
        "Costs n queries, all or nothing. The body may be compressed (Content-Encoding gzip or deflate)."
    ),
    "tags": ["model"],
    "responses": {
        200: {
            "description": "The logits",
            "content": {"application/octet-stream": _BINARY, "application/json": _JSON},
            "headers": {
                protocol.QUERY_CHARGE_HEADER: _header("Queries charged; 0 for a replay.", "integer"),
                protocol.QUERY_REMAINING_HEADER: _header("Queries left of the lifetime budget.", "integer"),
                protocol.QUERY_RECEIPT_HEADER: _header("Number of the ledger entry that paid."),
                protocol.JSON_LENGTH_HEADER: _header(_JSON_LENGTH, "integer"),
            },
        },
        **_refusals(
            MalformedRequest,
            Unauthorized,
            ClientRevoked,
            BudgetExhausted,
            NotFound,
            RequestInFlight,
            TooLarge,
            IdempotencyConflict,
            UnacceptableValues,
            InternalError,
            Unavailable,
        ),
    },
    "openapi_extra": {
        "parameters": [
            _request_header(protocol.JSON_LENGTH_HEADER, _JSON_LENGTH, "integer"),
            _request_header(
                protocol.IDEMPOTENCY_KEY_HEADER,
                f"1 to {protocol.MAX_IDEMPOTENCY_KEY} visible ASCII characters. The same key with the same body again "
                "is answered and costs nothing more.",
            ),
        ],
        "requestBody": {"required": True, "content": {"application/octet-stream": _BINARY, "application/json": _JSON}},
    },
}
