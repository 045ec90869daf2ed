"""Running the application: a socket, uvicorn, and an orderly end.

On SIGTERM or SIGINT readiness turns 503 and new queries are refused with Retry-After, while the socket still listens
so that they are told; those in flight are finished; then the process ends with exit code 0. A second signal ends it at
once.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from oracle_server.app import create_app
from oracle_server.connections import ConnectionLimits, bounded_protocol
from oracle_server.gate import Gate
from oracle_server.service import Service
from oracle_server.settings import Settings
from oracle_server.tls import server_context

log = logging.getLogger(__name__)


class ServeError(Exception):
    """The server cannot listen where it was told to."""


class DrainingServer(uvicorn.Server):
    """uvicorn, except that it closes the gate and waits for the requests inside before it stops listening."""

    def __init__(
        self, config: uvicorn.Config, gate: Gate, drain_timeout: float, on_started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._gate = gate
        self._drain_timeout = drain_timeout
        self._on_started = on_started
        self._deadline = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again once it has ended, and the exit code would not be 0.
        if self._gate.draining:
            self.should_exit = self.force_exit = True
            return
        self._gate.close()
        self._deadline = time.monotonic() + self._drain_timeout

    async def on_tick(self, counter: int) -> bool:
        if self._gate.draining and (self._gate.idle or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def make_server(app: FastAPI, settings: Settings, on_started: Callable[[], None] = lambda: None) -> DrainingServer:
    """A server for an application of `create_app`; `run(sockets=[...])` it.

    Raises:
        TlsError: the certificate or its key cannot be used.
    """
    service: Service = app.state.service
    tls = server_context(settings)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=bounded_protocol(
            ConnectionLimits.of(settings),
            lambda status: service.metrics.requests.labels(str(status)).inc(),
            service.shedder,
        ),
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
    )
    return DrainingServer(config, service.gate, settings.drain_timeout, on_started)


def listen(host: str, port: int, scheme: str = "http") -> tuple[socket.socket, str]:
    """A bound socket and its address as a URL; port 0 takes any free port.

    Raises:
        ServeError: the address is in use, or not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            # Not only bound: without this, two servers that share an address would both believe they have it.
            bound.listen(2048)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ServeError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    name = f"[{host}]" if family == socket.AF_INET6 else host
    return bound, f"{scheme}://{name}:{bound.getsockname()[1]}"


def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until a signal says to stop; `announce` is given the address once it answers.

    Raises:
        PolicyError, ModelError, LedgerError, ServeError, TlsError: as `create_app`, `listen` and `server_context` do.
    """
    server_context(settings)  # before a classifier is loaded that could not be served
    bound, url = listen(settings.host, settings.port, "https" if settings.tls_cert else "http")
    with bound:
        app = create_app(settings)
        log.info("serving '%s' on %s, ledger %s", settings.model_name, url, settings.ledger)
        if settings.policy is not None:
            log.info("policy %s", settings.policy)
        make_server(app, settings, lambda: announce(url)).run(sockets=[bound])
    log.info("stopped")
