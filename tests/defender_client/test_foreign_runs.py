"""Runs against endpoints that are not ours: the run that our server would give, and an account that holds."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from defender_support import Trained, command, same_tensors, tiny, write_tiny
from foreign_support import (
    MEAN,
    STD,
    Answer,
    Foreign,
    binary_v2,
    classify,
    json_of_its_own,
    json_v2,
    write_mapping,
)
from oracle_support import Running, digits
from typer.testing import CliRunner

from defender_client import jobs
from defender_client.attack import read as read_attack
from defender_client.certify import CERTIFIED_FILE, read
from defender_client.cli import app
from defender_client.errors import ConfigError
from defender_client.foreign import ForeignOracle
from defender_client.local_audit import audit_local
from defender_client.local_ledger import LEDGER_FILE
from defender_client.oracle_client import OracleUnreachable, RemoteOracle
from defender_client.paying import AnswersLost
from defender_client.plan import PlanUnaffordable
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.report import report
from defender_client.sources import LiveSource, RecordedRun, ServerAt, source_of
from defender_client.train import STACK_FILE
from shared.wire.errors import BudgetExhausted, MalformedRequest, UnexpectedAnswer

CALLABLE = "python:foreign_support:classify"
ENOUGH = 100_000


def ignore(_: object) -> None:
    pass


def train_and_certify(folder: Path, run: Path, source: LiveSource) -> None:
    jobs.train_job(tiny(folder), run, None, source, ignore)
    jobs.certify_job(run, None, source, {}, ignore)


def same_rows(one: Path, other: Path) -> bool:
    rows = [[(r.idx, r.predict, r.radius, r.correct) for r in read(run / CERTIFIED_FILE)] for run in (one, other)]
    return rows[0] == rows[1] and len(rows[0]) == 4


def spent(run: Path) -> int:
    """What the run's ledger says, which the audit has found in order."""
    found = audit_local(run)
    assert found.equal, found.differences
    (client,) = found.clients
    assert client.spent == sum(found.purposes.values()) == QueryLog.read(run / LOG_FILE).total
    assert client.spent + client.held <= client.budget
    return client.spent


def test_a_callable_is_as_our_server(trained: Trained, tmp_path: Path) -> None:
    train_and_certify(tmp_path, tmp_path / "run", source_of(CALLABLE, None, budget=ENOUGH))
    assert same_tensors(trained.run / STACK_FILE, tmp_path / "run" / STACK_FILE)
    assert same_rows(trained.run, tmp_path / "run")
    assert QueryLog.read(trained.run / LOG_FILE).charged == QueryLog.read(tmp_path / "run" / LOG_FILE).charged
    report([tmp_path / "run"], tmp_path / "report.html", None)
    assert (tmp_path / "report.html").stat().st_size > 0
    after = jobs.plan_job(tiny(tmp_path), tmp_path / "run", None, source_of(CALLABLE, None))
    assert (after.total, after.remaining) == (0, ENOUGH - spent(tmp_path / "run"))


def test_json_tensors_are_exact(trained: Trained, tmp_path: Path) -> None:
    with json_v2() as foreign:
        train_and_certify(tmp_path, tmp_path / "run", source_of(f"{foreign.url}/v2/models/m", None, budget=ENOUGH))
        assert foreign.rows == spent(tmp_path / "run")
    assert same_tensors(trained.run / STACK_FILE, tmp_path / "run" / STACK_FILE)
    assert same_rows(trained.run, tmp_path / "run")
    assert RecordedRun(tmp_path / "run").unrecorded() == {}


def test_binary_tensors_normalised_in_another_layout_are_exact(trained: Trained, tmp_path: Path) -> None:
    changes = {"input": "image", "output": "scores", "mean": MEAN, "std": STD}
    with binary_v2() as foreign:
        source = source_of(f"{foreign.url}/v2/models/m/versions/3", None, budget=ENOUGH, changes=changes)
        train_and_certify(tmp_path, tmp_path / "run", source)
        assert foreign.rows == spent(tmp_path / "run")
    assert same_tensors(trained.run / STACK_FILE, tmp_path / "run" / STACK_FILE)
    assert same_rows(trained.run, tmp_path / "run")


def test_a_json_endpoint_of_probabilities(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_KEY", "s3cret")
    with json_of_its_own() as foreign:
        source = source_of(str(write_mapping(tmp_path, foreign.url)), None, budget=ENOUGH)
        train_and_certify(tmp_path, tmp_path / "run", source)
        assert foreign.rows == spent(tmp_path / "run")
        changes = {"method": "square", "images": 2, "queries_per_image": 40}
        attacked = jobs.attack_job(tmp_path / "run", None, source, changes, None, ignore)
        assert len(read_attack(attacked.path)) == 2
        assert foreign.rows == spent(tmp_path / "run")
    mine, theirs = (safetensors.torch.load_file(run / STACK_FILE) for run in (trained.run, tmp_path / "run"))
    for name in mine:
        # Logarithms of probabilities are logits to float32's rounding, which a step of Adam may make its own length of.
        np.testing.assert_allclose(mine[name].numpy(), theirs[name].numpy(), atol=5e-3, err_msg=name)
    # The key is nowhere.
    assert all(b"s3cret" not in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


# --- questions one by one ---------------------------------------------------------------------------------------------


@contextmanager
def asking(run: Path, source: LiveSource) -> Iterator[ForeignOracle]:
    run.mkdir(exist_ok=True)
    with source.open(run, "run") as oracle:
        assert isinstance(oracle, ForeignOracle)
        yield oracle


def of(foreign: Foreign, budget: int | None = ENOUGH, **changes: object) -> LiveSource:
    return source_of(f"{foreign.url}/v2/models/m", None, budget=budget, changes=changes)


def answering(*answers: Answer | str | None) -> Callable[[int], Answer | str | None]:
    return lambda number: answers[number - 1] if number <= len(answers) else None


def test_pixels_as_bytes_are_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = digits(5)
    rounded = classify((np.rint(images * 255) / 255).astype(np.float32))
    changes = {"input": "image", "output": "scores"}
    with binary_v2("UINT8") as foreign:
        source = source_of(f"{foreign.url}/v2/models/m/versions/3", None, budget=ENOUGH, changes=changes)
        with asking(tmp_path / "bytes", source) as oracle:
            np.testing.assert_array_equal(oracle.query(images, purpose="train", label="a"), rounded)
            # A step of less than half a grey level is none.
            nudged = (np.rint(images * 255) / 255 + 0.0015).clip(0, 1).astype(np.float32)
            np.testing.assert_array_equal(oracle.query(nudged, purpose="train", label="b"), rounded)
    monkeypatch.setenv("THEIR_KEY", "s3cret")
    with json_of_its_own(png=True) as foreign:
        source = source_of(str(write_mapping(tmp_path, foreign.url, png=True)), None, budget=ENOUGH)
        with asking(tmp_path / "png", source) as oracle:
            found = oracle.query(images, purpose="train", label="a")
    np.testing.assert_allclose(found - found[:, :1], rounded - rounded[:, :1], atol=1e-4)


def test_an_answer_that_was_lost_is_bought_again_and_counted_twice(tmp_path: Path) -> None:
    with json_v2() as foreign:
        foreign.act = answering("hang up", (503, {}, b"{}"))
        with asking(tmp_path / "run", of(foreign)) as oracle:
            found = oracle.query(digits(7), purpose="train", label="a")
            assert oracle.log.total == 21  # the 503 too: nobody says that it was not counted
            oracle.query(digits(7), purpose="train", label="a")  # on record
        assert (foreign.rows, len(foreign.requests)) == (14, 3)
    np.testing.assert_array_equal(found, classify(digits(7)))
    assert spent(tmp_path / "run") == 21
    assert audit_local(tmp_path / "run").receipts == 3
    # The run can be had again, from the recording that every such run has.
    assert RecordedRun(tmp_path / "run").unrecorded() == {}
    with RecordedRun(tmp_path / "run").open(tmp_path, "again") as replay:
        np.testing.assert_array_equal(replay.query(digits(7), purpose="train", label="a"), found)


def test_attempts_without_an_answer_are_limited(tmp_path: Path) -> None:
    with json_v2() as foreign, asking(tmp_path / "run", of(foreign)) as oracle:
        foreign.act = lambda _: "hang up"
        with pytest.raises(AnswersLost, match="21 queries are counted"):
            oracle.query(digits(7), purpose="train", label="a")
        assert foreign.rows == oracle.budget().spent == 21
        foreign.act = lambda _: (500, {}, b"no")
        with pytest.raises(UnexpectedAnswer, match="500"):
            oracle.query(digits(7), purpose="train", label="b")
        assert len(foreign.requests) == 4  # a failure of its own is not tried again


def test_what_is_refused_costs_nothing(tmp_path: Path) -> None:
    with json_v2() as foreign, asking(tmp_path / "run", of(foreign)) as oracle:
        foreign.act = answering((413, {}, b"{}"), (400, {}, b'{"error": "what is this?"}'))
        with pytest.raises(MalformedRequest, match="what is this"):
            oracle.query(digits(7), purpose="train", label="a")
        assert (foreign.rows, oracle.budget().spent) == (0, 0)
        np.testing.assert_array_equal(oracle.query(digits(7), purpose="train", label="a"), classify(digits(7)))
        assert foreign.rows == 7
        assert [len(body) < len(foreign.requests[0][1]) for _, body in foreign.requests] == [
            False,
            True,
            True,
            True,
            True,
        ]
    assert spent(tmp_path / "run") == 7


def test_nothing_is_sent_that_the_budget_does_not_cover(tmp_path: Path) -> None:
    with json_v2() as foreign:
        with asking(tmp_path / "run", of(foreign, 10)) as oracle:
            oracle.query(digits(6), purpose="train", label="a")
            foreign.act = lambda _: "hang up"
            with pytest.raises(BudgetExhausted):
                oracle.query(digits(3), purpose="train", label="b")
            assert foreign.rows == 9  # one attempt, not two
        with asking(tmp_path / "run", of(foreign, 12)) as oracle:
            foreign.act = lambda _: None
            oracle.query(digits(3), purpose="train", label="b")
        assert foreign.rows == spent(tmp_path / "run") == 12


def test_an_answer_that_cannot_be_used_is_paid(tmp_path: Path) -> None:
    with json_v2() as foreign:
        foreign.act = answering(
            (200, {}, b'{"outputs": [{"name": "z", "datatype": "FP32", "shape": [1], "data": [1]}]}')
        )
        with asking(tmp_path / "run", of(foreign)) as oracle:
            with pytest.raises(UnexpectedAnswer, match=r"expected scores \[7, 10\]"):
                oracle.query(digits(7), purpose="train", label="a")
            assert oracle.budget().spent == 7
    assert spent(tmp_path / "run") == 7


def test_several_threads_share_the_budget(tmp_path: Path) -> None:
    with json_v2() as foreign:
        with asking(tmp_path / "run", of(foreign, 50)) as oracle:
            outcomes: list[str] = []

            def ask(name: int) -> None:
                for number in range(5):
                    try:
                        oracle.query(digits(3, name), purpose="train", label=f"{name}/{number}")
                        outcomes.append("answered")
                    except BudgetExhausted:
                        outcomes.append("refused")

            threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert outcomes.count("answered") == 16
        assert foreign.rows == spent(tmp_path / "run") == 48


# --- which oracle it is -----------------------------------------------------------------------------------------------


def test_our_own_server_is_told_from_another(server: Running, tmp_path: Path) -> None:
    key = server.caller(100).key
    source = source_of(server.url, key)
    assert isinstance(source, ServerAt)
    with source.open(tmp_path, "run") as oracle:
        assert isinstance(oracle, RemoteOracle)
    assert not (tmp_path / LEDGER_FILE).exists()
    with pytest.raises(ConfigError, match="keeps a ledger"), source_of(server.url, key, budget=5).open(tmp_path, "run"):
        pass
    with json_v2() as foreign:
        with pytest.raises(ConfigError, match="no model 'classifier'"):
            source_of(foreign.url, None).connect().__enter__().info  # noqa: B018
        with pytest.raises(ConfigError, match="--budget N"), of(foreign, None).open(tmp_path / "new", "run"):
            pass
        # A run that was charged on our ledger does not go on at another's.
        with pytest.raises(ConfigError, match="no local ledger"), of(foreign).open(tmp_path, "run"):
            pass


def test_a_plan_knows_the_budget(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    planned = jobs.plan_job(config, None, None, source_of(CALLABLE, None))
    assert planned.remaining is None
    assert jobs.plan_job(config, None, None, source_of(CALLABLE, None, budget=7)).remaining == 7
    with pytest.raises(PlanUnaffordable, match="--budget"):
        jobs.train_job(config, tmp_path / "run", None, source_of(CALLABLE, None, budget=planned.to_train - 1), ignore)
    assert spent(tmp_path / "run") == 0


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_run_killed_with_a_request_in_flight_goes_on(trained: Trained, tmp_path: Path) -> None:
    """kill -9 between a request and its answer: it is counted, and the run ends as if nothing had been."""
    run, output = tmp_path / "run", tmp_path / "output"
    write_tiny(tmp_path)
    wanted = QueryLog.read(trained.run / LOG_FILE)
    training = wanted.total - wanted.charged["certify"]
    with json_v2() as foreign:
        oracle = ("--oracle", f"{foreign.url}/v2/models/m")
        arguments = ("train", tmp_path / "tiny.toml", "--out", run, *oracle, "--budget", str(training))
        with command("defender_client", *arguments, output=output) as killed:
            foreign.act = lambda number: killed.signal(signal.SIGKILL) if number == 9 else None
            assert killed.wait() == -signal.SIGKILL
        foreign.act = lambda _: None
        assert audit_local(run).equal
        lost = foreign.rows - QueryLog.read(run / LOG_FILE).total
        assert lost > 0
        # What was lost is spent, so the budget no longer covers the run: nothing more is sent.
        before = foreign.rows
        with command("defender_client", *arguments, output=output) as poor:
            assert poor.wait() == 3, poor.said
        assert foreign.rows == before == spent(run)
        more = (*arguments[:-1], str(training + lost))
        with command("defender_client", *more, output=output) as resumed:
            assert resumed.wait() == 0, resumed.said
        assert foreign.rows == spent(run) == training + lost
        assert same_tensors(trained.run / STACK_FILE, run / STACK_FILE)
        with pytest.raises(PlanUnaffordable):
            jobs.certify_job(run, None, source_of(oracle[1], None), {}, ignore)
        assert foreign.rows == training + lost
    assert CliRunner().invoke(app, ["audit", str(run)]).exit_code == 0  # which asks nobody
    lines = (run / LEDGER_FILE).read_text().replace('"rows":', '"rows":1', 1)
    (run / LEDGER_FILE).write_text(lines)
    assert CliRunner().invoke(app, ["audit", str(run), "--json"]).exit_code == 1


def test_a_request_that_never_left_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defender_client.oracle_client.recognising._RETRY_SECONDS", 0.2)
    with json_v2() as foreign, asking(tmp_path / "run", of(foreign, 20)) as oracle:
        assert oracle.info.classes == 10  # asked while it was there
        foreign.stop()
        with pytest.raises(OracleUnreachable):
            oracle.query(digits(2), purpose="train", label="a")
        assert oracle.budget().remaining == 20
    assert spent(tmp_path / "run") == 0
