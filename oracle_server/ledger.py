"""The ledger: who may query, what they have spent, and every entry that explains it.

Its parts: `book` decides and writes charges, `chain` binds every entry to those before it, `group_commit` lets requests
share a wait for the disk, `liveness` tells which servers are gone, `verification` checks it all.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Row, delete, insert, select, update
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from oracle_server import chain, tables
from oracle_server.book import Book, Charge, Memory, Operation, Payment, Release, Reservation, Reserve, Sweep
from oracle_server.budget import Account
from oracle_server.chain import Chain, ChainBroken, Identity
from oracle_server.clock import utc_now
from oracle_server.database import BUSY_TIMEOUT_S, LedgerError, connect, ledger_file, lock_schema, parse_url, reading
from oracle_server.group_commit import GroupCommit
from oracle_server.keys import ApiKey
from oracle_server.liveness import FileLifeline, Lifeline, SessionLifeline
from oracle_server.migrations import CHAIN_STEP, migrate
from oracle_server.signing_key import create_signer, load_signer
from oracle_server.verification import Verification, verify
from shared.audit.chain import Entry
from shared.audit.signatures import Head, SignedHead, Signer
from shared.wire.errors import Unavailable

log = logging.getLogger(__name__)
_RETRY_AFTER_S = 5.0
# What one operation of a group may bring upon the others: each is then tried alone.
_ALONE = (IntegrityError, DataError)
CLIENT, ADMIN = "client", "admin"


class UnknownClient(LedgerError):
    """No client has this name."""


class ClientExists(LedgerError):
    """A client of this name is already there."""


@dataclass(frozen=True)
class Client:
    """Who may query. The hash of the secret stays out of `repr`. An admin sees all accounts and may query nothing."""

    id: int
    name: str
    key_id: str
    key_hash: str = field(repr=False)
    role: str
    budget: int
    spent: int
    held: int
    created_at: str
    revoked_at: str | None

    @property
    def revoked(self) -> bool:
        return self.revoked_at is not None

    @property
    def is_admin(self) -> bool:
        return self.role == ADMIN

    @property
    def account(self) -> Account:
        """The client's numbers, for the arithmetic of `budget`."""
        return Account(self.name, self.budget, self.spent, self.held, self.revoked)


class Ledger:
    """The ledger of one database. Methods may be called from any thread.

    Any failure of the database is `Unavailable`: where a charge cannot be written, no answer is given.
    """

    def __init__(self, url: URL, engine: Engine, signer: Signer | None, identity: Identity) -> None:
        self._url, self._writing, self._signer = url, engine, signer
        self._reading = reading(engine)
        self.identity = identity
        self._server: _Server | None = None
        self._server_lock = threading.Lock()

    @classmethod
    def open(
        cls,
        url: str,
        *,
        create: bool = True,
        signing_key: Path | None = None,
        timeout: float = BUSY_TIMEOUT_S,
    ) -> Ledger:
        """Open a ledger and bring its schema up to date.

        Args:
            url: `sqlite:///FILE`, a path, or `postgresql://USER@HOST/DATABASE`.
            create: whether to make a ledger that does not exist yet.
            signing_key: file of the key that signs the ledger, made with the ledger; by default beside a SQLite file
                as `FILE.key`, else `oracle-ledger.key` in the working directory. Without it the ledger can be read.
            timeout: seconds to wait for the database.

        Raises:
            LedgerError: the URL or the key cannot be used, there is no such ledger, or it is not one.
        """
        parsed = parse_url(url)
        path = ledger_file(parsed)
        key_file = signing_key or (Path("oracle-ledger.key") if path is None else path.with_name(f"{path.name}.key"))
        signer = load_signer(key_file)
        engine = connect(parsed, create=create, timeout=timeout)
        try:
            with engine.begin() as connection:
                lock_schema(connection)
                steps = migrate(connection)
                identity = chain.identify(connection)
                if identity is None:
                    # Never for a ledger that had a chain: whoever deletes it would have his own version signed.
                    if CHAIN_STEP not in steps:
                        raise LedgerError("the ledger was changed by other hands: the end of its chain was deleted")
                    signer = signer or create_signer(key_file)
                    identity = chain.establish(connection, signer)
        except SQLAlchemyError as error:
            engine.dispose()
            shown = parsed.render_as_string(hide_password=True)
            raise LedgerError(f"the ledger {shown} cannot be opened: {_why(error)}") from error
        except LedgerError:
            engine.dispose()
            raise
        if signer is not None and signer.public_key.hex() != identity.public_key:
            engine.dispose()
            raise LedgerError(f"the signing key {key_file} is not this ledger's: give the one it was made with")
        return cls(parsed, engine, signer, identity)

    def close(self) -> None:
        """Finish what is queued and close the database's connections."""
        with self._server_lock:
            if self._server is not None:
                self._server.close()
                self._server = None
        self._writing.dispose()

    # --- clients ---------------------------------------------------------------------------------------------------

    def add_client(self, name: str, budget: int, *, role: str = CLIENT) -> tuple[Client, ApiKey]:
        """A new client with a lifetime budget in queries, and its key: the only time the key is known.

        Raises:
            LedgerError: the name is empty or too long, or the budget is negative.
            ClientExists: the name is taken.
        """
        if not name.strip() or len(name) > 200:
            raise LedgerError("a client's name has 1 to 200 characters")
        _check_budget(budget)
        key = ApiKey.new()
        with self._appending() as (connection, end):
            if _by_name(connection, name) is not None:
                raise ClientExists(f"there is already a client '{name}'")
            row = connection.execute(
                insert(tables.clients)
                .values(
                    name=name,
                    key_id=key.key_id,
                    key_hash=key.hash(),
                    role=role,
                    budget=budget,
                    spent=0,
                    held=0,
                    created_at=utc_now(),
                    revoked_at=None,
                )
                .returning(*tables.clients.c)
            ).one()
            client = _client(row)
            end.append("client", client.id, note=chain.client_note(row))
            end.append("budget", client.id, amount=budget)
        return client, key

    def list_clients(self, *, role: str = CLIENT) -> list[Client]:
        """All clients (or administrators), by the order they came in."""
        clients = tables.clients
        with self._transaction() as connection:
            found = connection.execute(select(clients).where(clients.c.role == role).order_by(clients.c.id))
            return [_client(row) for row in found]

    def find_client(self, key_id: str) -> Client | None:
        """The client with this key id, revoked or not; None if there is none."""
        with self._transaction() as connection:
            row = connection.execute(select(tables.clients).where(tables.clients.c.key_id == key_id)).one_or_none()
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
        clients = tables.clients
        with self._appending() as (connection, end):
            client = _named(connection, name)
            connection.execute(update(clients).where(clients.c.id == client.id).values(budget=budget))
            end.append("budget", client.id, amount=budget)
            return _named(connection, name)

    def revoke(self, name: str) -> Client:
        """Make a client's key worthless for good; again is no error. Raises `UnknownClient`."""
        clients = tables.clients
        with self._appending() as (connection, end):
            client = _named(connection, name)
            if client.revoked:
                return client
            entry, _ = end.append("revoke", client.id)
            connection.execute(update(clients).where(clients.c.id == client.id).values(revoked_at=entry.at))
            return _named(connection, name)

    def account(self, client_id: int) -> Account:
        """The client's numbers as they stand now."""
        with self._transaction() as connection:
            row = connection.execute(select(tables.clients).where(tables.clients.c.id == client_id)).one()
            return _client(row).account

    # --- charges ---------------------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Take part as a server that makes reservations; returns how many reservations of dead servers were released.

        Raises:
            LedgerError: no signing key, or the server's lock cannot be taken.
            Unavailable: the database cannot be written.
        """
        with self._server_lock:
            if self._server is None:
                self._server = _Server(self._url, self._writing, chain.require(self._signer))
            server = self._server
        released: int = server.submit(Sweep()).result()
        return released

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation of `book`; the future has its outcome once it is on the disk.

        Outcomes are as `Book.apply` says; refusals, and `Unavailable` where the database failed, are raised.
        """
        if self._server is None:
            self.serve()
        assert self._server is not None  # noqa: S101  (said to mypy)
        return self._server.submit(operation)

    def reserve(self, client_id: int, rows: int, idempotency_key: str | None, body_sha256: str) -> Reservation:
        """Set `rows` queries aside, durably, or refuse all of them.

        With an idempotency key that stands for a paid request of the same body, nothing is set aside: `paid` is set.

        Raises:
            ClientRevoked, BudgetExhausted, HeldByOthers: as `budget.admit` does.
            IdempotencyConflict: the key stands for another body.
            RequestInFlight: the key's request is being computed.
            Unavailable: the database could not commit; nothing is charged.
        """
        reservation: Reservation = self.submit(Reserve(client_id, rows, idempotency_key, body_sha256)).result()
        return reservation

    def charge(self, reservation: Reservation) -> Payment:
        """Pay what was reserved, once its answer is computed and before it is sent.

        Raises:
            Unavailable: the database could not commit, or the reservation was released; no answer may be given.
        """
        payment: Payment = self.submit(Charge(reservation)).result()
        return payment

    def release(self, reservation: Reservation, reason: str) -> None:
        """Set free what was reserved; a second time, or after a charge, it does nothing."""
        self.submit(Release(reservation, reason)).result()

    def receipt(self, payment: Payment) -> str:
        """The signed receipt of a charge, as the header Query-Receipt carries it."""
        signer = chain.require(self._signer)
        return signer.sign_receipt(self.identity.ledger, payment.previous, payment.entry).text()

    # --- explaining itself -----------------------------------------------------------------------------------------

    def entries(
        self, client_id: int | None = None, *, after: int = 0, limit: int = 1000, kinds: tuple[str, ...] = ()
    ) -> list[Entry]:
        """At most `limit` entries with seq > `after`, oldest first; of one client or all, of some kinds or all."""
        entries = tables.entries
        query = select(entries).where(entries.c.seq > after).order_by(entries.c.seq).limit(limit)
        if client_id is not None:
            query = query.where(entries.c.client_id == client_id)
        if kinds:
            query = query.where(entries.c.kind.in_(kinds))
        with self._transaction() as connection:
            return [_entry(row) for row in connection.execute(query)]

    def head(self) -> SignedHead:
        """The end of the chain as it was last signed."""
        with self._transaction() as connection:
            return chain.signed_head(connection)

    def verify(self, public_key: bytes | None = None) -> Verification:
        """Check every entry, the chain, its signature and the tables that repeat what the entries say.

        Args:
            public_key: the key to trust, 32 bytes; by default the signing key's own.

        Raises:
            LedgerError: neither is there.
        """
        trusted = public_key or (self._signer.public_key if self._signer else None)
        if trusted is None:
            raise LedgerError("the signing key is not here: give the ledger's public key, --public-key")
        with self._transaction() as connection:
            return verify(connection, trusted)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that sees the ledger as it is now, and does not change it."""
        with self._transaction() as connection:
            yield connection

    @contextmanager
    def _appending(self) -> Iterator[tuple[Connection, Chain]]:
        """A write transaction at the chain's end."""
        signer = chain.require(self._signer)
        with self._transaction(write=True) as connection:
            end = Chain(connection, signer)
            yield connection, end
            end.flush()

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Connection]:
        with _available(), (self._writing if write else self._reading).begin() as connection:
            yield connection


class _Server:
    """One server's part in the ledger: its lifeline, its open reservations, and the thread that writes."""

    def __init__(self, url: URL, engine: Engine, signer: Signer) -> None:
        self._url, self._engine, self._signer = url, engine, signer
        # The next four are the writing thread's alone.
        self._memory = Memory()
        self._seen: Head | None = None
        self._connection: Connection | None = None
        self._id, self._lifeline = self._register()
        self._commits = GroupCommit[Operation](self._apply, alone=_ALONE, name="ledger")

    def submit(self, operation: Operation) -> Future[Any]:
        return self._commits.submit(operation)

    def close(self) -> None:
        """Finish what is queued, and leave: reservations that are still open are then for others to release."""
        self._commits.close()
        if self._connection is not None:
            self._connection.close()
        try:
            with _available(), self._engine.begin() as connection:
                open_requests = select(tables.requests.c.seq).where(
                    tables.requests.c.server == self._id, tables.requests.c.charge.is_(None)
                )
                if not connection.execute(open_requests).first():
                    connection.execute(delete(tables.servers).where(tables.servers.c.id == self._id))
        except Unavailable:
            pass  # the next server that starts finds this one gone
        self._lifeline.close()

    def _register(self) -> tuple[str, Lifeline]:
        server = secrets.token_hex(8)
        path = ledger_file(self._url)
        # The lock first: a server that is listed without one counts as gone.
        lifeline: Lifeline = (
            SessionLifeline(self._engine, server)
            if path is None
            else FileLifeline(path.with_name(f"{path.name}.servers"), server)
        )
        row = {"id": server, "host": socket.gethostname()[:255], "pid": os.getpid(), "started_at": utc_now()}
        try:
            with _available(), self._engine.begin() as connection:
                connection.execute(insert(tables.servers), [row])
        except BaseException:
            lifeline.close()
            raise
        return server, lifeline

    def _apply(self, operations: Sequence[Operation]) -> Sequence[object]:
        try:
            outcomes = self._commit(operations)
        except _ALONE:
            self._memory.at = None
            raise  # each of them comes again
        except BaseException:
            self._memory.at = None
            self._forget(operations)
            raise
        self._forget(operations)
        return outcomes

    def _commit(self, operations: Sequence[Operation]) -> list[object]:
        with _available(passing=_ALONE if len(operations) > 1 else ()):
            if any(isinstance(each, Sweep) for each in operations):
                self._stay_alive()
            with self._writing() as connection:
                end = Chain(connection, self._signer, self._seen)
                book = Book(connection, end, self._id, self._memory, self._lifeline)
                outcomes = book.apply(operations)
        self._seen = end.head
        book.remember()
        return outcomes

    def _forget(self, operations: Sequence[Operation]) -> None:
        """Whatever became of the commit, nobody computes these any more: if they stay open, a sweep releases them.

        Not before the commit: a sweep in the same group would take what a charge after it is about to pay for left.
        """
        for each in operations:
            if isinstance(each, Charge | Release):
                self._memory.open.pop(each.reservation.seq, None)

    def _stay_alive(self) -> None:
        """Where this server's lock was lost, and others may have taken it for gone, begin as another."""
        if self._lifeline.held():
            return
        log.warning("ledger: the server's lock was lost, and with it perhaps its reservations; starting over")
        self._lifeline.close()
        self._hang_up()  # whatever took the lock's connection has taken this one, too
        try:
            self._id, self._lifeline = self._register()
        except LedgerError as error:  # its database is away: the next sweep tries again
            log.error("ledger: %s", error)
            raise _unavailable() from error
        self._memory.open.clear()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction on the writing thread's own connection, kept: a pool's care costs as much as a write."""
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            with self._connection.begin():
                yield self._connection
        except BaseException:
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        """Let go of the writing thread's connection; the next transaction makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.close()


@contextmanager
def _available(passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """The one place where a database's failure becomes a refusal."""
    try:
        yield
    except ChainBroken as broken:
        log.error("ledger: %s", broken.detail)
        raise
    except SQLAlchemyError as error:
        if isinstance(error, passing):
            raise
        log.error("ledger: %s", error)
        raise _unavailable() from error


def _unavailable() -> Unavailable:
    return Unavailable(
        "the ledger cannot be read or written now, and nothing is answered uncharged: try again later",
        retry_after=_RETRY_AFTER_S,
    )


def _check_budget(budget: int) -> None:
    if not 0 <= budget < 2**63:
        raise LedgerError("a budget is a number of queries, 0 or more")


def _client(row: Row[Any]) -> Client:
    return Client(**row._mapping)


def _entry(row: Row[Any]) -> Entry:
    return Entry(**{name: value for name, value in row._mapping.items() if name != "hash"})


def _by_name(connection: Connection, name: str) -> Client | None:
    row = connection.execute(select(tables.clients).where(tables.clients.c.name == name)).one_or_none()
    return None if row is None else _client(row)


def _named(connection: Connection, name: str) -> Client:
    client = _by_name(connection, name)
    if client is None:
        raise UnknownClient(f"there is no client '{name}': 'oracle-server clients list' shows who there is")
    return client


def _why(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
