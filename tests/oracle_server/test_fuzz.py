"""Ten thousand bodies that nobody would send: never a 500, never a charge for a refusal, memory flat."""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle_support import digits, process

from oracle_server.ledger import Ledger
from shared.wire import codec, protocol
from shared.wire.errors import BY_CODE

MIB = 2**20
# Requests: WARM + EXAMPLES * BATCH * (1 + VARIANTS) + RANDOM: what hypothesis draws is sent as it is, and scrambled.
WARM, EXAMPLES, BATCH, VARIANTS, RANDOM = 400, 150, 8, 4, 4_000


@dataclass(frozen=True)
class Sent:
    """One request: its body, and the headers that say how to read it."""

    body: bytes
    headers: dict[str, str]


@dataclass
class Oracle:
    """A real server, and what it said to everything so far."""

    address: str
    key: str
    statuses: Counter[int] = field(default_factory=Counter)
    charged: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    def send(self, sent: Sent) -> None:
        """Send, check the answer, and count what it cost."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection(self.address, timeout=30)
        headers = {"Authorization": f"Bearer {self.key}"} | sent.headers
        connection.request("POST", protocol.INFER_ROUTE, sent.body, headers)
        answer = connection.getresponse()
        content = answer.read()
        with self._lock:
            self.statuses[answer.status] += 1
            self.charged += int(answer.headers.get("Query-Charge", "0"))
        if answer.status != 200:
            assert answer.status < 500, (sent, content)
            assert answer.headers["Content-Type"] == "application/problem+json", (sent, content)
            problem = json.loads(content)
            assert BY_CODE[problem["code"]].status == problem["status"] == answer.status
            assert "Query-Charge" not in answer.headers

    def close(self) -> None:
        """Close this thread's connection."""
        if hasattr(self._local, "connection"):
            self._local.connection.close()
            del self._local.connection


def valid(rows: int, *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """The JSON part of a request that would be answered, and the bytes after it."""
    encoded = codec.encode_request({"images": digits(rows)}, binary=binary)
    head, *tail = (bytes(chunk) for chunk in encoded.chunks)
    return json.loads(head), b"".join(tail)


SEEDS = [valid(rows, binary=binary) for rows in (1, 2) for binary in (True, False)]


def request(head: bytes, tail: bytes, **headers: str) -> Sent:
    """A request of these parts. Only a binary one says how long its JSON is."""
    length = {protocol.JSON_LENGTH_HEADER: str(len(head))} if tail else {}
    return Sent(head + tail, length | {name.replace("_", "-"): value for name, value in headers.items()})


# --- structured: one field, one length, one header at a time -------------------------------------------------------

numbers = (
    st.integers(-5, 100)
    | st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**64, 10**400, -(2**63) - 1])
    | st.floats()
    | st.sampled_from([1e308, -0.0, 5e-324])
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["images", "logits", "FP32", "BYTES"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
shapes = st.lists(st.integers(-1, 9) | st.sampled_from([2**31 - 1, 2**31, 2**64]), max_size=6)
places = st.sampled_from(
    [
        ("id",),
        ("parameters",),
        ("parameters", "binary_data_output"),
        ("inputs",),
        ("inputs", 0),
        ("inputs", 0, "name"),
        ("inputs", 0, "shape"),
        ("inputs", 0, "datatype"),
        ("inputs", 0, "parameters"),
        ("inputs", 0, "parameters", "binary_data_size"),
        ("inputs", 0, "data"),
        ("inputs", 0, "data", 0),
        ("outputs",),
        ("extra",),
    ]
)
header_text = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20)
headers = st.one_of(
    st.tuples(st.just(protocol.JSON_LENGTH_HEADER), header_text | st.integers(-5, 1000).map(str)),
    st.tuples(st.just(protocol.IDEMPOTENCY_KEY_HEADER), header_text | st.sampled_from(["a", "b", "x" * 300])),
    st.tuples(st.just("Content-Encoding"), header_text | st.sampled_from(["gzip", "deflate", "br", "identity"])),
    st.tuples(st.just("Content-Type"), header_text),
    st.tuples(st.just("Accept"), header_text),
)


def replaced(document: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """A copy of a JSON document with another value at a place; made there if it can be."""
    if not place:
        return value
    first, rest = place[0], place[1:]
    if isinstance(document, dict) and isinstance(first, str):
        return document | {first: replaced(document.get(first, {}), rest, value)}
    if isinstance(document, list) and isinstance(first, int) and first < len(document):
        return [*document[:first], replaced(document[first], rest, value), *document[first + 1 :]]
    return value


@st.composite
def mutated(draw: st.DrawFn) -> Sent:
    """A valid request, changed in one to three ways."""
    document, tail = draw(st.sampled_from(SEEDS))
    more: dict[str, str] = {}
    for _ in range(draw(st.integers(1, 3))):
        match draw(st.sampled_from(["field", "field", "shape", "tail", "header"])):
            case "field":
                document = replaced(document, draw(places), draw(anything))
            case "shape":
                document = replaced(document, ("inputs", 0, "shape"), draw(shapes))
            case "tail":
                tail = tail[: draw(st.integers(0, len(tail)))] + draw(st.binary(max_size=8))
            case "header":
                name, value = draw(headers)
                more[name] = value
    sent = request(json.dumps(document, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"), tail)
    return Sent(sent.body, sent.headers | more)


# --- unstructured: bytes at random ---------------------------------------------------------------------------------


def noise(rng: random.Random) -> Sent:
    """A valid request scrambled, or nothing but noise."""
    document, tail = rng.choice(SEEDS)
    sent = request(json.dumps(document).encode(), tail)
    return Sent(rng.randbytes(rng.randrange(600)), sent.headers) if rng.random() < 0.2 else scrambled(sent, rng)


def scrambled(sent: Sent, rng: random.Random) -> Sent:
    """A request with bytes flipped, cut, doubled or put in."""
    body = bytearray(sent.body)
    for _ in range(rng.randint(1, 4)):
        start, size = rng.randrange(len(body) + 1), rng.randint(1, 16)
        match rng.randrange(4):
            case 0:
                body[start : start + 1] = rng.randbytes(1)
            case 1:
                del body[start : start + size]
            case 2:
                body[start:start] = body[start : start + size]
            case 3:
                body[start:start] = rng.choice([rng.randbytes(size), b"[" * 300, b'"', b"\\u0000", b"e999", b"-"])
    return Sent(bytes(body), sent.headers)


# --- the run -------------------------------------------------------------------------------------------------------


def send_noise(oracle: Oracle, count: int, seed: int, threads: int = 4) -> None:
    def share(thread: int) -> None:
        rng = random.Random(seed + thread)
        for _ in range(count // threads):
            oracle.send(noise(rng))
        oracle.close()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


def send_mutated(oracle: Oracle) -> None:
    with ThreadPoolExecutor(BATCH) as pool:

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(mutated(), min_size=BATCH, max_size=BATCH))
        def run(batch: list[Sent]) -> None:
            list(pool.map(send_variants, batch))

        def send_variants(sent: Sent) -> None:
            rng = random.Random(sent.body)
            for variant in (sent, *(scrambled(sent, rng) for _ in range(VARIANTS))):
                oracle.send(variant)

        run()
        threads_end = threading.Barrier(BATCH)  # so that each thread closes its own connection

        def close(_: int) -> None:
            threads_end.wait(30)
            oracle.close()

        list(pool.map(close, range(BATCH)))


@pytest.mark.slow
def test_ten_thousand_bodies(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger.open(str(path))
    client, key = ledger.add_client("fuzzer", 10**9)
    options = ("--max-body-bytes", str(MIB), "--max-batch-rows", "64", "--body-timeout", "5")
    with process(path, *options) as (child, url):
        oracle = Oracle(url.removeprefix("http://"), key.reveal())
        send_noise(oracle, WARM, seed=0)
        before = psutil.Process(child.pid).memory_info().rss
        send_mutated(oracle)
        send_noise(oracle, RANDOM, seed=100)
        grown = psutil.Process(child.pid).memory_info().rss - before

        assert oracle.statuses.total() >= 10_000
        assert min(oracle.statuses[status] for status in (200, 400, 422)) > 50, oracle.statuses
        assert grown < 32 * MIB, f"{grown / MIB:.1f} MiB"
        account = ledger.account(client.id)
        assert account.spent == oracle.charged > 0
        assert not ledger.verify().findings
        for document, tail in SEEDS:  # it still answers
            oracle.send(request(json.dumps(document).encode(), tail))
        oracle.close()
        assert ledger.account(client.id).spent == oracle.charged == account.spent + 6
    ledger.close()
