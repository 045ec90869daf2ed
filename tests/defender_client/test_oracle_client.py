"""Logits over HTTP: answers, what they cost, and what becomes of a request when the connection or the server does not
do as hoped."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from defender_support import MAX_ROWS, CuttingProxy, Interfering, ServerProcess, at, spent, wait_until
from oracle_support import Caller, Held, Running, digits, running
from torch import nn

from defender_client.oracle_client import OracleUnreachable, RemoteOracle
from defender_client.query_log import LOG_FILE, QueryLog
from oracle_server.ledger import Ledger
from oracle_server.oracle import Oracle
from oracle_server.settings import Settings
from shared.wire import codec, protocol
from shared.wire.errors import (
    BudgetExhausted,
    ClientRevoked,
    NotFound,
    OracleError,
    RateLimited,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
)


def remote(server: Running, caller: Caller, **options: Any) -> RemoteOracle:
    return RemoteOracle(server.url, caller.key, **({"run_id": "run", "retry_seconds": 20} | options))


def ask(oracle: RemoteOracle, rows: int = 3, label: str = "b", seed: int = 0) -> np.ndarray:
    return oracle.query(digits(rows, seed), purpose="test", label=label)


# --- answers and charges ----------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_hidden_module(oracle: RemoteOracle, classifier: nn.Module) -> None:
    images = torch.from_numpy(digits(5))
    with torch.inference_mode():
        torch.testing.assert_close(oracle(images), classifier(images), atol=1e-5, rtol=1e-5)
    assert oracle(images).dtype == torch.float32


def test_what_the_oracle_says_of_itself_costs_nothing(oracle: RemoteOracle, server: Running, caller: Caller) -> None:
    assert (oracle.info.image_shape, oracle.info.classes, oracle.info.max_rows) == ((1, 8, 8), 10, MAX_ROWS)
    statement = oracle.budget()
    assert statement is not None
    assert (statement.client, statement.remaining) == (caller.client.name, 10**6)
    assert list(oracle.charges()) == []
    assert f'client="{caller.client.name}"' in oracle.metrics()
    assert spent(server, caller) == oracle.log.total == 0


def test_a_large_batch_is_split_at_the_servers_limit(oracle: RemoteOracle, server: Running, caller: Caller) -> None:
    rows = 2 * MAX_ROWS + 3
    logits = ask(oracle, rows)
    assert [entry.rows for entry in oracle.charges()] == [MAX_ROWS, MAX_ROWS, 3]
    assert spent(server, caller) == oracle.log.total == rows
    assert oracle.remaining == 10**6 - rows
    parts = [ask(oracle, rows, label="again")[start : start + 100] for start in range(0, rows, 100)]
    np.testing.assert_array_equal(logits, np.concatenate(parts))


def test_a_large_batch_is_split_at_the_servers_limit_of_bytes(tmp_path: Path) -> None:
    settings = Settings(ledger=str(tmp_path / "ledger.db"), max_body_bytes=4096)
    with running(settings) as server:
        caller = server.caller()
        with remote(server, caller) as oracle:
            assert ask(oracle, 40).shape == (40, 10)
        sizes = [entry.rows for entry in server.ledger.entries(caller.client.id, kinds=("charge",))]
    assert sum(sizes) == 40
    assert max(sizes) * 256 < 4096


def test_the_same_label_and_bytes_are_charged_once(oracle: RemoteOracle, server: Running, caller: Caller) -> None:
    first = ask(oracle, 300)
    np.testing.assert_array_equal(ask(oracle, 300), first)
    assert spent(server, caller) == oracle.log.total == 300
    ask(oracle, 300, label="another")
    ask(oracle, 300, seed=1)
    assert spent(server, caller) == oracle.log.total == 900


def test_another_run_pays_for_itself(server: Running, caller: Caller) -> None:
    for run in ("one", "two"):
        with remote(server, caller, run_id=run) as oracle:
            ask(oracle)
    assert spent(server, caller) == 6


def test_calls_are_never_the_same_purchase(oracle: RemoteOracle, server: Running, caller: Caller) -> None:
    images = torch.from_numpy(digits(2))
    oracle(images)
    oracle(images)
    assert spent(server, caller) == oracle.log.charged["call"] == 4


def test_the_log_holds_what_was_charged_and_what_went_over_the_wire(
    server: Running, caller: Caller, tmp_path: Path
) -> None:
    path = tmp_path / LOG_FILE
    with remote(server, caller, log=QueryLog(path)) as oracle:
        ask(oracle, 5)
        (entry,) = oracle.charges()
    (request,) = QueryLog.read(path).requests.values()
    assert (request.key, request.rows, request.charged) == (entry.idempotency_key, 5, 5)
    assert 5 * 64 * 4 < request.bytes_up < 5 * 64 * 4 + 400
    assert 5 * 10 * 4 < request.bytes_down < 5 * 10 * 4 + 400


def test_the_account_comes_in_pages(oracle: RemoteOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        ask(oracle, seed + 1, seed=seed)
    monkeypatch.setattr(protocol, "CHARGES_PAGE", 2)
    assert [entry.rows for entry in oracle.charges()] == [1, 2, 3, 4, 5]


# --- connections that break -------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(server: Running) -> Iterator[CuttingProxy]:
    with closing(CuttingProxy(server.url)) as started:
        yield started


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("sent", [0, 40, 250], ids=["no answer", "in the headers", "in the body"])
def test_a_connection_lost_before_the_answer_is_retried_free(
    proxy: CuttingProxy, server: Running, caller: Caller, sent: int, reset: bool
) -> None:
    with RemoteOracle(proxy.url, caller.key, retry_seconds=20) as oracle:
        expected = ask(oracle)
        proxy.cut(sent=sent, reset=reset)
        proxy.cut(sent=sent, reset=reset)
        np.testing.assert_array_equal(ask(oracle, label="cut"), expected)
        assert not proxy.cuts_left
        assert spent(server, caller) == oracle.log.total == 6
        assert oracle.log.unanswered == []


@pytest.mark.parametrize(
    "error", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.ReadTimeout, httpx.WriteError]
)
@pytest.mark.parametrize("answered", [False, True])
def test_every_kind_of_lost_connection_is_retried_free(
    server: Running, caller: Caller, error: type[httpx.TransportError], answered: bool
) -> None:
    lose = at(1, error("lost"))
    with remote(server, caller, transport=Interfering(after=lose) if answered else Interfering(lose)) as oracle:
        ask(oracle)
        assert spent(server, caller) == oracle.log.total == 3


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[tuple[ServerProcess, str]]:
    """A server process that takes its time, so that a kill comes between charge and answer; and a key."""
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    _, key = ledger.add_client("a", 10_000)
    ledger.close()
    with ServerProcess(tmp_path / "ledger.db", ("--engine-block", "1")) as started:
        yield started, key.reveal()


def test_a_server_killed_before_it_answered_and_started_again_charges_once(
    killable: tuple[ServerProcess, str], tmp_path: Path
) -> None:
    server, key = killable
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    with RemoteOracle(server.url, key, retry_seconds=60) as oracle, ThreadPoolExecutor(1) as pool:
        assert oracle.info.max_rows >= 2000
        answer = pool.submit(ask, oracle, 2000)
        wait_until(lambda: ledger.get_client("a").held == 2000)
        server.kill()
        assert not answer.done()
        time.sleep(0.2)  # some attempts find nobody there
        server.start()
        logits = answer.result(60)
        assert ledger.get_client("a").spent == oracle.log.total == 2000
        assert oracle.log.unanswered == []
        np.testing.assert_array_equal(ask(oracle, 2000)[:5], logits[:5])
    assert ledger.verify().intact
    ledger.close()


def test_nobody_there_is_told_soon(tmp_path: Path) -> None:
    with running(Settings(ledger=str(tmp_path / "ledger.db"))) as server:
        url = server.url
    start = time.monotonic()
    with (
        RemoteOracle(url, "key", retry_seconds=0.5) as oracle,
        pytest.raises(OracleUnreachable, match=r"within 0 s|within 1 s") as told,
    ):
        ask(oracle)
    assert time.monotonic() - start < 3
    assert url in str(told.value)


def test_an_answer_that_never_came_stays_open_in_the_log(server: Running, caller: Caller) -> None:
    def lose(number: int) -> None:
        raise httpx.ReadError("lost")

    with remote(server, caller, transport=Interfering(after=lose), retry_seconds=0.3) as oracle:
        with pytest.raises(OracleUnreachable):
            ask(oracle)
        assert [request.rows for request in oracle.log.unanswered] == [3]
        assert oracle.log.total == 0
    assert spent(server, caller) == 3  # which is what the audit will find


def test_a_request_that_cannot_be_sent_is_not_tried_for_long(oracle: RemoteOracle) -> None:
    start = time.monotonic()
    with pytest.raises(OracleUnreachable, match="Illegal header"):
        ask(oracle, label="two\nlines")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("url", ["localhost:8600", "8600", "", "ftp://localhost", "http://", "http://[::1"])
def test_what_is_no_address_is_told_at_once(url: str) -> None:
    start = time.monotonic()
    with pytest.raises(OracleUnreachable, match="address of a server"):
        RemoteOracle(url, "key")
    assert time.monotonic() - start < 1


# --- refusals ---------------------------------------------------------------------------------------------------------


def problem(status: int, retry_after: str | None = None, **fields: Any) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(status, json={"status": status, "detail": "no", **fields}, headers=headers)


def first(count: int, make: Callable[[], httpx.Response]) -> Callable[[int], httpx.Response | None]:
    """The first `count` requests get an answer of our own."""
    return lambda number: make() if number <= count else None


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for_as_long_as_it_says(server: Running, caller: Caller, status: int) -> None:
    busy = Interfering(first(2, lambda: problem(status, "0.3")))
    with remote(server, caller, transport=busy) as oracle:
        start = time.monotonic()
        ask(oracle)
        assert 0.6 <= time.monotonic() - start < 5
        assert spent(server, caller) == oracle.log.total == 3


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again_without_being_told_when(server: Running, caller: Caller, status: int) -> None:
    with remote(server, caller, transport=Interfering(first(2, lambda: problem(status)))) as oracle:
        ask(oracle)
        assert spent(server, caller) == oracle.log.total == 3


def test_a_wait_that_is_too_long_is_not_begun(server: Running, caller: Caller) -> None:
    start = time.monotonic()
    busy = Interfering(first(99, lambda: problem(429, "3601")))
    with remote(server, caller, transport=busy) as oracle, pytest.raises(RateLimited):
        ask(oracle)
    assert busy.count == 1
    assert time.monotonic() - start < 2


def test_a_request_that_is_still_being_answered_is_waited_for(tmp_path: Path) -> None:
    engine = Held()
    refusals = []

    def seen(number: int) -> None:
        refusals.append(number)
        engine.go.set()

    settings = Settings(ledger=str(tmp_path / "ledger.db"))
    with running(settings, Oracle(engine, (1, 8, 8), 3)) as server, ThreadPoolExecutor(1) as pool:
        caller = server.caller()
        with remote(server, caller) as one, remote(server, caller, transport=Interfering(after=seen)) as two:
            answer = pool.submit(ask, one)
            assert engine.entered.wait(10)
            np.testing.assert_array_equal(ask(two), answer.result(10))
            assert len(refusals) == 2  # 409, then the answer
            assert spent(server, caller) == 3
            # Both logs know of the request; together the accounts are audited by its key.
            assert one.log.requests.keys() == two.log.requests.keys()


def test_an_exhausted_budget_is_raised_with_its_numbers(server: Running) -> None:
    caller = server.caller(10)
    with remote(server, caller) as oracle:
        ask(oracle, 4)
        with pytest.raises(BudgetExhausted) as told:
            ask(oracle, 7, label="too-much")
        assert told.value.extensions == {"requested": 7, "remaining": 6, "budget": 10}
        assert (oracle.log.total, oracle.log.unanswered) == (4, [])
        assert spent(server, caller) == 4
        ask(oracle, 6, label="enough")
        assert (oracle.remaining, oracle.log.total, spent(server, caller)) == (0, 10, 10)


def test_a_wrong_key_is_told_at_once_and_a_revoked_one(server: Running, caller: Caller) -> None:
    start = time.monotonic()
    for wrong in (None, "nonsense", caller.key[:-1] + ("A" if caller.key[-1] != "A" else "B")):
        with RemoteOracle(server.url, wrong) as oracle:
            with pytest.raises(Unauthorized):
                oracle.budget()
            with pytest.raises(Unauthorized):
                ask(oracle)
            assert [request.refused for request in oracle.log.requests.values()] == ["unauthorized"]
    server.ledger.revoke(caller.client.name)
    with remote(server, caller) as oracle, pytest.raises(ClientRevoked):
        ask(oracle)
    assert time.monotonic() - start < 10
    assert spent(server, caller) == 0


@pytest.mark.parametrize("answer", [problem(503), problem(401), problem(409)], ids=["503", "401", "409"])
def test_a_refusal_after_a_lost_answer_proves_nothing(server: Running, caller: Caller, answer: httpx.Response) -> None:
    def before(number: int) -> httpx.Response | None:
        return answer if number > 1 else None

    transport = Interfering(before, at(1, httpx.ReadError("lost")))
    with remote(server, caller, transport=transport, retry_seconds=0.5) as oracle:
        with pytest.raises(OracleError):
            ask(oracle)
        # It was charged, so the log must not call it refused: the audit would find fault with the ledger.
        assert spent(server, caller) == 3
        assert [request.rows for request in oracle.log.unanswered] == [3]


@pytest.mark.parametrize("status", [502, 504])
def test_a_refusal_after_a_gateway_lost_the_answer_proves_nothing(server: Running, caller: Caller, status: int) -> None:
    transport = Interfering(
        before=lambda number: problem(503) if number > 1 else None, after=lambda number: problem(status)
    )
    with remote(server, caller, transport=transport, retry_seconds=0.5) as oracle:
        with pytest.raises(Unavailable):
            ask(oracle)
        assert spent(server, caller) == 3
        assert [request.rows for request in oracle.log.unanswered] == [3]


def test_a_refusal_when_asked_again_after_a_kill_proves_nothing(
    server: Running, caller: Caller, tmp_path: Path
) -> None:
    def lose(number: int) -> None:
        raise httpx.ReadError("lost")

    path = tmp_path / LOG_FILE
    for transport in (Interfering(after=lose), Interfering(first(9, lambda: problem(503)))):
        with (
            remote(server, caller, log=QueryLog(path), transport=transport, retry_seconds=0.2) as oracle,
            pytest.raises((OracleUnreachable, Unavailable)),
        ):
            ask(oracle)
    assert len(QueryLog.read(path).unanswered) == 1
    with remote(server, caller, log=QueryLog(path)) as oracle:
        ask(oracle)
        assert oracle.log.total == spent(server, caller) == 3


# --- servers that are not ours ----------------------------------------------------------------------------------------


METADATA = {
    "name": "classifier",
    "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
    "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
}


def foreign(answer: Callable[[httpx.Request], httpx.Response], metadata: Any = METADATA) -> RemoteOracle:
    """A server of the same protocol, by somebody else."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == protocol.METADATA_ROUTE:
            return httpx.Response(200, json=metadata)
        if request.url.path == protocol.INFER_ROUTE:
            return answer(request)
        return httpx.Response(404, json={"error": "no such route"})

    return RemoteOracle("http://foreign", transport=httpx.MockTransport(handle), retry_seconds=0.3)


def logits_answer(rows: int = 3, classes: int = 10, **headers: str | bytes) -> httpx.Response:
    encoded = codec.encode_response({"logits": np.ones((rows, classes), np.float32)}, binary={"logits": True})
    every = {protocol.JSON_LENGTH_HEADER: str(encoded.json_length), **headers}
    raw = [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in every.items()]
    return httpx.Response(200, content=encoded.body(), headers=raw)


def json_answer(**fields: Any) -> httpx.Response:
    tensor = {"name": "logits", "datatype": "FP32", "shape": [3, 10], "data": [0.5] * 30}
    return httpx.Response(200, json={"model_name": "classifier", "outputs": [tensor | fields]})


def test_a_foreign_servers_answer_counts_by_its_rows() -> None:
    with foreign(lambda request: logits_answer()) as oracle:
        assert ask(oracle).tolist() == np.ones((3, 10)).tolist()
        assert oracle.log.total == 3
        assert oracle.remaining is None
        assert oracle.budget() is None
        with pytest.raises(NotFound):
            oracle.metrics()


@pytest.mark.parametrize("charge", [b"", b"-1", b"\xb2", b"three", b"1.5", b"9" * 5000])
def test_a_charge_that_is_no_number_counts_by_its_rows(charge: bytes) -> None:
    headers = {protocol.QUERY_CHARGE_HEADER: charge, protocol.QUERY_REMAINING_HEADER: charge}
    with foreign(lambda request: logits_answer(**headers)) as oracle:
        ask(oracle)
        assert oracle.log.total == 3
        assert oracle.remaining is None


def test_an_answer_in_json_is_read_too() -> None:
    with foreign(lambda request: json_answer()) as oracle:
        assert ask(oracle).tolist() == np.full((3, 10), 0.5).tolist()


JSON_LENGTH = logits_answer().headers[protocol.JSON_LENGTH_HEADER]
UNREADABLE = {
    "not JSON": httpx.Response(200, content=b"<html>"),
    "empty": httpx.Response(200),
    "another output": json_answer(name="labels"),
    "another shape": logits_answer(rows=2),
    "other classes": logits_answer(classes=9),
    "cut short": httpx.Response(
        200, content=logits_answer().content[:-1], headers={protocol.JSON_LENGTH_HEADER: JSON_LENGTH}
    ),
    "a length that is no number": logits_answer(**{protocol.JSON_LENGTH_HEADER: b"\xb2"}),
    "a length of too many digits": logits_answer(**{protocol.JSON_LENGTH_HEADER: "9" * 5000}),
    "a length beyond the body": logits_answer(**{protocol.JSON_LENGTH_HEADER: "99999"}),
    "not finite": json_answer(shape=[3, 10], data=[1e39] * 30),
    "another compression": (200, b"not gzip", {"Content-Encoding": "gzip"}),
    "a redirection": httpx.Response(302, headers={"Location": "http://elsewhere"}),
    "a teapot": httpx.Response(418),
}


@pytest.mark.parametrize("answer", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_answer_that_cannot_be_used_is_one_error(answer: httpx.Response | tuple[int, bytes, dict[str, str]]) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, httpx.Response):
            return answer
        status, content, headers = answer  # built late: httpx would decode it here
        return httpx.Response(status, stream=httpx.ByteStream(content), headers=headers)

    with foreign(reply) as oracle:
        with pytest.raises(UnexpectedAnswer):
            ask(oracle)
        # Perhaps charged, perhaps not: not ours to say.
        assert oracle.log.total == 0
        assert len(oracle.log.unanswered) == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {**METADATA, "inputs": []},
        {**METADATA, "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]},
        {**METADATA, "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 64]}]},
        {**METADATA, "outputs": [{"name": "logits", "datatype": "FP32", "shape": ["n", 10]}]},
        [1],
    ],
)
def test_a_server_that_is_no_classifier_is_told(metadata: Any) -> None:
    with foreign(lambda request: logits_answer(), metadata) as oracle, pytest.raises(UnexpectedAnswer):
        ask(oracle)


@pytest.mark.parametrize("limit", ["many", 0, -1, None, [5]])
def test_limits_that_make_no_sense_are_not_heeded(limit: Any) -> None:
    metadata = METADATA | {"parameters": {"max_batch_rows": limit, "max_body_bytes": limit}}
    with foreign(lambda request: logits_answer(), metadata) as oracle:
        assert ask(oracle).shape == (3, 10)


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_is_nowhere_to_be_read(
    server: Running, caller: Caller, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    secret = caller.key
    lose = at(1, httpx.ReadError("lost"))
    with remote(server, caller, log=QueryLog(tmp_path / LOG_FILE), transport=Interfering(lose)) as oracle:
        ask(oracle)
        said += [repr(oracle), str(oracle.info), str(oracle.budget()), str(list(oracle.charges()))]
    for make in (
        lambda: RemoteOracle(server.url, secret + "x"),
        lambda: RemoteOracle("http://127.0.0.1:9", secret, retry_seconds=0.1),
        lambda: RemoteOracle(server.url, secret + "\n"),
        lambda: RemoteOracle(server.url, secret + " x"),
        lambda: RemoteOracle(server.url, secret + "é"),
        lambda: RemoteOracle("localhost", secret),
    ):
        try:
            with make() as oracle:
                oracle.budget()
        except OracleError as error:
            said += ["".join(traceback.format_exception(error)), repr(error), json.dumps(error.problem())]
        else:
            pytest.fail("no error")
    said += [caplog.text, *capfd.readouterr(), (tmp_path / LOG_FILE).read_text()]
    hidden = secret.split("_", 2)[2]  # zo_ID_SECRET
    assert len(hidden) > 20
    assert [text for text in said if hidden in text] == []
    assert "httpcore" in caplog.text  # it was listening


@pytest.mark.parametrize("key", ["a b", "a\n", "é", "\x00"])
def test_a_key_that_cannot_be_one_is_told_before_it_is_sent(key: str) -> None:
    with pytest.raises(Unauthorized, match="character"):
        RemoteOracle("http://127.0.0.1:9", key)
