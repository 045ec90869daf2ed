"""A short fault campaign over either database, and the judge itself, who must find whatever is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from databases import BACKENDS, POSTGRESQL, programs

from benchmarks.faults.judge import Evidence, judge
from defender_client.query_log import LOG_FILE, QueryLog
from oracle_server.exporting import export_lines
from oracle_server.ledger import Ledger

ROOT = Path(__file__).parents[2]
FAULTS = 100
ROWS = 4


# --- the campaign ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both at once: most of the time either waits for something."""
    with contextlib.ExitStack() as stack:
        yield {backend: stack.enter_context(campaign(backend)) for backend in BACKENDS if installed(backend)}


def installed(backend: str) -> bool:
    return backend != POSTGRESQL or programs() is not None


@contextlib.contextmanager
def campaign(backend: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.faults", "--faults", str(FAULTS), "--pause", "0.05", "--seed", "7"]
    with subprocess.Popen(
        [*command, "--ledger", backend], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.terminate()


@pytest.mark.timeout(900)  # a bound against hanging, not a measurement
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_fault_makes_the_account_differ(backend: str, campaigns: dict[str, subprocess.Popen[str]]) -> None:
    if not installed(backend):
        pytest.skip("PostgreSQL's initdb is not on this machine (Debian: apt-get install postgresql)")
    out, err = campaigns[backend].communicate(timeout=850)
    assert campaigns[backend].returncode == 0, out + err
    counts = dict(line.rsplit(maxsplit=1) for line in out.splitlines()[5:] if line)
    counts = {name.strip(): int(value.replace(",", "")) for name, value in counts.items()}
    assert counts["faults"] == FAULTS
    assert counts["server killed"] > 0
    assert counts["client killed"] > 0
    # It was not clean for want of anything that could go wrong.
    assert counts["charges expected (distinct keys that were answered)"] > 50
    assert counts["exchanges: no answer"] > 0


# --- the judge -------------------------------------------------------------------------------------------------------


def exported(ledger: Ledger) -> list[bytes]:
    """The lines of the exported ledger, as its file has them."""
    return [f"{line}\n".encode() for line in export_lines(ledger)]


@dataclasses.dataclass
class Case:
    """What a judge reads of a small ledger where all is well; tests spoil a part of it."""

    ledger: Ledger
    evidence: Evidence
    log: QueryLog

    def seen(self, key: str, account: str = "racers", **changed: Any) -> dict[str, Any]:
        """An exchange as the proxy writes it: refused, unless it is changed."""
        body = hashlib.sha256(key.encode()).hexdigest()
        exchange = {"account": account, "key": key, "body": body, "status": 503, "code": "unavailable", "detail": ""}
        return exchange | changed

    def pay(self, key: str, account: str = "racers") -> dict[str, Any]:
        """Pay for a request; its exchange."""
        seen = self.seen(key, account)
        client = self.ledger.get_client(account)
        reservation = self.ledger.reserve(client.id, ROWS, key, seen["body"])
        payment = reservation.paid or self.ledger.charge(reservation)
        answer = {"answer": f"logits of {key}", "charge": payment.charged, "receipt": self.ledger.receipt(payment)}
        return seen | {"status": 200, "code": None, "stands": True} | answer

    def verdict(self) -> set[str]:
        """What the judge finds wrong."""
        evidence = dataclasses.replace(self.evidence, exported=exported(self.ledger))
        return {what for what, found in judge(evidence).wrong.items() if found}


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    run = tmp_path / "run"
    log = QueryLog(run / LOG_FILE)
    for name, budget in {"roomy": 1000, "racers": 1000, "edge": 2 * ROWS}.items():
        ledger.add_client(name, budget)
    made = Case(ledger, Evidence([], bytes.fromhex(ledger.identity.public_key), [], [], {"roomy": [run]}), log)
    first = made.pay("first")
    made.evidence.exchanges.extend([first, made.pay("first"), made.pay("second"), made.pay("mine", "roomy")])
    outcome = {"key": "first", "images": 0, "rows": ROWS, "code": None}
    outcome |= {name: first[name] for name in ("body", "status", "answer", "receipt")}
    made.evidence.races.append({"kind": "same", "outcomes": [outcome, dict(outcome)]})
    log.sending("mine", "train", ROWS)
    log.answered("mine", ROWS, receipt=None, bytes_up=0, bytes_down=0)
    yield made
    log.close()
    ledger.close()


def test_the_judge_finds_nothing_where_all_is_well(case: Case) -> None:
    assert case.verdict() == set()


def unpaid(case: Case) -> None:
    receipt = case.evidence.exchanges[0]["receipt"]
    case.evidence.exchanges.append(case.pay("first") | {"key": "other", "receipt": receipt})


def early(case: Case) -> None:
    case.evidence.exchanges[0]["stands"] = False


def left_open(case: Case) -> None:
    case.ledger.reserve(case.ledger.get_client("racers").id, ROWS, "open", "body")


def other_logits(case: Case) -> None:
    case.evidence.exchanges[1]["answer"] = "others"


def forged(case: Case) -> None:
    body, _, signature = case.evidence.exchanges[0]["receipt"].partition(".")
    case.evidence.exchanges[0]["receipt"] = f"{body}.{signature[::-1]}"


def charged_again(case: Case) -> None:
    case.evidence.exchanges[1]["charge"] = ROWS


def refused_and_charged(case: Case) -> None:
    case.evidence.exchanges.append(case.pay("third"))
    case.evidence.exchanges[-1].update({"status": 403, "code": "client-revoked"})


def unavailable_and_charged(case: Case) -> None:
    case.evidence.exchanges.append(case.pay("third"))
    case.evidence.exchanges[-1].update({"status": 503, "code": "unavailable"})


def refused_though_covered(case: Case) -> None:
    refused = {"status": 403, "code": "budget-exhausted", "requested": ROWS, "budget": 2 * ROWS}
    case.evidence.exchanges.extend([case.pay("a", "edge"), case.seen("b", "edge", **refused)])


def failed_inside(case: Case) -> None:
    case.evidence.exchanges.append(case.seen("x", status=500, code="internal-error"))


def raced_differently(case: Case) -> None:
    case.evidence.races[0]["outcomes"][1] |= {"status": 403, "code": "budget-exhausted"}


def told_nothing(case: Case) -> None:
    case.evidence.races[0]["outcomes"][1]["status"] = None


def unknown_to_the_log(case: Case) -> None:
    case.evidence.exchanges.append(case.pay("nobody's", "roomy"))


def counted_otherwise(case: Case) -> None:
    case.log.sending("yours", "train", ROWS)
    case.log.answered("yours", ROWS, receipt=None, bytes_up=0, bytes_down=0)


def not_asked_for(case: Case) -> None:
    case.pay("secret")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (unpaid, {"answers without a charge", "receipts that do not match the ledger"}),
        (early, {"answers sent before their charge was in the database"}),
        (left_open, {"reservations left open after the last sweep"}),
        (other_logits, {"keys with answers that differ (logits, bit by bit)"}),
        (forged, {"receipts that do not match the ledger"}),
        (charged_again, {"keys that two answers said were charged"}),
        (refused_and_charged, {"refused requests that were charged"}),
        (unavailable_and_charged, {"requests told 503 and nothing else that were charged"}),
        (refused_though_covered, {"requests refused that the budget covered"}),
        (failed_inside, {"answers 5xx other than 503"}),
        (raced_differently, {"races that ended otherwise than they should"}),
        (told_nothing, {"races that ended otherwise than they should"}),
        (unknown_to_the_log, {"differences between the defenders' logs and the ledger"}),
        (counted_otherwise, {"differences between the defenders' logs and the ledger"}),
        (not_asked_for, {"charges that nobody asked for"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_judge_finds(spoil: Callable[[Case], None], found: set[str], case: Case) -> None:
    spoil(case)
    assert case.verdict() == found


def test_the_judge_replays_the_budget_by_itself(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oracle_server.book.admit", lambda account, rows: None)
    case.evidence.exchanges.extend(case.pay(key, "edge") for key in ("a", "b", "c"))
    assert "queries admitted over budget (entries)" in case.verdict()


def test_the_judge_finds_a_key_that_was_paid_twice(case: Case, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as forgetful, forgetful:
        forgetful.execute("DELETE FROM requests WHERE idempotency_key = 'first'")
    case.evidence.exchanges.append(case.pay("first"))
    assert {"keys charged more than once", "keys answered by more than one charge"} <= case.verdict()


def test_the_judge_finds_an_entry_that_was_edited(case: Case) -> None:
    lines = exported(case.ledger)
    charge = next(number for number, line in enumerate(lines) if b'"kind":"charge"' in line)
    fields = json.loads(lines[charge])
    fields["entry"]["rows"] += 1
    lines[charge] = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    found = judge(dataclasses.replace(case.evidence, exported=lines)).wrong
    assert found["findings in the exported ledger"]
    assert found["entries that settle no open reservation"]
