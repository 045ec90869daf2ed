from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from oracle_server.database import LedgerError
from oracle_server.keys import ApiKey
from oracle_server.ledger import ClientExists, Ledger, Receipt, UnknownClient
from shared.wire.errors import BudgetExhausted, ClientRevoked, IdempotencyConflict, Unavailable


def test_a_charge_survives_and_is_counted(ledger: Ledger, tmp_path: Path) -> None:
    client, _ = ledger.add_client("a", 10)
    receipt = ledger.charge(client.id, 4, None, "sha")
    assert (receipt.charged, receipt.remaining, receipt.replayed) == (4, 6, False)
    ledger.close()
    again = Ledger.open(str(tmp_path / "ledger.db"), create=False)
    assert again.account(client.id).spent == 4
    assert again.verify() == []
    again.close()


def test_the_budget_ends_at_the_exact_query(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    ledger.charge(client.id, 7, None, "sha")
    with pytest.raises(BudgetExhausted):
        ledger.charge(client.id, 4, None, "sha")
    assert ledger.account(client.id).spent == 7
    assert ledger.charge(client.id, 3, None, "sha").remaining == 0
    with pytest.raises(BudgetExhausted):
        ledger.charge(client.id, 1, None, "sha")
    assert [entry.rows for entry in ledger.entries(kinds=("charge",))] == [7, 3]


def test_racing_threads_never_overspend(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 20)
    outcomes: list[object] = []
    barrier = threading.Barrier(16)

    def spend() -> None:
        barrier.wait()
        for _ in range(3):
            try:
                outcomes.append(ledger.charge(client.id, 1, None, "sha"))
            except BudgetExhausted as error:
                outcomes.append(error)

    threads = [threading.Thread(target=spend) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
    assert len(outcomes) == 48
    assert sorted(receipt.remaining for receipt in receipts) == list(range(20))
    assert ledger.account(client.id).remaining == 0
    assert ledger.verify() == []


def test_a_replay_is_free_and_names_the_entry_that_paid(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    paid = ledger.charge(client.id, 10, "key", "sha")
    assert ledger.charge(client.id, 10, "key", "sha") == Receipt(paid.seq, 0, 0, replayed=True)
    assert len(ledger.entries(kinds=("charge",))) == 1


@pytest.mark.parametrize(("rows", "sha"), [(4, "other"), (5, "sha")])
def test_a_key_stands_for_one_body_only(ledger: Ledger, rows: int, sha: str) -> None:
    client, _ = ledger.add_client("a", 10)
    ledger.charge(client.id, 4, "key", "sha")
    with pytest.raises(IdempotencyConflict):
        ledger.charge(client.id, rows, "key", sha)
    assert ledger.account(client.id).spent == 4


def test_two_clients_may_use_the_same_key(ledger: Ledger) -> None:
    for name in ("a", "b"):
        client, _ = ledger.add_client(name, 10)
        assert ledger.charge(client.id, 4, "key", name).charged == 4


def test_a_refund_is_an_entry_and_frees_the_key(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    first = ledger.charge(client.id, 4, "key", "sha")
    ledger.refund(first)
    ledger.refund(first)  # a second time does nothing
    assert ledger.account(client.id).spent == 0
    assert ledger.charge(client.id, 5, "key", "another body").charged == 5
    entries = ledger.entries(client.id, kinds=("charge", "refund"))
    assert [(e.kind, e.rows, e.refers_to) for e in entries] == [
        ("charge", 4, None),
        ("refund", -4, first.seq),
        ("charge", 5, None),
    ]
    assert ledger.verify() == []


def test_a_replay_refunds_nothing(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    ledger.charge(client.id, 4, "key", "sha")
    ledger.refund(ledger.charge(client.id, 4, "key", "sha"))
    assert ledger.account(client.id).spent == 4


def test_a_revoked_client_is_not_charged_and_may_not_replay(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    ledger.charge(client.id, 4, "key", "sha")
    revoked = ledger.revoke("a")
    assert ledger.revoke("a") == revoked
    for key in (None, "key"):
        with pytest.raises(ClientRevoked):
            ledger.charge(client.id, 4, key, "sha")
    assert [entry.kind for entry in ledger.entries()] == ["budget", "charge", "revoke"]


def test_budgets_are_entries_too(ledger: Ledger) -> None:
    ledger.add_client("a", 10)
    assert ledger.set_budget("a", 25).account.remaining == 25
    assert [(entry.kind, entry.amount) for entry in ledger.entries()] == [("budget", 10), ("budget", 25)]
    assert ledger.verify() == []


@pytest.mark.parametrize(("column", "what"), [("spent", "spent"), ("budget", "budget")])
def test_verify_finds_a_number_changed_by_hand(ledger: Ledger, tmp_path: Path, column: str, what: str) -> None:
    client, _ = ledger.add_client("a", 10)
    ledger.charge(client.id, 4, None, "sha")
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute(f"UPDATE clients SET {column} = {column} - 1")
    (found,) = ledger.verify()
    assert (found.client, found.what, found.entries - found.stored) == ("a", what, 1)


def test_the_key_is_kept_only_as_a_hash(ledger: Ledger, tmp_path: Path) -> None:
    client, key = ledger.add_client("a", 10)
    ledger.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert client.key_hash.encode() in kept
    assert key.secret.encode() not in kept
    assert key.secret not in repr(key)
    assert client.key_hash not in repr(client)


def test_keys_are_read_back_and_compared() -> None:
    key = ApiKey.new()
    assert ApiKey.parse(key.reveal()) == key
    assert key.matches(key.hash())
    assert not key.matches(ApiKey.new().hash())
    assert not key.matches(None)
    for text_ in ("", "zo_", key.reveal() + "x", key.reveal().upper(), f"{key.reveal()}\n"):
        assert ApiKey.parse(text_) is None


def test_names_are_unique_and_known(ledger: Ledger) -> None:
    ledger.add_client("a", 1)
    with pytest.raises(ClientExists):
        ledger.add_client("a", 1)
    with pytest.raises(UnknownClient):
        ledger.set_budget("b", 1)
    for name, budget in (("", 1), ("b", -1), ("b", 2**63)):
        with pytest.raises(LedgerError):
            ledger.add_client(name, budget)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://host/db", "a://://", "missing-dir/x.db"])
def test_a_ledger_that_cannot_be_used_says_so(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LedgerError):
        Ledger.open(url)


def test_a_file_that_is_no_ledger_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, and long enough to tell " * 20)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger.open(str(tmp_path / "text.db"))
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger.open(str(tmp_path / "none.db"), create=False)


def test_a_database_that_fails_is_unavailable_and_charges_nothing(ledger: Ledger, tmp_path: Path) -> None:
    client, _ = ledger.add_client("a", 10)
    with ledger._writing.begin() as connection:
        connection.execute(text("CREATE TRIGGER full BEFORE INSERT ON entries BEGIN SELECT RAISE(ABORT, 'full'); END"))
    with pytest.raises(Unavailable) as refusal:
        ledger.charge(client.id, 4, None, "sha")
    assert refusal.value.retry_after
    assert ledger.account(client.id).spent == 0


def test_every_commit_reaches_the_disk(ledger: Ledger) -> None:
    with ledger._writing.connect() as connection:
        pragmas = {p: connection.execute(text(f"PRAGMA {p}")).scalar() for p in ("journal_mode", "synchronous")}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
