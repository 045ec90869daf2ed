"""No answer is sent before the request's body has been read.

A client that is still sending when the answer comes and the connection closes sees a reset and never the answer. So
whatever a route left unread is read and dropped first, in constant memory and within bounds; only past those bounds is
the answer sent at once, with `Connection: close`.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class DrainMiddleware:
    """Reads a body to its end before the answer starts.

    Args:
        app: what answers.
        limit: bytes of a body that are read in all, whether kept or dropped.
        timeout: seconds after the start of the request until which a body is waited for.
    """

    def __init__(self, app: ASGIApp, *, limit: int, timeout: float) -> None:
        self._app = app
        self._limit = limit
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        finished = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        received = 0
        deadline = time.monotonic() + self._timeout

        async def counting_receive() -> Message:
            nonlocal finished, received
            message = await receive()
            received += len(message.get("body", b""))
            finished = finished or not message.get("more_body", False)  # a disconnect ends the body, too
            return message

        async def drain() -> None:
            while not finished and received < self._limit:
                await counting_receive()

        async def draining_send(message: Message) -> None:
            if message["type"] == "http.response.start" and not finished:
                try:
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        await drain()
                except TimeoutError:
                    pass
                if not finished:
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self._app(scope, counting_receive, draining_send)
