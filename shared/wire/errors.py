"""Every way a query can be refused, and its status, in one place.

    OracleError
    ├── MalformedRequest       400  the message cannot be read as the protocol says
    ├── Unauthorized           401  no key, or one that is not known
    ├── Forbidden              403
    │   ├── ClientRevoked           the key was known once
    │   ├── DecodersNotAllowed      the server takes no decoders (it was started without --allow-decoders)
    │   └── BudgetExhausted         the batch is larger than what is left; refused whole, nothing charged
    ├── NotFound               404  no such route, model or version
    │   └── DecoderUnknown          this client has no such decoder here, or no longer: register it (again)
    ├── MethodNotAllowed       405
    ├── RequestTimeout         408  the headers or the body did not arrive in time
    ├── RequestInFlight        409  the same Idempotency-Key is being answered right now
    ├── TooLarge               413  more bytes or rows than the server takes at once
    ├── IdempotencyConflict    422  the same Idempotency-Key came before with another body
    ├── UnacceptableValues     422  readable, but not finite or out of range
    ├── RateLimited            429  with Retry-After
    ├── HeadersTooLarge        431  more headers, or more bytes of them, than the server takes
    ├── InternalError          500  the server's own fault
    ├── Unavailable            503  with Retry-After: draining, or something it needs is not there
    │   └── Overloaded              more is asked than can be computed; refused before anything was done
    └── UnexpectedAnswer       any  the peer's answer is not of this protocol (client side only)

The server raises these and answers with `problem()` (RFC 9457 plus the protocol's `error` string); the client reads an
answer back with `from_problem()` into the same class. Nothing refused is ever charged.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

PROBLEM_CONTENT_TYPE = "application/problem+json"
_MAX_DETAIL = 1000  # characters


class OracleError(Exception):
    """A refusal: `status` is HTTP's, `code` is stable and machine-readable, `detail` says what to do about it.

    Numbers a caller needs (`remaining`, `requested`, `max_rows`, ...) are in `extensions`; `retry_after` is in seconds;
    `headers` are further header fields of the answer.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "error"
    title: ClassVar[str] = "Error"

    def __init__(self, detail: str, /, *, retry_after: float | None = None, **extensions: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.headers: dict[str, str] = {}
        self.extensions = extensions

    def problem(self) -> dict[str, Any]:
        """The body of the answer: problem+json that also carries the protocol's `error` string."""
        # A detail may quote what was sent; the answer is no mirror of it.
        detail = self.detail if len(self.detail) <= _MAX_DETAIL else f"{self.detail[:_MAX_DETAIL]}..."
        return {
            "type": f"urn:zo-defense:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": detail,
            "error": detail,
            "code": self.code,
            **self.extensions,
        }


class MalformedRequest(OracleError):
    status, code, title = 400, "malformed-request", "Malformed request"


class Unauthorized(OracleError):
    status, code, title = 401, "unauthorized", "No valid API key"


class Forbidden(OracleError):
    status, code, title = 403, "forbidden", "Forbidden"


class ClientRevoked(Forbidden):
    code, title = "client-revoked", "This API key was revoked"


class DecodersNotAllowed(Forbidden):
    code, title = "decoders-not-allowed", "This server takes no decoders"


class BudgetExhausted(Forbidden):
    """The client's lifetime budget does not cover a batch; nothing of it was charged."""

    code, title = "budget-exhausted", "The query budget does not cover this batch"


class NotFound(OracleError):
    status, code, title = 404, "not-found", "Not found"


class DecoderUnknown(NotFound):
    code, title = "decoder-unknown", "This client has no such decoder here"


class MethodNotAllowed(OracleError):
    status, code, title = 405, "method-not-allowed", "Method not allowed"


class RequestTimeout(OracleError):
    status, code, title = 408, "request-timeout", "The request did not arrive in time"


class RequestInFlight(OracleError):
    status, code, title = 409, "request-in-flight", "The same request is being answered"


class TooLarge(OracleError):
    status, code, title = 413, "too-large", "Too large"


class IdempotencyConflict(OracleError):
    status, code, title = 422, "idempotency-conflict", "This Idempotency-Key was used with another body"


class UnacceptableValues(OracleError):
    status, code, title = 422, "unacceptable-values", "Unacceptable values"


class RateLimited(OracleError):
    status, code, title = 429, "rate-limited", "Too many requests"


class HeadersTooLarge(OracleError):
    status, code, title = 431, "headers-too-large", "The headers are too large"


class InternalError(OracleError):
    status, code, title = 500, "internal-error", "The server failed"


class Unavailable(OracleError):
    status, code, title = 503, "unavailable", "Temporarily unavailable"


class Overloaded(Unavailable):
    code, title = "overloaded", "More is asked than can be answered now"


class UnexpectedAnswer(OracleError):
    """The peer does not speak this protocol, or not as we do; `status` is what it said, for an unknown error."""

    code, title = "unexpected-answer", "Unexpected answer"


_CLASSES: tuple[type[OracleError], ...] = (
    MalformedRequest,
    Unauthorized,
    Forbidden,
    ClientRevoked,
    DecodersNotAllowed,
    BudgetExhausted,
    NotFound,
    DecoderUnknown,
    MethodNotAllowed,
    RequestTimeout,
    RequestInFlight,
    TooLarge,
    IdempotencyConflict,
    UnacceptableValues,
    RateLimited,
    HeadersTooLarge,
    InternalError,
    Unavailable,
    Overloaded,
)
BY_CODE: dict[str, type[OracleError]] = {cls.code: cls for cls in _CLASSES}
# For servers that are not ours: the status alone decides. The first class of each status is its most general one.
BY_STATUS: dict[int, type[OracleError]] = {
    400: MalformedRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    408: RequestTimeout,
    409: RequestInFlight,
    413: TooLarge,
    422: UnacceptableValues,
    429: RateLimited,
    431: HeadersTooLarge,
    500: InternalError,
    503: Unavailable,
}
_OWN_FIELDS = frozenset({"type", "title", "status", "detail", "error", "code"})


def from_problem(status: int, body: bytes, retry_after: float | None = None) -> OracleError:
    """The error an answer stands for: by its `code`, else by its status; never raises itself.

    Args:
        status: HTTP status, 400 or above.
        body: the answer's body; problem+json, the protocol's `{"error": ...}`, or anything else.
        retry_after: the Retry-After header in seconds, if there was one.
    """
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": body[:500].decode("utf-8", "replace").strip() or f"HTTP status {status} without a body"}
    detail = str(problem.get("detail") or problem.get("error") or f"HTTP status {status}")
    cls = BY_CODE.get(str(problem.get("code"))) or BY_STATUS.get(status)
    if cls is None:
        return UnexpectedAnswer(f"HTTP status {status}: {detail}", retry_after=retry_after, answered_status=status)
    extensions = {str(k): v for k, v in problem.items() if k not in _OWN_FIELDS and k != "retry_after"}
    return cls(detail, retry_after=retry_after, **extensions)
