"""What a server signed, against what it shows now: the end of its ledger, and the receipts that a client kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from defender_client import receipts
from defender_client.pinning import Pin
from defender_client.query_log import LoggedRequest
from shared.audit.charges import shown
from shared.audit.signatures import Head, Receipt, SignatureInvalid, SignedHead, read_public_key
from shared.wire.protocol import ChargeEntry, LedgerStatement


@dataclass(frozen=True)
class Signed:
    """What was checked.

    Attributes:
        receipts: how many receipts are good.
        key_from: where the key is from that they were checked with; None where there is none, and nothing was checked.
        differences: one sentence each.
    """

    receipts: int
    key_from: str | None
    differences: tuple[str, ...]


def check_signed(
    shown: LedgerStatement | None,
    entries: Sequence[ChargeEntry],
    requests: Iterable[LoggedRequest],
    kept: Pin | None,
    public_key: bytes | None,
) -> Signed:
    """Check a server's signatures.

    Args:
        shown: what the server says of its ledger; None if it says nothing.
        entries: what it says of this client's charges.
        requests: of the query logs.
        kept: what the runs kept of the ledger when they began.
        public_key: the key to trust, 32 bytes; None for the one that was kept, or else the one that the server names.
    """
    if shown is None:
        told = ("the server shows no signed end of its ledger",) if kept or public_key else ()
        return Signed(0, None, told)
    key, key_from = _key(shown, kept, public_key)
    try:
        trusted = read_public_key(key)
    except SignatureInvalid as invalid:
        return Signed(0, None, (f"the server's key: {invalid}",))
    checked = receipts.check(requests, kept.ledger if kept else shown.ledger, trusted)
    differences = [*_other_than_kept(shown, kept, key), *_end(shown, trusted, checked.good), *checked.differences]
    return Signed(len(checked.good), key_from, (*differences, *_misplaced(checked.good, entries)))


def _key(shown: LedgerStatement, kept: Pin | None, public_key: bytes | None) -> tuple[str, str]:
    if public_key is not None:
        return public_key.hex(), "that was given"
    if kept is not None:
        return kept.public_key, "that the runs kept when they began"
    return shown.public_key, "that the server names, which proves no more than the server's word"


def _other_than_kept(shown: LedgerStatement, kept: Pin | None, key: str) -> Iterator[str]:
    if kept is not None and kept.ledger != shown.ledger:
        yield f"the runs were charged on ledger {kept.ledger}, and the server has {shown.ledger}"
    if kept is not None and kept.public_key != key:
        yield f"the server named the key {kept.public_key} when the runs began, which is not the one given"
    if shown.public_key != key:
        yield f"the server names the key {shown.public_key}, and not {key}"


def _end(shown: LedgerStatement, trusted: bytes, good: Iterable[Receipt]) -> Iterator[str]:
    head = Head(shown.ledger, shown.seq, shown.hash, shown.at)
    try:
        SignedHead(head, shown.signature).verify(trusted)
    except SignatureInvalid as invalid:
        yield f"the end of the server's ledger: {invalid}"
        return
    for receipt in good:
        if receipt.entry.seq > head.seq or (receipt.entry.seq == head.seq and receipt.hash != head.hash):
            yield (
                f"{receipt.entry.idempotency_key}: its receipt is of entry {receipt.entry.seq}, and the server's "
                f"ledger ends at {head.seq} without it: it was set back"
            )


def _misplaced(good: Iterable[Receipt], entries: Iterable[ChargeEntry]) -> Iterator[str]:
    by_seq = {entry.seq: entry for entry in entries}
    for receipt in good:
        entry = receipt.entry
        if by_seq.get(entry.seq) != shown(entry):
            yield f"{entry.idempotency_key}: its receipt is of entry {entry.seq}, and the server says otherwise now"
