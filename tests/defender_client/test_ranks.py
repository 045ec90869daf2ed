"""Ranks by themselves: shares, words, logs and parts, without any other process."""

from __future__ import annotations

from pathlib import Path

import pytest

from defender_client.config import load_preset
from defender_client.errors import ConfigError
from defender_client.jobs import check_shareable
from defender_client.query_log import LOG_FILE, QueryLog, log_file
from defender_client.ranks import ALONE, Ranks, together
from defender_client.row_parts import SharedRows, parts_of
from defender_client.sources import LiveOracle, RecordedRun
from defender_client.terminal import speaker


@pytest.mark.parametrize("count", [0, 1, 5, 6, 64])
def test_shares_follow_each_other_and_are_even(count: int) -> None:
    shares = [Ranks(rank, 3).share(count) for rank in range(3)]
    assert [i for start, stop in shares for i in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_is_alone_and_an_environment_that_is_not_torchruns_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for size in (None, "1"):
        monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE", raising=False)
        with together() as ranks:
            assert ranks is ALONE
    assert speaker({"WORLD_SIZE": "2", "RANK": "1"}) == "rank 1: "
    assert speaker({}) == ""
    monkeypatch.delenv("RANK", raising=False)
    for size, why in (("2", "RANK"), ("two", "WORLD_SIZE"), ("0", "WORLD_SIZE")):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(ConfigError, match=why), together():
            pass


@pytest.mark.parametrize(
    ("preset", "settings", "why"),
    [
        ("fo-ae-ds", (), "no gradient of queries"),
        ("standard", (), "no gradient of queries"),
        ("zo-ae-ds-cge", ("train.inner_steps=2",), "inner_steps"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(preset: str, settings: tuple[str, ...], why: str) -> None:
    config = load_preset(preset, settings)
    check_shareable(config, ALONE)
    with pytest.raises(ConfigError, match=why):
        check_shareable(config, Ranks(0, 2))


def test_recordings_are_for_one_process(tmp_path: Path) -> None:
    two = Ranks(0, 2)
    with (
        pytest.raises(ConfigError, match="--record"),
        LiveOracle("http://127.0.0.1:1", None, record=True).open(tmp_path, "id", two),
    ):
        pass
    with pytest.raises(ConfigError, match="--replay"), RecordedRun(tmp_path).open(tmp_path, "id", two):
        pass


def paid(log: QueryLog, key: str, rows: int, charged: int) -> None:
    log.sending(key, "train", rows)
    log.answered(key, charged, receipt="r", bytes_up=1, bytes_down=1)


def test_what_several_ranks_asked_is_counted_once(tmp_path: Path) -> None:
    """Rank 1 bought b and c, and is no more: the run goes on with rank 0 alone, which asks for c again."""
    first, second = QueryLog(tmp_path / LOG_FILE), QueryLog(tmp_path / log_file(1))
    paid(first, "run/a/1", 10, 10)
    paid(second, "run/b/1", 20, 20)
    paid(second, "run/c/1", 30, 30)
    second.sending("run/d/1", "train", 40)  # its answer was lost
    for log in (first, second):
        log.close()
    gone = [tmp_path / log_file(1)]
    alone = QueryLog(tmp_path / LOG_FILE, gone, gone)
    assert alone.total == 60
    paid(alone, "run/c/1", 30, 0)  # the server answers again, and charges nothing
    paid(alone, "run/d/1", 40, 0)  # what it had charged to rank 1
    assert alone.total == 100
    alone.close()
    whole = QueryLog.of_run(tmp_path)
    assert whole.total == 100
    assert {key: request.charged for key, request in whole.requests.items()} == {
        "run/a/1": 10,
        "run/b/1": 20,
        "run/c/1": 30,
        "run/d/1": 40,
    }
    assert whole.unanswered == []
    with pytest.raises(FileNotFoundError):
        QueryLog.of_run(tmp_path / "none")


def test_rows_of_parts_are_set_in_where_they_belong(tmp_path: Path) -> None:
    path, header = tmp_path / "rows.tsv", "idx\tvalue"
    path.write_text(f"{header}\n0\ta\n")
    (tmp_path / "rows-rank0.tsv").write_text(f"{header}\n4\te\n0\tagain\n")
    (tmp_path / "rows-rank3.tsv").write_text(f"{header}\n2\tc\n3\td")  # the last is torn
    shared = SharedRows(path, header, range(6), [0], ALONE)
    assert shared.todo == [1, 3, 5]
    with shared.opened() as rows:
        rows.write("1\tb")
        assert path.read_text() == f"{header}\n0\ta\n1\tb\n2\tc\n"
        rows.write("3\td")
        rows.write("5\tf")
    assert path.read_text() == f"{header}\n0\ta\n1\tb\n2\tc\n3\td\n4\te\n5\tf\n"
    assert parts_of(path) == []
