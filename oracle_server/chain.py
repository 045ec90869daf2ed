"""The end of the hash chain within one write transaction: entries are appended here and nowhere else."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, insert, select, update

from oracle_server import tables
from oracle_server.clock import utc_now
from oracle_server.database import LedgerError
from shared.audit.accounts import CLIENT_NOTE
from shared.audit.chain import Entry, canonical_json, genesis, link
from shared.audit.signatures import Head, SignatureInvalid, SignedHead, Signer
from shared.wire.errors import Unavailable

_PAGE = 5_000
_ROW = 1  # the one row of the table
_RETRY_AFTER_S = 60.0  # until an operator has looked
# Statements of every request are made once: making them takes longer than the database does.
_END = select(tables.chain).with_for_update()
_APPEND = insert(tables.entries)
_SIGN = update(tables.chain).values({name: bindparam(name) for name in ("seq", "hash", "at", "signature")})


class ChainBroken(Unavailable):
    """The database's end of the chain is not as it was signed, or not what follows what was there before."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the ledger was changed by other hands ({why}), and nothing is answered until its operator has looked: "
            "oracle-server ledger verify",
            retry_after=_RETRY_AFTER_S,
        )


@dataclass(frozen=True)
class Identity:
    """Which ledger this is: its id, and the public key that signs it, 64 hexadecimal digits."""

    ledger: str
    public_key: str


class Chain:
    """The chain's end, locked until the transaction ends, so that every writer appends to the one end there is.

    What is signed next vouches for all before it. So the end must be one that the key signed, and must follow the last
    one that this process knows of: else whoever writes into the database, or puts an older copy of it back, would have
    his version signed by the next charge.

    Args:
        connection: of a write transaction.
        signer: the ledger's key.
        seen: an end of this ledger that was committed before; None if none is known.

    Raises:
        ChainBroken: the database does not hold such an end.
    """

    def __init__(self, connection: Connection, signer: Signer, seen: Head | None = None) -> None:
        # FOR UPDATE: in PostgreSQL the writers of all servers queue up here. SQLite has one writer anyway.
        signed = _read(connection, _END)
        if signed.head != seen:  # else it was this server that signed it
            try:
                signed.verify(signer.public_key)
            except SignatureInvalid:
                raise ChainBroken("its end is not signed") from None
            if seen is not None and not _follows(connection, signed.head, seen):
                raise ChainBroken(f"entry {seen.seq} is not there any more as it was written")
        self.head = signed.head
        self._connection, self._signer = connection, signer
        self._ledger, self._seq, self._hash = signed.head.ledger, signed.head.seq, bytes.fromhex(signed.head.hash)
        self._appended: list[dict[str, Any]] = []

    @property
    def end(self) -> bytes:
        """The chain's hash at its end, what was appended here included."""
        return self._hash

    def append(self, kind: str, client_id: int, **fields: Any) -> tuple[Entry, bytes]:
        """Append an entry; returns it and the hash before it. `flush` writes it."""
        entry = Entry(self._seq + 1, utc_now(), client_id, kind, **fields)
        previous = self._hash
        self._seq, self._hash = entry.seq, link(previous, entry.leaf())
        self._appended.append(entry.fields() | {"hash": self._hash.hex()})
        return entry, previous

    def flush(self) -> None:
        """Write what was appended, and the signed head that goes with it; the transaction makes it durable."""
        if not self._appended:
            return
        self._connection.execute(_APPEND, self._appended)
        self.head = Head(self._ledger, self._seq, self._hash.hex(), utc_now())
        _sign(self._connection, self._signer, self.head)
        self._appended.clear()


def identify(connection: Connection) -> Identity | None:
    """The ledger's identity; None for one that has no chain yet. Raises LedgerError where it has more than one."""
    rows = connection.execute(select(tables.chain)).all()
    if len(rows) > 1 or any(not re.fullmatch("[0-9a-f]+", str(row.ledger)) or row.id != _ROW for row in rows):
        raise LedgerError("the ledger was changed by other hands: its table 'chain' is not as this program writes it")
    return Identity(rows[0].ledger, rows[0].public_key) if rows else None


def signed_head(connection: Connection) -> SignedHead:
    """The chain's end as it stands, its signature not looked at. Raises ChainBroken where there is none."""
    return _read(connection, select(tables.chain))


def establish(connection: Connection, signer: Signer) -> Identity:
    """Begin the chain of a ledger that has none, within a write transaction.

    Entries of version 0.1, which had no chain, are bound into it as they stand, and their clients' names after them;
    the time of a revocation, which stood twice, becomes its entry's.
    """
    ledger = secrets.token_hex(8)
    value = genesis(ledger, signer.public_key)
    seq = 0
    while page := connection.execute(
        select(tables.entries).where(tables.entries.c.seq > seq).order_by(tables.entries.c.seq).limit(_PAGE)
    ).all():
        hashes = []
        for row in page:
            entry = Entry(**{k: v for k, v in row._mapping.items() if k != "hash"})
            seq, value = entry.seq, link(value, entry.leaf())
            hashes.append({"at_seq": seq, "value": value.hex()})
        statement = update(tables.entries).where(tables.entries.c.seq == bindparam("at_seq"))
        connection.execute(statement.values(hash=bindparam("value")), hashes)
    head = Head(ledger, seq, value.hex(), utc_now())
    connection.execute(
        insert(tables.chain).values(
            id=_ROW,
            ledger=ledger,
            public_key=signer.public_key.hex(),
            seq=seq,
            hash=head.hash,
            at=head.at,
            signature=signer.sign_head(head).signature,
        )
    )
    revoked_at = select(tables.entries.c.at).where(
        tables.entries.c.kind == "revoke", tables.entries.c.client_id == tables.clients.c.id
    )
    connection.execute(
        update(tables.clients)
        .where(tables.clients.c.revoked_at.is_not(None))
        .values(revoked_at=revoked_at.scalar_subquery())
    )
    chain = Chain(connection, signer)
    for row in connection.execute(select(tables.clients).order_by(tables.clients.c.id)):
        chain.append("client", row.id, note=client_note(row))
    chain.flush()
    return Identity(ledger, signer.public_key.hex())


def client_note(client: Row[Any]) -> str:
    """What a `client` entry says of who was added, from the row of the table."""
    return canonical_json({name: getattr(client, name) for name in CLIENT_NOTE}).decode("ascii")


def require(signer: Signer | None) -> Signer:
    """The key, or LedgerError where there is none to write with."""
    if signer is None:
        raise LedgerError("the ledger's signing key is not here, and nothing can be written without it: --signing-key")
    return signer


def _read(connection: Connection, query: Select[Any]) -> SignedHead:
    rows = connection.execute(query).all()
    if len(rows) != 1:
        raise ChainBroken(f"it has {len(rows)} ends")
    row = rows[0]
    if type(row.seq) is not int or not all(isinstance(text, str) for text in (row.ledger, row.hash, row.at)):
        raise ChainBroken("its end is not one")
    return SignedHead(Head(row.ledger, row.seq, row.hash, row.at), row.signature)


def _follows(connection: Connection, head: Head, seen: Head) -> bool:
    """Whether the chain that ends at `head` went through `seen`."""
    if head.seq <= seen.seq:
        return (head.ledger, head.seq, head.hash) == (seen.ledger, seen.seq, seen.hash)
    kept = connection.scalar(select(tables.entries.c.hash).where(tables.entries.c.seq == seen.seq))
    return seen.seq == 0 or bool(kept == seen.hash)


def _sign(connection: Connection, signer: Signer, head: Head) -> None:
    connection.execute(
        _SIGN, {"seq": head.seq, "hash": head.hash, "at": head.at, "signature": signer.sign_head(head).signature}
    )
