from __future__ import annotations

from pathlib import Path

import pytest
from databases import BACKENDS, ledger_url
from oracle_support import pay
from sqlalchemy import Connection, Engine, inspect, text

from oracle_server import tables
from oracle_server.database import LedgerError, connect, parse_url
from oracle_server.ledger import Ledger
from oracle_server.migrations import MIGRATIONS, Migration, migrate
from shared.wire.errors import ClientRevoked

NAMED = (tables.clients, tables.entries, tables.chain, tables.requests, tables.servers)

# What version 0.1 wrote: charges without reservations, a refund, a second budget, a revoked client.
VERSION_1 = """
INSERT INTO clients (id, name, key_id, key_hash, budget, spent, created_at, revoked_at) VALUES
    (1, 'a', '00000000000000aa', 'hash-a', 25, 7, '2026-01-01T00:00:00.000Z', NULL),
    (2, 'b', '00000000000000bb', 'hash-b', 5, 0, '2026-01-01T00:00:01.000Z', '2026-01-01T00:00:09.001Z');
INSERT INTO entries (seq, at, client_id, kind, rows, amount, idempotency_key, body_sha256, refers_to) VALUES
    (1, '2026-01-01T00:00:00.000Z', 1, 'budget', 0, 10, NULL, NULL, NULL),
    (2, '2026-01-01T00:00:01.000Z', 2, 'budget', 0, 5, NULL, NULL, NULL),
    (3, '2026-01-01T00:00:02.000Z', 1, 'charge', 4, NULL, 'kept', 'sha-1', NULL),
    (4, '2026-01-01T00:00:03.000Z', 1, 'charge', 2, NULL, 'failed', 'sha-2', NULL),
    (5, '2026-01-01T00:00:04.000Z', 1, 'refund', -2, NULL, 'failed', 'sha-2', 4),
    (6, '2026-01-01T00:00:05.000Z', 1, 'charge', 3, NULL, NULL, 'sha-3', NULL),
    (7, '2026-01-01T00:00:06.000Z', 1, 'budget', 0, 25, NULL, NULL, NULL),
    (8, '2026-01-01T00:00:09.000Z', 2, 'revoke', 0, NULL, NULL, NULL, NULL);
INSERT INTO standing_keys (client_id, idempotency_key, seq) VALUES (1, 'kept', 3);
"""


def database(url: str) -> Engine:
    return connect(parse_url(url), create=True)


def written_by_version_1(url: str) -> None:
    engine = database(url)
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS[:1])
        for statement in filter(str.strip, VERSION_1.split(";")):
            connection.execute(text(statement))
    engine.dispose()


def test_a_blank_database_gets_every_table_that_queries_name(url: str) -> None:
    engine = database(url)
    with engine.begin() as connection:
        assert migrate(connection) == [step.number for step in MIGRATIONS]
        assert migrate(connection) == []
        for table in NAMED:
            found = {column["name"] for column in inspect(connection).get_columns(table.name)}
            assert found == set(table.c.keys())
    engine.dispose()


def test_a_ledger_of_version_1_is_taken_over_whole(url: str) -> None:
    written_by_version_1(url)
    ledger = Ledger.open(url)
    assert [(c.name, c.budget, c.spent, c.held) for c in ledger.list_clients()] == [("a", 25, 7, 0), ("b", 5, 0, 0)]
    verification = ledger.verify()
    assert verification.findings == ()
    assert verification.entries == 10  # its eight, and one a client that says who it is
    assert ledger.reserve(1, 4, "kept", "sha-1").paid is not None
    assert pay(ledger, 1, 2, "failed", "sha-2").charged == 2  # a refund had freed the key
    assert pay(ledger, 1, 16).remaining == 0
    with pytest.raises(ClientRevoked):
        ledger.reserve(2, 1, None, "sha")
    assert ledger.verify().intact
    ledger.close()
    again = Ledger.open(url, create=False)
    assert again.verify().intact
    again.close()


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_each_older_schema_gets_the_later_steps(url: str, version: int) -> None:
    engine = database(url)
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS[:version])
        assert migrate(connection) == [step.number for step in MIGRATIONS[version:]]
        assert {table.name for table in NAMED} <= set(inspect(connection).get_table_names())
    engine.dispose()


def test_a_later_step_keeps_the_rows_and_an_older_program_refuses(ledger: Ledger, url: str) -> None:
    def add_a_column(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE clients ADD COLUMN remark VARCHAR(10)"))

    later = (*MIGRATIONS, Migration(MIGRATIONS[-1].number + 1, "a remark", add_a_column))
    ledger.add_client("a", 10)
    with ledger._writing.begin() as connection:
        assert migrate(connection, later) == [later[-1].number]
        assert connection.execute(text("SELECT name, remark FROM clients")).all() == [("a", None)]
    with pytest.raises(LedgerError, match="newer"):
        Ledger.open(url)


def test_a_step_that_fails_changes_nothing(url: str) -> None:
    def fail(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE clients ADD COLUMN remark VARCHAR(10)"))
        raise RuntimeError("half way")

    engine = database(url)
    with engine.begin() as connection:
        migrate(connection)
    with pytest.raises(RuntimeError), engine.begin() as connection:
        migrate(connection, (*MIGRATIONS, Migration(len(MIGRATIONS) + 1, "fails", fail)))
    with engine.begin() as connection:
        assert "remark" not in {column["name"] for column in inspect(connection).get_columns("clients")}
        assert migrate(connection) == []
    engine.dispose()


def test_steps_are_numbered_without_a_gap() -> None:
    assert [step.number for step in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ledger_whose_key_is_lost_can_be_read_and_not_written(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url, key, other = ledger_url(tmp_path, backend), tmp_path / "signing.key", tmp_path / "other.key"
    ledger = Ledger.open(url, signing_key=key)
    assert key.stat().st_mode & 0o777 == 0o600
    ledger.add_client("a", 10)
    ledger.close()
    key.rename(other)
    keyless = Ledger.open(url, signing_key=key)
    assert [each.name for each in keyless.list_clients()] == ["a"]
    assert keyless.verify(bytes.fromhex(keyless.identity.public_key)).intact
    for write in (lambda: keyless.set_budget("a", 11), lambda: keyless.serve(), keyless.verify):
        with pytest.raises(LedgerError, match="signing key"):
            write()
    keyless.close()
    Ledger.open(str(tmp_path / "another.db"), signing_key=key).close()  # which makes a key
    with pytest.raises(LedgerError, match="not this ledger's"):
        Ledger.open(url, signing_key=key)
    key.write_text("not a key")
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger.open(url, signing_key=key)
    Ledger.open(url, signing_key=other).close()
