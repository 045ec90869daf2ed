"""A run's directory: one process at a time, one identity for its whole life."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from defender_client.config import ConfigError

_LOCK_FILE = ".lock"
_IDENTITY_FILE = "run-id"


@contextmanager
def locked(run: Path) -> Iterator[str]:
    """Hold `run` for this process; yields the run's id, made on first use.

    The id is the first part of every Idempotency-Key, so that a run that is started again is known to the server.

    Raises:
        ConfigError: another process works in this directory.
    """
    run.mkdir(parents=True, exist_ok=True)
    # The lock belongs to the process, so no kill can leave it behind.
    with (run / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is working in {run}: wait for it, or choose another directory"
            ) from None
        yield _identity(run / _IDENTITY_FILE)


def check_identity(run: Path, run_id: str) -> None:
    """ConfigError unless this is the run of that id: what one rank has locked, the others must see too."""
    path = run / _IDENTITY_FILE
    if not path.exists() or _identity(path) != run_id:
        raise ConfigError(f"{run} is not the directory that rank 0 works in: all ranks must see the same --out")


def _identity(path: Path) -> str:
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(uuid.uuid4().hex[:16] + "\n")
        os.replace(temporary, path)
    return path.read_text().strip()
