"""The audit without a server: an exported ledger, the public key, and what the client's own runs have kept.

The file must be what the key signed, by the ledger's own rules; a newer file must continue an older one; the query logs
of runs must agree with its charges to the query; and every receipt they hold must stand in it, at its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from defender_client import receipts
from defender_client.config import ConfigError
from defender_client.ledger_file import read_ledger
from defender_client.matching import Matched, match, name_of, read_logs, shortened
from defender_client.pinning import Pin, pinned_by
from shared.audit.chain import Entry
from shared.audit.export import Examined
from shared.audit.history import contradictions
from shared.audit.signatures import Receipt


@dataclass(frozen=True)
class Spending:
    """What the file says of one client; in queries, `held` for requests that were being answered."""

    client: str
    requests: int
    spent: int
    held: int
    budget: int
    revoked: bool


@dataclass(frozen=True)
class LedgerAudit:
    """What the file says, and what is wrong.

    Attributes:
        ledger: its id.
        public_key: the key it was checked with, 64 hexadecimal digits.
        at: the clock's word for its signed end; None where that is missing.
        entries: number of entries.
        hidden: how many of them are left out.
        clients: the accounts of the clients that are shown.
        purposes: queries by purpose, as the runs' logs say; empty without runs.
        receipts: receipts of the runs that are good and stand in the file.
        without_receipt: charged requests of the runs that have none.
        differences: one sentence each; empty where all agree.
    """

    ledger: str
    public_key: str
    at: str | None
    entries: int
    hidden: int
    clients: tuple[Spending, ...]
    purposes: dict[str, int]
    receipts: int
    without_receipt: int
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing is wrong."""
        return not self.differences


def audit_file(
    file: Path, public_key: bytes | None, runs: Sequence[Path] = (), before: Path | None = None
) -> LedgerAudit:
    """Check an exported ledger, alone or with the runs of one client.

    Args:
        file: the export; it may show one client's entries only (`--client`).
        public_key: the key to trust, 32 bytes; None for the one that the runs kept when they began.
        runs: all the runs made with one client's key.
        before: an older export of the same ledger.

    Raises:
        ConfigError: a file or directory cannot be used, or no key is known.
    """
    kept = pinned_by(runs)
    trusted = public_key or (bytes.fromhex(kept.public_key) if kept else None)
    if trusted is None:
        raise ConfigError("no run here has kept the ledger's public key: give it by --public-key")
    examined = read_ledger(file, trusted)
    differences = list(examined.findings)
    if before is not None:
        differences += _not_continued(before, examined, trusted)
    logged = read_logs(runs)
    checked = receipts.check(logged.values(), examined.ledger, trusted)
    unlike = [receipt for receipt in checked.good if examined.hashes.get(receipt.entry.seq) != receipt.hash]
    matched = Matched({}, 0, 0, ())
    if runs:
        differences += _other_pin(kept, examined, trusted)
        differences += checked.differences
        differences += [_not_there(receipt, examined) for receipt in unlike]
        charged = _charges(examined, _owners(examined, checked.good, set(logged)))
        matched = match(logged, charged)
        differences += matched.differences
        if matched.total != charged.total():
            differences.append(f"the client counted {matched.total:,} queries, the file says {charged.total():,}")
    return LedgerAudit(
        ledger=examined.ledger,
        public_key=trusted.hex(),
        at=examined.head.at if examined.head else None,
        entries=examined.entries,
        hidden=examined.hidden,
        clients=tuple(_spendings(examined)),
        purposes=matched.purposes,
        receipts=len(checked.good) - len(unlike),
        without_receipt=checked.missing,
        differences=shortened(differences),
    )


def _not_continued(before: Path, newer: Examined, public_key: bytes) -> list[str]:
    older = read_ledger(before, public_key)
    if older.findings:
        return [f"{before}: {finding}" for finding in older.findings]
    return [] if newer.findings else contradictions(older, newer)


def _other_pin(kept: Pin | None, examined: Examined, public_key: bytes) -> Iterator[str]:
    if kept is not None and kept.ledger != examined.ledger:
        yield f"the runs were charged on ledger {kept.ledger}, and this file is of {examined.ledger}"
    if kept is not None and kept.public_key != public_key.hex():
        yield f"the server named the key {kept.public_key} when the runs began, which is not the one given"


def _not_there(receipt: Receipt, examined: Examined) -> str:
    seq, key, end = receipt.entry.seq, receipt.entry.idempotency_key, max(examined.hashes)
    if seq > end:
        return (
            f"{key}: its receipt is of entry {seq}, and the file ends at {end}: it was exported before, or the ledger "
            "was set back"
        )
    return f"{key}: its receipt says otherwise of the ledger up to entry {seq} than the file: history was rewritten"


def _owners(examined: Examined, good: Sequence[Receipt], keys: set[str]) -> set[int]:
    """Whose runs these are: the file's one client, or by the receipts, or by the keys where there are no receipts."""
    if examined.client is not None:
        return {examined.client}
    return {receipt.entry.client_id for receipt in good} or {
        entry.client_id for entry in examined.shown.values() if entry.idempotency_key in keys
    }


def _paying(examined: Examined) -> Iterator[Entry]:
    return (entry for entry in examined.shown.values() if entry.kind in ("charge", "refund"))


def _charges(examined: Examined, owners: set[int]) -> Counter[str]:
    charged: Counter[str] = Counter()
    for entry in _paying(examined):
        if entry.client_id in owners:
            charged[name_of(entry.seq, entry.idempotency_key)] += entry.rows
    return charged


def _spendings(examined: Examined) -> Iterator[Spending]:
    requests: Counter[int] = Counter()
    for entry in _paying(examined):
        requests[entry.client_id] += 1 if entry.kind == "charge" else -1
    for account in examined.accounts.clients.values():
        if account.role == "client":
            yield Spending(
                client=account.name or f"client {account.id}",
                requests=requests[account.id],
                spent=account.spent,
                held=account.held,
                budget=account.budget,
                revoked=account.revoked_at is not None,
            )
