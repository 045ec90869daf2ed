"""Opening the ledger's database: its URL, and the set-up of a connection. What the two dialects need is here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError

BUSY_TIMEOUT_S = 10.0
# A session whose machine is gone without a word ends within half a minute, and with it the lock that says that its
# server lives (`liveness`); by the system's own settings that may take two hours.
_NOTICE_THE_DEAD = (
    "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 -c tcp_user_timeout=30000"
)
# Any number will do that nothing else in the database locks: "zo-defense" in ASCII, shortened to 63 bits.
_MIGRATION_LOCK = int.from_bytes(b"zo-defen") >> 1


class LedgerError(Exception):
    """The operator asked for something this ledger cannot do; the message says what to change."""


def parse_url(url_or_path: str) -> URL:
    """The database a `--ledger` option names: `sqlite:///FILE`, a bare path, or `postgresql://USER@HOST/DATABASE`.

    Raises:
        LedgerError: not a URL, no file, a database this version cannot use, or one whose driver is not installed.
    """
    given = url_or_path if "://" in url_or_path else f"sqlite:///{url_or_path}"
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        # Not shown: a URL may hold a password.
        raise LedgerError("--ledger is not a ledger URL: use sqlite:///FILE, a path, or postgresql://...") from None
    match url.get_backend_name():
        case "sqlite":
            if url.database in (None, "", ":memory:"):
                raise LedgerError("a ledger in memory would forget what was spent: name a file, sqlite:///FILE")
            return url
        case "postgresql" | "postgres":
            if importlib.util.find_spec("psycopg") is None:
                raise LedgerError("a ledger in PostgreSQL needs the driver psycopg: pip install 'zo-defense[postgres]'")
            return url.set(drivername="postgresql+psycopg")
        case other:
            raise LedgerError(
                f"ledgers of '{other}' are not supported: use sqlite:///FILE, a path, or postgresql://..."
            )


def ledger_file(url: URL) -> Path | None:
    """The file of a SQLite ledger; None for PostgreSQL."""
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


def connect(url: URL, *, create: bool, timeout: float = BUSY_TIMEOUT_S) -> Engine:
    """An engine whose commits are durable and whose connections wait for their turn to write.

    Args:
        url: as `parse_url` returns it.
        create: whether a missing file is made.
        timeout: seconds to wait for the database, or for its lock.

    Raises:
        LedgerError: the file, or its directory, does not exist.
    """
    path = ledger_file(url)
    # Parameters of a failed statement do not belong in a log (hide_parameters).
    if path is None:
        engine = create_engine(
            url,
            hide_parameters=True,
            isolation_level="READ COMMITTED",
            pool_pre_ping=True,  # the database may have been restarted since
            connect_args={
                "connect_timeout": max(1, round(timeout)),
                # A commit is on the disk before it is acknowledged, whatever the database's own default says.
                "options": f"-c synchronous_commit=on -c lock_timeout={round(1000 * timeout)} {_NOTICE_THE_DEAD}",
                "keepalives_idle": 10,  # and the same seen from this side
                "keepalives_interval": 5,
                "keepalives_count": 3,
            },
        )
        return engine
    if not path.parent.is_dir():
        raise LedgerError(f"the ledger's directory {path.parent} does not exist: create it first")
    if not create and not path.is_file():
        raise LedgerError(f"there is no ledger at {path}")
    engine = create_engine(url, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        _set_up(connection, timeout)

    event.listen(engine, "begin", _begin)
    return engine


def reading(engine: Engine) -> Engine:
    """The same database for transactions that only read, and see it as it is at one moment."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return engine.execution_options(reading=True)


def lock_schema(connection: Connection) -> None:
    """Let one process at a time look at the schema and change it, until the end of the transaction."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    # SQLite's BEGIN IMMEDIATE has taken the only lock there is.


def _set_up(connection: Any, timeout: float) -> None:
    # The driver opens transactions late and by its own rules; with None it leaves BEGIN to us (_begin).
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {round(1000 * timeout)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # WAL's default, NORMAL, may lose the last commits in a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    # A transaction that starts as a reader and then writes can fail at once instead of waiting; IMMEDIATE waits first.
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
