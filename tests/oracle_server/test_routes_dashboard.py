"""What the page is served with, and what two clients and an admin are told by `GET /v1/dashboard`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from oracle_support import Caller, Running, digits, refused

from oracle_server.cost_cache import CostCache
from oracle_server.dashboard import WINDOWS
from oracle_server.dashboard_view import DashboardView, view
from oracle_server.ledger import ADMIN, Client, Ledger
from oracle_server.routes_dashboard import DASHBOARD_ROUTE
from oracle_server.verification import kept_entries
from oracle_server.watch import Finding, Verdict
from shared.audit.chain import Entry

Fetch = Callable[..., dict[str, Any]]


@pytest.fixture
def admin(server: Running) -> Caller:
    client, key = server.ledger.add_client(f"root-{time.monotonic_ns()}", 0, role=ADMIN)
    return Caller(client, key.reveal(), server.http)


def shown(caller: Caller, window: str = "1h") -> dict[str, Any]:
    answer = caller.http.get(f"{DASHBOARD_ROUTE}?window={window}", headers=caller.headers)
    assert answer.status_code == 200, answer.text
    DashboardView.model_validate_json(answer.text)
    told: dict[str, Any] = answer.json()
    return told


def forget_kept(server: Running) -> None:
    """Spending is computed at most once a second."""
    server.service.spending._kept.clear()


def account_of(told: dict[str, Any], caller: Caller) -> dict[str, Any]:
    (found,) = [account for account in told["accounts"] if account["client"] == caller.client.name]
    account: dict[str, Any] = found
    return account


@pytest.mark.parametrize("window", WINDOWS)
def test_a_client_sees_its_own_account(server: Running, window: str) -> None:
    caller = server.caller(budget=100)
    for rows in (3, 4):
        assert caller.infer(digits(rows), Idempotency_Key=f"a-long-idempotency-key-{rows}").status_code == 200
    refused(caller.infer(digits(64), Idempotency_Key="x" * 300), 400, "malformed-request")
    server.ledger.set_budget(caller.client.name, 8)
    refused(caller.infer(digits(2)), 403, "budget-exhausted")
    told = shown(caller, window)
    (account,) = told["accounts"]
    assert account == {
        "client": caller.client.name,
        "budget": 8,
        "spent": 7,
        "held": 0,
        "remaining": 1,
        "revoked": False,
        "rate": 7 / 60,
        "seconds_left": pytest.approx(60 / 7),
        "refusals": {"malformed-request": 1, "budget-exhausted": 1},
    }
    assert told["viewer"] == {"name": caller.client.name, "admin": False}
    (spending,) = told["spending"]["clients"]
    assert (sum(spending["rows"]), spending["spent"], spending["client"]) == (7, 7, caller.client.name)
    assert [entry["kind"] for entry in told["entries"]] == [
        *("budget", "charge", "reserve", "charge", "reserve", "budget", "client")
    ]
    assert {entry["key"] for entry in told["entries"]} == {"a-long-idempoten…", None}
    assert [entry["amount"] for entry in told["entries"] if entry["kind"] == "budget"] == [8, 100]
    assert all(entry["note"] is None for entry in told["entries"]), "the hash of its secret stays in the ledger"


def test_an_admin_sees_every_account_and_may_query_nothing(server: Running, admin: Caller) -> None:
    one, two = server.caller(50), server.caller(60)
    one.infer(digits(5))
    two.infer(digits(6))
    server.http.get(DASHBOARD_ROUTE, headers={"Authorization": f"Bearer {one.key[:-1]}?"})
    told = shown(admin)
    assert (account_of(told, one)["spent"], account_of(told, two)["spent"]) == (5, 6)
    assert admin.client.name not in {account["client"] for account in told["accounts"]}
    assert {entry["client"] for entry in told["entries"]} >= {one.client.name, two.client.name}
    assert told["refusals_without_key"]["unauthorized"] >= 1
    names = [each["client"] for each in told["spending"]["clients"]]
    assert names == [account["client"] for account in told["accounts"]]
    refused(admin.infer(digits(1)), 403, "budget-exhausted")


def test_what_a_client_is_told_does_not_depend_on_another(server: Running, admin: Caller) -> None:
    """The same before and after everything that others do, but for the length of the chain and for the time."""
    ada, ben = server.caller(budget=1_000), server.caller(budget=4_321)
    ada.infer(digits(7), Idempotency_Key="of-ada")

    def told_to_ada() -> dict[str, Any]:
        forget_kept(server)
        told = shown(ada)
        del told["now"]
        for name in ("entries", "verified", "checked_at", "walks", "walked_at"):
            del told["verification"][name]
        for entry in told["entries"]:
            del entry["verified"]
        told["spending"] = [(each["client"], each["spent"], sum(each["rows"])) for each in told["spending"]["clients"]]
        return told

    before = told_to_ada()
    for rows in (11, 13, 17):
        ben.infer(digits(rows), Idempotency_Key=f"of-ben-{rows}")
    refused(ben.infer(digits(64 + 1)), 413, "too-large")
    server.ledger.set_budget(ben.client.name, 5_432)
    server.http.get(DASHBOARD_ROUTE, headers={"Authorization": "Bearer nonsense"})
    shown(admin)
    server.caller()
    server.ledger.revoke(ben.client.name)
    assert told_to_ada() == before
    text = ada.http.get(DASHBOARD_ROUTE, headers=ada.headers).text
    of_ben = server.ledger.entries(ben.client.id)
    secrets = {
        ben.client.name,
        ben.client.key_id,
        admin.client.name,
        "of-ben",
        "5432",
        "4321",
        *_hashes(server, of_ben),
    }
    assert not [secret for secret in secrets if secret in text]


def _hashes(server: Running, entries: list[Entry]) -> set[str]:
    seqs = {entry.seq for entry in entries}
    with server.ledger.reading() as connection:
        kept = {kept_hash for entry, kept_hash in kept_entries(connection) if entry.seq in seqs and kept_hash}
    bodies = {entry.body_sha256 for entry in entries if entry.body_sha256}
    assert len(kept) == len(seqs) > 3 == len(bodies)
    return kept | bodies


def test_the_spending_that_is_kept_is_not_handed_to_another(server: Running, admin: Caller) -> None:
    forget_kept(server)
    one, two = server.caller(), server.caller()
    for caller in (admin, one, two, admin):
        clients = [each["client"] for each in shown(caller)["spending"]["clients"]]
        assert len(clients) > 1 if caller is admin else clients == [caller.client.name]


def test_a_finding_about_an_account_is_told_to_its_owner_and_the_admin(ledger: Ledger) -> None:
    (ada, _), (ben, _) = ledger.add_client("ada", 1), ledger.add_client("ben", 1)
    root, _ = ledger.add_client("root", 0, role=ADMIN)
    findings = (Finding("entry 7: it was changed", 7), Finding("client 'ben': spent is 5", None, ben.id))

    def told(viewer: Client) -> tuple[str, ...]:
        return view(
            ledger,
            viewer,
            "1h",
            verdict=Verdict("broken", findings=findings),
            refusals={},
            counting_since="",
            kept=CostCache(),
        ).verification.findings

    assert told(root) == told(ben) == ("entry 7: it was changed", "client 'ben': spent is 5")
    assert told(ada)[0] == "entry 7: it was changed"
    assert len(told(ada)) == 2
    assert "ben" not in told(ada)[1]
    assert "5" not in told(ada)[1]


def test_the_ledger_is_verified_as_it_grows(server: Running) -> None:
    caller = server.caller()
    caller.infer(digits(2))
    deadline = time.monotonic() + 30
    told = shown(caller)
    while not all(entry["verified"] for entry in told["entries"]):
        assert time.monotonic() < deadline, told["verification"]
        time.sleep(0.1)
        told = shown(caller)
    verification = told["verification"]
    assert verification["state"] == "verified"
    assert verification["findings"] == []
    assert verification["verified"] == verification["entries"] == server.ledger.head().head.seq


def test_only_a_key_that_stands_is_told_anything(server: Running, caller: Caller) -> None:
    refused(server.http.get(DASHBOARD_ROUTE), 401, "unauthorized")
    refused(
        server.http.get(DASHBOARD_ROUTE, headers={"Authorization": caller.headers["Authorization"] + "x"}),
        401,
        "unauthorized",
    )
    refused(server.http.get(f"{DASHBOARD_ROUTE}?window=1y", headers=caller.headers), 400, "malformed-request")
    server.ledger.revoke(caller.client.name)
    refused(server.http.get(DASHBOARD_ROUTE, headers=caller.headers), 403, "client-revoked")


def test_refusals_are_counted_by_client_and_code_in_the_metrics_too(server: Running, admin: Caller) -> None:
    caller = server.caller(budget=1)
    for _ in range(2):
        refused(caller.infer(digits(2)), 403, "budget-exhausted")
    assert account_of(shown(admin), caller)["refusals"] == {"budget-exhausted": 2}
    sample = f'oracle_refusals_total{{client="{caller.client.name}",code="budget-exhausted"}} 2.0'
    assert sample in server.http.get("/metrics").text.splitlines()


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html"),
        ("/static/dashboard.css", "text/css"),
        ("/static/dashboard.js", "text/javascript"),
    ],
)
def test_the_page_may_load_nothing_from_elsewhere(server: Running, path: str, media_type: str) -> None:
    answer = server.http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    known = server.http.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", ""), "names no other host"
    assert "https://" not in answer.text


def test_the_data_are_kept_nowhere(server: Running, caller: Caller) -> None:
    answer = server.http.get(DASHBOARD_ROUTE, headers=caller.headers)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name", ["", "nothing.js", "../settings.py", "..%2Fsettings.py", "%2e%2e/settings.py", "py.typed"]
)
def test_nothing_else_is_served_as_a_file(server: Running, name: str) -> None:
    refused(server.http.get(f"/static/{name}"), 404, "not-found")
