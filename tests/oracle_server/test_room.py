"""All bodies in flight share one room."""

from __future__ import annotations

import gzip
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from oracle_support import Held, digits, logits_of, refused, running

from oracle_server.body import decompress
from oracle_server.oracle import Oracle
from oracle_server.room import BodyRoom
from oracle_server.settings import Settings
from shared.wire import codec, protocol
from shared.wire.errors import Unavailable


def test_shares_add_up_and_are_given_back() -> None:
    room = BodyRoom(100)
    with room.share() as first, room.share() as second:
        first.take(60)
        second.take(40)
        assert room.taken == 100
        with pytest.raises(Unavailable) as refusal:
            second.take(1)
        assert refusal.value.retry_after == 1
        assert room.taken == 100
    assert room.taken == 0


def test_one_alone_always_finds_room() -> None:
    room = BodyRoom(100)
    with room.share() as share:
        share.take(1000)
        with room.share() as other, pytest.raises(Unavailable):
            other.take(1)
    assert room.taken == 0


def test_what_a_body_inflates_to_takes_room() -> None:
    room = BodyRoom(1000)
    with room.share() as other, room.share() as share:
        other.take(1)
        with pytest.raises(Unavailable):
            decompress(gzip.compress(bytes(1000)), "gzip", share, limit=10**6)
        decompress(gzip.compress(bytes(999)), "gzip", share, limit=10**6)
        assert room.taken == 1000


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_query_for_which_there_is_no_room_is_told_to_come_again(tmp_path: Path, encoding: str) -> None:
    held = Held()
    encoded = codec.encode_request({"images": digits(10)})
    settings = Settings(ledger=str(tmp_path / "ledger.db"), max_bodies_bytes=encoded.size + 100)
    with running(settings, Oracle(held, (1, 8, 8), 3)) as server, ThreadPoolExecutor(1) as pool:
        caller = server.caller()
        body = gzip.compress(encoded.body()) if encoding == "gzip" else encoded.body()
        headers = caller.headers | {
            "Content-Encoding": encoding,
            protocol.JSON_LENGTH_HEADER: str(encoded.json_length),
        }
        first = pool.submit(caller.infer, digits(10))
        assert held.entered.wait(10)
        refusal = caller.http.post(protocol.INFER_ROUTE, content=body, headers=headers)
        refused(refusal, 503, "unavailable")
        assert refusal.headers["retry-after"] == "1"
        held.go.set()
        logits_of(first.result())
        logits_of(caller.http.post(protocol.INFER_ROUTE, content=body, headers=headers))
        assert caller.budget()["spent"] == 20
        assert server.service.room.taken == 0
