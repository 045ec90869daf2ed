"""The ledger's check of itself: 2,000 random tamperings of its tables are all found, and what a thief would try.

With the 8,000 of `tests/shared/test_audit_export.py` they are the 10,000 that this project promises.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from databases import BACKENDS, ledger_url
from oracle_support import digits, pay, refused, running
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from oracle_server.book import Sweep
from oracle_server.chain import ChainBroken
from oracle_server.cli import app
from oracle_server.database import LedgerError
from oracle_server.exporting import export_lines
from oracle_server.ledger import Ledger, Reservation
from oracle_server.settings import Settings
from oracle_server.verification import verify
from shared.audit.chain import Entry, genesis, link
from shared.audit.export import examine
from shared.audit.signatures import Receipt, read_public_key
from shared.wire.errors import BudgetExhausted, ClientRevoked, IdempotencyConflict, OracleError, RequestInFlight

TAMPERINGS = 2_000
TABLES = ("clients", "entries", "chain", "requests")
ENTRY = tuple(Entry.__dataclass_fields__)


def fill(ledger: Ledger) -> None:
    """Clients and an administrator; charges with and without a key, a release, a revocation, an open reservation."""
    ann, _ = ledger.add_client("ann", 20)
    bob, _ = ledger.add_client("bob", 20)
    ledger.add_client("root", 0, role="admin")
    pay(ledger, ann.id, 4, "k1", "ab" * 32)
    pay(ledger, bob.id, 3)
    ledger.release(ledger.reserve(ann.id, 2, "k2", "cd" * 32), "for a test")
    pay(ledger, ann.id, 2, "k2", "cd" * 32)
    ledger.set_budget("ann", 30)
    ledger.revoke("bob")
    ledger.reserve(ann.id, 5, "k3", "ef" * 32)


# --- a naive model of the same account -------------------------------------------------------------------------------


@dataclass
class Model:
    """One client, as plainly as it can be said."""

    budget: int
    spent: int = 0
    revoked: bool = False
    open: dict[str, int] = field(default_factory=dict)
    paid: dict[str, int] = field(default_factory=dict)

    def refusal(self, key: str, rows: int) -> type[OracleError] | None:
        """What a request must be refused with; None if it must be admitted, or replayed."""
        if self.revoked:
            return ClientRevoked
        known = {**self.open, **self.paid}
        if key in known:
            return IdempotencyConflict if known[key] != rows else RequestInFlight if key in self.open else None
        if rows > max(0, self.budget - self.spent):
            return BudgetExhausted
        return OracleError if rows > self.budget - self.spent - sum(self.open.values()) else None


@pytest.mark.parametrize("seed", [1, 2])
def test_any_operations_leave_what_a_naive_model_says(ledger: Ledger, url: str, seed: int) -> None:
    draw = random.Random(seed)
    second = Ledger.open(url)
    models: dict[str, Model] = {}
    ids: dict[str, int] = {}
    held: dict[tuple[str, str], tuple[Ledger, Reservation]] = {}
    for _ in range(150):
        server = draw.choice((ledger, second))
        doing = draw.choice(("add", "budget", "revoke", *["request"] * 6, *["settle"] * 4))
        if doing == "add" or not models:
            name = f"client {len(models)}"
            models[name] = Model(draw.randrange(40))
            ids[name] = server.add_client(name, models[name].budget)[0].id
        name = draw.choice(list(models))
        model = models[name]
        if doing == "budget":
            model.budget = draw.randrange(60)
            server.set_budget(name, model.budget)
        elif doing == "revoke" and draw.random() < 0.2:
            model.revoked = True
            server.revoke(name)
        elif doing == "request":
            key, rows = f"key {draw.randrange(12)}", draw.randrange(1, 9)
            refusal = model.refusal(key, rows)
            if refusal is not None:
                with pytest.raises(refusal):
                    server.reserve(ids[name], rows, key, "sha")
                continue
            reservation = server.reserve(ids[name], rows, key, "sha")
            assert (reservation.paid is not None) == (key in model.paid)
            if reservation.paid is None:
                model.open[key] = rows
                held[name, key] = (server, reservation)
        elif doing == "settle" and held:
            (name, key), (server, reservation) = held.popitem()
            model = models[name]
            rows = model.open.pop(key)
            if draw.random() < 0.6:
                receipt = Receipt.parse(server.receipt(server.charge(reservation)))
                assert (receipt.entry.rows, receipt.entry.idempotency_key) == (rows, key)
                model.paid[key] = rows
                model.spent += rows
            else:
                server.release(reservation, "for a test")
    found = ledger.verify()
    assert found.findings == ()
    told = {a.name: (a.budget, a.spent, a.held, a.revoked_at is not None) for a in found.accounts.clients.values()}
    assert told == {
        name: (model.budget, model.spent, sum(model.open.values()), model.revoked) for name, model in models.items()
    }
    lines = [line.encode() + b"\n" for line in export_lines(ledger)]
    assert examine(lines, read_public_key(ledger.identity.public_key)).findings == ()
    second.close()


# --- 2,000 times at random -------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Iterator[tuple[Connection, bytes]]:
    """A connection to a ledger that ignores its constraints, as a thief's would, and the ledger's key."""
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    fill(ledger)
    key = read_public_key(ledger.identity.public_key)
    ledger.close()
    engine = create_engine(f"sqlite:///{tmp_path / 'ledger.db'}")
    with engine.connect() as connection:
        assert verify(connection, key).intact
        yield connection, key
    engine.dispose()


def dump(connection: Connection) -> str:
    """Everything that counts, types included."""
    tables = [connection.exec_driver_sql(f"SELECT * FROM {table}").all() for table in TABLES]
    return repr([sorted(map(tuple, rows), key=repr) for rows in tables])


def caught(connection: Connection, key: bytes) -> bool:
    try:
        return not verify(connection, key).intact
    except (LedgerError, OracleError, DBAPIError):
        return True


def rows_of(connection: Connection, table: str) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(text(f"SELECT rowid AS at_row, * FROM {table}")).mappings()]


def put(connection: Connection, table: str, row: int, **values: object) -> None:
    assignments = ", ".join(f'"{name}" = :{name}' for name in values)
    connection.execute(text(f"UPDATE {table} SET {assignments} WHERE rowid = :at_row"), values | {"at_row": row})


def rehash(connection: Connection, ledger: str, key: bytes) -> None:
    """All hashes made anew, and the end set to them: all that can be done without the key."""
    value = genesis(ledger, key)
    hashes = []
    for *entry, row in connection.exec_driver_sql(f"SELECT {', '.join(ENTRY)}, rowid FROM entries ORDER BY seq"):
        value = link(value, Entry(*entry).leaf())
        hashes.append((value.hex(), row))
    if hashes:
        connection.exec_driver_sql("UPDATE entries SET hash = ? WHERE rowid = ?", hashes)
        connection.exec_driver_sql("UPDATE chain SET hash = ?, seq = (SELECT max(seq) FROM entries)", hashes[-1][:1])


POOL: list[object] = [
    None,
    0,
    1,
    2,
    3,
    7,
    -1,
    0.5,
    "",
    "x",
    "5",
    b"\xff",
    "admin",
    "charge",
    "release",
    "k1",
    "00" * 32,
]


def tamper(connection: Connection, draw: random.Random, key: bytes) -> None:
    table = draw.choice(TABLES)
    rows = rows_of(connection, table)
    row, other = draw.choice(rows), draw.choice(rows)
    columns = [name for name in row if name != "at_row"]
    column = draw.choice(columns)
    match draw.randrange(6):
        case 0 | 1:
            near = [row[column] + 1, row[column] - 1] if isinstance(row[column], int) else []
            value = draw.choice([*POOL, other[column], row[draw.choice(columns)], *near, *near])
            put(connection, table, row["at_row"], **{column: value})
        case 2:
            connection.execute(text(f"DELETE FROM {table} WHERE rowid = :at"), {"at": row["at_row"]})
        case 3:
            new = {name: row[name] for name in columns} | {column: draw.choice([*POOL, -5, 99])}
            first = columns[0]  # the primary key, in every table
            new[first] = draw.choice((0, -5, 99, len(rows) + 1)) if new[first] == row[first] else new[first]
            names = ", ".join(f'"{name}"' for name in new)
            values = ", ".join(f":{name}" for name in new)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), new)
        case 4:
            swapped = draw.sample(columns, draw.randrange(1, len(columns)))
            put(connection, table, row["at_row"], **{name: other[name] for name in swapped})
            put(connection, table, other["at_row"], **{name: row[name] for name in swapped})
        case 5:
            connection.execute(text(f"DELETE FROM {table} WHERE rowid >= :at"), {"at": row["at_row"]})
    if draw.random() < 0.3:
        ledger = connection.execute(text("SELECT ledger FROM chain")).scalar()
        if isinstance(ledger, str) and ledger.isascii():
            rehash(connection, ledger, key)


def test_no_random_tampering_goes_unnoticed(written: tuple[Connection, bytes]) -> None:
    connection, key = written
    draw = random.Random(20260102)
    before, done = dump(connection), 0
    unnoticed = []
    while done < TAMPERINGS:
        state = draw.getstate()
        try:
            tamper(connection, draw, key)
            changed = dump(connection) != before
        except (DBAPIError, TypeError):  # the database, or JSON, takes no such thing
            changed = False
        if changed:
            done += 1
            if not caught(connection, key):
                unnoticed.append((state, dump(connection)))
        connection.rollback()
    assert [told for _, told in unnoticed] == []
    assert dump(connection) == before


# --- what a thief would try ------------------------------------------------------------------------------------------

EDITS = {
    "another's key": "UPDATE clients SET key_hash = (SELECT key_hash FROM clients WHERE id = 2) WHERE name = 'ann'",
    "an administrator": "UPDATE clients SET role = 'admin' WHERE name = 'ann'",
    "a budget raised": "UPDATE clients SET budget = 1000000 WHERE name = 'ann'",
    "spent less": "UPDATE clients SET spent = 0 WHERE name = 'ann'",
    "held less": "UPDATE clients SET held = 0 WHERE name = 'ann'",
    "revoked no more": "UPDATE clients SET revoked_at = NULL WHERE name = 'bob'",
    "revoked at another time": "UPDATE clients SET revoked_at = '2000' WHERE name = 'bob'",
    "older than it is": "UPDATE clients SET created_at = '2000' WHERE name = 'ann'",
    "a client deleted": "DELETE FROM clients WHERE name = 'root'",
    "a client slipped in": "INSERT INTO clients (id, name, key_id, key_hash, budget, spent, created_at) "
    "SELECT 99, 'eve', 'eve', key_hash, budget, 0, created_at FROM clients WHERE name = 'ann'",
    "a key free to be paid again": "DELETE FROM requests WHERE idempotency_key = 'k1'",
    "a reservation forgotten": "DELETE FROM requests WHERE idempotency_key = 'k3'",
    "a reservation of another server": "UPDATE requests SET server = 'x' WHERE idempotency_key = 'k3'",
    "a reservation paid": "UPDATE requests SET charge = 9 WHERE idempotency_key = 'k3'",
    "a request for another body": "UPDATE requests SET body_sha256 = 'x' WHERE idempotency_key = 'k1'",
    "a request of fewer rows": "UPDATE requests SET rows = 1 WHERE idempotency_key = 'k3'",
    "an entry of another time": "UPDATE entries SET at = '2000' WHERE seq = 5",
    "an entry below the first": "INSERT INTO entries (seq, at, client_id, kind, rows) VALUES (0, '', 1, 'charge', -9)",
    "an entry far below": "INSERT INTO entries (seq, at, client_id, kind, rows) VALUES (-9, '', 1, 'charge', -9)",
    "an entry that is text": "UPDATE entries SET rows = 'many' WHERE seq = 7",
    "an entry that is bytes": "UPDATE entries SET note = x'ff' WHERE seq = 7",
    "a hash that is none": "UPDATE entries SET hash = 'é' WHERE seq = 7",
    "the end of another time": "UPDATE chain SET at = '2000'",
    "the end at another entry": "UPDATE chain SET seq = seq - 1",
    "an end without a signature": "UPDATE chain SET signature = ''",
    "the end's row under another number": "UPDATE chain SET id = 2",
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edits_are_seen(tmp_path: Path, edit: str) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger.open(str(path))
    fill(ledger)
    ledger.close()
    run = CliRunner()
    assert run.invoke(app, ["ledger", "verify", "--ledger", str(path)]).exit_code == 0
    with sqlite3.connect(path) as connection:
        assert connection.execute(edit).rowcount == 1
    result = run.invoke(app, ["ledger", "verify", "--ledger", str(path)])
    assert result.exit_code in (1, 2), result.output
    assert len(result.stderr.strip()) > 20
    assert "Traceback" not in result.output


def alter(ledger: Ledger, *statements: str) -> None:
    with ledger._writing.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def test_what_was_changed_is_not_signed_by_the_next_charge(ledger: Ledger) -> None:
    """A thief without the key makes all hashes anew, and waits for the server to sign what follows."""
    fill(ledger)
    ann, key = ledger.get_client("ann"), read_public_key(ledger.identity.public_key)
    alter(ledger, "UPDATE entries SET amount = 1000000 WHERE seq = 2")
    with ledger._writing.begin() as connection:
        value = genesis(ledger.identity.ledger, key)
        for row in connection.execute(text(f"SELECT {', '.join(ENTRY)} FROM entries ORDER BY seq")).mappings().all():
            value = link(value, Entry(**row).leaf())
            connection.execute(
                text("UPDATE entries SET hash = :hash WHERE seq = :seq"), {"hash": value.hex(), "seq": row["seq"]}
            )
        connection.execute(text("UPDATE chain SET hash = :hash"), {"hash": value.hex()})
    before = ledger.head()
    for write in (
        lambda: ledger.reserve(ann.id, 1, None, "sha"),
        lambda: ledger.submit(Sweep()).result(),
        lambda: ledger.set_budget("ann", 5),
        lambda: ledger.add_client("eve", 5),
    ):
        with pytest.raises(ChainBroken, match="not signed"):
            write()
    assert ledger.head() == before
    assert not ledger.verify().intact


def test_an_older_state_that_was_put_back_is_not_gone_on_from(ledger: Ledger, url: str) -> None:
    """Its end is signed, and all is as it once was: only who has seen more can tell. A server that runs has."""
    fill(ledger)
    ann = ledger.get_client("ann")
    older = ledger.head()
    pay(ledger, ann.id, 1, "k4")
    alter(
        ledger,
        f"DELETE FROM entries WHERE seq = {older.head.seq + 2}",
        f"DELETE FROM entries WHERE seq = {older.head.seq + 1}",
        f"DELETE FROM requests WHERE seq > {older.head.seq}",
        "UPDATE clients SET spent = spent - 1 WHERE name = 'ann'",
        f"UPDATE chain SET seq = {older.head.seq}, hash = '{older.head.hash}', at = '{older.head.at}', "
        f"signature = '{older.signature}'",
    )
    assert ledger.verify().intact
    with pytest.raises(ChainBroken, match="not there any more"):
        ledger.reserve(ann.id, 1, None, "sha")
    newcomer = Ledger.open(url)
    pay(newcomer, ann.id, 2, "k4")  # which has seen nothing
    with pytest.raises(ChainBroken, match="not there any more"):
        ledger.reserve(ann.id, 1, None, "sha")
    newcomer.close()


def test_a_server_follows_what_others_append(ledger: Ledger, url: str) -> None:
    fill(ledger)
    ann, second = ledger.get_client("ann"), Ledger.open(url)
    for _ in range(3):
        pay(second, ann.id, 1)
        pay(ledger, ann.id, 1)
    assert ledger.verify().intact
    second.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chain_that_was_deleted_is_not_begun_anew(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = ledger_url(tmp_path, backend)
    ledger = Ledger.open(url)
    fill(ledger)
    ledger.close()
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM chain"))
    for _ in range(2):
        with pytest.raises(LedgerError, match="the end of its chain was deleted"):
            Ledger.open(url)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM chain")).scalar() == 0
    engine.dispose()


def test_a_server_over_a_ledger_that_was_changed_answers_nothing(tmp_path: Path) -> None:
    with running(Settings(ledger=str(tmp_path / "ledger.db"))) as server:
        caller = server.caller(10)
        assert caller.infer(digits(1)).status_code == 200
        alter(server.ledger, "UPDATE chain SET hash = (SELECT hash FROM entries WHERE seq = 1)")
        problem = refused(caller.infer(digits(1)), 503, "unavailable")
        assert "changed by other hands" in str(problem["detail"])
        assert caller.budget()["spent"] == 1


def test_the_whole_ledger_cannot_be_exported_where_a_row_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger.open(str(path))
    fill(ledger)
    alter(ledger, "UPDATE entries SET rows = 'many' WHERE seq = 7")
    with pytest.raises(LedgerError, match="entry 7: its rows is of type str"):
        list(export_lines(ledger))
    ledger.close()


def test_verify_names_a_few_findings_and_counts_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ledger.db"
    ledger = Ledger.open(str(path))
    ann, _ = ledger.add_client("ann", 100)
    for number in range(30):
        pay(ledger, ann.id, 1, f"k{number}")
    public_key = ledger.identity.public_key
    ledger.close()
    run, command = CliRunner(), ["ledger", "verify", "--ledger", str(path)]
    told = run.invoke(app, command)
    assert "62 entries, chained and signed; 1 clients, 30 queries in 30 charges, 0 requests in flight" in told.stdout
    assert run.invoke(app, [*command, "--public-key", public_key]).exit_code == 0
    other = run.invoke(app, [*command, "--public-key", "00" * 32])
    assert other.exit_code == 1
    assert "another public key" in other.stderr
    assert run.invoke(app, [*command, "--public-key", "short"]).exit_code == 2
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE entries SET at = 'x' WHERE seq > 10")
    edited = run.invoke(app, command)
    assert edited.exit_code == 1
    lines = edited.stderr.strip().splitlines()
    assert lines[0] == "entry 11: it, or one before it, is not what its hash was made of"
    assert len(lines) == 21
    assert lines[-1] == "... and 32 more"
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM chain")
    gone = run.invoke(app, command)
    assert gone.exit_code == 2
    assert "was deleted" in gone.stderr
