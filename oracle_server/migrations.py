"""The ledger's schema as numbered steps, recorded in the table `schema_migrations`.

Append only: a step that was ever released is never edited. A change to the schema is a new step at the end. Each step
describes its tables itself, so that it means the same whatever `tables` says later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    insert,
    select,
    text,
)

from oracle_server.clock import utc_now
from oracle_server.database import LedgerError

# SQLite numbers rows by itself only where the type is spelled INTEGER.
_Serial = BigInteger().with_variant(Integer, "sqlite")


@dataclass(frozen=True)
class Migration:
    """One step: its place in the order, what it does in words, and in deed."""

    number: int
    description: str
    apply: Callable[[Connection], None]


def _clients_and_entries(connection: Connection) -> None:
    metadata = MetaData()
    Table(
        "clients",
        metadata,
        Column("id", _Serial, primary_key=True),
        Column("name", String(200), nullable=False, unique=True),
        Column("key_id", String(16), nullable=False, unique=True),
        Column("key_hash", String(64), nullable=False),
        Column("budget", BigInteger, nullable=False),
        Column("spent", BigInteger, nullable=False),
        Column("created_at", String(32), nullable=False),
        Column("revoked_at", String(32)),
    )
    Table(
        "entries",
        metadata,
        Column("seq", _Serial, primary_key=True),
        Column("at", String(32), nullable=False),
        Column("client_id", BigInteger, ForeignKey("clients.id"), nullable=False, index=True),
        Column("kind", String(16), nullable=False),
        Column("rows", BigInteger, nullable=False),
        Column("amount", BigInteger),
        Column("idempotency_key", String(255)),
        Column("body_sha256", String(64)),
        # A charge is refunded at most once. NULLs do not count as equal, neither in SQLite nor in PostgreSQL.
        Column("refers_to", BigInteger, ForeignKey("entries.seq"), unique=True),
        sqlite_autoincrement=True,  # a number is never given twice, even if the last entry were deleted by hand
    )
    Table(
        "standing_keys",
        metadata,
        Column("client_id", BigInteger, ForeignKey("clients.id"), primary_key=True, autoincrement=False),
        Column("idempotency_key", String(255), primary_key=True),
        Column("seq", BigInteger, ForeignKey("entries.seq"), nullable=False),
    )
    metadata.create_all(connection)


def _chain_and_reservations(connection: Connection) -> None:
    for statement in (
        "ALTER TABLE entries ADD COLUMN note TEXT",
        "ALTER TABLE entries ADD COLUMN hash VARCHAR(64)",
        "ALTER TABLE clients ADD COLUMN role VARCHAR(16) NOT NULL DEFAULT 'client'",
        "ALTER TABLE clients ADD COLUMN held BIGINT NOT NULL DEFAULT 0",
    ):
        connection.execute(text(statement))
    metadata = MetaData()
    Table(
        "chain",  # one row; `chain.establish` writes it, because it takes the signing key
        metadata,
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("ledger", String(32), nullable=False),
        Column("public_key", String(64), nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("hash", String(64), nullable=False),
        Column("at", String(32), nullable=False),
        Column("signature", String(128), nullable=False),
    )
    requests = Table(
        "requests",
        metadata,
        Column("seq", BigInteger, primary_key=True, autoincrement=False),
        Column("client_id", BigInteger, nullable=False),
        Column("idempotency_key", Text),
        Column("body_sha256", String(64)),
        Column("rows", BigInteger, nullable=False),
        Column("server", String(32)),
        Column("charge", BigInteger),
        # NULLs do not count as equal: requests without a key are told apart by seq alone.
        UniqueConstraint("client_id", "idempotency_key", name="requests_one_per_key"),
    )
    Index(
        "requests_open",
        requests.c.server,
        sqlite_where=requests.c.charge.is_(None),
        postgresql_where=requests.c.charge.is_(None),
    )
    Table(
        "servers",
        metadata,
        Column("id", String(32), primary_key=True),
        Column("host", String(255), nullable=False),
        Column("pid", BigInteger, nullable=False),
        Column("started_at", String(32), nullable=False),
    )
    metadata.create_all(connection)
    connection.execute(
        text(
            "INSERT INTO requests (seq, client_id, idempotency_key, body_sha256, rows, charge) "
            "SELECT e.seq, k.client_id, k.idempotency_key, e.body_sha256, e.rows, e.seq "
            "FROM standing_keys k JOIN entries e ON e.seq = k.seq"
        )
    )
    connection.execute(text("DROP TABLE standing_keys"))
    connection.execute(text("CREATE INDEX entries_by_kind_and_time ON entries (kind, at)"))


def _shared_decoders(connection: Connection) -> None:
    metadata = MetaData()
    Table(
        "decoders",
        metadata,
        Column("client_id", BigInteger, primary_key=True, autoincrement=False),
        Column("id", String(32), primary_key=True),
        Column("content", LargeBinary, nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("used", BigInteger, nullable=False),
    )
    metadata.create_all(connection)


# The step after which a ledger has a chain: `chain.establish` follows it in the same transaction.
CHAIN_STEP = 2

MIGRATIONS: tuple[Migration, ...] = (
    Migration(1, "clients, entries and the idempotency keys that stand for a charge", _clients_and_entries),
    Migration(CHAIN_STEP, "the hash chain, reservations, servers and administrators", _chain_and_reservations),
    Migration(3, "decoders that all servers of the ledger know", _shared_decoders),
)

_metadata = MetaData()
_applied = Table(
    "schema_migrations",
    _metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("description", String(200), nullable=False),
    Column("applied_at", String(32), nullable=False),
)


def migrate(connection: Connection, migrations: tuple[Migration, ...] = MIGRATIONS) -> list[int]:
    """Bring a database to the newest schema, within the caller's transaction; returns the numbers that were applied.

    Raises:
        LedgerError: a newer version of this program has written the database.
    """
    _metadata.create_all(connection)
    current = connection.scalar(select(func.max(_applied.c.number))) or 0
    if current > migrations[-1].number:
        raise LedgerError(
            f"the ledger has schema {current} and this version knows {migrations[-1].number}: use a newer oracle-server"
        )
    pending = [step for step in migrations if step.number > current]
    for step in pending:
        step.apply(connection)
        connection.execute(
            insert(_applied).values(number=step.number, description=step.description, applied_at=utc_now())
        )
    return [step.number for step in pending]
