"""Durable charges: who may query, what they have spent, and every entry that explains it.

A charge is one transaction, committed to disk before the answer is computed. Whatever happens afterwards, a crash
included, the count can only be too high for the client's taste, never too low for the owner's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from oracle_server.budget import Account, admit
from oracle_server.clock import utc_now
from oracle_server.database import LedgerError, connect, parse_url
from oracle_server.keys import ApiKey
from oracle_server.migrations import migrate
from oracle_server.tables import clients, entries, standing_keys
from shared.wire.errors import IdempotencyConflict, Unavailable

log = logging.getLogger(__name__)
_RETRY_AFTER_S = 5.0


class UnknownClient(LedgerError):
    """No client has this name."""


class ClientExists(LedgerError):
    """A client of this name is already there."""


@dataclass(frozen=True)
class Client:
    """Who may query. The hash of the secret stays out of `repr`."""

    id: int
    name: str
    key_id: str
    key_hash: str = field(repr=False)
    budget: int
    spent: int
    created_at: str
    revoked_at: str | None

    @property
    def revoked(self) -> bool:
        return self.revoked_at is not None

    @property
    def account(self) -> Account:
        """The client's numbers, for the arithmetic of `budget`."""
        return Account(self.name, self.budget, self.spent, self.revoked)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; `tables` explains the kinds."""

    seq: int
    at: str
    client_id: int
    kind: str
    rows: int
    amount: int | None
    idempotency_key: str | None
    body_sha256: str | None
    refers_to: int | None


@dataclass(frozen=True)
class Receipt:
    """The outcome of a charge: entry `seq`, queries `charged` now, `remaining` after it.

    A replay (the same key and body again) charges nothing and names the entry that paid.
    """

    seq: int
    charged: int
    remaining: int
    replayed: bool = False


@dataclass(frozen=True)
class Discrepancy:
    """A client whose stored `what` ('spent' or 'budget') is not what its entries say."""

    client: str
    what: str
    stored: int
    entries: int


class Ledger:
    """The ledger of one database. Methods may be called from any thread.

    Any failure of the database is `Unavailable`: where a charge cannot be written, no answer is given.
    """

    def __init__(self, engine: Engine) -> None:
        self._writing = engine
        self._reading = engine.execution_options(reading=True)

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Ledger:
        """Open a ledger and bring its schema up to date.

        Args:
            url: `sqlite:///FILE` or a path.
            create: whether to make a ledger that does not exist yet.

        Raises:
            LedgerError: the URL cannot be used, there is no such ledger, or it is not one.
        """
        ledger = cls(connect(parse_url(url), create=create))
        try:
            with ledger._writing.begin() as connection:
                migrate(connection)
        except SQLAlchemyError as error:
            raise LedgerError(f"the ledger {url} cannot be opened: {getattr(error, 'orig', error)}") from error
        return ledger

    def close(self) -> None:
        """Close the database's connections."""
        self._writing.dispose()

    # --- clients ---------------------------------------------------------------------------------------------------

    def add_client(self, name: str, budget: int) -> tuple[Client, ApiKey]:
        """A new client with a lifetime budget in queries, and its key: the only time the key is known.

        Raises:
            LedgerError: the name is empty or too long, or the budget is negative.
            ClientExists: the name is taken.
        """
        if not name.strip() or len(name) > 200:
            raise LedgerError("a client's name has 1 to 200 characters")
        _check_budget(budget)
        key = ApiKey.new()
        with self._transaction(write=True) as connection:
            if _by_name(connection, name) is not None:
                raise ClientExists(f"there is already a client '{name}'")
            row = connection.execute(
                insert(clients)
                .values(
                    name=name,
                    key_id=key.key_id,
                    key_hash=key.hash(),
                    budget=budget,
                    spent=0,
                    created_at=utc_now(),
                    revoked_at=None,
                )
                .returning(*clients.c)
            ).one()
            client = _client(row)
            _append(connection, client.id, "budget", amount=budget)
        return client, key

    def list_clients(self) -> list[Client]:
        """All clients, by the order they came in."""
        with self._transaction() as connection:
            return [_client(row) for row in connection.execute(select(clients).order_by(clients.c.id))]

    def find_client(self, key_id: str) -> Client | None:
        """The client with this key id, revoked or not; None if there is none."""
        with self._transaction() as connection:
            row = connection.execute(select(clients).where(clients.c.key_id == key_id)).one_or_none()
        return None if row is None else _client(row)

    def get_client(self, name: str) -> Client:
        """The client of this name; raises `UnknownClient`."""
        with self._transaction() as connection:
            return _named(connection, name)

    def set_budget(self, name: str, budget: int) -> Client:
        """Give a client another lifetime budget, in queries; what it has spent stays spent.

        Raises:
            LedgerError: the budget is negative.
            UnknownClient: no client has this name.
        """
        _check_budget(budget)
        with self._transaction(write=True) as connection:
            client = _named(connection, name)
            connection.execute(update(clients).where(clients.c.id == client.id).values(budget=budget))
            _append(connection, client.id, "budget", amount=budget)
            return _named(connection, name)

    def revoke(self, name: str) -> Client:
        """Make a client's key worthless for good; again is no error. Raises `UnknownClient`."""
        with self._transaction(write=True) as connection:
            client = _named(connection, name)
            if client.revoked:
                return client
            connection.execute(update(clients).where(clients.c.id == client.id).values(revoked_at=utc_now()))
            _append(connection, client.id, "revoke")
            return _named(connection, name)

    def account(self, client_id: int) -> Account:
        """The client's numbers as they stand now."""
        with self._transaction() as connection:
            return _by_id(connection, client_id).account

    # --- charges ---------------------------------------------------------------------------------------------------

    def charge(self, client_id: int, rows: int, idempotency_key: str | None, body_sha256: str) -> Receipt:
        """Charge `rows` queries, durably, or refuse all of them.

        With an idempotency key that stands for an earlier charge of the same body nothing more is charged.

        Raises:
            ClientRevoked: the client was revoked.
            BudgetExhausted: more rows than remain; nothing was charged.
            IdempotencyConflict: the key stands for a charge of another body.
            Unavailable: the database could not commit; nothing was charged.
        """
        with self._transaction(write=True) as connection:
            account = _by_id(connection, client_id).account
            admit(account, 0)  # a revoked client may not replay either
            if idempotency_key is not None:
                earlier = _standing_charge(connection, client_id, idempotency_key)
                if earlier is not None:
                    if (earlier.body_sha256, earlier.rows) != (body_sha256, rows):
                        raise IdempotencyConflict(
                            "this Idempotency-Key was used before with another body: use a new key for a new request",
                            receipt=str(earlier.seq),
                        )
                    return Receipt(earlier.seq, 0, account.remaining, replayed=True)
            admit(account, rows)
            # The condition repeats `admit` where it counts: in the database, against whoever else is writing.
            charged = connection.execute(
                update(clients)
                .where(clients.c.id == client_id, clients.c.revoked_at.is_(None))
                .where(clients.c.spent + rows <= clients.c.budget)
                .values(spent=clients.c.spent + rows)
            )
            if charged.rowcount != 1:
                raise Unavailable("the account changed while it was charged: try again", retry_after=1)
            seq = _append(
                connection, client_id, "charge", rows=rows, idempotency_key=idempotency_key, body_sha256=body_sha256
            )
            if idempotency_key is not None:
                connection.execute(
                    insert(standing_keys).values(client_id=client_id, idempotency_key=idempotency_key, seq=seq)
                )
            return Receipt(seq, rows, account.remaining - rows)

    def refund(self, receipt: Receipt) -> None:
        """Take a charge back whose answer failed; its idempotency key may be charged again.

        Nothing is deleted: a negative entry refers to the charge. A replay was not charged and refunds nothing;
        a second refund of the same charge does nothing.
        """
        if receipt.replayed:
            return
        with self._transaction(write=True) as connection:
            charge = _entry(connection.execute(select(entries).where(entries.c.seq == receipt.seq)).one())
            if connection.scalar(select(entries.c.seq).where(entries.c.refers_to == charge.seq)) is not None:
                return
            connection.execute(
                update(clients).where(clients.c.id == charge.client_id).values(spent=clients.c.spent - charge.rows)
            )
            _append(
                connection,
                charge.client_id,
                "refund",
                rows=-charge.rows,
                idempotency_key=charge.idempotency_key,
                body_sha256=charge.body_sha256,
                refers_to=charge.seq,
            )
            connection.execute(delete(standing_keys).where(standing_keys.c.seq == charge.seq))

    # --- explaining itself -----------------------------------------------------------------------------------------

    def entries(
        self, client_id: int | None = None, *, after: int = 0, limit: int = 1000, kinds: tuple[str, ...] = ()
    ) -> list[Entry]:
        """At most `limit` entries with seq > `after`, oldest first; of one client or all, of some kinds or all."""
        query = select(entries).where(entries.c.seq > after).order_by(entries.c.seq).limit(limit)
        if client_id is not None:
            query = query.where(entries.c.client_id == client_id)
        if kinds:
            query = query.where(entries.c.kind.in_(kinds))
        with self._transaction() as connection:
            return [_entry(row) for row in connection.execute(query)]

    def verify(self) -> list[Discrepancy]:
        """Compare each client's `spent` and `budget` with its entries; empty where the ledger agrees with itself."""
        latest = (
            select(entries.c.client_id, func.max(entries.c.seq).label("seq"))
            .where(entries.c.kind == "budget")
            .group_by(entries.c.client_id)
            .subquery()
        )
        with self._transaction() as connection:
            spent = dict(
                connection.execute(select(entries.c.client_id, func.sum(entries.c.rows)).group_by(entries.c.client_id))
                .tuples()
                .all()
            )
            budgets = dict(
                connection.execute(
                    select(entries.c.client_id, entries.c.amount).join(latest, entries.c.seq == latest.c.seq)
                )
                .tuples()
                .all()
            )
            stored = [_client(row) for row in connection.execute(select(clients).order_by(clients.c.id))]
        found = []
        for client in stored:
            for what, value, explained in (
                ("spent", client.spent, spent.get(client.id, 0)),
                ("budget", client.budget, budgets.get(client.id, 0)),
            ):
                if value != explained:
                    found.append(Discrepancy(client.name, what, value, int(explained)))
        return found

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Connection]:
        """A transaction; the one place where a database's failure becomes a refusal."""
        try:
            with (self._writing if write else self._reading).begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            log.error("ledger: %s", error)
            raise Unavailable(
                "the ledger cannot be read or written now, and nothing is answered uncharged: try again later",
                retry_after=_RETRY_AFTER_S,
            ) from error


def _check_budget(budget: int) -> None:
    if not 0 <= budget < 2**63:
        raise LedgerError("a budget is a number of queries, 0 or more")


def _client(row: Row[Any]) -> Client:
    return Client(**row._mapping)


def _entry(row: Row[Any]) -> Entry:
    return Entry(**row._mapping)


def _by_id(connection: Connection, client_id: int) -> Client:
    return _client(connection.execute(select(clients).where(clients.c.id == client_id)).one())


def _by_name(connection: Connection, name: str) -> Client | None:
    row = connection.execute(select(clients).where(clients.c.name == name)).one_or_none()
    return None if row is None else _client(row)


def _named(connection: Connection, name: str) -> Client:
    client = _by_name(connection, name)
    if client is None:
        raise UnknownClient(f"there is no client '{name}': 'oracle-server clients list' shows who there is")
    return client


def _standing_charge(connection: Connection, client_id: int, idempotency_key: str) -> Entry | None:
    row = connection.execute(
        select(entries)
        .join(standing_keys, standing_keys.c.seq == entries.c.seq)
        .where(standing_keys.c.client_id == client_id, standing_keys.c.idempotency_key == idempotency_key)
    ).one_or_none()
    return None if row is None else _entry(row)


def _append(
    connection: Connection,
    client_id: int,
    kind: str,
    *,
    rows: int = 0,
    amount: int | None = None,
    idempotency_key: str | None = None,
    body_sha256: str | None = None,
    refers_to: int | None = None,
) -> int:
    """Write one entry; returns its seq."""
    seq: int = connection.execute(
        insert(entries)
        .values(
            at=utc_now(),
            client_id=client_id,
            kind=kind,
            rows=rows,
            amount=amount,
            idempotency_key=idempotency_key,
            body_sha256=body_sha256,
            refers_to=refers_to,
        )
        .returning(entries.c.seq)
    ).scalar_one()
    return seq
