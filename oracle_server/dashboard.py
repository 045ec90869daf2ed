"""The numbers of the page, read from the ledger: accounts and their rate, spending over time, the last entries.

All of it is computed from the entries and the accounts within the caller's transaction, so that it is the same from any
worker and after any crash. Each function takes the client whose numbers are wanted, or None for everybody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from sqlalchemy import ColumnElement, Connection, bindparam, func, select, true

from oracle_server import tables
from oracle_server.budget import Account
from oracle_server.clock import timestamp
from oracle_server.ledger import CLIENT, Client
from shared.audit.chain import Entry

# The windows of the plots, in seconds; None reaches back to when the client was added.
WINDOWS: Mapping[str, int | None] = {"15m": 900, "1h": 3600, "24h": 86_400, "all": None}
BUCKETS = 120
RATE_WINDOW_S = 60
LATEST = 20

_SPENDING = ("charge", "refund")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True)
class AccountNow:
    """A client's account, and how fast it goes.

    Attributes:
        account: the client's numbers, in queries.
        rate: queries a second, the mean of the last `RATE_WINDOW_S` seconds.
    """

    client_id: int
    account: Account
    rate: float

    @property
    def seconds_left(self) -> float | None:
        """Seconds until nothing is left, if `rate` stays; None where nothing is being spent."""
        return self.account.remaining / self.rate if self.rate > 0 else None


@dataclass(frozen=True)
class ClientSpending:
    """Queries charged to a client in each bucket, refunds taken off; `spent` is the account's at the end of them."""

    client: str
    spent: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Spending:
    """Charges over time: bucket i begins `start` + i `step`, in milliseconds since 1970 in UTC."""

    start: int
    step: int
    clients: tuple[ClientSpending, ...]


def accounts(connection: Connection, now: datetime, client_id: int | None = None) -> list[AccountNow]:
    """The accounts as they stand, by the order the clients came in."""
    rates = _rates(connection, now)
    return [
        AccountNow(client.id, client.account, rates.get(client.id, 0.0)) for client in _clients(connection, client_id)
    ]


def spending(connection: Connection, window: str, now: datetime, client_id: int | None = None) -> Spending:
    """What was charged in a window of time that ends now, in at most `BUCKETS` buckets.

    Charges are placed by the clock's word for them. Where the clock was set back, those that it dates into the future
    stand in no bucket: they came before what is in the buckets, as they did in the ledger.

    Args:
        window: a key of `WINDOWS`.
    """
    clients = _clients(connection, client_id)
    start, step, count = _buckets(window, _milliseconds(now), [_milliseconds(_moment(c.created_at)) for c in clients])
    rows = {client.id: [0] * count for client in clients}
    for bucket, charged_to, total in _charged(connection, start, step, count, client_id):
        if charged_to in rows:
            rows[charged_to][bucket] = total
    return Spending(start, step, tuple(ClientSpending(c.name, c.spent, tuple(rows[c.id])) for c in clients))


def latest(connection: Connection, client_id: int | None = None, limit: int = LATEST) -> list[tuple[Entry, str | None]]:
    """The last entries, the newest first, each with the hash kept beside it."""
    entries = tables.entries
    query = select(entries).where(_of(client_id)).order_by(entries.c.seq.desc()).limit(limit)
    found = []
    for row in connection.execute(query):
        fields = dict(row._mapping)
        kept_hash = fields.pop("hash")
        found.append((Entry(**fields), kept_hash))
    return found


def names(connection: Connection, client_ids: Iterable[int]) -> dict[int, str]:
    """The names of clients and administrators by their ids."""
    clients = tables.clients
    found = connection.execute(select(clients.c.id, clients.c.name).where(clients.c.id.in_(set(client_ids))))
    return {row.id: row.name for row in found}


def _clients(connection: Connection, client_id: int | None) -> list[Client]:
    clients = tables.clients
    chosen = clients.c.role == CLIENT if client_id is None else clients.c.id == client_id
    return [Client(**row._mapping) for row in connection.execute(select(clients).where(chosen).order_by(clients.c.id))]


def _rates(connection: Connection, now: datetime) -> dict[int, float]:
    """Queries a second of each client that was charged within `RATE_WINDOW_S`.

    An entry dated into the future shows that the clock was set back after it; it, and all that stands before it in the
    ledger, is then not of now, whatever its date. Clocks of several servers may differ by `RATE_WINDOW_S`.
    """
    entries, window = tables.entries, timedelta(seconds=RATE_WINDOW_S)
    charges = entries.c.kind == "charge"
    set_back_after = select(func.max(entries.c.seq)).where(charges, entries.c.at > timestamp(now + window))
    query = (
        select(entries.c.client_id, func.sum(entries.c.rows))
        .where(charges, entries.c.at > timestamp(now - window))
        .where(entries.c.seq > func.coalesce(set_back_after.scalar_subquery(), 0))
        .group_by(entries.c.client_id)
    )
    return {client_id: int(rows) / RATE_WINDOW_S for client_id, rows in connection.execute(query)}


def _buckets(window: str, now: int, born: list[int]) -> tuple[int, int, int]:
    """Start, step and number of the buckets, the last of which holds `now`; in milliseconds.

    Edges are multiples of the step, so that a bucket keeps its charges as time goes on.
    """
    seconds = WINDOWS[window]
    if seconds is not None:
        step = 1000 * seconds // BUCKETS
        return (now // step - BUCKETS + 1) * step, step, BUCKETS
    oldest = min([now, *born])
    step = 1000 * max(1, -(-(now - oldest) // (1000 * (BUCKETS - 1))))
    first, last = oldest // step, now // step
    return first * step, step, last - first + 1


def _charged(
    connection: Connection, start: int, step: int, count: int, client_id: int | None
) -> Iterator[tuple[int, int, int]]:
    """(bucket, client id, queries) wherever something was charged."""
    entries = tables.entries
    # One range of the index by kind and time for each bucket: no database can plan that badly.
    query = (
        select(entries.c.client_id, func.sum(entries.c.rows))
        .where(entries.c.kind.in_(_SPENDING), _of(client_id))
        .where(entries.c.at >= bindparam("begins"), entries.c.at < bindparam("ends"))
        .group_by(entries.c.client_id)
    )
    edges = [timestamp(_EPOCH + (start + i * step) * _MILLISECOND) for i in range(count + 1)]
    for bucket, (begins, ends) in enumerate(pairwise(edges)):
        for charged_to, rows in connection.execute(query, {"begins": begins, "ends": ends}):
            yield bucket, charged_to, int(rows)


def _of(client_id: int | None) -> ColumnElement[bool]:
    return true() if client_id is None else tables.entries.c.client_id == client_id


def _milliseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MILLISECOND


def _moment(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp)
