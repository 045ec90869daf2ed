from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from databases import BACKENDS, ledger_url
from oracle_support import Caller, Running, running

from oracle_server.ledger import Ledger
from oracle_server.settings import Settings

MAX_ROWS, MAX_BODY = 64, 2**20


@pytest.fixture(scope="session", params=BACKENDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The digits classifier, live, with limits small enough to be reached; over either database."""
    folder = tmp_path_factory.mktemp("oracle")
    settings = Settings(
        ledger=ledger_url(folder, request.param),
        signing_key=folder / "signing.key",
        max_batch_rows=MAX_ROWS,
        max_body_bytes=MAX_BODY,
        body_timeout=2.0,
        allow_decoders=True,
    )
    with running(settings) as started:
        yield started


@pytest.fixture
def caller(server: Running) -> Caller:
    """A client of the live server with 10,000 queries."""
    return server.caller()


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a ledger may be made, in either database; its signing key goes to `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return ledger_url(tmp_path, request.param)


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    """An empty ledger of its own, in either database."""
    opened = Ledger.open(url)
    yield opened
    opened.close()
