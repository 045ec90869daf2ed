"""The page's numbers against a computation over all entries, in both databases."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from oracle_server import chain, dashboard
from oracle_server.clock import timestamp
from oracle_server.ledger import ADMIN, Client, Ledger
from shared.audit.chain import Entry

NOW = datetime(2026, 3, 1, 12, 0, 0, 123_000, tzinfo=UTC)
Clock = Callable[[datetime], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the time that entries are written at."""

    def set_to(moment: datetime) -> None:
        monkeypatch.setattr(chain, "utc_now", lambda: timestamp(moment))
        monkeypatch.setattr("oracle_server.ledger.utc_now", lambda: timestamp(moment))

    return set_to


def write(ledger: Ledger, client: Client, *kinds_and_rows: tuple[str, int]) -> None:
    """Entries as they stand, without the rules: version 0.1's refunds are not written any more."""
    with ledger._appending() as (_, end):
        for kind, rows in kinds_and_rows:
            end.append(kind, client.id, rows=rows)


def every(ledger: Ledger) -> list[Entry]:
    return ledger.entries(limit=100_000)


def moment(entry: Entry) -> datetime:
    return datetime.fromisoformat(entry.at)


@pytest.fixture
def busy(ledger: Ledger, clock: Clock) -> tuple[Ledger, list[Client]]:
    """Three clients and an admin, who were added two days ago and have asked at random since; the last is idle."""
    rng, moments = random.Random(5), []
    clock(NOW - timedelta(days=2))
    clients = [ledger.add_client(name, 10**6)[0] for name in ("ada", "ben", "idle")]
    ledger.add_client("root", 0, role=ADMIN)
    for span, n in ((2 * 86_400, 60), (3_600, 60), (900, 60), (59, 20)):
        moments += [NOW - timedelta(milliseconds=rng.randrange(1000 * span)) for _ in range(n)]
    for when in sorted(moments):
        clock(when)
        kind = rng.choice(("charge", "charge", "charge", "reserve", "release", "refund"))
        write(ledger, rng.choice(clients[:2]), (kind, rng.randrange(1, 99) * (-1 if kind == "refund" else 1)))
    return ledger, clients


@pytest.mark.parametrize("window", dashboard.WINDOWS)
def test_spending_is_what_the_entries_say(busy: tuple[Ledger, list[Client]], window: str) -> None:
    ledger, clients = busy
    with ledger.reading() as connection:
        found = dashboard.spending(connection, window, NOW)
        own = {c.name: dashboard.spending(connection, window, NOW, c.id) for c in clients}
    assert [each.client for each in found.clients] == ["ada", "ben", "idle"]
    assert own.keys() == {"ada", "ben", "idle"}
    start = datetime.fromtimestamp(found.start / 1000, UTC)
    for client, series in zip(clients, found.clients, strict=True):
        expected = [0] * len(series.rows)
        for entry in every(ledger):
            bucket = (moment(entry) - start) // timedelta(milliseconds=found.step)
            if entry.kind in ("charge", "refund") and entry.client_id == client.id and 0 <= bucket < len(expected):
                expected[bucket] += entry.rows
        assert list(series.rows) == expected
        assert own[client.name].clients == (series,)  # alone, a client is told the same of itself
        assert any(expected) == (client.name != "idle")
    # The window is as long as its name says, ends now, and is cut into at most as many buckets as were promised.
    length = dashboard.WINDOWS[window] or 2 * 86_400
    covered = found.step * len(found.clients[0].rows) / 1000
    assert len(found.clients[0].rows) <= dashboard.BUCKETS
    assert length <= covered <= length + 2 * found.step / 1000
    assert 0 <= NOW.timestamp() * 1000 - (found.start + found.step * (len(found.clients[0].rows) - 1)) < found.step


def test_all_of_the_time_has_all_of_the_charges(ledger: Ledger) -> None:
    client, _ = ledger.add_client("ada", 100)
    for rows in (3, 4):
        ledger.charge(ledger.reserve(client.id, rows, None, "sha"))
    ledger.release(ledger.reserve(client.id, 50, None, "sha"), "its answer failed")
    with ledger.reading() as connection:
        (series,) = dashboard.spending(connection, "all", datetime.now(UTC)).clients
    assert (sum(series.rows), series.spent) == (7, ledger.account(client.id).spent) == (7, 7)


def test_rate_and_forecast_are_of_the_last_minute(busy: tuple[Ledger, list[Client]]) -> None:
    ledger, _ = busy
    recent = [e for e in every(ledger) if e.kind == "charge" and moment(e) > NOW - timedelta(seconds=60)]
    with ledger.reading() as connection:
        found = {each.account.client: each for each in dashboard.accounts(connection, NOW)}
    assert list(found) == ["ada", "ben", "idle"]
    for each in found.values():
        rows = sum(e.rows for e in recent if e.client_id == each.client_id)
        assert each.rate == rows / 60
        assert each.account == ledger.account(each.client_id)
        assert each.seconds_left == (10**6 / (rows / 60) if rows else None)
    assert found["ada"].rate > 0 < found["ben"].rate
    assert found["idle"].seconds_left is None


def test_an_empty_account_lasts_no_second_longer(ledger: Ledger) -> None:
    client, _ = ledger.add_client("ada", 120)
    ledger.charge(ledger.reserve(client.id, 60, None, "sha"))
    ledger.reserve(client.id, 30, None, "sha")
    with ledger.reading() as connection:
        (now,) = dashboard.accounts(connection, datetime.now(UTC))
    assert (now.rate, now.seconds_left) == (1.0, 30.0)  # what is held is not left


def test_a_clock_that_was_set_back_does_not_make_the_past_present(ledger: Ledger, clock: Clock) -> None:
    clock(NOW)
    client, _ = ledger.add_client("ada", 10**6)
    for minutes, rows in ((-50, 1_000), (0, 2_000), (70, 4_000)):  # the clock was an hour ahead ...
        clock(NOW + timedelta(minutes=minutes))
        write(ledger, client, ("charge", rows))
    with ledger.reading() as connection:
        (before,) = dashboard.accounts(connection, NOW + timedelta(seconds=30))
    assert before.rate == 0  # 2,000 are dated within the minute, and stand before an entry of the future
    clock(NOW + timedelta(seconds=20))  # ... and was set back
    write(ledger, client, ("charge", 60), ("charge", 120))
    now = NOW + timedelta(seconds=30)
    with ledger.reading() as connection:
        (after,) = dashboard.accounts(connection, now)
        (hour,) = dashboard.spending(connection, "1h", now).clients
        (ever,) = dashboard.spending(connection, "all", now).clients
    assert after.rate == 3.0
    assert sum(hour.rows) == 1_000 + 2_000 + 180  # by their dates; what is of the future stands in no bucket
    assert sum(ever.rows) == 2_000 + 180  # since the client was added, by the clock's word for it


def test_servers_whose_clocks_differ_by_seconds_are_both_now(ledger: Ledger, clock: Clock) -> None:
    client, _ = ledger.add_client("ada", 10**6)
    for seconds in (-30, 20, -5):
        clock(NOW + timedelta(seconds=seconds))
        write(ledger, client, ("charge", 60))
    with ledger.reading() as connection:
        (now,) = dashboard.accounts(connection, NOW)
    assert now.rate == 3.0


def test_a_bucket_keeps_its_charges_as_time_goes_on(busy: tuple[Ledger, list[Client]]) -> None:
    ledger, _ = busy
    later = NOW + timedelta(seconds=31)
    with ledger.reading() as connection:
        first, second = (dashboard.spending(connection, "1h", now) for now in (NOW, later))
    shift = (second.start - first.start) // first.step
    assert shift in (1, 2)
    assert first.clients[0].rows[shift:] == second.clients[0].rows[:-shift]


def test_the_last_entries_are_the_newest_first(busy: tuple[Ledger, list[Client]]) -> None:
    ledger, (ada, *_) = busy
    with ledger.reading() as connection:
        shown, own = dashboard.latest(connection), dashboard.latest(connection, ada.id, limit=5)
        names = dashboard.names(connection, [entry.client_id for entry, _ in shown])
    newest = sorted(every(ledger), key=lambda entry: -entry.seq)
    assert [entry for entry, _ in shown] == newest[: dashboard.LATEST]
    assert [entry for entry, _ in own] == list(itertools.islice((e for e in newest if e.client_id == ada.id), 5))
    assert shown[0][1] == ledger.head().head.hash
    assert set(names.values()) <= {"ada", "ben"}
