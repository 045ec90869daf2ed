"""The audit: equal when nothing was touched, and a name for every kind of difference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from defender_support import Interfering, Killed, Trained, at, certify_here, tiny, train_here
from oracle_support import Caller, Running, digits, pay

from defender_client.audit import Audit, audit
from defender_client.config import ConfigError, load_preset
from defender_client.oracle_client import OracleUnreachable, RemoteOracle
from defender_client.pinning import PIN_FILE, pin
from defender_client.query_log import LOG_FILE, QueryLog

Line = dict[str, object]
FOREIGN_BODY = "0" * 64


def audited(server: Running, caller: Caller, *runs: Path) -> Audit:
    with RemoteOracle(server.url, caller.key) as oracle:
        return audit(runs, oracle)


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """The trained run's log, to be tampered with."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained.run / LOG_FILE, folder)
    return folder


def rewrite(run: Path, change: Callable[[list[Line]], list[Line]]) -> None:
    lines = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    (run / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def test_accounts_are_equal_to_the_query(server: Running, trained: Trained) -> None:
    result = audited(server, trained.caller, trained.run)
    assert result.differences == ()
    assert result.equal
    assert result.logged == result.ledger == result.statement == result.metrics
    assert result.purposes == {"noise": 186, "labels": 112, "train": 2 * 96 * 9, "validation": 2 * 16, "certify": 440}
    assert (result.client, result.budget, result.lost) == (trained.caller.client.name, 10**6, 0)
    assert result.requests == len(QueryLog.read(trained.run / LOG_FILE).requests)


def test_all_runs_of_a_client_are_audited_together(server: Running, caller: Caller, tmp_path: Path) -> None:
    runs = [tmp_path / "defended", tmp_path / "undefended"]
    small = ["data.train_images=8", "data.validation_images=4", "train.epochs=1", "certify.images=1"]
    for config, folder in (
        (tiny(tmp_path, *small), runs[0]),
        (load_preset("standard", ["certify.n0=5", "certify.n=20", "certify.images=2"]), runs[1]),
    ):
        train_here(config, folder, server.url, caller.key)
        certify_here(config, folder, server.url, caller.key)
    both = audited(server, caller, *runs)
    assert both.differences == ()
    assert both.purposes["certify"] == 110 + 2 * 25
    one = audited(server, caller, runs[0])
    assert not one.equal
    assert any("no log here knows of it" in difference for difference in one.differences)
    assert any("the server's ledger says" in difference for difference in one.differences)


def first(lines: list[Line], field: str) -> int:
    return next(i for i, line in enumerate(lines) if field in line)


def removed(lines: list[Line]) -> list[Line]:
    key = lines[-1]["key"]
    return [line for line in lines if line["key"] != key]


def added(lines: list[Line]) -> list[Line]:
    new = {"key": "made/up/0", "purpose": "train", "rows": 5, "at": "now"}
    return [*lines, new, {"key": "made/up/0", "charged": 5, "receipt": None, "up": 1, "down": 1}]


def fewer(lines: list[Line]) -> list[Line]:
    lines[first(lines, "charged")]["charged"] = 1
    return lines


def moved(lines: list[Line]) -> list[Line]:
    """The sum stays the same; the single requests do not."""
    one, other = [line for line in lines if "charged" in line][:2]
    one["charged"], other["charged"] = int(str(one["charged"])) - 1, int(str(other["charged"])) + 1
    return lines


def called_refused(lines: list[Line]) -> list[Line]:
    at = first(lines, "charged")
    lines[at] = {"key": lines[at]["key"], "refused": "budget-exhausted"}
    return lines


def lost_and_fewer(lines: list[Line]) -> list[Line]:
    at = first(lines, "charged")
    key = lines.pop(at)["key"]
    next(line for line in lines if line["key"] == key)["rows"] = 1
    return lines


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (removed, "no log here knows of it"),
        (added, "made/up/0: the client counted 5, the ledger 0"),
        (fewer, "the client counted 1, the ledger"),
        (moved, "the client counted"),
        (called_refused, "refused (budget-exhausted), but the ledger charged"),
        (lost_and_fewer, "1 rows were sent, the ledger charged"),
    ],
)
def test_a_log_that_was_tampered_with(
    server: Running, trained: Trained, run: Path, change: Callable[[list[Line]], list[Line]], named: str
) -> None:
    rewrite(run, change)
    result = audited(server, trained.caller, run)
    assert not result.equal
    assert any(named in difference for difference in result.differences)


def test_charges_that_no_log_explains(server: Running, caller: Caller, tmp_path: Path) -> None:
    with RemoteOracle(server.url, caller.key, log=QueryLog(tmp_path / LOG_FILE)) as oracle:
        oracle.query(digits(3), purpose="x", label="x")
    assert audited(server, caller, tmp_path).equal
    pay(server.ledger, caller.client.id, 7, "elsewhere", FOREIGN_BODY)
    caller.infer(digits(2))
    differences = audited(server, caller, tmp_path).differences
    assert "elsewhere: the ledger charged 7, and no log here knows of it" in differences
    assert any("without a key: the ledger charged 2" in difference for difference in differences)
    assert {difference for difference in differences if difference.startswith("the client counted 3")} == {
        f"the client counted 3 queries, the server's {what} says 12"
        for what in ("ledger", "budget statement", "metrics")
    }


def test_a_second_charge_of_a_request_is_found(server: Running, caller: Caller, tmp_path: Path) -> None:
    with RemoteOracle(server.url, caller.key, log=QueryLog(tmp_path / LOG_FILE), run_id="r") as oracle:
        oracle.query(digits(3), purpose="x", label="x")
    (key,) = QueryLog.read(tmp_path / LOG_FILE).requests
    # As a ledger might that forgot which keys it knows.
    pay(server.ledger, caller.client.id, 3, f"{key}?", FOREIGN_BODY)
    assert not audited(server, caller, tmp_path).equal


def test_a_lost_answer_is_explained_and_no_difference(server: Running, caller: Caller, tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    for number, transport in enumerate(
        (Interfering(after=at(1, Killed())), Interfering(before=at(1, Killed()))), start=1
    ):
        with (
            pytest.raises(Killed),
            RemoteOracle(server.url, caller.key, log=QueryLog(path), run_id="r", transport=transport) as oracle,
        ):
            oracle.query(digits(number), purpose="x", label=f"x{number}")
    result = audited(server, caller, tmp_path)
    assert result.differences == ()
    assert (result.lost, result.logged, result.requests) == (1, 1, 0)


def test_refused_requests_are_no_difference(server: Running, tmp_path: Path) -> None:
    caller = server.caller(2)
    with RemoteOracle(server.url, caller.key, log=QueryLog(tmp_path / LOG_FILE)) as oracle:
        oracle.query(digits(2), purpose="x", label="x")
        with pytest.raises(Exception, match="budget"):
            oracle.query(digits(1), purpose="x", label="y")
    assert audited(server, caller, tmp_path).equal


def test_a_request_that_was_released_is_no_difference(server: Running, caller: Caller, tmp_path: Path) -> None:
    log = QueryLog(tmp_path / LOG_FILE)
    log.sending("k", "x", 5)
    log.close()
    server.ledger.release(server.ledger.reserve(caller.client.id, 5, "k", FOREIGN_BODY), "no answer")
    result = audited(server, caller, tmp_path)
    assert (result.differences, result.logged, result.lost) == ((), 0, 0)


def test_many_differences_are_shortened_and_the_totals_stay(server: Running, caller: Caller, tmp_path: Path) -> None:
    QueryLog(tmp_path / LOG_FILE).close()
    for number in range(30):
        pay(server.ledger, caller.client.id, 1, f"key-{number}", FOREIGN_BODY)
    differences = audited(server, caller, tmp_path).differences
    assert len(differences) == 11
    assert "... 23 more ..." in differences
    assert "the client counted 0 queries, the server's metrics says 30" in differences


def test_a_name_of_any_kind_is_found_in_the_metrics(server: Running, tmp_path: Path) -> None:
    client, key = server.ledger.add_client('a "quoted" \\ name\nof two lines, ü', 10)
    caller = Caller(client, key.reveal(), server.http)
    with RemoteOracle(server.url, caller.key, log=QueryLog(tmp_path / LOG_FILE)) as oracle:
        oracle.query(digits(2), purpose="x", label="x")
    assert audited(server, caller, tmp_path).equal


def test_without_a_log_or_a_ledger_there_is_nothing_to_compare(server: Running, caller: Caller, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no queries.jsonl"):
        audited(server, caller, tmp_path)
    QueryLog(tmp_path / LOG_FILE).close()
    foreign = httpx.MockTransport(lambda request: httpx.Response(404))
    with (
        RemoteOracle("http://foreign", transport=foreign) as oracle,
        pytest.raises(ConfigError, match="keeps no ledger"),
    ):
        audit([tmp_path], oracle)
    with RemoteOracle("http://127.0.0.1:9", retry_seconds=0.1) as oracle, pytest.raises(OracleUnreachable):
        audit([tmp_path], oracle)


# --- what the server signed ------------------------------------------------------------------------------------------


def asked(server: Running, caller: Caller, run: Path) -> None:
    """Three requests, and the ledger pinned before them."""
    run.mkdir(exist_ok=True)
    with RemoteOracle(server.url, caller.key, log=QueryLog(run / LOG_FILE), run_id="r") as oracle:
        pin(run, oracle.ledger())
        for rows in (1, 2, 3):
            oracle.query(digits(rows), purpose="x", label=f"x{rows}")


def test_receipts_are_checked_by_the_key_that_can_be_trusted_most(
    server: Running, caller: Caller, tmp_path: Path
) -> None:
    asked(server, caller, tmp_path)
    key = bytes.fromhex(server.ledger.identity.public_key)
    with RemoteOracle(server.url, caller.key) as oracle:
        pinned, given = audit([tmp_path], oracle), audit([tmp_path], oracle, key)
        (tmp_path / PIN_FILE).unlink()
        named = audit([tmp_path], oracle)
        other = audit([tmp_path], oracle, bytes(32))
    for result, key_from in ((pinned, "kept when they began"), (given, "was given"), (named, "server's word")):
        assert (result.differences, result.receipts) == ((), 3)
        assert key_from in (result.key_from or "")
    assert other.receipts == 0
    assert any("the server names the key" in told for told in other.differences)
    assert any("the end of the server's ledger: the signature" in told for told in other.differences)
    assert sum("its receipt: the signature" in told for told in other.differences) == 3


def test_another_ledger_behind_the_same_address(server: Running, caller: Caller, tmp_path: Path) -> None:
    asked(server, caller, tmp_path)
    (tmp_path / PIN_FILE).write_text(json.dumps({"ledger": "00", "public_key": "11" * 32}))
    differences = audited(server, caller, tmp_path).differences
    assert any("charged on ledger 00" in told for told in differences)
    assert any("the server names the key" in told for told in differences)


def test_a_ledger_that_was_set_back_is_told_by_the_receipts(server: Running, tmp_path: Path) -> None:
    """A server that shows fewer charges and an older end, though both are signed."""
    caller = server.caller(100)
    older: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/ledger" and older:
            return httpx.Response(200, content=older[0])
        response = server.http.request(
            request.method, str(request.url), headers=request.headers, content=request.read()
        )
        headers = {k: v for k, v in response.headers.items() if k not in ("content-encoding", "content-length")}
        return httpx.Response(response.status_code, headers=headers, content=response.content)

    first = server.http.get("/v1/ledger", headers=caller.headers).content
    asked(server, caller, tmp_path)
    older.append(first)
    with RemoteOracle(server.url, caller.key, transport=httpx.MockTransport(answer)) as oracle:
        differences = audit([tmp_path], oracle).differences
    assert sum("it was set back" in told for told in differences) == 3


def test_a_receipt_of_which_the_server_says_otherwise(server: Running, caller: Caller, tmp_path: Path) -> None:
    asked(server, caller, tmp_path)

    def answer(request: httpx.Request) -> httpx.Response:
        response = server.http.request(
            request.method, str(request.url), headers=request.headers, content=request.read()
        )
        content = response.content
        if request.url.path == "/v1/charges":
            content = re.sub(rb'"body_sha256":"..', b'"body_sha256":"00', content, count=1)
        return httpx.Response(response.status_code, content=content)

    with RemoteOracle(server.url, caller.key, transport=httpx.MockTransport(answer)) as oracle:
        (difference,) = audit([tmp_path], oracle).differences
    assert "and the server says otherwise now" in difference
