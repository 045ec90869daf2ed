"""The OpenAPI document: what FastAPI sees for itself, and what it cannot, such as raw bodies and refusals."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from shared.wire import protocol
from shared.wire.errors import (
    PROBLEM_CONTENT_TYPE,
    BudgetExhausted,
    ClientRevoked,
    DecodersNotAllowed,
    DecoderUnknown,
    HeadersTooLarge,
    IdempotencyConflict,
    InternalError,
    MalformedRequest,
    NotFound,
    OracleError,
    RateLimited,
    RequestInFlight,
    RequestTimeout,
    TooLarge,
    UnacceptableValues,
    Unauthorized,
    Unavailable,
)

TITLE = "Oracle"
DESCRIPTION = (
    "A model that can only be queried. Open Inference Protocol v2 with binary tensors; one query is one row: one image "
    "in, one vector of logits or one reconstruction out. Each query is charged to a lifetime budget before it is "
    "answered; whatever is refused is not charged. Errors are problem+json (RFC 9457) that also carry the protocol's "
    "`error`."
)

_SCHEMAS = "#/components/schemas/"
_PROBLEM_SCHEMA = {
    "title": "Problem",
    "description": "RFC 9457, and the `error` string of the Open Inference Protocol. Some carry numbers beside these.",
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
        status: {
            "description": "; ".join(names),
            "content": {PROBLEM_CONTENT_TYPE: {"schema": {"$ref": f"{_SCHEMAS}Problem"}}},
        }
        for status, names in titles.items()
    }


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _request_header(name: str, description: str, kind: str = "string") -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, **_header(description, kind)}


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_STATEMENT: dict[str, Any] = {"model": protocol.DecoderStatement}
_MESSAGES = (protocol.InferRequestHeader, protocol.InferResponseHeader)
_JSON_LENGTH = "Bytes of JSON at the start of the uncompressed body; absent where the whole body is JSON."


def _json(message: type[protocol.Message]) -> dict[str, Any]:
    return {"schema": {"$ref": f"{_SCHEMAS}{message.__name__}"}}


# Whatever is asked may be refused in these ways.
ANYWHERE = _refusals(MalformedRequest, RequestTimeout, HeadersTooLarge, InternalError, Unavailable)
OF_A_KEY = _refusals(Unauthorized, ClientRevoked)
OF_A_MODEL = _refusals(NotFound)
OF_DECODERS = OF_A_KEY | _refusals(ClientRevoked, DecodersNotAllowed, DecoderUnknown)

INFER: dict[str, Any] = {
    "summary": "Query the model: images in, logits (or reconstructions) out",
    "description": (
        f"Input `{protocol.INPUT_NAME}` FP32 [n, c, h, w] in [0, 1]; output `{protocol.OUTPUT_NAME}` FP32 [n, k], or "
        f"`{protocol.RECONSTRUCTION_NAME}` FP32 [n, c, h, w] of a reconstructor: the model's metadata says which. "
        "Costs n queries, all or nothing. The body may be compressed (Content-Encoding gzip or deflate)."
    ),
    "tags": ["model"],
    "responses": {
        200: {
            "description": "The logits, or the reconstructions",
            "content": {"application/octet-stream": _BINARY, "application/json": _json(_MESSAGES[1])},
            "headers": {
                protocol.QUERY_CHARGE_HEADER: _header("Queries charged; 0 for a replay.", "integer"),
                protocol.QUERY_REMAINING_HEADER: _header("Queries left of the lifetime budget.", "integer"),
                protocol.QUERY_RECEIPT_HEADER: _header("Signed receipt: the entry that paid, and its place."),
                protocol.JSON_LENGTH_HEADER: _header(_JSON_LENGTH, "integer"),
                protocol.RATELIMIT_POLICY_HEADER: _header("The caller's quotas per minute, where there are any."),
                protocol.RATELIMIT_HEADER: _header("What is left of them, and seconds until there is more."),
            },
        },
        **OF_A_KEY,
        **_refusals(ClientRevoked, BudgetExhausted),
        **_refusals(RequestInFlight, TooLarge, IdempotencyConflict, UnacceptableValues, RateLimited),
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
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": _BINARY, "application/json": _json(_MESSAGES[0])},
        },
    },
}

REGISTER: dict[str, Any] = {
    "summary": "Register a decoder, to query in its latent",
    "description": (
        "The decoder's file, which is data and never code. Costs no query. 200 where the caller had registered it "
        "before. Off unless the server was started with --allow-decoders."
    ),
    "tags": ["decoders"],
    "responses": {
        200: _STATEMENT | {"description": "It was registered already"},
        201: {"description": "It is registered"},
        **OF_A_KEY,
        **_refusals(ClientRevoked, DecodersNotAllowed),
        **_refusals(TooLarge, UnacceptableValues),
    },
    "openapi_extra": {"requestBody": {"required": True, "content": {"application/octet-stream": _BINARY}}},
}


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the app: FastAPI's own, with the messages of the wire, without what is not so here."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas: dict[str, Any] = document["components"]["schemas"]
    schemas["Problem"] = _PROBLEM_SCHEMA
    for message in _MESSAGES:
        schema = message.model_json_schema(ref_template=_SCHEMAS + "{model}")
        schemas |= schema.pop("$defs", {}) | {message.__name__: schema}
    # FastAPI's own answer to a bad parameter; here that is a problem with status 400.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for item in document["paths"].values():
        for operation in item.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
    return document
