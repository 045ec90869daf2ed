"""What one viewer of the page may see, as the message it is sent in. Nothing of one client is told to another.

An admin sees all accounts. A client sees its own account, spending, entries and refusals; of the ledger as a whole it
sees how many entries there are and whether they are whole, which every receipt and `GET /v1/ledger` tell it anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from oracle_server import dashboard
from oracle_server.clock import timestamp
from oracle_server.cost_cache import CostCache
from oracle_server.dashboard import AccountNow, Spending
from oracle_server.ledger import Client, Ledger
from oracle_server.watch import Finding, State, Verdict
from shared.audit.chain import Entry

Window = Literal["15m", "1h", "24h", "all"]
_KEY_SHOWN = 16  # characters of an Idempotency-Key


class View(BaseModel):
    """A part of the page's data."""

    model_config = ConfigDict(frozen=True)


class Viewer(View):
    """Whose key it is."""

    name: str
    admin: bool


class AccountView(View):
    """A client's account in queries; `rate` is queries a second, `seconds_left` None where nothing is being spent."""

    client: str
    budget: int
    spent: int
    held: int
    remaining: int
    revoked: bool
    rate: float
    seconds_left: float | None
    refusals: dict[str, int]  # by code, since `DashboardView.counting_since`


class SpendingOfClient(View):
    """Queries charged in each bucket, and the account's `spent` at the end of the last."""

    client: str
    spent: int
    rows: tuple[int, ...]


class SpendingView(View):
    """Charges over time: bucket i begins `start_ms` + i `step_ms`, since 1970 in UTC."""

    start_ms: int
    step_ms: int
    clients: tuple[SpendingOfClient, ...]


class EntryView(View):
    """A ledger entry. `key` begins its Idempotency-Key; `verified` is None where it was not reached yet."""

    seq: int
    at: str
    client: str
    kind: str
    rows: int
    amount: int | None
    key: str | None
    note: str | None
    hash: str | None
    verified: bool | None


class VerificationView(View):
    """What is known of the whole ledger; see `watch.Verdict`."""

    state: State
    entries: int
    verified: int
    checked_at: str | None
    walks: int
    walked_at: str | None
    findings: tuple[str, ...]


class DashboardView(View):
    """`GET /v1/dashboard`."""

    now: str
    counting_since: str  # when this server started, and with it its count of refusals
    rate_window_s: int
    viewer: Viewer
    window: Window
    accounts: tuple[AccountView, ...]
    refusals_without_key: dict[str, int]  # for an admin only
    spending: SpendingView
    entries: tuple[EntryView, ...]
    verification: VerificationView


def view(
    ledger: Ledger,
    viewer: Client,
    window: Window,
    *,
    verdict: Verdict,
    refusals: Mapping[str, Mapping[str, int]],
    counting_since: str,
    kept: CostCache[Spending],
) -> DashboardView:
    """The page's data for one viewer, as the ledger stands now.

    Args:
        refusals: by client and code, '' for requests without a valid key.
        kept: spending that was computed a moment ago.
    """
    now, scope = datetime.now(UTC), None if viewer.is_admin else viewer.id
    with ledger.reading() as connection:
        accounts = dashboard.accounts(connection, now, scope)
        latest = dashboard.latest(connection, scope)
        names = dashboard.names(connection, {entry.client_id for entry, _ in latest})
        spending = kept.get((window, scope), lambda: dashboard.spending(connection, window, now, scope))
    broken = {finding.seq for finding in verdict.findings}
    return DashboardView(
        now=timestamp(now),
        counting_since=counting_since,
        rate_window_s=dashboard.RATE_WINDOW_S,
        viewer=Viewer(name=viewer.name, admin=viewer.is_admin),
        window=window,
        accounts=tuple(_account(each, refusals.get(each.account.client, {})) for each in accounts),
        refusals_without_key=dict(refusals.get("", {})) if viewer.is_admin else {},
        spending=_spending(spending),
        entries=tuple(
            _entry(entry, kept_hash, names.get(entry.client_id, f"client {entry.client_id}"), verdict.verified, broken)
            for entry, kept_hash in latest
        ),
        verification=_verification(verdict, scope),
    )


def _account(now: AccountNow, refusals: Mapping[str, int]) -> AccountView:
    account = now.account
    return AccountView(
        client=account.client,
        budget=account.budget,
        spent=account.spent,
        held=account.held,
        remaining=account.remaining,
        revoked=account.revoked,
        rate=now.rate,
        seconds_left=now.seconds_left,
        refusals=dict(refusals),
    )


def _spending(spending: Spending) -> SpendingView:
    return SpendingView(
        start_ms=spending.start,
        step_ms=spending.step,
        clients=tuple(SpendingOfClient(client=c.client, spent=c.spent, rows=c.rows) for c in spending.clients),
    )


def _entry(entry: Entry, kept_hash: str | None, client: str, reached: int, broken: set[int | None]) -> EntryView:
    key = entry.idempotency_key
    verified = None if entry.seq > reached else entry.seq not in broken
    return EntryView(
        seq=entry.seq,
        at=entry.at,
        client=client,
        kind=entry.kind,
        rows=entry.rows,
        amount=entry.amount,
        key=key if key is None or len(key) <= _KEY_SHOWN else f"{key[:_KEY_SHOWN]}…",
        # The notes of other kinds are for machines: the hash of a client's secret, the id of a server.
        note=entry.note if entry.kind == "release" else None,
        hash=kept_hash,
        verified=verified,
    )


def _verification(verdict: Verdict, scope: int | None) -> VerificationView:
    return VerificationView(
        state=verdict.state,
        entries=verdict.entries,
        verified=verdict.verified,
        checked_at=verdict.checked_at,
        walks=verdict.walks,
        walked_at=verdict.walked_at,
        findings=tuple(dict.fromkeys(_told(finding, scope) for finding in verdict.findings)),
    )


def _told(finding: Finding, scope: int | None) -> str:
    if scope is None or finding.client_id in (None, scope):
        return finding.text
    return "the account of another client is not what its entries amount to"
