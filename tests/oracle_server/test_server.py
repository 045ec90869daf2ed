"""The server as a process: it is killed, told to stop, and started again."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from oracle_support import Caller, Held, digits, logits_of, process, refused, running

from oracle_server.ledger import Ledger
from oracle_server.oracle import Oracle
from oracle_server.server import ServeError, listen
from oracle_server.settings import Settings
from shared.wire import protocol


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def queries_total(http: httpx.Client, client: str) -> float:
    """`oracle_queries_total` of a client, as /metrics says it."""
    lines = http.get(protocol.METRICS_ROUTE).text.splitlines()
    return float(next(x for x in lines if x.startswith(f'oracle_queries_total{{client="{client}"}}')).split()[-1])


def test_a_kill_loses_no_count(path: Path) -> None:
    ledger = Ledger.open(str(path))
    client, key = ledger.add_client("a", 10)
    with process(path) as (child, url), httpx.Client(base_url=url) as http:
        caller = Caller(client, key.reveal(), http)
        logits_of(caller.infer(digits(7), Idempotency_Key="k"))
        child.send_signal(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
    assert ledger.verify().intact
    with process(path) as (child, url), httpx.Client(base_url=url) as http:
        caller = Caller(client, key.reveal(), http)
        assert queries_total(http, "a") == caller.budget()["spent"] == ledger.account(client.id).spent == 7
        refused(caller.infer(digits(4)), 403, "budget-exhausted")
        assert caller.infer(digits(7), Idempotency_Key="k").headers["Query-Charge"] == "0"
        logits_of(caller.infer(digits(3)))
        assert queries_total(http, "a") == ledger.account(client.id).spent == 10
        child.terminate()
        assert child.wait(20) == 0
        assert key.secret not in (child.stderr.read() if child.stderr else "")
    ledger.close()


@pytest.fixture
def held() -> Iterator[Held]:
    engine = Held()
    yield engine
    engine.go.set()


def test_draining_refuses_new_queries_and_finishes_the_old(path: Path, held: Held) -> None:
    with running(Settings(ledger=str(path)), Oracle(held, (1, 8, 8), 3)) as server, ThreadPoolExecutor(1) as pool:
        caller = server.caller()
        first = pool.submit(caller.infer, digits(2))
        assert held.entered.wait(10)
        server.service.gate.close()
        for route in ("/v2/health/ready", "/v2/models/classifier/ready"):
            refused(server.http.get(route), 503, "unavailable")
        assert server.http.get("/v2/health/live").status_code == 200
        late = caller.infer(digits(1))
        refused(late, 503, "unavailable")
        assert (late.headers["retry-after"], late.headers["connection"]) == ("1", "close")
        held.go.set()
        logits_of(first.result())
        assert server.ledger.account(caller.client.id).spent == 2


def test_sigterm_finishes_what_is_in_flight_and_exits_with_0(path: Path) -> None:
    ledger = Ledger.open(str(path))
    client, key = ledger.add_client("a", 10**6)
    ledger.close()
    # Small blocks make the batch take long enough for the signal to come in between.
    with process(path, "--engine-block", "1") as (child, url), httpx.Client(base_url=url, timeout=30) as http:
        caller = Caller(client, key.reveal(), http)
        logits_of(caller.infer(digits(1)))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(caller.infer, digits(4096))
            deadline = time.monotonic() + 10
            with httpx.Client(base_url=url) as other:
                while Caller(client, key.reveal(), other).budget()["held"] < 4096:  # reserved, so inside
                    assert time.monotonic() < deadline
            child.send_signal(signal.SIGTERM)
            assert not answer.done()
            assert logits_of(answer.result()).shape == (4096, 10)
        assert child.wait(20) == 0


def test_a_port_in_use_is_told() -> None:
    taken, url = listen("127.0.0.1", 0)
    with taken, pytest.raises(ServeError, match="in use"):
        listen("127.0.0.1", int(url.rsplit(":", 1)[1]))
    with pytest.raises(ServeError):
        listen("no-such-host.invalid", 0)


def test_an_address_of_version_6_is_a_url() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        bound, url = listen("::1", 0)
    except ServeError:
        pytest.skip("no IPv6 loopback")
    with bound:
        assert url.startswith("http://[::1]:")
