"""Which ledger a run's queries are on, and the key that signs it: kept in the run directory at first use.

What a server says of its key is only as good as the server. Kept from the beginning, it is at least the same server's
word for the whole run: a ledger that was begun anew, or a signature by another key, is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from defender_client.config import ConfigError
from shared.audit.signatures import SignatureInvalid, read_public_key
from shared.wire.protocol import LedgerStatement

PIN_FILE = "ledger.json"


class LedgerChanged(ConfigError):
    """The ledger, or its key, is another than the one that the run began with."""


class Pin(BaseModel):
    """A ledger's id, and the public key that signs it, 64 hexadecimal digits."""

    model_config = ConfigDict(frozen=True)

    ledger: str
    public_key: str


def pin(run: Path, statement: LedgerStatement | Pin | None) -> None:
    """Keep what a server says of its ledger, or compare it with what was kept; without a ledger nothing is kept.

    Raises:
        LedgerChanged: it is another ledger, another key, or none.
        ConfigError: what the server says, or what was kept, cannot be read.
    """
    kept = pinned(run)
    said = None if statement is None else Pin(ledger=statement.ledger, public_key=statement.public_key)
    if kept is None:
        if said is not None:
            _key(said, "the server")
            temporary = (run / PIN_FILE).with_suffix(".tmp")
            temporary.write_text(said.model_dump_json(indent=2) + "\n", encoding="utf-8")
            temporary.replace(run / PIN_FILE)
    elif said != kept:
        now = "shows no ledger" if said is None else f"has ledger {said.ledger} with key {said.public_key[:16]}..."
        raise LedgerChanged(
            f"{run} is on ledger {kept.ledger} with key {kept.public_key[:16]}..., and the server {now}: "
            f"if you know why, remove {run / PIN_FILE}"
        )


def pinned(run: Path) -> Pin | None:
    """What was kept in a run directory; None if nothing was. Raises ConfigError where it cannot be read."""
    path = run / PIN_FILE
    if not path.exists():
        return None
    try:
        kept = Pin.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path} is damaged: {error.errors()[0]['msg']}") from None
    _key(kept, str(path))
    return kept


def pinned_by(runs: Iterable[Path]) -> Pin | None:
    """What the runs have kept; None where none has kept anything.

    Raises:
        LedgerChanged: they have kept different things.
        ConfigError: something cannot be read.
    """
    found = {run: kept for run in runs if (kept := pinned(run)) is not None}
    if len(set(found.values())) > 1:
        raise LedgerChanged(f"the runs are on different ledgers, and are audited apart: {', '.join(map(str, found))}")
    return next(iter(found.values()), None)


def _key(kept: Pin, where: str) -> None:
    try:
        read_public_key(kept.public_key)
    except SignatureInvalid as error:
        raise ConfigError(f"{where} names a key that is none: {error}") from None
