"""A run had again from its recording: the same bits, zero queries, and no network to ask over."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np
import pytest
from defender_support import Interfering, Killed, at, certify_here, opened, same_tensors, spent, tiny, train_here
from oracle_support import Caller, Running, digits

from defender_client import request_key
from defender_client.audit import audit
from defender_client.certify import CERTIFIED_FILE
from defender_client.checkpoints import CHECKPOINT_FILE
from defender_client.config import RunConfig, load_preset
from defender_client.jobs import certify_job, train_job
from defender_client.labels import LABELS_FILE
from defender_client.oracle import OracleInfo
from defender_client.oracle_client import RemoteOracle
from defender_client.plan import Plan
from defender_client.pretrain import PRETRAINED_FILE
from defender_client.query_log import LOG_FILE, QueryLog, ReplayedAnswer
from defender_client.questions import Images
from defender_client.recording import (
    ANSWERS_FILE,
    NotRecorded,
    Recorder,
    Recording,
    RecordingDamaged,
    RecordingMissing,
)
from defender_client.replay import Replay
from defender_client.report import read_run, report
from defender_client.sources import RecordedRun
from defender_client.train import CURVE_FILE, STACK_FILE

SETTINGS = ("train.query_rows=512", "estimator.name=rge")
WEIGHTS = (STACK_FILE, CHECKPOINT_FILE, LABELS_FILE, PRETRAINED_FILE)


@pytest.fixture(scope="module")
def recorded(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quiet run, trained and certified, with its recording: to be looked at, not touched."""
    folder = tmp_path_factory.mktemp("recorded")
    config, run, key = tiny(folder, *SETTINGS), folder / "run", server.caller(10**6).key
    train_here(config, run, server.url, key, record=True)
    certify_here(config, run, server.url, key, record=True)
    return run


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection can be made, and no client for one."""

    def refuse(*arguments: object, **options: object) -> NoReturn:
        pytest.fail("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(httpx, "Client", refuse)


def ignore(planned: Plan) -> None:
    pass


def replay(config: RunConfig, run: Path, source: Path) -> None:
    train_job(config, run, None, RecordedRun(source), ignore)
    certify_job(run, None, RecordedRun(source), {}, ignore)


def without_time(run: Path) -> list[str]:
    return [line.rpartition("\t")[0] for line in (run / CERTIFIED_FILE).read_text().splitlines()]


def check_same(one: Path, other: Path) -> None:
    for name in WEIGHTS:
        assert same_tensors(one / name, other / name), name
    assert (one / CURVE_FILE).read_bytes() == (other / CURVE_FILE).read_bytes()
    assert without_time(one) == without_time(other)


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_training_and_certification_are_the_same_bit_for_bit(recorded: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    replay(tiny(tmp_path, *SETTINGS), run, recorded)
    check_same(run, recorded)
    log = QueryLog.read(run / LOG_FILE)
    assert (log.total, log.requests) == (0, {})
    assert log.replayed_rows == QueryLog.read(recorded / LOG_FILE).total > 0
    assert (run / "run-id").read_text() != (recorded / "run-id").read_text()
    assert not (run / ANSWERS_FILE).exists()


@pytest.mark.usefixtures("offline")
def test_a_replay_that_was_killed_goes_on(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = tmp_path / "again", tiny(tmp_path, *SETTINGS)
    ask = Replay.ask
    kills = 0
    for number in itertools.count(2):
        left = number

        def dying(self: Replay, *arguments: Any, **options: Any) -> np.ndarray:
            nonlocal left
            left -= 1
            if not left:
                raise Killed
            return ask(self, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Replay, "ask", dying)
            try:
                replay(config, run, recorded)
                break
            except Killed:
                kills += 1
    assert kills > 3
    check_same(run, recorded)
    assert QueryLog.read(run / LOG_FILE).total == 0


def test_a_run_recorded_over_many_kills_replays(
    server: Running, caller: Caller, recorded: Path, tmp_path: Path
) -> None:
    """Killed at every request in turn, by turns before it was sent and after it was answered."""
    config, run = tiny(tmp_path, *SETTINGS), tmp_path / "run"
    kills = 0
    for job in (train_here, certify_here):
        for number in itertools.count():
            die = at(1 + number % 3, Killed())
            transport = Interfering(after=die) if number % 2 else Interfering(before=die)
            try:
                job(config, run, server.url, caller.key, transport, record=True)
                break
            except Killed:
                kills += 1
    assert kills > 8
    check_same(run, recorded)
    assert spent(server, caller) == QueryLog.read(recorded / LOG_FILE).total
    replay(config, tmp_path / "again", run)
    check_same(tmp_path / "again", recorded)


def test_what_the_log_calls_answered_is_on_record(
    server: Running, caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, the answer is recorded and not logged; never the other way round."""

    def die(*arguments: object, **options: object) -> NoReturn:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patched, opened(run, server.url, caller.key, record=True) as oracle:
        patched.setattr(QueryLog, "answered", die)
        with pytest.raises(Killed):
            oracle.query(digits(3), purpose="test", label="a")
    assert len(QueryLog.read(run / LOG_FILE).unanswered) == 1
    with Recording(run) as recording:
        (answer,) = recording.answers("a/0")
        assert (answer.rows, answer.cost) == (3, 3)
    # Asked again, it is charged nothing and recorded as costing the same.
    with opened(run, server.url, caller.key, record=True) as oracle:
        oracle.query(digits(3), purpose="test", label="a")
        assert oracle.cost == spent(server, caller) == 3
    with Recording(run) as recording:
        assert [answer.cost for answer in recording.answers("a/0")] == [3]


def test_a_replay_started_again_knows_what_its_answers_had_cost(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    with Recording(recorded) as recording:
        (answer,) = recording.answers("train/1/0/0/0")
        with closing(QueryLog(path)) as log:
            log.replayed(ReplayedAnswer(str(answer.key), "train", answer.rows, answer.cost))
        with closing(QueryLog(path)) as log:
            assert Replay(recording, log).cost == answer.cost > 0
            assert (log.replayed_rows, log.total) == (answer.rows, 0)


def test_an_undefended_run_replays_without_an_answer(server: Running, caller: Caller, tmp_path: Path) -> None:
    config = load_preset("standard")
    train_here(config, tmp_path / "run", server.url, caller.key, record=True)
    train_job(config, tmp_path / "again", None, RecordedRun(tmp_path / "run"), ignore)
    assert same_tensors(tmp_path / "again" / STACK_FILE, tmp_path / "run" / STACK_FILE)


@pytest.mark.parametrize("autoencoder", ["pyramid", "pca"])
def test_a_guided_run_replays_bit_for_bit(server: Running, caller: Caller, tmp_path: Path, autoencoder: str) -> None:
    """Its surrogate, and the number of probes of each sample, follow from the answers."""
    guided = ("estimator.name=prior", "estimator.q=2", "estimator.active=true", "surrogate.width=16")
    config = tiny(tmp_path, *guided, f"autoencoder.architecture={autoencoder}", "train.mse=1", "train.steps=2")
    train_here(config, tmp_path / "run", server.url, caller.key, record=True)
    train_job(config, tmp_path / "again", None, RecordedRun(tmp_path / "run"), ignore)
    for name in WEIGHTS:
        assert same_tensors(tmp_path / "again" / name, tmp_path / "run" / name), name


def test_a_run_goes_on_from_its_own_recording(recorded: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    (run / CERTIFIED_FILE).unlink()
    certify_job(run, None, RecordedRun(run), {}, ignore)
    assert without_time(run) == without_time(recorded)
    assert QueryLog.read(run / LOG_FILE).total == QueryLog.read(recorded / LOG_FILE).total


# --- split batches, other scores --------------------------------------------------------------------------------------


def remote(server: Running, caller: Caller, run: Path, transport: httpx.BaseTransport) -> RemoteOracle:
    log, recorder = QueryLog(run / LOG_FILE), Recorder(run / ANSWERS_FILE)
    return RemoteOracle(server.url, caller.key, log=log, recorder=recorder, run_id="run", transport=transport)


def from_recording(run: Path, work: Callable[[Replay], np.ndarray]) -> np.ndarray:
    with Recording(run) as recording, closing(QueryLog(None)) as log:
        return work(Replay(recording, log))


def test_batches_are_split_as_they_were(server: Running, caller: Caller, tmp_path: Path) -> None:
    """One batch whole, the next in parts of a cap learnt meanwhile, a third over the limit that was always told."""
    refuse = Interfering(before=lambda number: httpx.Response(413, json={"max_rows": 16}) if number == 2 else None)
    with remote(server, caller, tmp_path, refuse) as oracle:
        bought = {"a": oracle.query(digits(40), purpose="test", label="a")}
        for label, rows in (("b", 40), ("c", 300)):
            bought[label] = oracle.query(digits(rows), purpose="test", label=label)
    for label, answer in bought.items():
        rows = len(answer)
        found = from_recording(tmp_path, lambda o, n=rows, at=label: o.query(digits(n), purpose="x", label=at))  # type: ignore[misc]
        np.testing.assert_array_equal(found, answer)
    with Recording(tmp_path) as recording:
        assert [answer.rows for answer in recording.answers("a/0") + recording.answers("b/0")] == [40, 16]
        assert [answer.rows for answer in recording.answers("b/32")] == [8]


def test_probabilities_are_recorded_as_they_came_and_read_as_logits(tmp_path: Path) -> None:
    scores = np.array([[0.9, 0.1], [0.0, 1.0]], np.float32)
    with closing(Recorder(tmp_path / ANSWERS_FILE)) as recorder:
        recorder.describe(OracleInfo(image_shape=(1, 8, 8), classes=2, max_rows=9, scores="probabilities"))
        recorder.keep(f"r/a/0/{digest_of(digits(2))}", scores, 2)
        recorder.describe(OracleInfo(image_shape=(1, 8, 8), classes=2, max_rows=9))  # its policy changed since
        recorder.keep(f"r/b/0/{digest_of(digits(2))}", scores, 4)
    with Recording(tmp_path) as recording:
        np.testing.assert_array_equal(recording.read(recording.answers("a/0")[0]), scores)
    found = from_recording(tmp_path, lambda oracle: oracle.query(digits(2), purpose="x", label="a"))
    np.testing.assert_allclose(found[0], np.log(scores[0]))
    assert np.isfinite(found).all()
    later = from_recording(tmp_path, lambda oracle: oracle.query(digits(2), purpose="x", label="b"))
    np.testing.assert_array_equal(later, scores)


def test_what_a_purpose_had_cost_does_not_depend_on_the_order_of_its_answers(tmp_path: Path) -> None:
    """Two answers of one step came in the other order than they were asked."""
    scores = np.zeros((2, 2), np.float32)
    with closing(Recorder(tmp_path / ANSWERS_FILE)) as recorder:
        recorder.describe(OracleInfo(image_shape=(1, 8, 8), classes=2, max_rows=9))
        for label, cost in (("b", 2), ("a", 4), ("c", 6)):
            recorder.keep(f"r/{label}/0/{digest_of(digits(2))}", scores, cost)
    costs = []
    with Recording(tmp_path) as recording, closing(QueryLog(None)) as log:
        oracle = Replay(recording, log)
        for label, purpose in (("a", "train"), ("b", "train"), ("c", "validation")):
            oracle.query(digits(2), purpose=purpose, label=label)
            costs.append(oracle.cost)
    assert costs == [4, 4, 6]


def digest_of(images: np.ndarray) -> str:
    return request_key.digest(Images(images).encode())


# --- what a recording does not have -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["seed=1", "train.epochs=3", "estimator.mu=0.01", "data.train_images=90"])
def test_another_run_is_not_in_the_recording(recorded: Path, tmp_path: Path, setting: str) -> None:
    config = tiny(tmp_path, *SETTINGS, setting)
    with pytest.raises(NotRecorded, match=r"differs from the recorded one.*preset.*seed, data or version") as told:
        replay(config, tmp_path / "again", recorded)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "again" / CERTIFIED_FILE).exists()


def test_other_images_under_the_same_label_are_told_apart_from_none(recorded: Path) -> None:
    with pytest.raises(NotRecorded, match="'labels/train/0/0' for other images only"):
        from_recording(recorded, lambda oracle: oracle.query(digits(96), purpose="labels", label="labels/train/0"))
    with pytest.raises(NotRecorded, match="no answer to 'elsewhere/0'"):
        from_recording(recorded, lambda oracle: oracle.query(digits(96), purpose="labels", label="elsewhere"))


def test_a_run_that_was_recorded_in_part_says_so(server: Running, caller: Caller, tmp_path: Path) -> None:
    config, run = tiny(tmp_path, *SETTINGS), tmp_path / "run"
    with pytest.raises(Killed):
        train_here(config, run, server.url, caller.key, Interfering(after=at(10, Killed())))
    train_here(config, run, server.url, caller.key, record=True)
    missing = RecordedRun(run).unrecorded()
    assert missing["labels"] > 0
    with pytest.raises(NotRecorded, match=r"recording is partial: .*of labels.*--record was not given"):
        replay(config, tmp_path / "again", run)
    # What is on record can be had.
    certify_here(config, run, server.url, caller.key, record=True)
    before = without_time(run)
    (run / CERTIFIED_FILE).unlink()
    certify_job(run, None, RecordedRun(run), {}, ignore)
    assert without_time(run) == before


def test_a_run_that_was_not_recorded_at_all(tmp_path: Path) -> None:
    with pytest.raises(RecordingMissing, match=r"has no answers.bin"):
        train_job(tiny(tmp_path), tmp_path / "again", None, RecordedRun(tmp_path), ignore)


def test_a_damaged_answer_ends_the_replay(recorded: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    with Recording(run) as recording:
        (answer,) = recording.answers("train/1/0/0/0")
    content = bytearray((run / ANSWERS_FILE).read_bytes())
    content[answer.offset] ^= 1
    (run / ANSWERS_FILE).write_bytes(content)
    with pytest.raises(RecordingDamaged, match="train/1/0/0/0"):
        replay(tiny(tmp_path, *SETTINGS), tmp_path / "again", run)


def test_a_recording_has_no_account(recorded: Path) -> None:
    with Recording(recorded) as recording, closing(QueryLog(None)) as log:
        oracle = Replay(recording, log)
        assert (oracle.budget(), oracle.remaining, oracle.cost) == (None, None, 0)  # type: ignore[func-returns-value]


# --- what is said of a replay -----------------------------------------------------------------------------------------


def test_report_and_audit_say_that_it_spent_nothing(
    server: Running, caller: Caller, recorded: Path, tmp_path: Path
) -> None:
    run = tmp_path / "again"
    replay(tiny(tmp_path, *SETTINGS), run, recorded)
    result = read_run(run)
    assert result.queries == {}
    assert (result.table_row["training_queries"], result.table_row["certification_queries"]) == (0, 0)
    rows = QueryLog.read(recorded / LOG_FILE).total
    report([recorded, run], tmp_path / "report.html", None)
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert f"again was replayed: {rows:,} answers came from a recording, at zero queries" in page
    assert "run was replayed" not in page.replace("again was replayed", "")
    with RemoteOracle(server.url, caller.key) as oracle:
        audited = audit([run], oracle)
    assert (audited.equal, audited.logged, audited.requests) == (True, 0, 0)


def test_the_curve_counts_what_the_recorded_run_paid(recorded: Path) -> None:
    curve = [json.loads(line) for line in (recorded / CURVE_FILE).read_text().splitlines()]
    charged = QueryLog.read(recorded / LOG_FILE).charged
    assert curve[-1]["queries"] == charged.total() - charged["certify"]
