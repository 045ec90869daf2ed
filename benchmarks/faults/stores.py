"""Real databases under attack: locked by another session, out of disk space, crashed."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg

TESTS = Path(__file__).parents[2] / "tests" / "oracle_server"
_SIZE_MB = 768
_PAGE = 4096


class FaultMissed(Exception):
    """A fault found nothing that it could happen to; another is drawn instead."""


class Disk:
    """A small disk of its own, which can be filled up to the last page. Only root may mount one.

    Attributes:
        mounted: whether it is one; else it is a directory like any other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE_MB}m", "tmpfs", str(folder)]
        try:
            self.mounted = subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0
        except FileNotFoundError:
            self.mounted = False

    @contextlib.contextmanager
    def full(self) -> Iterator[Callable[[], None]]:
        """Fill it up; yields what takes the space that was freed meanwhile. At the end there is space again."""
        filler = self.folder / "filler"
        with filler.open("wb") as file:

            def top_up() -> None:
                space = os.statvfs(self.folder)
                end = os.fstat(file.fileno()).st_size
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), end, space.f_bavail * space.f_frsize)
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, _PAGE)

            try:
                yield top_up
            finally:
                filler.unlink()

    def close(self) -> None:
        """Unmount it; its files are gone."""
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)
            self.mounted = False


class Store(ABC):
    """A ledger's database.

    Attributes:
        url: for `--ledger`.
        how_full: how its disk is filled up; None where that cannot be done here.
        can_crash: whether the database itself can be crashed, and its sessions ended.
    """

    url: str
    how_full: str | None
    can_crash = False

    @abstractmethod
    def lock(self, seconds: float, rng: random.Random) -> None:
        """Keep all writers waiting."""

    @abstractmethod
    def fill(self, seconds: float, servers: Sequence[int]) -> None:
        """Let every write that needs space fail; `servers` are the pids that run now."""

    @abstractmethod
    def stands(self, seq: int, entry_hash: str) -> bool | None:
        """Whether a committed charge with this seq and hash is there; None where the database does not answer now."""

    @abstractmethod
    def close(self) -> None:
        """Remove it."""

    def crash(self, seconds: float) -> None:
        """Crash the database, and start it again after `seconds`."""
        raise FaultMissed

    def end_sessions(self, share: float, rng: random.Random) -> int:
        """End about this share of the servers' sessions, and at least one; returns how many."""
        raise FaultMissed

    def open_reservations(self) -> set[int]:
        """The seq of every request that is reserved and not yet paid."""
        raise FaultMissed


class SqliteStore(Store):
    """A SQLite file on a small disk of its own."""

    def __init__(self, folder: Path) -> None:
        self._disk = Disk(folder / "disk")
        self._file = self._disk.folder / "ledger.db"
        self.url = f"sqlite:///{self._file}"
        self.how_full = (
            f"a tmpfs of {_SIZE_MB} MB, filled to its last page (ENOSPC)"
            if self._disk.mounted
            else "RLIMIT_FSIZE of the live servers (EFBIG), for only root may mount a disk"
        )
        self._looking: sqlite3.Connection | None = None

    def lock(self, seconds: float, rng: random.Random) -> None:
        with self._session() as session:
            session.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            session.execute("ROLLBACK")

    def fill(self, seconds: float, servers: Sequence[int]) -> None:
        # An empty log: else the next commits would find room in the pages that it has already.
        with self._session() as session:
            session.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        until = time.monotonic() + seconds
        if not self._disk.mounted:
            self._limit(servers, until)
            return
        with self._disk.full() as top_up:
            while time.monotonic() < until:
                top_up()
                time.sleep(0.02)

    def stands(self, seq: int, entry_hash: str) -> bool | None:
        try:
            if self._looking is None:
                self._looking = sqlite3.connect(self._file, timeout=0.05, isolation_level=None, check_same_thread=False)
            row = self._looking.execute("SELECT hash FROM entries WHERE seq = ? AND kind = 'charge'", (seq,)).fetchone()
        except sqlite3.Error:
            return None
        return bool(row == (entry_hash,))

    def close(self) -> None:
        if self._looking is not None:
            self._looking.close()
        self._disk.close()

    @contextlib.contextmanager
    def _session(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self._file, timeout=5, isolation_level=None)) as session:
                yield session
        except sqlite3.Error as error:
            raise FaultMissed from error

    @staticmethod
    def _limit(servers: Sequence[int], until: float) -> None:
        for limit in (0, resource.RLIM_INFINITY):
            for pid in servers:
                with contextlib.suppress(ProcessLookupError):
                    hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit if limit == 0 else hard, hard))
            if limit == 0:
                time.sleep(max(0.0, until - time.monotonic()))


class PostgresStore(Store):
    """A PostgreSQL of the campaign's own, as the tests start one; its tables are in a tablespace on a small disk."""

    can_crash = True

    def __init__(self, folder: Path) -> None:
        sys.path.append(str(TESTS))
        from databases import Cluster, programs  # type: ignore[import-not-found]  # the tests' own

        found = programs()
        if found is None:
            raise SystemExit("PostgreSQL's initdb is not on this machine (Debian: apt-get install postgresql)")
        self._cluster = Cluster(found)
        self.url = self._cluster.new_database()
        self._disk = Disk(self._cluster.folder / "small")
        self.how_full = None
        if self._disk.mounted:
            self.how_full = f"a tablespace on a tmpfs of {_SIZE_MB} MB, filled to its last page (ENOSPC)"
            owner = self._cluster.folder.stat()
            os.chown(self._disk.folder, owner.st_uid, owner.st_gid)
            database = self.url.split("@/")[1].split("?")[0]
            with psycopg.connect(self.url.replace(f"/{database}?", "/postgres?"), autocommit=True) as session:
                session.execute(f"CREATE TABLESPACE small LOCATION '{self._disk.folder}'")
                session.execute(f"ALTER DATABASE {database} SET TABLESPACE small")
        self._looking: psycopg.Connection[tuple[str]] | None = None
        self._running = threading.RLock()  # recovery needs space, and a lock needs a database

    def lock(self, seconds: float, rng: random.Random) -> None:
        table = rng.choice(("chain", "requests", "clients"))
        with self._running, self._session() as session, session.transaction():
            session.execute("SET LOCAL lock_timeout = '2s'")
            session.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            time.sleep(seconds)

    def fill(self, seconds: float, servers: Sequence[int]) -> None:
        until = time.monotonic() + seconds
        with self._running, self._disk.full() as top_up:
            while time.monotonic() < until:
                top_up()
                time.sleep(0.02)

    def crash(self, seconds: float) -> None:
        with self._running:
            self._cluster.stop("immediate")
            time.sleep(seconds)
            self._cluster.start()

    def end_sessions(self, share: float, rng: random.Random) -> int:
        sessions = "FROM pg_stat_activity WHERE datname = current_database() AND application_name <> 'campaign'"
        with self._running, self._session() as session:
            pids = [pid for (pid,) in session.execute(f"SELECT pid {sessions}")]
            chosen = [pid for pid in pids if rng.random() < share] or pids
            for pid in chosen:
                session.execute("SELECT pg_terminate_backend(%s)", (pid,))
        if not chosen:
            raise FaultMissed
        return len(chosen)

    def open_reservations(self) -> set[int]:
        with self._session() as session:
            return {int(seq) for (seq,) in session.execute("SELECT seq FROM requests WHERE charge IS NULL")}

    def stands(self, seq: int, entry_hash: str) -> bool | None:
        try:
            if self._looking is None:
                self._looking = self._connect(" -c statement_timeout=300")
            row = self._looking.execute(
                "SELECT hash FROM entries WHERE seq = %s AND kind = 'charge'", (seq,)
            ).fetchone()
        except psycopg.Error:
            if self._looking is not None and self._looking.broken:
                self._looking.close()
                self._looking = None
            return None
        return row == (entry_hash,)

    def close(self) -> None:
        if self._looking is not None:
            self._looking.close()
        with contextlib.suppress(subprocess.CalledProcessError):
            self._cluster.stop("immediate")
        self._disk.close()
        shutil.rmtree(self._disk.folder, ignore_errors=True)
        self._cluster.remove()

    def _connect(self, options: str = "") -> psycopg.Connection[tuple[str]]:
        return psycopg.connect(
            self.url, autocommit=True, application_name="campaign", options=f"-c client_min_messages=warning{options}"
        )

    @contextlib.contextmanager
    def _session(self) -> Iterator[psycopg.Connection[tuple[str]]]:
        try:
            with self._connect() as session:
                yield session
        except psycopg.Error as error:
            raise FaultMissed from error


def open_store(kind: str, folder: Path) -> Store:
    """A fresh database: `sqlite` or `postgresql`."""
    return SqliteStore(folder) if kind == "sqlite" else PostgresStore(folder)
