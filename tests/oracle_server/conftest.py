from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle_support import Caller, Running, running

from oracle_server.ledger import Ledger
from oracle_server.settings import Settings

MAX_ROWS, MAX_BODY = 64, 2**20


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The digits classifier, live, with limits small enough to be reached."""
    ledger = tmp_path_factory.mktemp("oracle") / "ledger.db"
    settings = Settings(ledger=str(ledger), max_batch_rows=MAX_ROWS, max_body_bytes=MAX_BODY, body_timeout=2.0)
    with running(settings) as started:
        yield started


@pytest.fixture
def caller(server: Running) -> Caller:
    """A client of the live server with 10,000 queries."""
    return server.caller()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger in a file of its own."""
    opened = Ledger.open(str(tmp_path / "ledger.db"))
    yield opened
    opened.close()
