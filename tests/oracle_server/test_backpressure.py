"""A full queue: who is refused, how, and that it costs nothing; what goes on meanwhile."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from databases import BACKENDS, ledger_url
from oracle_support import Caller, Held, Running, digits, logits_of, refused, running
from prometheus_client.parser import text_string_to_metric_families

from oracle_server.admission import Admission
from oracle_server.inference import Prepared, answer
from oracle_server.oracle import Oracle
from oracle_server.rows import DenseRows
from oracle_server.settings import Settings
from shared.wire import codec, protocol
from shared.wire.errors import Overloaded

ROWS, REQUESTS = 40, 8


@pytest.fixture
def held() -> Iterator[Held]:
    engine = Held()
    yield engine
    engine.go.set()


@pytest.fixture(params=BACKENDS)
def server(request: pytest.FixtureRequest, tmp_path: Path, held: Held) -> Iterator[Running]:
    """A server whose engine is held, and whose queue has room for 40 rows and 8 requests; over either ledger."""
    settings = Settings(
        ledger=ledger_url(tmp_path, request.param),
        signing_key=tmp_path / "signing.key",
        max_queue_rows=ROWS,
        max_queue_requests=REQUESTS,
        max_batch_rows=64,
        body_timeout=2.0,
    )
    with running(settings, Oracle(held, (1, 8, 8), 3)) as started:
        yield started


def until(condition: object) -> None:
    """Wait for what comes soon."""
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def series(server: Running, name: str, **labels: str) -> float:
    """A series of /metrics; 0 where there is none."""
    families = text_string_to_metric_families(server.http.get(protocol.METRICS_ROUTE).text)
    return next((s.value for f in families for s in f.samples if s.name == name and s.labels == labels), 0.0)


def kinds(server: Running, caller: Caller) -> list[str]:
    return [entry.kind for entry in server.ledger.entries(caller.client.id)]


def fill(server: Running, pool: ThreadPoolExecutor, caller: Caller, *batches: int) -> list[object]:
    """Ask for so many rows at a time, and wait until they are in the queue."""
    asked = []
    key = caller.headers["Authorization"].encode()
    for rows in batches:
        before = server.service.admission.rows
        asked.append(pool.submit(caller.infer, digits(rows)))
        until(lambda rows=rows, before=before: server.service.admission.rows == before + rows)
        # Its place is its client's only from here on: what came in between would have it refused.
        until(lambda: server.service.admission.recall(key))
    return asked


# --- over HTTP -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_at_its_head_and_costs_nothing(server: Running, held: Held) -> None:
    first, second, third = (server.caller() for _ in range(3))
    with ThreadPoolExecutor(4) as pool:
        asked = fill(server, pool, first, 10, 10) + fill(server, pool, second, 10)
        for caller in (first, third):  # known by its key, and not
            refusal = caller.infer(digits(11))
            refused(refusal, 503, "overloaded")
            assert int(refusal.headers["retry-after"]) >= 1
            assert "connection" not in refusal.headers
            assert "charged" in refusal.json()["detail"]
        assert kinds(server, third) == ["client", "budget"]  # not even reserved
        until(lambda: kinds(server, second)[2:] == ["reserve"])
        assert kinds(server, first).count("reserve") <= 2
        assert series(server, "oracle_queue_rows") == 30
        assert series(server, "oracle_queue_requests") == 3
        assert series(server, "oracle_refusals_total", client=first.client.name, code="overloaded") == 1
        assert series(server, "oracle_refusals_total", client="", code="overloaded") == 1
        assert series(server, "oracle_requests_total", status="503") == 2
        assert series(server, "oracle_overload_refusal_seconds_count") == 2
        asked += fill(server, pool, third, 10)  # what fits is let in
        held.go.set()
        for each in asked:
            logits_of(each.result())  # type: ignore[attr-defined]
    assert [caller.budget()["spent"] for caller in (first, second, third)] == [20, 10, 10]
    assert [caller.budget()["held"] for caller in (first, second, third)] == [0, 0, 0]
    assert server.service.admission.rows == server.service.admission.requests == 0
    assert server.ledger.verify().intact
    logits_of(first.infer(digits(11)))


def test_a_refused_connection_goes_on(server: Running, held: Held) -> None:
    caller = server.caller()
    with ThreadPoolExecutor(1) as pool:
        asked = fill(server, pool, caller, 20)
        encoded = codec.encode_request({"images": digits(1)})
        request = b"".join(
            (
                f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {caller.key}\r\n".encode(),
                f"{protocol.JSON_LENGTH_HEADER}: {encoded.json_length}\r\n".encode(),
                f"Content-Length: {encoded.size}\r\n\r\n".encode(),
                encoded.body(),
            )
        )
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(request[:-7])
            time.sleep(0.05)
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)  # no answer is sent before the body has come
            connection.settimeout(10)
            connection.sendall(request[-7:] + 2 * request)  # and two more, ahead of their answers
            read = b""
            while read.count(b"HTTP/1.1 503") < 3 or not read.endswith(b"}"):
                read += connection.recv(65536)
            assert read.count(b'"overloaded"') == 3
            held.go.set()
            logits_of(asked[0].result())  # type: ignore[attr-defined]
            connection.sendall(request)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert caller.budget()["spent"] == 21


def test_a_body_that_never_comes_is_not_waited_for(server: Running, held: Held) -> None:
    caller = server.caller()
    with ThreadPoolExecutor(1) as pool:
        fill(server, pool, caller, 20)
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {caller.key}\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\nx".encode())
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"connection: close" in answer.lower()
        held.go.set()


@pytest.mark.parametrize("how", ["chunked", "gzip", "JSON"])
def test_rows_that_no_head_tells_are_refused_before_they_are_reserved(server: Running, held: Held, how: str) -> None:
    caller, other = server.caller(), server.caller()
    encoded = codec.encode_request({"images": digits(20)}, binary=how != "JSON")
    headers = other.headers
    if encoded.json_length is not None:
        headers[protocol.JSON_LENGTH_HEADER] = str(encoded.json_length)
    content: object = encoded.body()
    if how == "chunked":
        content = iter([encoded.body()])
    elif how == "gzip":
        import gzip

        content, headers["Content-Encoding"] = gzip.compress(encoded.body()), "gzip"
    with ThreadPoolExecutor(2) as pool:
        asked = fill(server, pool, caller, 30)
        refusal = other.http.post(protocol.INFER_ROUTE, content=content, headers=headers)
        refused(refusal, 503, "overloaded")
        assert kinds(server, other) == ["client", "budget"]
        assert server.service.admission.rows == 30
        held.go.set()
        logits_of(asked[0].result())  # type: ignore[attr-defined]
    assert server.service.room.taken == 0


def test_one_request_alone_always_fits(server: Running, held: Held) -> None:
    held.go.set()
    caller = server.caller()
    assert logits_of(caller.infer(digits(64))).shape == (64, 3)  # though the queue is of 40 rows
    refused(caller.infer(digits(65)), 413, "too-large")


def test_a_wrong_key_takes_no_place(server: Running, held: Held) -> None:
    with ThreadPoolExecutor(1) as pool:
        fill(server, pool, server.caller(), 10)
        refused(server.http.post(protocol.INFER_ROUTE, headers={"Authorization": "Bearer x"}), 401, "unauthorized")
        refused(server.http.post(protocol.INFER_ROUTE), 401, "unauthorized")
        assert server.service.admission.requests == 1
        held.go.set()


def test_a_revoked_key_is_told_so_when_there_is_room_again(server: Running, held: Held) -> None:
    caller = server.caller()
    with ThreadPoolExecutor(1) as pool:
        fill(server, pool, caller, 20)
        server.ledger.revoke(caller.client.name)
        refused(caller.infer(digits(1)), 503, "overloaded")
        held.go.set()
    refused(caller.infer(digits(1)), 403, "client-revoked")


def test_the_server_lives_while_the_engine_is_held_and_reads_the_next_bodies(server: Running, held: Held) -> None:
    caller, other = server.caller(), server.caller()
    with ThreadPoolExecutor(2) as pool:
        asked = fill(server, pool, caller, 10)
        assert held.entered.wait(10)
        for route in ("/v2/health/live", "/v2/health/ready", "/v2/models/classifier", protocol.METRICS_ROUTE):
            assert server.http.get(route).status_code == 200
        asked += fill(server, pool, other, 10)
        # Read, checked and reserved, while the engine has yet to answer the first.
        until(lambda: kinds(server, other)[2:] == ["reserve"])
        assert not asked[0].done()  # type: ignore[attr-defined]
        held.go.set()


def test_draining_finishes_what_was_let_in(server: Running, held: Held) -> None:
    callers = [server.caller() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        asked = [fill(server, pool, caller, 8)[0] for caller in callers]
        server.service.gate.close()
        refused(callers[0].infer(digits(20)), 503, "unavailable")  # which says more than that the queue is full
        held.go.set()
        for each in asked:
            logits_of(each.result())  # type: ignore[attr-defined]
        # Not over HTTP: the server is ending.
        assert [server.ledger.account(caller.client.id).spent for caller in callers] == [8, 8, 8]


def test_a_request_cancelled_while_it_waits_is_released_and_not_computed(server: Running, held: Held) -> None:
    busy, gone = server.caller(), server.caller()
    with ThreadPoolExecutor(1) as pool:
        fill(server, pool, busy, 5)
        assert held.entered.wait(10)
        body = codec.encode_request({"images": digits(7)})
        prepared = Prepared(codec.decode_request(body.body(), body.json_length), DenseRows(digits(7)), "0" * 64)

        async def give_up() -> None:
            task = asyncio.create_task(answer(server.service, gone.client, None, prepared))
            while kinds(server, gone)[2:] != ["reserve"]:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)  # it waits for the engine now
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(give_up())
        until(lambda: kinds(server, gone)[2:] == ["reserve", "release"])
        held.go.set()
    assert gone.budget() == {**gone.budget(), "spent": 0, "held": 0}
    logits_of(gone.infer(digits(7)))
    assert series(server, "oracle_block_rows_sum") == 5 + 7


def test_concurrent_requests_share_blocks(tmp_path: Path) -> None:
    blocks: list[int] = []
    entered, go = threading.Event(), threading.Event()

    def engine(images: torch.Tensor) -> torch.Tensor:
        blocks.append(len(images))
        entered.set()
        assert go.wait(30)
        return images.flatten(1)[:, :3]

    with (
        running(Settings(ledger=str(tmp_path / "ledger.db")), Oracle(engine, (1, 8, 8), 3)) as server,
        ThreadPoolExecutor(9) as pool,
    ):
        callers = [server.caller() for _ in range(9)]
        images = [digits(rows + 1, seed=rows) for rows in range(9)]
        asked = [pool.submit(callers[0].infer, images[0])]
        assert entered.wait(10)
        asked += [pool.submit(caller.infer, each) for caller, each in zip(callers[1:], images[1:], strict=True)]
        until(lambda: len(server.service.batcher._waiting) == 8)
        go.set()
        for each, future in zip(images, asked, strict=True):
            np.testing.assert_array_equal(logits_of(future.result()), each.reshape(len(each), -1)[:, :3])
        assert blocks == [1, sum(range(2, 10))]
        assert series(server, "oracle_block_rows_count") == 2
        assert series(server, "oracle_queue_wait_seconds_count") == 9


# --- who may take how much -----------------------------------------------------------------------------------------


def test_clients_share_the_queue_and_one_who_comes_new_finds_room() -> None:
    admission = Admission(max_rows=120, max_requests=1000)
    with ExitStack() as stack:

        def take_all(client: int) -> int:
            taken = 0
            while True:
                try:
                    stack.enter_context(admission.enter(client, 1))
                except Overloaded:
                    return taken
                taken += 1

        assert take_all(1) == 60  # half, alone
        assert take_all(2) == 30  # half of what is left
        assert take_all(3) == 15
        with admission.enter(4, 1):
            pass
        assert admission.rows == 105
    assert admission.rows == admission.requests == 0
    assert not admission._clients


def test_requests_are_bounded_like_rows() -> None:
    admission = Admission(max_rows=10**6, max_requests=8)
    with ExitStack() as stack:
        for client in (1, 1, 1, 1, 2, 2):
            stack.enter_context(admission.enter(client, 1))
        for client in (1, 2):
            with pytest.raises(Overloaded):
                admission.check(client, 1)
        stack.enter_context(admission.enter(3, 1))
        stack.enter_context(admission.enter(None, 1))
        with pytest.raises(Overloaded):
            admission.check(None, 1)


def test_a_place_is_claimed_and_grows_and_shrinks() -> None:
    admission = Admission(max_rows=100, max_requests=10)
    with admission.enter(1, 10) as mine, admission.enter(None, 20) as place:
        place.claim(1)
        with pytest.raises(Overloaded):
            place.resize(41)
        assert (admission.rows, place.rows) == (30, 20)
        place.resize(40)
        assert admission.rows == 50
        with pytest.raises(Overloaded), admission.enter(None, 30) as other:
            other.claim(1)
        mine.resize(1)
        assert admission.rows == 41
    assert admission.rows == admission.requests == 0
    assert not admission._clients


@pytest.mark.parametrize(("rate", "seconds"), [(None, 1), (1.0, 25), (0.001, 60), (1000.0, 1)])
def test_retry_after_is_the_time_in_which_half_of_the_queue_is_computed(rate: float | None, seconds: int) -> None:
    admission = Admission(max_rows=60, max_requests=10, rate=lambda: rate)
    with admission.enter(1, 50), pytest.raises(Overloaded) as refusal:
        admission.check(2, 11)
    assert refusal.value.retry_after == seconds
