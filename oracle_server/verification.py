"""Checking the whole ledger in its database: every entry, the chain, its signature, and the tables that repeat them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, select, true

from oracle_server import chain, tables
from oracle_server.database import LedgerError
from shared.audit.accounts import CLIENT_NOTE, Account, Accounts, Request
from shared.audit.chain import Entry, NotAnEntry, read_entry
from shared.audit.verifier import Verifier

_PAGE = 5_000


@dataclass(frozen=True)
class Verification:
    """What a check of the ledger found.

    Attributes:
        findings: one sentence each; empty where all is as it was written.
        entries: how many entries there are.
        accounts: what they amount to.
    """

    findings: tuple[str, ...]
    entries: int
    accounts: Accounts

    @property
    def intact(self) -> bool:
        return not self.findings


def verify(connection: Connection, public_key: bytes) -> Verification:
    """Check a ledger within one transaction.

    Args:
        public_key: the key to trust, 32 bytes.

    Raises:
        LedgerError: there is no chain.
    """
    identity = chain.identify(connection)
    if identity is None:
        raise LedgerError("the ledger has no chain: its row was deleted, or it is not a ledger")
    verifier, count = Verifier(identity.ledger, public_key), 0
    findings = verifier.findings
    try:
        for entry, kept_hash in kept_entries(connection):
            verifier.take(entry, kept_hash)
            count += 1
    except NotAnEntry as error:
        findings.append(f"{error}; what stands behind it was not looked at")
    verifier.finish(chain.signed_head(connection))
    if identity.public_key != public_key.hex():
        findings.append("the ledger names another public key than the one it is checked with")
    if not findings:  # else the tables would only repeat what is wrong with the entries
        findings += _clients(connection, verifier.accounts)
        findings += _requests(connection, verifier.accounts)
    return Verification(tuple(findings), count, verifier.accounts)


def kept_entries(
    connection: Connection, after: int | None = None, *, page_size: int = _PAGE
) -> Iterator[tuple[Entry, str | None]]:
    """Entries in their order, each with the hash kept beside it; read a page at a time.

    Args:
        after: only entries with a larger seq. None is not 0: a row that was slipped in below the first is to be seen.

    Raises:
        NotAnEntry: a row holds what no entry does: SQLite takes values of any type.
    """
    entries = tables.entries
    beyond = true() if after is None else entries.c.seq > after
    while page := connection.execute(select(entries).where(beyond).order_by(entries.c.seq).limit(page_size)).all():
        for row in page:
            fields = dict(row._mapping)
            kept_hash = fields.pop("hash")
            yield read_entry(fields), kept_hash
        beyond = entries.c.seq > page[-1].seq


def _clients(connection: Connection, accounts: Accounts) -> list[str]:
    found = []
    stored = {row.id: row for row in connection.execute(select(tables.clients))}
    for client_id in sorted(stored.keys() | accounts.clients.keys()):
        account, row = accounts.clients.get(client_id), stored.get(client_id)
        if account is None or row is None:
            where = "the entries" if account is None else "the table of clients"
            found.append(f"client {client_id} is missing in {where}")
            continue
        for what, kept, explained in _compared(row, account):
            if kept != explained:
                found.append(f"client '{account.name}': {what} is {kept} and its entries say {explained}")
    return found


def _compared(row: object, account: Account) -> Iterator[tuple[str, object, object]]:
    for what in (*CLIENT_NOTE, "budget", "spent", "held", "revoked_at"):
        yield what, getattr(row, what), getattr(account, what)


def _requests(connection: Connection, accounts: Accounts) -> list[str]:
    stored = {Request(**row._mapping) for row in connection.execute(select(tables.requests))}
    explained = {*accounts.standing.values(), *accounts.open.values()}
    return [
        f"request {request.seq}: the table of requests and the entries do not say the same of it"
        for request in _in_order(stored ^ explained)
    ]


def _in_order(requests: Iterable[Request]) -> list[Request]:
    # SQLite lets a seq be anything that was written into it by hand.
    return sorted(requests, key=lambda request: (str(type(request.seq)), request.seq))
