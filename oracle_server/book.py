"""One write transaction of charges: a group of operations, decided in order and written together.

A request is paid in two steps, each durable before the next one:

    reserve    its rows are set aside, while they are computed
    charge     they are paid, after the answer was computed and before its first byte is sent
    release    they are set free, because no answer will be given

so that no answer is ever given without its charge on the disk, and no charge stands for an answer that was not
computed.

A crash between the two steps leaves a reservation open. No answer can have been sent for it, for that happens only
after the charge; so the rule of its settlement is: **an open reservation of a server that is gone is released.** The
release is an entry like any other. The client's retry, under the same Idempotency-Key or another, is then a new
request.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from oracle_server import tables
from oracle_server.budget import Account, admit
from oracle_server.chain import Chain
from oracle_server.liveness import Lifeline
from shared.audit.accounts import Request
from shared.audit.chain import Entry
from shared.wire.errors import IdempotencyConflict, OracleError, RequestInFlight, Unavailable

_RETRY_AFTER_S = 1.0

# Statements of every request are made once: making them takes longer than the database does.
_clients, _requests = tables.clients, tables.requests
_ACCOUNTS = select(_clients).where(_clients.c.id.in_(bindparam("ids", expanding=True)))
_STANDING_ONE = select(_requests).where(
    _requests.c.client_id == bindparam("id"), _requests.c.idempotency_key == bindparam("key")
)
_STANDING = select(_requests).where(
    _requests.c.client_id.in_(bindparam("ids", expanding=True)),
    _requests.c.idempotency_key.in_(bindparam("keys", expanding=True)),
)
_RESERVED = select(_requests).where(
    _requests.c.seq.in_(bindparam("seqs", expanding=True)), _requests.c.charge.is_(None)
)
_OPEN_OF = (
    select(_requests)
    .where(_requests.c.server == bindparam("of"), _requests.c.charge.is_(None))
    .order_by(_requests.c.seq)
)
_SERVERS = select(tables.servers.c.id).union(select(_requests.c.server).where(_requests.c.charge.is_(None)))
_ADD = insert(_requests)
_PAY = update(_requests).where(_requests.c.seq == bindparam("of")).values(charge=bindparam("by"))
_DROP = delete(_requests).where(_requests.c.seq == bindparam("of"))
_ACCOUNT = (
    update(_clients)
    .where(_clients.c.id == bindparam("of"))
    .values(spent=bindparam("now_spent"), held=bindparam("now_held"))
)


@dataclass(frozen=True)
class Payment:
    """A charge that stands: its entry, and the chain's hash before it.

    `charged` is 0 for a replay, which names the charge that paid; `remaining` is what the client has left now.
    """

    entry: Entry
    previous: bytes
    charged: int
    remaining: int
    replayed: bool = False


@dataclass(frozen=True)
class Reservation:
    """Queries set aside under entry `seq`; `paid` where the same request was paid before, and nothing is set aside.

    `seq` is the same for a request and for all its replays.
    """

    seq: int
    client_id: int
    rows: int
    idempotency_key: str | None
    body_sha256: str | None
    paid: Payment | None = None


@dataclass(frozen=True)
class Reserve:
    """Set `rows` queries of a client aside for a request."""

    client_id: int
    rows: int
    idempotency_key: str | None
    body_sha256: str | None


@dataclass(frozen=True)
class Charge:
    """Pay what was reserved: its answer was computed."""

    reservation: Reservation


@dataclass(frozen=True)
class Release:
    """Set free what was reserved: no answer will be given."""

    reservation: Reservation
    reason: str


@dataclass(frozen=True)
class Sweep:
    """Release the reservations that nobody will settle: of servers that are gone, and of this one's failed commits."""


Operation = Reserve | Charge | Release | Sweep


@dataclass
class _Account:
    """A client's row, as the group leaves it."""

    name: str
    budget: int
    spent: int
    held: int
    revoked: bool
    changed: bool = False

    @property
    def rule(self) -> Account:
        return Account(self.name, self.budget, self.spent, self.held, self.revoked)


@dataclass
class Memory:
    """What this server knows of the ledger as its own last transaction left it, at the chain's hash `at`.

    Every change of an account or a reservation is an entry. While the chain still ends where this server ended it,
    nobody has changed any, and they need not be read again.

    Attributes:
        accounts: clients by id.
        open: this server's reservations that are being computed now, by seq. True at any time.
    """

    at: bytes | None = None
    accounts: dict[int, _Account] = field(default_factory=dict)
    open: dict[int, Request] = field(default_factory=dict)


@dataclass
class _Changes:
    """What the group adds to and takes from the table `requests`."""

    insert: list[dict[str, Any]] = field(default_factory=list)
    charge: list[dict[str, Any]] = field(default_factory=list)
    delete: list[int] = field(default_factory=list)


class Book:
    """The state that a group of operations reads, and what it changes.

    Args:
        connection: of a write transaction.
        chain: its end of the chain.
        server: the id of the server that reserves.
        memory: of this server; to be dropped where the transaction fails.
        lifeline: tells which other servers are gone.
    """

    def __init__(self, connection: Connection, chain: Chain, server: str, memory: Memory, lifeline: Lifeline) -> None:
        self._connection, self._chain = connection, chain
        self._server, self._memory, self._lifeline = server, memory, lifeline
        self._fresh = chain.end == memory.at
        self._accounts = memory.accounts if self._fresh else {}
        self._standing: dict[tuple[int, str], Request] = {}
        self._reserved: dict[int, Request] = {}
        self._changes = _Changes()

    def apply(self, operations: Sequence[Operation]) -> list[object]:
        """Perform the operations in order; returns an outcome for each: a value, or the refusal as an exception.

        Outcomes: `Reservation` for Reserve; `Payment` for Charge; None for Release; the number of released reservations
        for Sweep. Nothing is written for an operation that is refused.
        """
        self._load(operations)
        outcomes: list[object] = []
        for operation in operations:
            try:
                outcomes.append(self._perform(operation))
            except OracleError as refusal:
                outcomes.append(refusal)
        self._write()
        return outcomes

    def remember(self) -> None:
        """Bring the server's memory up to date, once the transaction is on the disk."""
        memory = self._memory
        memory.at, memory.accounts = self._chain.end, self._accounts
        for change in self._changes.insert:
            request = Request(**change)
            memory.open[request.seq] = request

    def _perform(self, operation: Operation) -> object:
        match operation:
            case Reserve():
                return self._reserve(operation)
            case Charge(reservation):
                return self._charge(reservation)
            case Release(reservation, reason):
                stored = self._reserved.get(reservation.seq)
                if stored is not None:
                    self._release(stored, reason)
                return None
            case Sweep():
                return self._sweep()

    def _reserve(self, wanted: Reserve) -> Reservation:
        account, key = self._accounts[wanted.client_id], wanted.idempotency_key
        admit(account.rule, 0)  # a revoked client may not replay either
        earlier = self._standing.get((wanted.client_id, key)) if key is not None else None
        if earlier is not None and earlier.charge is None and self._is_orphan(earlier):
            self._release(earlier, "its commit failed")
            earlier = None
        if earlier is not None:
            if (earlier.body_sha256, earlier.rows) != (wanted.body_sha256, wanted.rows):
                raise IdempotencyConflict(
                    "this Idempotency-Key was used before with another body: use a new key for a new request"
                )
            if earlier.charge is None:
                raise RequestInFlight(
                    "a request with this Idempotency-Key is being answered now: its answer can be had for free "
                    "afterwards",
                    retry_after=_RETRY_AFTER_S,
                )
            return self._replay(earlier, account)
        admit(account.rule, wanted.rows)
        entry, _ = self._chain.append(
            "reserve",
            wanted.client_id,
            rows=wanted.rows,
            idempotency_key=key,
            body_sha256=wanted.body_sha256,
            note=self._server,
        )
        account.held += wanted.rows
        account.changed = True
        stored = Request(entry.seq, wanted.client_id, key, wanted.body_sha256, wanted.rows, self._server, None)
        if key is not None:
            self._standing[wanted.client_id, key] = stored
        self._changes.insert.append(asdict(stored))
        return Reservation(entry.seq, wanted.client_id, wanted.rows, key, wanted.body_sha256)

    def _replay(self, earlier: Request, account: _Account) -> Reservation:
        entries = tables.entries
        rows = self._connection.execute(
            select(entries).where(entries.c.seq <= earlier.charge).order_by(entries.c.seq.desc()).limit(2)
        ).all()
        # The charge is never the first entry: its client stands before it.
        entry = Entry(**{name: value for name, value in rows[0]._mapping.items() if name != "hash"})
        paid = Payment(entry, bytes.fromhex(rows[1].hash), 0, account.rule.remaining, replayed=True)
        return Reservation(
            earlier.seq, earlier.client_id, earlier.rows, earlier.idempotency_key, earlier.body_sha256, paid
        )

    def _charge(self, reservation: Reservation) -> Payment:
        stored = self._reserved.pop(reservation.seq, None)
        if stored is None or stored.charge is not None:
            # This server was taken for dead, or its last commit failed: somebody released what it held.
            raise Unavailable(
                "the reservation of this request was released meanwhile, and nothing was charged: try again",
                retry_after=_RETRY_AFTER_S,
            )
        account = self._accounts[stored.client_id]
        entry, previous = self._chain.append("charge", stored.client_id, **_settles(stored))
        account.held -= stored.rows
        account.spent += stored.rows
        account.changed = True
        if stored.idempotency_key is None:
            self._changes.delete.append(stored.seq)
        else:
            self._changes.charge.append({"of": stored.seq, "by": entry.seq})
        return Payment(entry, previous, stored.rows, account.rule.remaining)

    def _release(self, stored: Request, reason: str) -> None:
        self._reserved.pop(stored.seq, None)
        account = self._accounts[stored.client_id]
        self._chain.append("release", stored.client_id, **_settles(stored), note=reason)
        account.held -= stored.rows
        account.changed = True
        self._changes.delete.append(stored.seq)
        if stored.idempotency_key is not None:
            self._standing.pop((stored.client_id, stored.idempotency_key), None)

    def _sweep(self) -> int:
        servers = sorted(set(self._connection.scalars(_SERVERS)) - {self._server})
        orphans = [stored for stored in self._open_requests(self._server) if self._is_orphan(stored)]
        for stored in orphans:
            self._release(stored, "its commit failed")
        released = len(orphans)
        for server in servers:
            with self._lifeline.gone(self._connection, server) as gone:
                if not gone:
                    continue
                left = self._open_requests(server)
                for stored in left:
                    self._release(stored, f"server {server} ended before it answered")
                self._connection.execute(delete(tables.servers).where(tables.servers.c.id == server))
                released += len(left)
        return released

    def _open_requests(self, server: str) -> list[Request]:
        found = self._connection.execute(_OPEN_OF, {"of": server})
        settled = set(self._changes.delete) | {change["of"] for change in self._changes.charge}
        stored = [_request(row) for row in found if row.seq not in settled]
        self._load_accounts({each.client_id for each in stored})
        return stored

    def _is_orphan(self, stored: Request) -> bool:
        """Whether an open reservation is this server's, and nobody here is computing it: its commit seemed to fail."""
        new = {change["seq"] for change in self._changes.insert}
        return stored.server == self._server and stored.seq not in self._memory.open and stored.seq not in new

    # --- the database ----------------------------------------------------------------------------------------------

    def _load(self, operations: Sequence[Operation]) -> None:
        """What the operations will look at, in as few statements as there are tables."""
        reserves = [each for each in operations if isinstance(each, Reserve)]
        settled = [each.reservation for each in operations if isinstance(each, Charge | Release)]
        self._load_accounts({each.client_id for each in reserves} | {each.client_id for each in settled})
        keys = {each.idempotency_key for each in reserves if each.idempotency_key is not None}
        if len(reserves) == len(keys) == 1:  # the usual case, for which the other statement takes twice as long
            found = self._connection.execute(_STANDING_ONE, {"id": reserves[0].client_id, "key": keys.pop()})
            self._standing = {(row.client_id, row.idempotency_key): _request(row) for row in found}
        elif keys:
            ids = {each.client_id for each in reserves}
            found = self._connection.execute(_STANDING, {"ids": list(ids), "keys": list(keys)})
            for row in found:
                self._standing[row.client_id, row.idempotency_key] = _request(row)
        if settled and self._fresh:
            opened = self._memory.open
            self._reserved = {each.seq: opened[each.seq] for each in settled if each.seq in opened}
        elif settled:
            found = self._connection.execute(_RESERVED, {"seqs": [each.seq for each in settled]})
            self._reserved = {row.seq: _request(row) for row in found}

    def _load_accounts(self, ids: Set[int]) -> None:
        missing = ids - self._accounts.keys()
        if missing:
            for row in self._connection.execute(_ACCOUNTS, {"ids": list(missing)}):
                self._accounts[row.id] = _Account(row.name, row.budget, row.spent, row.held, row.revoked_at is not None)

    def _write(self) -> None:
        self._chain.flush()
        connection, changes = self._connection, self._changes
        if changes.delete:  # before what is inserted: a key that was freed may have been taken again
            connection.execute(_DROP, [{"of": seq} for seq in changes.delete])
        if changes.insert:
            connection.execute(_ADD, changes.insert)
        if changes.charge:
            connection.execute(_PAY, changes.charge)
        changed = [
            {"of": client_id, "now_spent": account.spent, "now_held": account.held}
            for client_id, account in self._accounts.items()
            if account.changed
        ]
        if changed:
            connection.execute(_ACCOUNT, changed)


def _request(row: Row[Any]) -> Request:
    return Request(**row._mapping)


def _settles(stored: Request) -> dict[str, Any]:
    """The fields of the entry that settles a reservation: all of the reservation's own, and which one it is."""
    return {
        "rows": stored.rows,
        "idempotency_key": stored.idempotency_key,
        "body_sha256": stored.body_sha256,
        "refers_to": stored.seq,
    }
