from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import psycopg
import pytest
from databases import POSTGRESQL, ledger_url
from oracle_support import pay
from sqlalchemy import Connection, text

from oracle_server.book import Charge, Payment, Release, Sweep
from oracle_server.budget import HeldByOthers
from oracle_server.database import LedgerError
from oracle_server.keys import ApiKey
from oracle_server.ledger import ADMIN, ClientExists, Ledger, UnknownClient
from shared.audit.signatures import Receipt, SignatureInvalid, read_public_key
from shared.wire.errors import BudgetExhausted, ClientRevoked, IdempotencyConflict, RequestInFlight, Unavailable


def test_a_charge_survives_and_is_counted(ledger: Ledger, url: str) -> None:
    client, _ = ledger.add_client("a", 10)
    payment = pay(ledger, client.id, 4)
    assert (payment.charged, payment.remaining, payment.replayed) == (4, 6, False)
    ledger.close()
    again = Ledger.open(url, create=False)
    assert again.account(client.id).spent == 4
    assert again.verify().intact
    again.close()


def test_a_reservation_is_held_then_paid_or_set_free(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    first, second = ledger.reserve(client.id, 4, "k", "sha"), ledger.reserve(client.id, 3, None, "sha")
    account = ledger.account(client.id)
    assert (account.spent, account.held, account.remaining) == (0, 7, 3)
    ledger.release(first, "for a test")
    assert ledger.charge(second).remaining == 7
    account = ledger.account(client.id)
    assert (account.spent, account.held, account.remaining) == (3, 0, 7)
    assert pay(ledger, client.id, 7, "k").remaining == 0  # the key is free again, and so are its queries
    told = [(e.kind, e.rows, e.refers_to) for e in ledger.entries(kinds=("reserve", "charge", "release"))]
    assert told == [
        ("reserve", 4, None),
        ("reserve", 3, None),
        ("release", 4, first.seq),
        ("charge", 3, second.seq),
        ("reserve", 7, None),
        ("charge", 7, 7),
    ]
    assert ledger.verify().intact


def test_a_reservation_is_settled_once(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    reservation = ledger.reserve(client.id, 4, "k", "sha")
    ledger.charge(reservation)
    ledger.release(reservation, "too late")
    assert ledger.account(client.id).spent == 4
    with pytest.raises(Unavailable, match="released"):
        ledger.charge(reservation)
    other = ledger.reserve(client.id, 4, "l", "sha")
    ledger.release(other, "no answer")
    with pytest.raises(Unavailable, match="released"):
        ledger.charge(other)
    assert ledger.account(client.id).spent == 4
    assert ledger.verify().intact


def test_the_budget_ends_at_the_exact_query(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    pay(ledger, client.id, 7)
    with pytest.raises(BudgetExhausted):
        ledger.reserve(client.id, 4, None, "sha")
    assert ledger.account(client.id).spent == 7
    assert pay(ledger, client.id, 3).remaining == 0
    with pytest.raises(BudgetExhausted):
        ledger.reserve(client.id, 1, None, "sha")
    assert [entry.rows for entry in ledger.entries(kinds=("charge",))] == [7, 3]


def test_what_others_hold_may_come_back_and_is_no_final_refusal(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    first = ledger.reserve(client.id, 8, None, "sha")
    with pytest.raises(HeldByOthers):
        ledger.reserve(client.id, 3, None, "sha")
    with pytest.raises(BudgetExhausted):
        ledger.reserve(client.id, 11, None, "sha")
    ledger.release(first, "no answer")
    assert ledger.reserve(client.id, 3, None, "sha").rows == 3


def test_racing_threads_never_overspend(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 20)
    outcomes: list[object] = []
    barrier = threading.Barrier(16)

    def spend() -> None:
        barrier.wait()
        for _ in range(3):
            while True:
                try:
                    outcomes.append(pay(ledger, client.id, 1))
                except HeldByOthers:
                    continue
                except BudgetExhausted as error:
                    outcomes.append(error)
                break

    threads = [threading.Thread(target=spend) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paid = [outcome for outcome in outcomes if isinstance(outcome, Payment)]
    assert len(outcomes) == 48
    assert len(paid) == 20
    assert ledger.account(client.id).remaining == 0
    assert ledger.verify().intact


def test_a_group_is_decided_in_order(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    reservations = [ledger.reserve(client.id, 1, f"k{n}", "sha") for n in range(4)]
    futures = [ledger.submit(Charge(reservations[0])), ledger.submit(Release(reservations[1], "no answer"))]
    futures += [ledger.submit(Charge(each)) for each in reservations[2:]]
    outcomes = [future.result() for future in futures]
    assert [type(outcome) for outcome in outcomes] == [Payment, type(None), Payment, Payment]
    assert [outcome.remaining for outcome in outcomes if outcome] == [6, 7, 7]
    assert ledger.verify().intact


def test_a_replay_is_free_and_names_the_entry_that_paid(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    reservation = ledger.reserve(client.id, 10, "key", "sha")
    paid = ledger.charge(reservation)
    again = ledger.reserve(client.id, 10, "key", "sha")
    assert again.seq == reservation.seq  # what a policy's noise depends on
    assert again.paid == Payment(paid.entry, paid.previous, 0, 0, replayed=True)
    assert ledger.receipt(again.paid) == ledger.receipt(paid)
    assert len(ledger.entries(kinds=("charge",))) == 1


def test_a_key_in_flight_is_refused(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    reservation = ledger.reserve(client.id, 4, "key", "sha")
    with pytest.raises(RequestInFlight):
        ledger.reserve(client.id, 4, "key", "sha")
    ledger.charge(reservation)
    assert ledger.reserve(client.id, 4, "key", "sha").paid is not None


@pytest.mark.parametrize(("rows", "sha"), [(4, "other"), (5, "sha")])
def test_a_key_stands_for_one_body_only(ledger: Ledger, rows: int, sha: str) -> None:
    client, _ = ledger.add_client("a", 10)
    pay(ledger, client.id, 4, "key")
    with pytest.raises(IdempotencyConflict):
        ledger.reserve(client.id, rows, "key", sha)
    assert ledger.account(client.id).spent == 4


def test_two_clients_may_use_the_same_key(ledger: Ledger) -> None:
    for name in ("a", "b"):
        client, _ = ledger.add_client(name, 10)
        assert pay(ledger, client.id, 4, "key", name).charged == 4


def test_a_receipt_proves_its_charge(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    payment = pay(ledger, client.id, 4, "key", "ab" * 32)
    receipt = Receipt.parse(ledger.receipt(payment))
    public_key = read_public_key(ledger.identity.public_key)
    receipt.verify(public_key)
    assert (receipt.ledger, receipt.entry) == (ledger.identity.ledger, payment.entry)
    assert receipt.entry == ledger.entries(kinds=("charge",))[0]
    assert receipt.hash == ledger.head().head.hash  # the charge is the last entry
    with pytest.raises(SignatureInvalid):
        receipt.verify(bytes(32))


def test_a_revoked_client_is_not_charged_and_may_not_replay(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    pay(ledger, client.id, 4, "key")
    in_flight = ledger.reserve(client.id, 2, "other", "sha")
    revoked = ledger.revoke("a")
    assert ledger.revoke("a") == revoked
    for key in (None, "key"):
        with pytest.raises(ClientRevoked):
            ledger.reserve(client.id, 4, key, "sha")
    ledger.charge(in_flight)  # what was admitted is answered and paid
    told = [entry.kind for entry in ledger.entries()]
    assert told == ["client", "budget", "reserve", "charge", "reserve", "revoke", "charge"]
    assert ledger.verify().intact


def test_budgets_are_entries_too(ledger: Ledger) -> None:
    ledger.add_client("a", 10)
    assert ledger.set_budget("a", 25).account.remaining == 25
    assert [(entry.kind, entry.amount) for entry in ledger.entries(kinds=("budget",))] == [
        ("budget", 10),
        ("budget", 25),
    ]
    assert ledger.verify().intact


def test_an_admin_is_no_client_and_may_query_nothing(ledger: Ledger) -> None:
    admin, _ = ledger.add_client("root", 0, role=ADMIN)
    assert ledger.list_clients() == []
    assert [each.name for each in ledger.list_clients(role=ADMIN)] == ["root"]
    with pytest.raises(BudgetExhausted):
        ledger.reserve(admin.id, 1, None, "sha")
    assert ledger.verify().intact


def test_the_reservations_of_a_server_that_is_gone_are_released(ledger: Ledger, url: str) -> None:
    client, _ = ledger.add_client("a", 10)
    gone, alive = Ledger.open(url), Ledger.open(url)
    gone.reserve(client.id, 4, "gone", "sha")
    kept = alive.reserve(client.id, 3, "alive", "sha")
    assert ledger.serve() == 0  # both are alive
    server = gone._server
    assert server is not None
    server._lifeline.close()  # what the kernel, or PostgreSQL, does when a process ends
    assert ledger.submit(Sweep()).result() == 1
    account = ledger.account(client.id)
    assert (account.spent, account.held) == (0, 3)
    (release,) = ledger.entries(kinds=("release",))
    assert (release.rows, release.idempotency_key, release.note) == (
        4,
        "gone",
        f"server {server._id} ended before it answered",
    )
    assert pay(ledger, client.id, 4, "gone").charged == 4  # the retry is a new request
    assert alive.charge(kept).charged == 3
    assert ledger.verify().intact
    for each in (gone, alive):
        each.close()


def test_a_sweep_leaves_alone_what_its_own_group_is_about_to_pay(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 1000)
    reservations = [ledger.reserve(client.id, 1, f"key {n}", "sha") for n in range(20)]
    # While the first waits for the disk the others gather: sweeps and charges, in turn, in one group.
    outcomes = [ledger.submit(each) for reserved in reservations for each in (Sweep(), Charge(reserved))]
    assert [outcome.result() for outcome in outcomes[::2]] == [0] * 20
    assert all(outcome.result().charged == 1 for outcome in outcomes[1::2])


def test_a_server_whose_database_was_away_starts_over_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = ledger_url(tmp_path, POSTGRESQL)
    database = url.split("@/")[1].split("?")[0]
    with (
        contextlib.closing(Ledger.open(url)) as ledger,
        psycopg.connect(url.replace(f"/{database}?", "/postgres?"), autocommit=True) as operator,
    ):
        client, _ = ledger.add_client("a", 10)
        ledger.reserve(client.id, 4, "lost", "sha")
        operator.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
        operator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (database,))
        for _ in range(2):
            with pytest.raises(Unavailable):
                ledger.submit(Sweep()).result()
        operator.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
        assert ledger.submit(Sweep()).result() == 1  # what it held under its lost lock
        assert pay(ledger, client.id, 10).remaining == 0
        assert ledger.verify().intact


def test_two_servers_know_of_each_others_keys(ledger: Ledger, url: str) -> None:
    client, _ = ledger.add_client("a", 10)
    other = Ledger.open(url)
    reservation = ledger.reserve(client.id, 4, "key", "sha")
    with pytest.raises(RequestInFlight):
        other.reserve(client.id, 4, "key", "sha")
    ledger.charge(reservation)
    paid = other.reserve(client.id, 4, "key", "sha").paid
    assert paid is not None
    assert other.receipt(paid) == ledger.receipt(paid)
    other.close()


def test_a_commit_that_failed_leaves_nothing_held(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = ledger.add_client("a", 10)
    reservation = ledger.reserve(client.id, 4, "key", "sha")
    server = ledger._server
    assert server is not None
    # A charge whose commit fails; and a reservation whose commit succeeded, though the answer to it was lost.
    with ledger._writing.begin() as connection:
        _refuse_charges(connection, ledger)
    with pytest.raises(Unavailable):
        ledger.charge(reservation)
    del server._memory.open[ledger.reserve(client.id, 3, "lost", "sha").seq]
    assert ledger.account(client.id).held == 7
    retried = ledger.reserve(client.id, 3, "lost", "sha")  # the retry need not wait for the sweep
    assert ledger.submit(Sweep()).result() == 1
    ledger.release(retried, "for a test")
    assert ledger.account(client.id).held == 0
    assert ledger.verify().intact


def _refuse_charges(connection: Connection, ledger: Ledger) -> None:
    if connection.dialect.name == "sqlite":
        connection.execute(
            text(
                "CREATE TRIGGER full BEFORE INSERT ON entries WHEN NEW.kind = 'charge' "
                "BEGIN SELECT RAISE(ABORT, 'full'); END"
            )
        )
        return
    connection.execute(
        text(
            "CREATE FUNCTION full_disk() RETURNS trigger AS $$ BEGIN "
            "RAISE EXCEPTION USING ERRCODE = 'disk_full'; END $$ LANGUAGE plpgsql"
        )
    )
    connection.execute(
        text(
            "CREATE TRIGGER full_disk BEFORE INSERT ON entries FOR EACH ROW WHEN (NEW.kind = 'charge') "
            "EXECUTE FUNCTION full_disk()"
        )
    )


def test_the_key_is_kept_only_as_a_hash(tmp_path: Path) -> None:
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    client, key = ledger.add_client("a", 10)
    ledger.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
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


def test_a_database_that_fails_is_unavailable_and_charges_nothing(ledger: Ledger) -> None:
    client, _ = ledger.add_client("a", 10)
    with ledger._writing.begin() as connection:
        connection.execute(text("ALTER TABLE entries RENAME TO elsewhere"))
    with pytest.raises(Unavailable) as refusal:
        ledger.reserve(client.id, 4, None, "sha")
    assert refusal.value.retry_after
    assert ledger.account(client.id).spent == ledger.account(client.id).held == 0


def test_every_commit_reaches_the_disk(ledger: Ledger) -> None:
    with ledger._writing.connect() as connection:
        if connection.dialect.name == "sqlite":
            pragmas = {p: connection.execute(text(f"PRAGMA {p}")).scalar() for p in ("journal_mode", "synchronous")}
            assert pragmas == {"journal_mode": "wal", "synchronous": 2}
        else:
            assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"
