"""The application inside somebody else's server, which is stopped by lifespan events and cancels what it gave up on.

Under uvicorn a request whose client has gone is finished and paid, as if the client had waited, and its answer can be
had for free under its Idempotency-Key. Ray Serve cancels such a request instead, at whatever step it is, and a
reservation that is cancelled between two steps is one that a living server would hold for good. So here a request runs
in a task of its own, which is never cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Receive, Scope, Send

from oracle_server.settings import Settings

if TYPE_CHECKING:  # they take torch with them, and whoever only sends a replica somewhere does without
    from fastapi import FastAPI

    from oracle_server.service import Service

log = logging.getLogger(__name__)


class NotStarted(Exception):
    """A request came before the lifespan's startup, or after its end."""


class Replica:
    """An ASGI application that is built where it runs: until its lifespan starts it is settings, and so can be sent.

    At the lifespan's end new queries are refused and those inside are finished, for at most `drain_timeout` seconds,
    before the ledger is closed.

    Args:
        settings: fields of `Settings`, as JSON has them. What is not given is read from this machine's environment.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._given = dict(settings)
        self._app: FastAPI | None = None
        self._running: set[asyncio.Task[None]] = set()

    @property
    def service(self) -> Service:
        """The parts of the running application. Raises `NotStarted`."""
        service: Service = self._started().state.service
        return service

    async def check(self) -> None:
        """Raise `Unavailable` where the ledger cannot be read: then nothing can be answered here."""
        service = self.service
        await service.on_ledger(service.ledger.head)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        exchange = _Exchange(receive, send)
        task = asyncio.create_task(self._answer(scope, exchange))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            exchange.leave()
            raise

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            await self._started()(scope, exchange.receive, exchange.send)
        except Exception:
            if not exchange.left:
                raise
            log.exception("a request failed whose client had gone")  # nobody else would say so

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            app = self._build()
        except Exception as error:
            log.exception("the oracle cannot be started")
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            return
        async with app.router.lifespan_context(app):
            self._app = app
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._drain(self.service)
        self._app = None
        await send({"type": "lifespan.shutdown.complete"})

    def _build(self) -> FastAPI:
        from oracle_server.app import create_app

        return create_app(Settings(**self._given))

    async def _drain(self, service: Service) -> None:
        service.gate.close()
        if self._running:
            await asyncio.wait(self._running, timeout=service.settings.drain_timeout)

    def _started(self) -> FastAPI:
        if self._app is None:
            raise NotStarted("the oracle is not started, or stopped already")
        return self._app


class _Exchange:
    """A request's `receive` and `send`, which go on without the client once it has left."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._waiting: asyncio.Future[Message] | None = None
        self.left = False

    def leave(self) -> None:
        """The client is gone: nothing more comes of it, and nothing is sent to it."""
        self.left = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def receive(self) -> Message:
        if not self.left:
            self._waiting = asyncio.ensure_future(self._receive())
            try:
                return await self._waiting
            except asyncio.CancelledError:
                if not self.left:
                    raise
            finally:
                self._waiting = None
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self.left:
            await self._send(message)
