"""Real databases for ledgers: SQLite files, and a PostgreSQL of the tests' own.

ORACLE_TEST_LEDGER=postgresql runs every test that asks for no database by name on PostgreSQL.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest

SQLITE, POSTGRESQL = "sqlite", "postgresql"
BACKENDS = (SQLITE, POSTGRESQL)
DEFAULT = os.environ.get("ORACLE_TEST_LEDGER", SQLITE)
_numbers = itertools.count()


def ledger_url(folder: Path, backend: str = DEFAULT) -> str:
    """The URL of a ledger that does not exist yet."""
    if backend == SQLITE:
        return f"sqlite:///{folder / 'ledger.db'}"
    cluster = postgres()
    if cluster is None:
        pytest.skip("PostgreSQL's initdb is not on this machine (Debian: apt-get install postgresql)")
    return cluster.new_database()


class Cluster:
    """A PostgreSQL of our own: no TCP, one directory, gone at the end."""

    def __init__(self, programs: Path) -> None:
        # Not pytest's tmp_path: PostgreSQL refuses to run as root, and another user cannot look into that.
        self.folder = Path(tempfile.mkdtemp(prefix="zo-pg-"))
        self._programs = programs
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            with contextlib.suppress(KeyError):
                pwd.getpwnam(self._user)
            shutil.chown(self.folder, self._user)
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "oracle", "-A", "trust", "--no-sync")
        self.start()

    def start(self) -> None:
        options = (
            f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -c fsync=off -c max_connections=200"
        )
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", options, "start"
        )

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is a crash: no session is told."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "stop")

    def remove(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_database(self) -> str:
        """The URL of a fresh database."""
        name = f"ledger_{next(_numbers)}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://oracle@/{name}?host={self.folder}"

    def _address(self, database: str) -> str:
        return f"postgresql://oracle@/{database}?host={self.folder}"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._programs / program), *arguments],
            check=True,
            user=self._user,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@functools.cache
def postgres() -> Cluster | None:
    """The tests' one cluster, started when it is first asked for; None where PostgreSQL is not installed."""
    found = programs()
    if found is None:
        return None
    cluster = Cluster(found)
    atexit.register(cluster.remove)
    return cluster


def programs() -> Path | None:
    """Where initdb and pg_ctl are; Debian keeps them out of the PATH."""
    on_path = shutil.which("initdb")
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: path.parts, reverse=True)
    if on_path:
        return Path(on_path).parent
    return candidates[0].parent if candidates else None
