"""The process never dies of a request: whatever a route did not foresee is logged and answered with 500."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oracle_server.problems import problem_response
from shared.wire.errors import InternalError

log = logging.getLogger(__name__)


class GuardMiddleware:
    """Answers an unforeseen exception of `app` with a problem that gives nothing away; the log has the traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception:
            if scope["type"] != "http" or started:
                raise  # too late for an answer: the server closes the connection
            log.exception("%s %s failed", scope["method"], scope["path"])
            error = InternalError("the server failed to answer: try again, and tell its operator if it stays so")
            await problem_response(error)(scope, receive, send)
