"""Which server processes live: each holds a lock that ends with it, whatever kills it. No clock is asked.

SQLite: an advisory lock (flock) on a file of the server's own, beside the ledger. PostgreSQL: a session's advisory
lock, which ends with the session's connection. Whoever can take a server's lock knows that it is gone.
"""

from __future__ import annotations

import fcntl
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from oracle_server.database import LedgerError


class Lifeline(ABC):
    """The lock of one server of a ledger, and a way to try those of others."""

    @abstractmethod
    def held(self) -> bool:
        """Whether this server's own lock is still held. Where it is not, others may have settled its reservations."""

    @abstractmethod
    @contextmanager
    def gone(self, connection: Connection, server: str) -> Iterator[bool]:
        """Whether another server is gone; if so, nobody else finds it so until the caller's transaction ends."""

    @abstractmethod
    def close(self) -> None:
        """Let go; this server then counts as gone."""


class FileLifeline(Lifeline):
    """A lock on `DIRECTORY/SERVER.lock`.

    Raises:
        LedgerError: the file cannot be made.
    """

    def __init__(self, directory: Path, server: str) -> None:
        self._directory = directory
        self._path = directory / f"{server}.lock"
        try:
            directory.mkdir(exist_ok=True)
            self._file = self._path.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(f"the server's lock {self._path} cannot be taken: {error.strerror}") from None

    def held(self) -> bool:
        return True  # the kernel keeps it for as long as this process is

    @contextmanager
    def gone(self, connection: Connection, server: str) -> Iterator[bool]:
        path = self._directory / f"{server}.lock"
        try:
            file = path.open("r+")
        except FileNotFoundError:
            yield True  # it ended in good order and took the file with it
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


class SessionLifeline(Lifeline):
    """A lock of a PostgreSQL session, on a connection that does nothing else.

    Raises:
        LedgerError: the database cannot be reached.
    """

    def __init__(self, engine: Engine, server: str) -> None:
        try:
            self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            self._connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _number(server)})
        except SQLAlchemyError as error:
            raise LedgerError(f"the server's lock cannot be taken: {getattr(error, 'orig', error)}") from None

    def held(self) -> bool:
        try:
            self._connection.execute(text("SELECT 1"))
        except SQLAlchemyError:
            return False
        return not self._connection.invalidated

    @contextmanager
    def gone(self, connection: Connection, server: str) -> Iterator[bool]:
        # Held to the end of the transaction that settles what the server left.
        yield bool(connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _number(server)}))

    def close(self) -> None:
        with suppress(SQLAlchemyError):  # the session may be gone already, and the lock with it
            self._connection.invalidate()  # closed, not given back: a pooled session would keep the lock
            self._connection.close()


def _number(server: str) -> int:
    """A server's id, hexadecimal, as the number of its lock: 63 bits of it."""
    return int(server[:16], 16) >> 1
