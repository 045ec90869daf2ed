"""The rules of the account as a table: what may stand next in a ledger, and what may not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from audit_support import BODY, Written, note

from shared.audit.accounts import Accounts, RuleBroken
from shared.audit.chain import Entry

PAID = {"idempotency_key": "k", "body_sha256": BODY}


def ledger() -> Written:
    """Ann, who may spend 10, has spent 4 for the key k, and holds 3 for the key h (entry 5); bob, who is revoked."""
    written = Written()
    written.add("client", note=note("ann"))
    written.add("budget", amount=10)
    written.pay(4, "k")
    written.add("reserve", rows=3, idempotency_key="h", body_sha256=BODY, note="server")
    written.add("client", 2, note=note("bob"))
    written.add("budget", 2, amount=10)
    written.add("revoke", 2)
    return written


def replayed(written: Written) -> Accounts:
    accounts = Accounts()
    for entry in written.entries:
        accounts.apply(entry)
    return accounts


def test_what_the_entries_amount_to() -> None:
    accounts = replayed(ledger())
    ann, bob = accounts.clients[1], accounts.clients[2]
    assert (ann.name, ann.budget, ann.spent, ann.held, ann.remaining, ann.revoked_at) == ("ann", 10, 4, 3, 3, None)
    assert (bob.name, bob.spent, bob.revoked_at) == ("bob", 0, "at 7")
    assert accounts.charges == 1
    assert [(request.seq, request.rows, request.server) for request in accounts.open.values()] == [(5, 3, "server")]
    assert {key: request.charge for key, request in accounts.standing.items()} == {(1, "k"): 4, (1, "h"): None}


ALLOWED = [
    ("reserve", 1, {"rows": 3, "idempotency_key": "n", "body_sha256": BODY}),
    ("reserve", 1, {"rows": 3}),
    ("charge", 1, {"rows": 3, "refers_to": 5, "idempotency_key": "h", "body_sha256": BODY}),
    ("release", 1, {"rows": 3, "refers_to": 5, "idempotency_key": "h", "body_sha256": BODY, "note": "why"}),
    ("budget", 1, {"amount": 0}),
    ("revoke", 1, {}),
    ("client", 3, {"note": note("cay")}),
    ("budget", 2, {"amount": 1}),
]
REFUSED = [
    ("reserve", 1, {"rows": 4}, "takes 4 queries of client 1, which had 3 left"),
    ("reserve", 1, {"rows": 0}, "sets no query aside"),
    ("reserve", 1, {"rows": -1}, "sets no query aside"),
    ("reserve", 1, {"rows": 1, **PAID}, "a second time"),
    ("reserve", 1, {"rows": 1, "idempotency_key": "h"}, "a second time"),
    ("reserve", 2, {"rows": 1}, "was revoked before it"),
    ("reserve", 9, {"rows": 1}, "no client 9"),
    ("charge", 1, {"rows": 1}, "was not reserved"),
    ("charge", 1, {"rows": 2, "refers_to": 5, "idempotency_key": "h", "body_sha256": BODY}, "is not what reservation"),
    ("charge", 1, {"rows": 3, "refers_to": 5, "idempotency_key": "x", "body_sha256": BODY}, "is not what reservation"),
    ("charge", 1, {"rows": 3, "refers_to": 5, "idempotency_key": "h", "body_sha256": "cd"}, "is not what reservation"),
    ("charge", 2, {"rows": 3, "refers_to": 5, "idempotency_key": "h", "body_sha256": BODY}, "is not what reservation"),
    ("charge", 1, {"rows": 4, "refers_to": 3, **PAID}, "no open reservation"),
    ("release", 1, {"rows": 4, "refers_to": 3, **PAID}, "no open reservation"),
    ("release", 1, {"rows": 3, "idempotency_key": "h", "body_sha256": BODY}, "no open reservation"),
    ("refund", 1, {"rows": -4, "refers_to": 4, **PAID}, "no charge to refund"),
    ("budget", 1, {"amount": -1}, "is not a budget"),
    ("budget", 1, {}, "is not a budget"),
    ("revoke", 2, {}, "was revoked before"),
    ("revoke", 9, {}, "no client 9"),
    ("client", 1, {"note": note("cay")}, "is there already"),
    ("client", 3, {"note": note("ann")}, "already a client 'ann'"),
    ("client", 3, {"note": "[]"}, "does not say who"),
    ("client", 3, {"note": "{"}, "does not say who"),
    ("client", 3, {}, "does not say who"),
    ("gift", 1, {"rows": 1}, "no kind of entry is called 'gift'"),
]


@pytest.mark.parametrize(("kind", "client_id", "fields"), ALLOWED)
def test_what_may_stand_next(kind: str, client_id: int, fields: dict[str, object]) -> None:
    written = ledger()
    written.add(kind, client_id, **fields)
    replayed(written)


@pytest.mark.parametrize(("kind", "client_id", "fields", "told"), REFUSED)
def test_what_may_not(kind: str, client_id: int, fields: dict[str, object], told: str) -> None:
    accounts, before = replayed(ledger()), replayed(ledger())
    with pytest.raises(RuleBroken, match=told):
        accounts.apply(Entry(9, "now", client_id, kind, **fields))  # type: ignore[arg-type]
    assert vars(accounts) == vars(before)


def test_a_settled_reservation_frees_or_keeps_its_key() -> None:
    settled = {"rows": 3, "refers_to": 5, "idempotency_key": "h", "body_sha256": BODY}
    for kind, spent, stands in (("charge", 7, True), ("release", 4, False)):
        written = ledger()
        written.add(kind, **settled)
        accounts = replayed(written)
        ann = accounts.clients[1]
        assert (ann.spent, ann.held, (1, "h") in accounts.standing) == (spent, 0, stands)
        again = Entry(10, "now", 1, "reserve", 1, None, "h", BODY)
        if stands:
            with pytest.raises(RuleBroken):
                accounts.apply(again)
        else:
            accounts.apply(again)


def test_a_ledger_of_version_1_is_read_by_its_own_rules() -> None:
    """Its charges had no reservation, could be refunded, and its clients' names come at its end."""
    written = Written()
    written.add("budget", amount=10)
    charge = written.add("charge", rows=4, **PAID)
    written.add("refund", rows=-4, refers_to=charge.seq, **PAID)
    written.add("charge", rows=5, **PAID)
    written.add("client", note=note("ann"))
    accounts = replayed(written)
    assert (accounts.clients[1].name, accounts.clients[1].spent) == ("ann", 5)
    for refund in (replace(written.entries[2], seq=6), replace(written.entries[2], seq=6, refers_to=4, rows=-4)):
        with pytest.raises(RuleBroken):
            accounts.apply(refund)
    with pytest.raises(RuleBroken, match="was not reserved"):
        accounts.apply(Entry(6, "now", 1, "charge", 1))
