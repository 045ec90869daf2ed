"""The application: settings in, wired parts out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware

from oracle_server.documentation import DESCRIPTION, TITLE
from oracle_server.draining import DrainMiddleware
from oracle_server.guard import GuardMiddleware
from oracle_server.ledger import Ledger
from oracle_server.metrics import Metrics, MetricsMiddleware
from oracle_server.oracle import Oracle, build_oracle
from oracle_server.problems import add_problem_handlers
from oracle_server.routes import router
from oracle_server.service import Service
from oracle_server.settings import Settings
from shared.version import VERSION


def create_app(settings: Settings, oracle: Oracle | None = None) -> FastAPI:
    """An application that is ready to answer; its parts are at `app.state.service`.

    Args:
        settings: what to serve and within which limits.
        oracle: answers instead of the classifier that the settings name.

    Raises:
        ModelError: the classifier cannot be loaded.
        LedgerError: the ledger cannot be opened.
    """
    ledger = Ledger.open(settings.ledger)
    service = Service(settings, oracle or build_oracle(settings), ledger, Metrics(ledger))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title=TITLE,
        description=DESCRIPTION,
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        middleware=[  # the first is the outermost
            Middleware(MetricsMiddleware, metrics=service.metrics),
            # Half of it for a body within its limit, half to let go of one beyond it.
            Middleware(DrainMiddleware, limit=2 * settings.max_body_bytes, timeout=settings.body_timeout),
            Middleware(GuardMiddleware),
        ],
    )
    app.state.service = service
    add_problem_handlers(app)
    app.include_router(router)
    return app
