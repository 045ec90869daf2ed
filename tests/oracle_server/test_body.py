"""Bodies as they arrive: compressed, in pieces, too large, too slow; and refusals that the sender gets to see."""

from __future__ import annotations

import gzip
import socket
import time
import tracemalloc
import zlib

import pytest
from oracle_support import Caller, Running, digits, logits_of, refused

from oracle_server.body import decompress
from oracle_server.room import BodyRoom, Share
from shared.wire import codec, protocol
from shared.wire.errors import MalformedRequest, TooLarge

MIB = 2**20


def unlimited() -> Share:
    return Share(BodyRoom(2**60))


def compressed(caller: Caller, encoding: str) -> dict[str, str]:
    length = codec.encode_request({"images": digits(3)}).json_length
    return caller.headers | {"Content-Encoding": encoding, protocol.JSON_LENGTH_HEADER: str(length)}


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_read(caller: Caller, encoding: str, compress: object) -> None:
    body = codec.encode_request({"images": digits(3)}).body()
    sent = compress(body)  # type: ignore[operator]
    answer = caller.http.post(protocol.INFER_ROUTE, content=sent, headers=compressed(caller, encoding))
    assert logits_of(answer).shape == (3, 10)


@pytest.mark.parametrize(
    ("content", "encoding", "status", "code"),
    [
        (gzip.compress(b"0" * (64 * MIB)), "gzip", 413, "too-large"),
        (gzip.compress(b"{}")[:-9], "gzip", 400, "malformed-request"),
        (gzip.compress(b"{}") + b"more", "gzip", 400, "malformed-request"),
        (b"no gzip", "gzip", 400, "malformed-request"),
        (b"{}", "br", 400, "malformed-request"),
    ],
    ids=["bomb", "cut", "trailing", "other", "unknown"],
)
def test_a_body_that_does_not_decompress(caller: Caller, content: bytes, encoding: str, status: int, code: str) -> None:
    answer = caller.http.post(
        protocol.INFER_ROUTE, content=content, headers=caller.headers | {"Content-Encoding": encoding}
    )
    refused(answer, status, code)


def test_a_bomb_is_never_inflated() -> None:
    bomb = zlib.compress(b"0" * (64 * MIB))
    tracemalloc.start()
    with pytest.raises(TooLarge):
        decompress(bomb, "deflate", unlimited(), limit=MIB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MIB


def test_the_limit_is_the_last_byte_that_is_taken() -> None:
    plain = b"0" * 1000
    assert decompress(zlib.compress(plain), "deflate", unlimited(), limit=1000) == plain
    with pytest.raises(TooLarge):
        decompress(zlib.compress(plain), "deflate", unlimited(), limit=999)
    with pytest.raises(MalformedRequest):
        decompress(zlib.compress(plain)[:-1], "deflate", unlimited(), limit=1000)


def test_a_chunked_body_is_read_within_the_limit(caller: Caller) -> None:
    encoded = codec.encode_request({"images": digits(3)})
    headers = caller.headers | {protocol.JSON_LENGTH_HEADER: str(encoded.json_length)}
    answer = caller.http.post(protocol.INFER_ROUTE, content=(bytes(chunk) for chunk in encoded.chunks), headers=headers)
    assert logits_of(answer).shape == (3, 10)
    too_much = (b"0" * 65536 for _ in range(24))
    refused(caller.http.post(protocol.INFER_ROUTE, content=too_much, headers=headers), 413, "too-large")


def send(server: Running, head: str, body: bytes, pause: float = 0.0) -> bytes:
    """Send everything before reading anything, as a simple client does; returns the answer."""
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{head}\r\nHost: x\r\n\r\n".encode())
        connection.sendall(body)
        time.sleep(pause)
        answer = b""
        while b"}" not in answer:
            received = connection.recv(65536)
            if not received:
                break
            answer += received
        return answer


@pytest.mark.parametrize(
    ("path", "key", "size", "status"),
    [
        (protocol.INFER_ROUTE, "nonsense", MIB, b"401"),
        (protocol.INFER_ROUTE, None, MIB + MIB // 2, b"413"),
        ("/nothing", None, MIB, b"404"),
        ("/v2", None, MIB, b"405"),
    ],
)
def test_an_early_refusal_of_a_large_body_is_seen(
    caller: Caller, server: Running, path: str, key: str | None, size: int, status: bytes
) -> None:
    head = f"POST {path} HTTP/1.1\r\nAuthorization: Bearer {key or caller.key}\r\nContent-Length: {size}"
    answer = send(server, head, b"0" * size)
    assert answer.split(b" ", 2)[1] == status
    assert b"connection: close" not in answer.lower()  # all was read, so the connection can go on


def test_a_body_far_beyond_the_limit_is_let_go(caller: Caller, server: Running) -> None:
    head = f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\nAuthorization: Bearer {caller.key}\r\nContent-Length: {2**40}"
    answer = send(server, head, b"0" * (2 * MIB))
    assert answer.split(b" ", 2)[1] == b"413"
    assert b"connection: close" in answer.lower()


def test_a_body_that_does_not_arrive_is_not_waited_for(caller: Caller, server: Running) -> None:
    head = f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\nAuthorization: Bearer {caller.key}\r\nContent-Length: 1000"
    start = time.monotonic()
    answer = send(server, head, b"0" * 10)
    assert answer.split(b" ", 2)[1] == b"408"
    assert b"connection: close" in answer.lower()
    assert 1.5 < time.monotonic() - start < 8
    assert caller.budget()["spent"] == 0
