from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from defender_support import MAX_ROWS, Trained, certify_here, tiny, train_here
from oracle_support import Caller, Running, running
from reconstruction_support import write_reconstructor
from torch import nn

from defender_client.oracle_client import RemoteOracle
from defender_client.whitebox import WhiteBoxSource, load_whitebox
from oracle_server.loading import load_classifier
from oracle_server.settings import Settings


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The digits classifier, live, with a real ledger."""
    ledger = tmp_path_factory.mktemp("oracle") / "ledger.db"
    with running(Settings(ledger=str(ledger), max_batch_rows=MAX_ROWS)) as started:
        yield started


@pytest.fixture
def caller(server: Running) -> Caller:
    """A client of the live server with plenty of queries."""
    return server.caller(10**6)


@pytest.fixture
def oracle(server: Running, caller: Caller) -> Iterator[RemoteOracle]:
    """The live server as the client sees it."""
    with RemoteOracle(server.url, caller.key, run_id="run", retry_seconds=20) as remote:
        yield remote


@pytest.fixture(scope="session")
def classifier() -> nn.Module:
    """What the server hides: images [n, 1, 8, 8] -> logits [n, 10]."""
    return load_classifier(Settings()).module


@pytest.fixture(scope="session")
def trained(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """To be looked at, not touched: tests that change it make a copy."""
    folder = tmp_path_factory.mktemp("trained")
    caller, config, run = server.caller(10**6), tiny(folder), folder / "run"
    train_here(config, run, server.url, caller.key)
    certify_here(config, run, server.url, caller.key)
    return Trained(run, config, caller)


# --- an oracle that hides a reconstructor -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the reconstructor."""
    return write_reconstructor(tmp_path_factory.mktemp("weights") / "reconstructor.safetensors")


@pytest.fixture(scope="session")
def reconstructing(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Running]:
    """The reconstructor, live."""
    ledger = tmp_path_factory.mktemp("oracle") / "ledger.db"
    settings = Settings(ledger=str(ledger), task="reconstruction", weights=str(weights), allow_decoders=True)
    with running(settings) as started:
        yield started


@pytest.fixture
def payer(reconstructing: Running) -> Caller:
    """A client of it with plenty of queries."""
    return reconstructing.caller(10**6)


@pytest.fixture(scope="session")
def reconstructor(weights: Path) -> nn.Module:
    """A copy of it: images [n, 1, 8, 8] -> flat images [n, 64]."""
    return load_whitebox(WhiteBoxSource(weights), (1, 8, 8), 64, "reconstruction").module
