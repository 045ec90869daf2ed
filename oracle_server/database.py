"""Opening the ledger's database: its URL, and the set-up of a connection. The only place that knows SQLite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

BUSY_TIMEOUT_MS = 10_000


class LedgerError(Exception):
    """The operator asked for something this ledger cannot do; the message says what to change."""


def parse_url(text: str) -> URL:
    """The database a `--ledger` option names: a URL `sqlite:///FILE`, or a bare path.

    Raises:
        LedgerError: not a URL, no file, or a database this version cannot use.
    """
    if "://" not in text:
        text = f"sqlite:///{text}"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise LedgerError(f"'{text}' is not a ledger URL: use sqlite:///FILE or a path") from None
    if url.get_backend_name() != "sqlite":
        raise LedgerError(f"ledgers of '{url.get_backend_name()}' are not supported: use sqlite:///FILE or a path")
    if url.database in (None, "", ":memory:"):
        raise LedgerError("a ledger in memory would forget what was spent: name a file, sqlite:///FILE")
    return url


def connect(url: URL, *, create: bool) -> Engine:
    """An engine whose connections are durable and wait for their turn to write.

    Args:
        url: as `parse_url` returns it.
        create: whether a missing file is made.

    Raises:
        LedgerError: the file, or its directory, does not exist.
    """
    path = Path(str(url.database))
    if not path.parent.is_dir():
        raise LedgerError(f"the ledger's directory {path.parent} does not exist: create it first")
    if not create and not path.is_file():
        raise LedgerError(f"there is no ledger at {path}")
    engine = create_engine(url, hide_parameters=True)  # parameters of a failed statement do not belong in a log
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin)
    return engine


def _set_up(connection: Any, _record: object) -> None:
    # The driver opens transactions late and by its own rules; with None it leaves BEGIN to us (_begin).
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # WAL's default, NORMAL, may lose the last commits in a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    # A transaction that starts as a reader and then writes can fail at once instead of waiting; IMMEDIATE waits first.
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
