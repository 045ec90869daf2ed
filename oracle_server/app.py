"""The application: settings in, wired parts out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware

from oracle_server import routes_dashboard, routes_decoders
from oracle_server.admission import Admission
from oracle_server.batching import Batcher
from oracle_server.decoder_store import DecoderStore
from oracle_server.decoders import Decoders
from oracle_server.documentation import ANYWHERE, DESCRIPTION, TITLE, openapi
from oracle_server.draining import DrainMiddleware
from oracle_server.gate import Gate
from oracle_server.guard import GuardMiddleware
from oracle_server.ledger import Ledger
from oracle_server.metrics import Metrics, MetricsMiddleware
from oracle_server.oracle import Oracle, build_oracle
from oracle_server.policy.policy import Policy
from oracle_server.policy.spec import load_policy
from oracle_server.problems import add_problem_handlers
from oracle_server.room import BodyRoom
from oracle_server.routes import router
from oracle_server.service import Service
from oracle_server.settings import Settings
from oracle_server.shedding import Shedder
from oracle_server.sweeping import sweep
from oracle_server.watch import Watch
from shared.version import VERSION

log = logging.getLogger(__name__)


def create_app(settings: Settings, oracle: Oracle | None = None) -> FastAPI:
    """An application that is ready to answer; its parts are at `app.state.service`.

    Args:
        settings: what to serve and within which limits.
        oracle: answers instead of the model that the settings name, and has its task.

    Raises:
        PolicyError: the policy cannot be used.
        ModelError: the model cannot be loaded.
        LedgerError: the ledger cannot be opened.
    """
    spec = load_policy(settings.policy, settings.task, votes=settings.smooth is not None)
    policy = Policy(spec, max_batch_rows=settings.max_batch_rows)
    oracle = oracle or build_oracle(settings)  # before the ledger, which a wrong model should not leave behind
    ledger = Ledger.open(settings.ledger, signing_key=settings.signing_key, timeout=settings.ledger_timeout)
    try:
        released = ledger.serve()
    except BaseException:
        ledger.close()
        raise
    if released:
        log.warning("ledger: released %d reservations that a server before this one left open", released)
    watch = Watch(ledger)
    room = BodyRoom(settings.max_bodies_bytes)
    metrics = Metrics(ledger, watch)
    batcher = Batcher(
        oracle.predict,
        oracle.block,
        lanes=oracle.lanes,
        wait=settings.batch_wait / 1000,
        on_block=metrics.computed,
        on_start=metrics.queue_wait.observe,
    )
    admission = Admission(settings.max_queue_rows, settings.max_queue_requests, lambda: batcher.rate)
    metrics.queue_rows.set_function(lambda: admission.rows)
    metrics.queue_requests.set_function(lambda: admission.requests)
    gate = Gate()
    # Half of it for a body within its limit, half to let go of one beyond it.
    max_drained = 2 * settings.max_body_bytes
    shedder = Shedder(
        admission,
        gate,
        metrics,
        image_shape=oracle.image_shape,
        max_rows=settings.max_batch_rows,
        max_body=max_drained,
    )
    store = DecoderStore(settings) if settings.allow_decoders and settings.share_decoders else None
    decoders = Decoders(settings, oracle.image_shape, store)
    service = Service(
        settings, oracle, ledger, metrics, policy, watch, room, decoders, gate, batcher, admission, shedder
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        watch.start()
        sweeping = asyncio.create_task(sweep(ledger))
        yield
        sweeping.cancel()
        service.close()

    app = FastAPI(
        title=TITLE,
        description=DESCRIPTION,
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # Swagger's page comes from a content delivery network; /docs is ours
        redoc_url=None,
        responses=ANYWHERE,
        middleware=[  # the first is the outermost
            Middleware(MetricsMiddleware, metrics=service.metrics),
            Middleware(DrainMiddleware, limit=max_drained, timeout=settings.body_timeout),
            Middleware(GuardMiddleware),
        ],
    )
    app.state.service = service
    add_problem_handlers(app)
    app.include_router(router)
    app.include_router(routes_dashboard.router)
    app.include_router(routes_decoders.router)
    document = openapi(app)
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's way of changing it
    return app
