"""Connections that cost more than they may: each is told so, closed, and costs the others nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from oracle_support import Held, Running, digits, process, refused, running

from oracle_server.ledger import Ledger
from oracle_server.oracle import Oracle
from oracle_server.settings import Settings
from shared.wire import codec, protocol

KIB, MIB = 2**10, 2**20
HEADER_BYTES, HEADERS, CONNECTIONS = 4 * KIB, 20, 8


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with limits small enough to be reached."""
    settings = Settings(
        ledger=str(tmp_path_factory.mktemp("small") / "ledger.db"),
        max_header_bytes=HEADER_BYTES,
        max_headers=HEADERS,
        header_timeout=0.5,
        body_timeout=0.5,
        max_connections=CONNECTIONS,
    )
    with running(settings) as started:
        yield started


def connect(server: Running) -> socket.socket:
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def exchange(server: Running, sent: bytes) -> bytes:
    with connect(server) as connection:
        connection.sendall(sent)
        return read_all(connection)


def problem_of(answer: bytes, status: int, code: str) -> dict[str, object]:
    """Check that an answer is one problem and the last thing said; returns it."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 %d " % status), answer[:200]
    assert b"content-type: application/problem+json" in lines
    assert b"connection: close" in lines
    assert b"content-length: %d" % len(body) in lines
    problem: dict[str, object] = json.loads(body)
    assert (problem["status"], problem["code"]) == (status, code)
    return problem


def head(padding: int, *, end: bytes = b"\r\n\r\n", path: bytes = b"/v2") -> bytes:
    """The head of a request, of exactly `padding` bytes."""
    start = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: "
    return start + b"a" * (padding - len(start) - len(end)) + end


# --- size ----------------------------------------------------------------------------------------------------------


def test_the_limit_is_the_last_byte_of_a_head_that_is_taken(small: Running) -> None:
    assert exchange(small, head(HEADER_BYTES)).startswith(b"HTTP/1.1 200")
    problem = problem_of(exchange(small, head(HEADER_BYTES + 1)), 431, "headers-too-large")
    assert problem["max_header_bytes"] == HEADER_BYTES


def test_a_head_that_arrives_byte_by_byte_is_counted_alike(small: Running) -> None:
    for size, status in ((HEADER_BYTES, 200), (HEADER_BYTES + 1, 431)):
        with connect(small) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent = head(size)
            for start in range(0, len(sent), 64):
                connection.sendall(sent[start : start + 64])
            assert read_all(connection).startswith(b"HTTP/1.1 %d" % status)


def test_the_second_head_of_a_connection_is_limited_too(small: Running) -> None:
    first = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(small) as connection:
        connection.sendall(first)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(head(HEADER_BYTES + 1))
        problem_of(read_all(connection), 431, "headers-too-large")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * HEADER_BYTES + b" HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"a" * HEADER_BYTES + b": b\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * HEADER_BYTES,
        b"\r\n" * HEADER_BYTES,
    ],
    ids=["target", "name", "many", "empty lines"],
)
def test_every_part_of_a_head_counts(small: Running, sent: bytes) -> None:
    problem_of(exchange(small, sent), 431, "headers-too-large")


def test_headers_are_counted(small: Running) -> None:
    def with_headers(count: int) -> bytes:
        more = b"".join(b"X-%d: y\r\n" % i for i in range(count - 2))
        return b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + more + b"\r\n"

    assert exchange(small, with_headers(HEADERS)).startswith(b"HTTP/1.1 200")
    problem = problem_of(exchange(small, with_headers(HEADERS + 1)), 431, "headers-too-large")
    assert problem["max_headers"] == HEADERS


CHUNKED = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "endless",
    [b"1\r\na\r\n0\r\nX: " + b"a" * 2 * HEADER_BYTES, b"1;a=" + b"b" * 2 * HEADER_BYTES],
    ids=["trailer", "chunk extension"],
)
def test_what_frames_a_body_is_limited_like_a_head(small: Running, endless: bytes) -> None:
    problem_of(exchange(small, CHUNKED + endless), 431, "headers-too-large")


def test_a_trailer_is_not_taken_for_a_header(small: Running) -> None:
    caller = small.caller()
    encoded = codec.encode_request({"images": digits(1)}, binary=False).body()
    sent = (
        b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n"
        % (
            protocol.INFER_ROUTE.encode(),
            len(encoded),
            encoded,
        )
    )
    answer = exchange(small, sent + b"Authorization: Bearer " + caller.key.encode() + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 401")
    assert caller.budget()["spent"] == 0


# --- time ----------------------------------------------------------------------------------------------------------


def test_a_head_that_never_ends_is_not_waited_for(small: Running) -> None:
    with connect(small) as slow, connect(small) as silent:
        slow.sendall(b"GET /v2 HTTP/1.1\r\nX: ")
        problem_of(read_all(slow), 408, "request-timeout")
        assert read_all(silent) == b""  # nothing was said, so nothing is answered


def test_a_head_that_trickles_has_no_more_time(small: Running) -> None:
    with connect(small) as connection:
        connection.settimeout(0.05)
        received = b""
        for byte in b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 200:
            connection.sendall(bytes([byte]))
            try:
                received = connection.recv(65536)
                break
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408")


def test_an_empty_line_now_and_then_holds_no_connection(small: Running) -> None:
    with connect(small) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        problem_of(read_all(connection), 408, "request-timeout")


def test_an_answer_that_nobody_reads_is_dropped(tmp_path: Path) -> None:
    def wide(images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 5000)

    settings = Settings(ledger=str(tmp_path / "ledger.db"), body_timeout=1.0)
    with running(settings, Oracle(wide, (1, 8, 8), 5000)) as server:
        caller = server.caller()
        encoded = codec.encode_request({"images": digits(1000)})  # answered by 20 MB
        sent = (
            f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {caller.key}\r\n"
            f"{protocol.JSON_LENGTH_HEADER}: {encoded.json_length}\r\nContent-Length: {encoded.size}\r\n\r\n"
        ).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(10)
            host, port = server.address.split(":")
            connection.connect((host, int(port)))
            connection.sendall(sent + encoded.body())
            wait_until(lambda: caller.budget()["spent"] == 1000)
            wait_until(lambda: connections_of(psutil.Process(), connection.getsockname()) == 0)
            assert len(read_all(connection)) < 20_000_000  # what had left is all that comes


def connections_of(server: psutil.Process, peer: tuple[str, int]) -> int:
    """Sockets of a process that are connected to `peer`."""
    return sum(1 for c in server.net_connections("tcp") if c.raddr and tuple(c.raddr) == peer)


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- number --------------------------------------------------------------------------------------------------------


def test_beyond_the_limit_of_connections_one_is_told_to_come_again(tmp_path: Path) -> None:
    with (
        running(Settings(ledger=str(tmp_path / "ledger.db"), max_connections=CONNECTIONS)) as server,
        ExitStack() as stack,
    ):
        caller = server.caller()
        held = [stack.enter_context(connect(server)) for _ in range(CONNECTIONS)]
        for connection in held:  # each of them is known to the server
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET")
        answer = caller.infer(digits(1))
        refused(answer, 503, "unavailable")
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
        problem_of(exchange(server, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"), 503, "unavailable")
        held[0].sendall(b" /v2 HTTP/1.1\r\nHost: x\r\n\r\n")  # who is in stays in
        assert held[0].recv(65536).startswith(b"HTTP/1.1 200")
        held[1].close()
        held[2].close()
        wait_until(lambda: caller.infer(digits(1)).status_code == 200)
        assert caller.budget()["spent"] == 1


def test_far_beyond_it_connections_are_closed_without_a_word(tmp_path: Path) -> None:
    settings = Settings(ledger=str(tmp_path / "ledger.db"), max_connections=CONNECTIONS)
    with running(settings) as server, ExitStack() as stack:
        opened = [stack.enter_context(connect(server)) for _ in range(CONNECTIONS + 64 + 10)]
        wait_until(lambda: sum(is_closed(connection) for connection in opened) == 10)
        for connection in opened:
            connection.close()
        wait_until(lambda: server.http.get("/v2").status_code == 200)


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_requests_ahead_of_their_answers_are_few(small: Running) -> None:
    answer = exchange(small, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
    assert 1 <= answer.count(b"HTTP/1.1 200") <= 17


# --- form ----------------------------------------------------------------------------------------------------------

LENGTH, CHUNKS = b"Content-Length: 2", b"Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    "framing",
    [
        LENGTH + b"\r\n" + CHUNKS,
        CHUNKS + b"\r\n" + LENGTH,
        LENGTH + b"\r\nContent-Length: 3",
        LENGTH + b"\r\n" + LENGTH,
        b"Content-Length: 2, 2",
        b"Content-Length: +2",
        b"Content-Length: -2",
        b"Content-Length: 0x2",
        b"Content-Length: 99999999999999999999999",
        b"Content-Length : 2",
        CHUNKS + b"\r\n" + CHUNKS,
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding:\x0bchunked",
        LENGTH + b"\r\n " + CHUNKS,
        b"X: y\x00z",
        b"X: y\nZ: z",
        b"no colon",
    ],
)
def test_a_message_whose_end_is_doubtful_is_refused(small: Running, framing: bytes) -> None:
    caller = small.caller()
    sent = b"POST " + protocol.INFER_ROUTE.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
    smuggled = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = exchange(small, sent + caller.key.encode() + b"\r\n" + framing + b"\r\n\r\n0\r\n\r\n" + smuggled)
    problem_of(answer, 400, "malformed-request")
    assert answer.count(b"HTTP/1.1") == 1
    assert caller.budget()["spent"] == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v2 HTTP/9.9\r\n\r\n",
        b"GET\x00/v2 HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"BREW /v2 HTTP/1.1\r\n\r\n",
        CHUNKED + b"zz\r\n",
        CHUNKED + b"2\r\nabc\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"fffffffffffffffff\r\n",
    ],
)
def test_what_is_not_http_is_a_problem_too(small: Running, sent: bytes) -> None:
    problem_of(exchange(small, sent), 400, "malformed-request")


def test_refusals_that_reach_no_route_are_counted(small: Running) -> None:
    before = [metric(small, f'oracle_requests_total{{status="{status}"}}') for status in (400, 431)]
    exchange(small, b"garbage\r\n\r\n")
    exchange(small, head(HEADER_BYTES + 1))
    after = [metric(small, f'oracle_requests_total{{status="{status}"}}') for status in (400, 431)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]


def metric(server: Running, name: str) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(name)), 0.0))


def test_an_upgrade_is_ignored_and_the_connection_goes_on(small: Running) -> None:
    upgrade = b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    answer = exchange(small, upgrade + b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 2


def test_garbage_after_a_query_is_not_its_answer(tmp_path: Path) -> None:
    held = Held()
    with running(Settings(ledger=str(tmp_path / "ledger.db")), Oracle(held, (1, 8, 8), 3)) as server:
        caller = server.caller()
        encoded = codec.encode_request({"images": digits(1)}, binary=False)
        sent = f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {caller.key}\r\n"
        with connect(server) as connection:
            connection.sendall(f"{sent}Content-Length: {encoded.size}\r\n\r\n".encode() + encoded.body())
            assert held.entered.wait(10)
            connection.sendall(b"garbage\r\n\r\n")
            time.sleep(0.2)
            held.go.set()
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"HTTP/1.1") == 1
        assert caller.budget()["spent"] == 1


def test_a_connection_that_ends_within_a_body_is_no_failure(small: Running, caplog: pytest.LogCaptureFixture) -> None:
    caller = small.caller()
    before = metric(small, 'oracle_requests_total{status="400"}')
    with connect(small) as connection:
        sent = f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {caller.key}\r\n"
        connection.sendall(f"{sent}Content-Length: 100\r\n\r\nabc".encode())
    wait_until(lambda: metric(small, 'oracle_requests_total{status="400"}') == before + 1)
    assert "Traceback" not in caplog.text


# --- memory --------------------------------------------------------------------------------------------------------


def test_floods_leave_the_memory_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger.open(str(path)).close()
    with process(path) as (child, url), ThreadPoolExecutor(8) as pool:
        host, port = url.removeprefix("http://").split(":")

        def flood(kind: tuple[bytes, bytes]) -> bytes:
            start, more = kind
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                try:
                    connection.sendall(start)
                    for _ in range(100):
                        connection.sendall(more)
                    return connection.recv(65536)
                except (ConnectionResetError, BrokenPipeError):
                    return b""

        get, many = b"GET /v2 HTTP/1.1\r\nHost: x\r\n", 64 * KIB
        kinds = [
            (get + b"X: ", b"a" * many),
            (get, b"a: b\r\n" * (many // 6)),
            (b"GET /", b"a" * many),
            (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n" * (many // 6)),
            (CHUNKED + b"1\r\na\r\n0\r\nX: ", b"a" * many),
            (CHUNKED + b"1;a=", b"a" * many),
            (b"", (get + b"\r\n") * (many // 30)),
            (b"", b"\r\n" * (many // 2)),
        ]
        list(pool.map(flood, kinds))  # warm
        before = psutil.Process(child.pid).memory_info().rss
        list(pool.map(flood, kinds * 8))  # 400 MB sent
        grown = psutil.Process(child.pid).memory_info().rss - before
        assert httpx.get(f"{url}/v2").status_code == 200
        assert grown < 32 * MIB, f"{grown / MIB:.0f} MiB"
