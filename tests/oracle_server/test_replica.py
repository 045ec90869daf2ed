"""The application where another server stops it and cancels its requests; driven as such a server does, without one."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from oracle_support import Held, digits
from sqlalchemy import text

from oracle_server.app import create_app
from oracle_server.ledger import Ledger
from oracle_server.oracle import Oracle
from oracle_server.replica import NotStarted, Replica
from oracle_server.replicas import shared_settings
from oracle_server.settings import Settings
from shared.wire import codec, protocol
from shared.wire.errors import Unavailable

ROWS = 4


class Slow(Replica):
    """Computes when it is let go."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(shared_settings(settings))
        self.engine = Held()

    def _build(self) -> FastAPI:
        return create_app(Settings(**self._given), Oracle(self.engine, (1, 8, 8), 3))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(ledger=f"{tmp_path}/ledger.db", signing_key=tmp_path / "signing.key", body_timeout=20)


@contextlib.asynccontextmanager
async def living(replica: Replica) -> AsyncIterator[list[dict[str, Any]]]:
    """The lifespan's events, as a server sends them; yields what is answered."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    told: list[dict[str, Any]] = []

    async def tell(message: Any) -> None:
        told.append(message)

    await events.put({"type": "lifespan.startup"})
    life = asyncio.create_task(replica({"type": "lifespan"}, events.get, tell))
    while not told:
        await asyncio.sleep(0.01)
    yield told
    await events.put({"type": "lifespan.shutdown"})
    await life


def request(key: str) -> tuple[dict[str, Any], bytes]:
    """An inference request's scope and body."""
    encoded = codec.encode_request({"images": digits(ROWS)}, binary=True)
    headers = {
        "authorization": f"Bearer {key}",
        "idempotency-key": "k",
        "content-length": str(encoded.size),
        protocol.JSON_LENGTH_HEADER.lower(): str(encoded.json_length),
    }
    scope = {
        "type": "http",
        "method": "POST",
        "path": protocol.INFER_ROUTE,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    return scope, bytes(encoded.body())


class Client:
    """One request of a client that sends so much of its body and then is gone."""

    def __init__(self, *pieces: dict[str, Any]) -> None:
        self._pieces = list(pieces)
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self._pieces:
            return self._pieces.pop(0)
        await asyncio.Event().wait()  # for ever: a cancelled request hears nothing more
        raise AssertionError

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_request_whose_client_has_gone_is_finished_and_paid(settings: Settings) -> None:
    async def scenario() -> None:
        replica = Slow(settings)
        async with living(replica):
            ledger = replica.service.ledger
            client, key = ledger.add_client("a", 10)
            scope, body = request(key.reveal())
            gone = Client({"type": "http.request", "body": body, "more_body": False})
            task = asyncio.create_task(replica(scope, gone.receive, gone.send))
            await until(lambda: replica.engine.entered.is_set() and ledger.account(client.id).held == ROWS)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            replica.engine.go.set()
            await until(lambda: ledger.account(client.id).held == 0)
            assert ledger.account(client.id).spent == ROWS
            assert gone.sent == []
            again = Client({"type": "http.request", "body": body, "more_body": False})
            await replica(scope, again.receive, again.send)
            headers = dict(again.sent[0]["headers"])
            assert (again.sent[0]["status"], headers[b"query-charge"]) == (200, b"0")

    asyncio.run(scenario())


def test_a_body_that_will_not_end_is_not_waited_for(settings: Settings) -> None:
    """Its place in the queue and its room are free at once, not after `body_timeout`."""

    async def scenario() -> None:
        replica = Slow(settings)
        async with living(replica):
            service = replica.service
            client, key = service.ledger.add_client("a", 10)
            scope, body = request(key.reveal())
            gone = Client({"type": "http.request", "body": body[:100], "more_body": True})
            task = asyncio.create_task(replica(scope, gone.receive, gone.send))
            await until(lambda: service.room.taken == 100)
            task.cancel()
            async with asyncio.timeout(settings.body_timeout / 4):
                await until(lambda: service.gate.idle and service.room.taken == 0)
            assert service.ledger.account(client.id).spent == 0

    asyncio.run(scenario())


def test_what_is_inside_at_the_end_is_finished_before_the_ledger_closes(settings: Settings) -> None:
    async def scenario() -> tuple[int, int]:
        replica = Slow(settings)
        async with living(replica) as told:
            client, key = replica.service.ledger.add_client("a", 10)
            scope, body = request(key.reveal())
            inside = Client({"type": "http.request", "body": body, "more_body": False})
            task = asyncio.create_task(replica(scope, inside.receive, inside.send))
            await until(replica.engine.entered.is_set)
            asyncio.get_running_loop().call_later(0.3, replica.engine.go.set)
        await task
        assert [message["type"] for message in told] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        with pytest.raises(NotStarted):
            _ = replica.service
        return inside.sent[0]["status"], client.id

    status, client_id = asyncio.run(scenario())
    ledger = Ledger.open(settings.ledger, signing_key=settings.signing_key)
    assert status == 200
    assert (ledger.account(client_id).spent, ledger.account(client_id).held) == (ROWS, 0)
    assert ledger.verify().intact
    ledger.close()


def test_it_is_well_as_long_as_its_ledger_can_be_read(settings: Settings) -> None:
    async def scenario() -> None:
        replica = Slow(settings)
        async with living(replica):
            await replica.check()
            with replica.service.ledger._writing.begin() as connection:
                connection.execute(text("ALTER TABLE chain RENAME TO elsewhere"))
            with pytest.raises(Unavailable):
                await replica.check()
            with replica.service.ledger._writing.begin() as connection:
                connection.execute(text("ALTER TABLE elsewhere RENAME TO chain"))

    asyncio.run(scenario())


def test_what_keeps_it_from_starting_is_told(settings: Settings, tmp_path: Path) -> None:
    async def scenario() -> list[dict[str, Any]]:
        given = shared_settings(settings) | {"policy": str(tmp_path / "none.toml")}
        async with living(Replica(given)) as told:
            return told

    (failed,) = asyncio.run(scenario())
    assert failed["type"] == "lifespan.startup.failed"
    assert "none.toml" in failed["message"]
    assert not Path(settings.ledger).exists()


def test_it_can_be_sent_before_it_is_started(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORACLE_MAX_BATCH_ROWS", "7")
    replica = pickle.loads(pickle.dumps(Replica(shared_settings(settings))))
    given = Settings(**replica._given)
    assert given == settings.model_copy(
        update={"share_decoders": True, "ledger": f"sqlite:///{settings.ledger}", "engine_cache": given.engine_cache}
    )  # and not what the other machine's environment says
