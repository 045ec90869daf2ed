"""The audit of a run whose oracle was a foreign one: its own ledger against its query log and its recording.

Beside what is checked of any exported ledger, each request of the log, and each answer on record, must stand on it:
lines that were cut off its end, with nothing else changed, are found by that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from defender_client.errors import ConfigError
from defender_client.ledger_file import read_ledger
from defender_client.local_ledger import LEDGER_FILE
from defender_client.matching import read_logs, shortened
from defender_client.offline_audit import LedgerAudit, audit_file
from defender_client.recording import ANSWERS_FILE, Recording, RecordingMissing
from defender_client.request_key import RequestKey


def has_local_ledger(run: Path) -> bool:
    """Whether a run keeps a ledger of its own."""
    return (run / LEDGER_FILE).exists()


def audit_local(run: Path, public_key: bytes | None = None, before: Path | None = None) -> LedgerAudit:
    """Check a run's own ledger; asks no server.

    Args:
        run: its directory.
        public_key: the key to trust, 32 bytes; None for the one that the run kept when it began.
        before: an older copy of the ledger, which this one must continue.

    Raises:
        ConfigError: a file cannot be used, or no key is known.
    """
    file = run / LEDGER_FILE
    found = audit_file(file, public_key, [run], before)
    examined = read_ledger(file, bytes.fromhex(found.public_key))
    keys = {entry.idempotency_key for entry in examined.shown.values()}
    first = {str(RequestKey.parse(key).first) for key in keys if key is not None}
    differences = [
        f"{request.key}: it was sent, and the ledger has no entry of it: lines were cut off"
        for request in read_logs([run]).values()
        if request.key not in keys
    ]
    differences += [
        f"{key}: its answer is on record, and the ledger has no entry of it: lines were cut off"
        for key in recorded_keys(run)
        if key not in first
    ]
    return replace(found, differences=(*found.differences, *shortened(differences)))


def recorded_keys(run: Path) -> list[str]:
    """The keys of the answers on record; none where nothing was recorded."""
    if not (run / ANSWERS_FILE).exists():
        return []
    try:
        with Recording(run) as recording:
            return recording.keys()
    except RecordingMissing:
        return []


def check_one(runs: list[Path]) -> Path | None:
    """The one run that keeps a ledger of its own; None where none of them does.

    Raises:
        ConfigError: several runs, one of which does: each such ledger is audited by itself.
    """
    local = [run for run in runs if has_local_ledger(run)]
    if local and len(runs) > 1:
        raise ConfigError(f"{local[0]} keeps a ledger of its own: audit such runs one at a time")
    return local[0] if local else None
