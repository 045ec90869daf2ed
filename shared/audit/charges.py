"""A ledger's entry as the client that paid is shown it."""

from __future__ import annotations

from shared.audit.chain import Entry
from shared.wire.protocol import ChargeEntry


def shown(entry: Entry) -> ChargeEntry:
    """What `GET /v1/charges` says of an entry: not whose it is, nor what it refers to."""
    return ChargeEntry(
        seq=entry.seq,
        at=entry.at,
        kind=entry.kind,
        rows=entry.rows,
        idempotency_key=entry.idempotency_key,
        body_sha256=entry.body_sha256,
    )
