"""The receipts that a run kept: what the server signed for each charge, before it sent the answer.

A receipt holds the whole entry and the chain's hash before it. So it shows what was charged and for what, and the
ledger that it was given from: one in which its place holds another hash has had its history rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from defender_client.query_log import LoggedRequest
from shared.audit.signatures import Receipt, SignatureInvalid


@dataclass(frozen=True)
class Checked:
    """The receipts of query logs.

    Attributes:
        good: those that the key signed and that say what the request was.
        missing: requests that were charged and have none: a proxy stripped it, or the server gave none.
        differences: one sentence for each of the others.
    """

    good: tuple[Receipt, ...]
    missing: int
    differences: tuple[str, ...]


def check(requests: Iterable[LoggedRequest], ledger: str, public_key: bytes) -> Checked:
    """Hold each receipt against the request that it was given for.

    Args:
        requests: of the query logs.
        ledger: the id of the ledger they must be from.
        public_key: the key they must be signed with, 32 bytes.
    """
    good: list[Receipt] = []
    differences: list[str] = []
    missing = 0
    for request in requests:
        if request.receipt is None:
            missing += bool(request.charged)
            continue
        try:
            receipt = Receipt.parse(request.receipt)
            receipt.verify(public_key)
        except SignatureInvalid as invalid:
            differences.append(f"{request.key}: its receipt: {invalid}")
            continue
        wrong = _other_than(request, receipt, ledger)
        if wrong is None:
            good.append(receipt)
        else:
            differences.append(f"{request.key}: its receipt is {wrong}")
    return Checked(tuple(good), missing, tuple(differences))


def _other_than(request: LoggedRequest, receipt: Receipt, ledger: str) -> str | None:
    """What is wrong with a receipt that was really signed; None if it is the request's own."""
    entry = receipt.entry
    if receipt.ledger != ledger:
        return f"of ledger {receipt.ledger}, and this is {ledger}"
    if entry.kind != "charge":
        return f"of an entry of kind '{entry.kind}'"
    if entry.idempotency_key != request.key:
        return f"for the key {entry.idempotency_key}"
    if entry.rows != request.rows:
        return f"for {entry.rows} queries, and {request.rows} rows were sent"
    # A key ends with the first digits of its body's SHA-256.
    if not (entry.body_sha256 or "").startswith(request.key.rpartition("/")[2]):
        return "for another body"
    return None
