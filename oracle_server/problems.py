"""Errors as answers: problem+json (RFC 9457) that also carries the protocol's `error` string. The one place for it."""

from __future__ import annotations

import math

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from oracle_server.refusals import REFUSAL
from shared.wire.errors import (
    BY_STATUS,
    PROBLEM_CONTENT_TYPE,
    InternalError,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    OracleError,
    Overloaded,
    Unauthorized,
    Unavailable,
)


class Problem(JSONResponse):
    """An answer that refuses; on its way out it leaves its code in the request's state, where `metrics` counts it."""

    media_type = PROBLEM_CONTENT_TYPE

    def __init__(self, error: OracleError, headers: dict[str, str]) -> None:
        super().__init__(error.problem(), error.status, headers)
        self._code = error.code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[REFUSAL] = self._code
        await super().__call__(scope, receive, send)


def problem_response(error: OracleError) -> Response:
    """The answer that says `error`."""
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    # Not of an overload: to connect again costs both sides more than the refusal did.
    if isinstance(error, Unavailable) and not isinstance(error, Overloaded):
        headers["Connection"] = "close"  # so that the next attempt may reach another replica
    return Problem(error, headers)


def add_problem_handlers(app: FastAPI) -> None:
    """Make every error of `app`'s routes a problem, the framework's own included."""

    @app.exception_handler(OracleError)
    async def refused(_request: Request, error: OracleError) -> Response:
        return problem_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem_response(MalformedRequest(f"{where}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        answer = problem_response(_from_framework(request, error))
        answer.headers.update(error.headers or {})
        return answer


def _from_framework(request: Request, error: HTTPException) -> OracleError:
    path = request.url.path
    if error.status_code == NotFound.status:
        return NotFound(f"there is no {path} here: /docs lists what there is")
    if error.status_code == MethodNotAllowed.status:
        return MethodNotAllowed(f"{path} does not take {request.method}")
    return BY_STATUS.get(error.status_code, InternalError)(str(error.detail))
