"""The watch finds what is changed before it and behind it, in both databases."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle_support import pay
from sqlalchemy import create_engine, text

from oracle_server import watch as watching
from oracle_server.database import parse_url
from oracle_server.ledger import Ledger
from oracle_server.watch import Watch

PIECE = 5


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_PIECE", PIECE)
    monkeypatch.setattr(watching, "_PATROL", PIECE + 2)


@pytest.fixture
def grown(ledger: Ledger) -> Ledger:
    """Two clients, 4 entries; ten requests of one, 20 entries."""
    (ada, _), _ = ledger.add_client("ada", 1_000), ledger.add_client("ben", 2_000)
    for n in range(10):
        pay(ledger, ada.id, 1 + n, f"key-{n}")
    return ledger


def until_idle(watch: Watch) -> None:
    """Follow to the end of the ledger."""
    for _ in range(100):
        if watch.step() == watching._POLL_S:
            return
    raise AssertionError("the watch never reached the end")


def all_over(watch: Watch) -> None:
    """One whole walk more, begun after now."""
    walks = watch.verdict.walks
    for _ in range(100):
        watch.step()
        if watch.verdict.walks >= walks + 2:
            return
    raise AssertionError("the walk never ended")


def change(url: str, statement: str, **values: object) -> None:
    """Whoever has the database can write to it."""
    engine = create_engine(parse_url(url))
    with engine.begin() as connection:
        assert connection.execute(text(statement), values).rowcount > 0
    engine.dispose()


def test_an_untouched_ledger_is_followed_in_pieces(grown: Ledger) -> None:
    watch = Watch(grown)
    assert watch.verdict.state == "checking"
    pause = watch.step()
    assert (watch.verdict.state, watch.verdict.verified, watch.verdict.entries) == ("checking", PIECE, 24)
    assert 0 < pause != watching._POLL_S
    until_idle(watch)
    assert (watch.verdict.state, watch.verdict.verified, watch.verdict.entries) == ("verified", 24, 24)
    pay(grown, 1, 3)
    watch.step()
    assert (watch.verdict.state, watch.verdict.verified) == ("verified", 26)
    all_over(watch)
    assert watch.verdict.state == "verified"
    assert watch.verdict.walked_at is not None


def test_it_keeps_no_state_of_requests(grown: Ledger) -> None:
    watch = Watch(grown)
    all_over(watch)
    assert watch._front.accounts.standing == watch._front.accounts.clients == {}
    assert watch._front.findings == []


def test_open_and_released_reservations_are_no_finding(grown: Ledger) -> None:
    grown.reserve(1, 10, None, "sha")
    grown.release(grown.reserve(1, 20, None, "sha"), "its answer failed")
    grown.set_budget("ben", 5)
    grown.revoke("ben")
    watch = Watch(grown)
    all_over(watch)
    assert watch.verdict.state == "verified"


@pytest.mark.parametrize(
    ("statement", "seq"),
    [
        ("UPDATE entries SET rows = rows - 1 WHERE seq = 10", 10),
        ("UPDATE entries SET at = '2020-01-01T00:00:00.000Z' WHERE seq = 24", 24),
        ("DELETE FROM entries WHERE seq = 12", 13),
        ("UPDATE entries SET hash = NULL WHERE seq = 7", 7),
        ("UPDATE entries SET hash = 'nonsense' WHERE seq = 7", 7),
    ],
)
def test_an_entry_changed_after_it_was_verified_is_found(grown: Ledger, url: str, statement: str, seq: int) -> None:
    watch = Watch(grown)
    until_idle(watch)
    assert watch.verdict.state == "verified"
    change(url, statement)
    all_over(watch)
    assert watch.verdict.state == "broken"
    assert watch.verdict.findings[0].seq == seq
    assert watch.verdict.findings[0].client_id is None


def test_a_ledger_changed_before_the_server_came_is_broken(grown: Ledger, url: str) -> None:
    change(url, "UPDATE entries SET rows = 1000 WHERE seq = 10")
    watch = Watch(grown)
    until_idle(watch)
    assert watch.verdict.state == "broken"
    assert [finding.seq for finding in watch.verdict.findings] == [10]


def test_an_end_cut_off_is_found(grown: Ledger, url: str) -> None:
    watch = Watch(grown)
    until_idle(watch)
    change(url, "DELETE FROM entries WHERE seq > 20")
    all_over(watch)
    assert watch.verdict.state == "broken"
    assert "cut off" in watch.verdict.findings[0].text


@pytest.mark.parametrize("column", ["budget", "spent", "held"])
def test_an_account_that_its_entries_do_not_explain_is_found_at_once(grown: Ledger, url: str, column: str) -> None:
    watch = Watch(grown)
    until_idle(watch)
    change(url, f"UPDATE clients SET {column} = {column} + 1 WHERE name = 'ben'")
    watch.step()
    (finding,) = watch.verdict.findings
    assert watch.verdict.state == "broken"
    assert finding.client_id == grown.get_client("ben").id
    assert column in finding.text


def test_a_broken_ledger_stays_broken_when_it_is_mended(grown: Ledger, url: str) -> None:
    watch = Watch(grown)
    until_idle(watch)
    change(url, "UPDATE clients SET spent = spent + 1 WHERE name = 'ben'")
    watch.step()
    change(url, "UPDATE clients SET spent = spent - 1 WHERE name = 'ben'")
    all_over(watch)
    assert watch.verdict.state == "broken"
    assert len(watch.verdict.findings) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM chain",
        "UPDATE chain SET public_key = '00'",
        "UPDATE chain SET at = 'x'",
        "UPDATE chain SET seq = 3",
    ],
)
def test_the_chains_own_row_is_watched(grown: Ledger, url: str, statement: str) -> None:
    watch = Watch(grown)
    until_idle(watch)
    change(url, statement)
    watch.step()
    assert watch.verdict.state == "broken"


def test_findings_are_bounded(grown: Ledger, url: str) -> None:
    change(url, "UPDATE entries SET hash = NULL")
    watch = Watch(grown)
    all_over(watch)
    assert len(watch.verdict.findings) == watching._MOST_FINDINGS


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(str(tmp_path / "ledger.db"), timeout=0.2)
    opened.add_client("ada", 1_000)
    yield opened
    opened.close()


def test_an_older_copy_of_the_ledger_put_in_its_place_is_found(sqlite: Ledger, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as live, sqlite3.connect(tmp_path / "copy.db") as copy:
        live.backup(copy)
        pay(sqlite, 1, 5)
        watch = Watch(sqlite)
        until_idle(watch)
        assert watch.verdict.state == "verified"
        copy.backup(live)
    live.close()
    copy.close()
    watch.step()
    assert watch.verdict.state == "broken"


def test_a_value_that_no_entry_can_hold_is_found(sqlite: Ledger, tmp_path: Path) -> None:
    change(f"sqlite:///{tmp_path / 'ledger.db'}", "UPDATE entries SET note = x'00ff' WHERE seq = 1")
    watch = Watch(sqlite)
    until_idle(watch)
    assert [finding.seq for finding in watch.verdict.findings] == [1]


def test_a_database_that_cannot_be_read_is_no_finding(sqlite: Ledger, tmp_path: Path) -> None:
    watch = Watch(sqlite)
    until_idle(watch)
    (tmp_path / "ledger.db").rename(tmp_path / "away.db")
    sqlite._reading.dispose()
    (tmp_path / "ledger.db").mkdir()
    assert watch.step() == watching._RETRY_S
    assert watch.verdict.state == "unavailable"
    (tmp_path / "ledger.db").rmdir()
    (tmp_path / "away.db").rename(tmp_path / "ledger.db")
    until_idle(watch)
    assert watch.verdict.state == "verified"


def test_the_thread_begins_and_ends(sqlite: Ledger) -> None:
    watch = Watch(sqlite)
    watch.start()
    while watch.verdict.state == "checking":
        time.sleep(0.01)
    watch.close()
    assert watch.verdict.state == "verified"
    assert not watch._thread.is_alive()
