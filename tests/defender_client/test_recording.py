"""The file of a run's answers: what was written is read back, a kill costs at most the last record, damage is told."""

from __future__ import annotations

import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from defender_client.oracle import OracleInfo
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.recording import (
    ANSWERS_FILE,
    Recorder,
    Recording,
    RecordingDamaged,
    RecordingMissing,
)

INFO = OracleInfo(image_shape=(1, 8, 8), classes=3, max_rows=100)


def scores(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)


def recorded(run: Path, count: int = 3) -> list[int]:
    """A recording of `count` answers; the file's length after the description and after each answer."""
    path, ends = run / ANSWERS_FILE, []
    with closing(Recorder(path)) as recorder:
        recorder.describe(INFO)
        ends.append(path.stat().st_size)
        for number in range(count):
            recorder.keep(f"run/train/{number}/0/d{number}", scores(number + 1, number), 10 * number)
            ends.append(path.stat().st_size)
    return ends


def answered(recording: Recording, label: str) -> list[list[list[float]]]:
    return [recording.read(answer).tolist() for answer in recording.answers(label)]


def read_all(run: Path) -> None:
    with Recording(run) as recording:
        for number in range(3):
            answered(recording, f"train/{number}/0")


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    recorded(tmp_path)
    with Recording(tmp_path) as recording:
        assert recording.info == INFO
        for number in range(3):
            (answer,) = recording.answers(f"train/{number}/0")
            assert (answer.rows, answer.classes, answer.cost) == (number + 1, 3, 10 * number)
            assert str(answer.key) == f"run/train/{number}/0/d{number}"
            np.testing.assert_array_equal(recording.read(answer), scores(number + 1, number))
        assert recording.answers("train/9/0") == []


def test_each_answer_is_in_the_file_before_the_next_thing_happens(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path / ANSWERS_FILE)) as recorder:
        recorder.describe(INFO)
        recorder.keep("run/a/0/d", scores(2), 2)
        with Recording(tmp_path) as recording:
            assert answered(recording, "a/0") == [scores(2).tolist()]


def test_an_answer_recorded_again_counts_as_it_was_last(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path / ANSWERS_FILE)) as recorder:
        recorder.describe(INFO)
        for seed, digest in ((1, "d"), (2, "other"), (3, "d")):
            recorder.keep(f"run/a/0/{digest}", scores(2, seed), seed)
    with Recording(tmp_path) as recording:
        assert [answer.cost for answer in recording.answers("a/0")] == [3, 2]  # the newest first
        assert answered(recording, "a/0") == [scores(2, 3).tolist(), scores(2, 2).tolist()]


def test_what_the_oracle_says_is_kept_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / ANSWERS_FILE
    sizes = []
    for info in (INFO, INFO, INFO.model_copy(update={"max_rows": 7})):
        with closing(Recorder(path)) as recorder:
            recorder.describe(info)
            recorder.describe(info)
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1] < sizes[2]
    with Recording(tmp_path) as recording:
        assert recording.info.max_rows == 7


def test_a_record_cut_at_any_byte_costs_that_record_only(tmp_path: Path) -> None:
    path = tmp_path / ANSWERS_FILE
    ends = recorded(tmp_path)
    whole = path.read_bytes()
    for cut in range(ends[2], ends[3]):
        path.write_bytes(whole[:cut])
        with Recording(tmp_path) as recording:  # which leaves the file as it is
            assert answered(recording, "train/1/0") == [scores(2, 1).tolist()]
            assert recording.answers("train/2/0") == []
        assert path.stat().st_size == cut
        with closing(Recorder(path)) as recorder:
            assert path.stat().st_size == ends[2]
            recorder.keep("run/train/2/0/d2", scores(3, 2), 20)
        assert path.read_bytes() == whole


def test_a_changed_byte_is_never_an_answer(tmp_path: Path) -> None:
    """Every byte of the file in turn: the damage is told when the file is opened or when the answer is read."""
    path = tmp_path / ANSWERS_FILE
    recorded(tmp_path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        with pytest.raises(RecordingDamaged, match="is damaged"):
            read_all(tmp_path)


def test_a_damaged_recording_is_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / ANSWERS_FILE
    ends = recorded(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[ends[1] + 5] ^= 1  # a length: what follows must not be taken for a torn record and cut off
    path.write_bytes(whole)
    with pytest.raises(RecordingDamaged, match=f"at byte {ends[1]}"):
        Recorder(path)
    assert path.read_bytes() == whole


def test_a_run_that_was_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(RecordingMissing, match="--record"):
        Recording(tmp_path)
    Recorder(tmp_path / ANSWERS_FILE).close()
    with pytest.raises(RecordingMissing, match="is empty"):
        Recording(tmp_path)


def test_what_the_log_knows_and_the_recording_does_not(tmp_path: Path) -> None:
    recorded(tmp_path, 1)
    with closing(QueryLog(tmp_path / LOG_FILE)) as log:
        for key, purpose in (("run/train/0/0/d0", "train"), ("run/labels/0/d", "labels"), ("run/lost/0/d", "train")):
            log.sending(key, purpose, 1)
            if "lost" not in key:
                log.answered(key, 1, receipt=None, bytes_up=1, bytes_down=1)
    with Recording(tmp_path) as recording:
        assert recording.unrecorded() == {"labels": 1}


def test_answers_are_not_held_in_memory(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path / ANSWERS_FILE)) as recorder:
        recorder.describe(INFO)
        for number in range(20):
            recorder.keep(f"run/{number}/0/d", np.zeros((20_000, 3), np.float32), 1)  # 240 kB each
    assert (tmp_path / ANSWERS_FILE).stat().st_size > 4_800_000
    tracemalloc.start()
    with Recording(tmp_path) as recording:
        assert recording.read(recording.answers("19/0")[0]).shape == (20_000, 3)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000
