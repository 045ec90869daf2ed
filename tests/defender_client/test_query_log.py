"""The client's own account: what it says after a reload, a kill at any byte, a refusal and a replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from defender_client.query_log import LogDamaged, QueryLog


def answer(log: QueryLog, key: str, charged: int) -> None:
    log.answered(key, charged, receipt="1", bytes_up=100, bytes_down=10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "queries.jsonl"


def filled(path: Path) -> QueryLog:
    """Two purposes, one lost answer, one refusal."""
    log = QueryLog(path)
    for key, purpose, rows in (("a", "labels", 5), ("b", "train", 7), ("c", "train", 9)):
        log.sending(key, purpose, rows)
        answer(log, key, rows)
    log.sending("lost", "train", 11)
    log.sending("no", "train", 13)
    log.refused("no", "budget-exhausted")
    return log


def test_a_reload_gives_the_same_account(path: Path) -> None:
    log = filled(path)
    log.close()
    for again in (QueryLog.read(path), QueryLog(path)):
        assert again.requests == log.requests
        assert again.charged == log.charged == {"labels": 5, "train": 16}
        assert again.total == 21
        assert [request.key for request in again.unanswered] == ["lost"]
        assert again.requests["no"].refused == "budget-exhausted"
        assert again.requests["no"].charged is None
        assert (again.requests["a"].bytes_up, again.requests["a"].bytes_down) == (100, 10)
        again.close()


def test_reading_leaves_the_file_alone(path: Path) -> None:
    filled(path).close()
    with path.open("ab") as torn:
        torn.write(b'{"key":"ha')
    before = path.read_bytes()
    QueryLog.read(path).close()
    assert path.read_bytes() == before


def test_every_line_is_in_the_file_before_the_next_thing_happens(path: Path) -> None:
    log = QueryLog(path)
    log.sending("a", "train", 5)
    assert [request.key for request in QueryLog.read(path).unanswered] == ["a"]
    answer(log, "a", 5)
    assert QueryLog.read(path).total == 5
    log.close()


def test_a_last_line_cut_at_any_byte_costs_that_line_only(tmp_path: Path) -> None:
    for settle in (False, True):  # the last line is one that announces a request, or one that answers it
        path = tmp_path / f"{settle}.jsonl"
        log = filled(path)
        log.sending("last", "validation", 3)
        if settle:
            answer(log, "last", 3)
        log.close()
        whole = path.read_bytes()
        start = whole[:-1].rfind(b"\n") + 1
        for cut in range(start, len(whole)):
            path.write_bytes(whole[:cut])
            again = QueryLog(path)
            assert path.read_bytes() == whole[:start]
            assert again.total == 21
            assert ("last" in again.requests) == settle
            # The account goes on where the cut was, and is whole when read back.
            again.sending("last", "validation", 3)
            answer(again, "last", 0 if settle else 3)
            again.close()
            assert QueryLog.read(path).total == 24


def test_a_request_is_announced_once(path: Path) -> None:
    log = QueryLog(path)
    log.sending("a", "train", 5)
    log.sending("a", "train", 5)
    answer(log, "a", 5)
    log.sending("a", "train", 5)
    log.close()
    assert len(path.read_text().splitlines()) == 2


def test_a_replay_settles_a_lost_answer_and_is_free_otherwise() -> None:
    log = filled_in_memory()
    answer(log, "lost", 0)
    assert (log.total, log.unanswered) == (32, [])
    answer(log, "lost", 0)
    answer(log, "a", 0)
    assert log.total == 32
    assert log.requests["a"].bytes_up == 200


def filled_in_memory() -> QueryLog:
    log = QueryLog(None)
    for key, purpose, rows in (("a", "labels", 5), ("b", "train", 7), ("c", "train", 9)):
        log.sending(key, purpose, rows)
        answer(log, key, rows)
    log.sending("lost", "train", 11)
    return log


def test_a_refused_request_may_be_asked_again(path: Path) -> None:
    log = filled(path)
    log.sending("no", "train", 13)
    assert [request.key for request in log.unanswered] == ["lost", "no"]
    answer(log, "no", 13)
    log.close()
    assert QueryLog.read(path).charged == {"labels": 5, "train": 29}
    assert QueryLog.read(path).requests["no"].refused is None


def test_a_refusal_after_the_answer_takes_nothing_back(path: Path) -> None:
    log = filled(path)
    log.sending("a", "labels", 5)
    log.refused("a", "unauthorized")
    log.sending("a", "labels", 5)
    answer(log, "a", 0)
    log.close()
    assert log.charged["labels"] == QueryLog.read(path).charged["labels"] == 5


@pytest.mark.parametrize(
    "line", ["", "{}", "[1]", "not JSON", '{"key":"unknown","charged":3,"up":1,"down":1}', '{"key":"lost","charged":3}']
)
def test_a_damaged_log_says_where(path: Path, line: str) -> None:
    filled(path).close()
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole[:4], line, *whole[4:]]) + "\n")
    for read in (QueryLog, QueryLog.read):
        with pytest.raises(LogDamaged, match=r"queries.jsonl.*line 5"):
            read(path)


def test_nothing_but_numbers_and_names_is_kept(path: Path) -> None:
    filled(path).close()
    fields = {name for line in path.read_text().splitlines() for name in json.loads(line)}
    assert fields == {"key", "purpose", "rows", "at", "charged", "receipt", "up", "down", "refused"}
