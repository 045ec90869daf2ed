"""Several requests at a time: that there are so many and no more, and that nothing but the time depends on it."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from defender_support import (
    DNCNN,
    RGE,
    Interfering,
    Killed,
    Trained,
    at,
    certify_here,
    same_tensors,
    spent,
    tiny,
    train_here,
    wait_until,
)
from oracle_support import Caller, Running, digits, running
from test_train import finished, last_checkpoint
from torch import nn

from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.black_box import BlackBox
from defender_client.certify import CERTIFIED_FILE, read
from defender_client.checkpoints import CHECKPOINT_FILE
from defender_client.config import ConfigError, RunConfig, TrainConfig
from defender_client.estimation import Batch, Estimation
from defender_client.in_flight import Crew
from defender_client.jobs import train_job
from defender_client.labels import LABELS_FILE
from defender_client.objective import STABILITY
from defender_client.oracle import WaitGivenUp
from defender_client.oracle_client import RemoteOracle
from defender_client.oracle_client.retrying import Retrier
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.recording import ANSWERS_FILE, Recorder, Recording
from defender_client.request_key import RequestKey
from defender_client.sources import RecordedRun
from defender_client.train import CURVE_FILE, STACK_FILE
from defender_client.zo import RGE as RandomDirections
from oracle_server.oracle import Oracle
from oracle_server.settings import Settings
from shared.wire import codec, protocol

FOUR = ("train.in_flight=4", "certify.in_flight=4")
WEIGHTS = (STACK_FILE, CHECKPOINT_FILE, LABELS_FILE)


def late(number: int) -> None:
    """Answers come in another order than they were asked for."""
    time.sleep(0.004 * (number * 7 % 4))


def charges(server: Running, caller: Caller) -> set[tuple[str, int]]:
    """What the ledger charged: label and digest, and rows. Every charge has a key of its own."""
    entries = server.ledger.entries(caller.client.id, kinds=("charge",))
    keys = [RequestKey.parse(entry.idempotency_key or "") for entry in entries]
    found = {(f"{key.label}/{key.digest}", entry.rows) for key, entry in zip(keys, entries, strict=True)}
    assert len(found) == len(entries)
    return found


# --- a crew -----------------------------------------------------------------------------------------------------------


class Counted:
    """Tasks that say how many are made, taken and worked on at a time."""

    def __init__(self, count: int) -> None:
        self._count, self._lock = count, threading.Lock()
        self.made = self.running = self.most_running = 0
        self.makers: set[int] = set()

    def __iter__(self) -> Iterator[Callable[[], int]]:
        for number in range(self._count):
            self.made += 1
            self.makers.add(threading.get_ident())
            yield lambda number=number: self.work(number)  # type: ignore[misc]

    def work(self, number: int) -> int:
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(random.Random(number).random() / 200)
        with self._lock:
            self.running -= 1
        return number


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_results_are_in_order_however_many_are_under_way(in_flight: int) -> None:
    tasks, taken = Counted(60), 0
    with Crew(in_flight) as crew:
        for result in crew.in_order(tasks):
            assert result == taken
            taken += 1
            assert tasks.made - taken <= 2 * in_flight
        assert taken == 60
        assert list(crew.in_order(Counted(3))) == [0, 1, 2]
    assert tasks.most_running == in_flight
    assert tasks.makers == {threading.get_ident()}


@pytest.mark.parametrize("in_flight", [1, 4])
def test_the_first_failure_is_raised_in_its_place_and_no_more_is_made(in_flight: int) -> None:
    def tasks() -> Iterator[Callable[[], int]]:
        for number in range(100):
            made.append(number)
            yield lambda number=number: 1 // (3 - number)  # type: ignore[misc]

    made: list[int] = []
    results: list[int] = []
    with Crew(in_flight) as crew, pytest.raises(ZeroDivisionError):
        results.extend(crew.in_order(tasks()))
    assert results == [1 // 3, 1 // 2, 1]
    assert len(made) <= 4 + 2 * in_flight


def test_who_leaves_a_crew_leaves_what_was_not_begun() -> None:
    begun: list[int] = []
    held = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number:
            held.wait(10)

    with Crew(2) as crew:
        assert next(crew.in_order(lambda number=number: work(number) for number in range(9))) is None  # type: ignore[misc]
        wait_until(lambda: len(begun) == 3)
    held.set()
    time.sleep(0.05)
    assert sorted(begun) == [0, 1, 2]


def test_one_at_a_time_is_worked_on_by_whoever_takes_the_results() -> None:
    with Crew(1) as crew:
        found = list(crew.in_order([threading.current_thread, threading.current_thread]))
    assert found == [threading.current_thread()] * 2


def test_at_least_one_is_in_flight(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not 0"):
        Crew(0)
    for wrong in ("train.in_flight=0", "certify.in_flight=65", "train.in_flight=1.5"):
        with pytest.raises(ConfigError, match="in_flight"):
            tiny(tmp_path, wrong)


# --- at the server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 3])
def test_so_many_requests_are_in_flight_and_never_more(tmp_path: Path, classifier: nn.Module, in_flight: int) -> None:
    """Counted at the server, by what it has set aside for requests that it has not answered."""
    held: list[int] = []

    def slow(images: torch.Tensor) -> torch.Tensor:
        if len(held) in awaited:
            wait_until(lambda: rows_held() == 36 * in_flight)
            time.sleep(0.05)  # for one more than there may be
        held.append(rows_held())
        with torch.inference_mode():
            return classifier(images)  # type: ignore[no-any-return]

    def rows_held() -> int:
        return server.ledger.get_client(caller.client.name).held

    config = tiny(
        tmp_path,
        "train.epochs=1",
        "train.batch=96",
        "train.query_rows=36",  # 4 samples of 9 probes: each request is as large as the others
        "data.validation_images=36",
        "data.train_images=72",
        "estimator.noise=off",
        f"train.in_flight={in_flight}",
        "certify.n0=36",
        "certify.n=36",
        f"certify.in_flight={in_flight}",
    )
    settings = Settings(ledger=str(tmp_path / "ledger.db"), engine_block=36)
    with running(settings, Oracle(slow, (1, 8, 8), 10)) as server:
        caller = server.caller(10**6)
        awaited = {10}  # a request of the step, after two for labels
        train_here(config, tmp_path / "run", server.url, caller.key)
        awaited = {len(held) + 2}
        certify_here(config, tmp_path / "run", server.url, caller.key)
    assert max(held) == 36 * in_flight


# --- the same result --------------------------------------------------------------------------------------------------

SETTINGS = {
    "cge": ("train.query_rows=64",),
    # Batch normalization over micro-batches; the last ones smaller, of micro-batches and of questions.
    "rge-dncnn": (*RGE, *DNCNN, "train.micro_batch=12", "train.query_rows=20", "data.train_images=80"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_run_is_the_same_bit_for_bit_whatever_is_in_flight(
    server: Running, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Weights, curve, ledger and certificates; and so is its replay, recorded with many in flight or with one."""
    callers: list[Caller] = []
    for name, more in (("one", ()), ("four", FOUR)):
        config, run = tiny(tmp_path, *settings, *more), tmp_path / name
        callers.append(server.caller(10**6))
        for do in (train_here, certify_here):
            do(config, run, server.url, callers[-1].key, Interfering(after=late), record=True)  # type: ignore[operator]
        replayed = tmp_path / f"{name}-again"
        other = tiny(tmp_path, *settings, *(() if more else FOUR))
        train_job(other, replayed, None, RecordedRun(run), lambda plan: None)
        for again in (run, replayed):
            for weights in WEIGHTS:
                assert same_tensors(again / weights, tmp_path / "one" / weights), (again, weights)
            assert (again / CURVE_FILE).read_bytes() == (tmp_path / "one" / CURVE_FILE).read_bytes()
            assert last_checkpoint(again).progress == last_checkpoint(tmp_path / "one").progress
        assert read(run / CERTIFIED_FILE) == read(tmp_path / "one" / CERTIFIED_FILE)
    assert charges(server, callers[0]) == charges(server, callers[1])
    logs = [QueryLog.read(tmp_path / name / LOG_FILE) for name in ("one", "four")]
    assert logs[0].charged == logs[1].charged
    assert list(logs[0].requests) != [key.replace(*run_ids(tmp_path)) for key in logs[1].requests]  # they did overlap


def run_ids(folder: Path) -> tuple[str, str]:
    four, one = ((folder / name / "run-id").read_text().strip() for name in ("four", "one"))
    return four, one


def test_the_micro_batches_of_a_step_are_one_batch_where_nothing_is_taken_over_it(
    server: Running, caller: Caller, tmp_path: Path
) -> None:
    """Without batch normalization the gradient is that of the whole batch, to rounding."""
    config = tiny(tmp_path, *RGE)
    with RemoteOracle(server.url, caller.key) as oracle, Crew(3) as crew:
        gradients = []
        for micro_batch in (0, 7, 1):
            torch.manual_seed(0)
            stack = stacks.Stack(stacks.specify(config, (1, 8, 8), 10)).train()
            estimator = RandomDirections(3, 0.1, generator=torch.Generator().manual_seed(1))
            black_box = BlackBox(stack, oracle, 28)
            settings = TrainConfig(query_rows=4, micro_batch=micro_batch)
            estimation = Estimation(stack, black_box, estimator, STABILITY, crew, settings, config.estimator)
            images, labels = torch.from_numpy(digits(20)), torch.arange(20) % 10
            result = estimation.backpropagate(Batch.even(images, images, labels), f"train/{micro_batch}")
            gradients.append(torch.cat([p.grad.flatten() for p in stack.trainable() if p.grad is not None]))
            assert 0 < result.loss < 10
    for gradient in gradients[1:]:
        assert float((gradient - gradients[0]).norm() / gradients[0].norm()) < 1e-3


# --- killed and started again -----------------------------------------------------------------------------------------


def test_a_kill_with_several_in_flight_changes_and_costs_nothing(
    server: Running, caller: Caller, tmp_path: Path
) -> None:
    """One run, killed again and again, before a request is sent or after it was answered, with others on their way."""
    settings = (*RGE, "train.query_rows=32", "train.epochs=1", "train.checkpoint_every=2")
    config, run, whole = tiny(tmp_path, *settings, *FOUR), tmp_path / "run", tmp_path / "whole"
    train_here(tiny(tmp_path, *settings), whole, server.url, server.caller(10**6).key)
    kills = 0
    for number in itertools.count():
        die = at(3 * number + 1, Killed())
        transport = Interfering(before=die) if number % 2 else Interfering(before=late, after=die)
        try:
            train_here(config, run, server.url, caller.key, transport)
            break
        except Killed:
            kills += 1
    assert kills > 3
    finished(config, run, server, caller, whole)


def test_a_certification_that_is_killed_with_several_in_flight_goes_on(
    server: Running, caller: Caller, trained: Trained, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", trained.config
    run.mkdir()
    for name in (configs.CONFIG_FILE, STACK_FILE):
        shutil.copy(trained.run / name, run / name)
    config = config.model_copy(update={"certify": config.certify.model_copy(update={"in_flight": 3})})
    # Of 8 requests: with 3 in flight the fourth to arrive is one of the first six, and so leaves two images to do.
    for number in (4, 3, 2, 1):
        with pytest.raises(Killed):
            certify_here(config, run, server.url, caller.key, Interfering(late, at(number, Killed())))
        assert [row.idx for row in read(run / CERTIFIED_FILE)] == list(range(len(read(run / CERTIFIED_FILE))))
    assert certify_here(config, run, server.url, caller.key) == read(trained.run / CERTIFIED_FILE)
    assert spent(server, caller) == QueryLog.read(run / LOG_FILE).total == 440


def test_what_is_in_flight_may_change_when_a_run_is_resumed_and_nothing_else(trained: Trained, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    configs.save(config, tmp_path)
    for key in ("train", "certify"):
        changed = tiny(tmp_path, f"{key}.in_flight=7")
        configs.save(changed, tmp_path)
        assert configs.load(tmp_path) == changed
    with pytest.raises(ConfigError, match=r"train.micro_batch: 0 -> 8"):
        configs.save(tiny(tmp_path, "train.micro_batch=8"), tmp_path)
    configs.save_certify_settings(config.certify, tmp_path)
    assert configs.certify_settings(config, tmp_path, {"in_flight": 9}).in_flight == 9


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), FOUR], ids=["one", "four"])
def test_the_first_interrupt_does_not_wait_for_what_the_server_asks(
    server: Running, caller: Caller, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    config: RunConfig = tiny(tmp_path, *settings, "train.epochs=1", "train.query_rows=32")
    run, whole = tmp_path / "run", tmp_path / "whole"
    train_here(config, whole, server.url, server.caller(10**6).key)

    def busy(number: int) -> httpx.Response | None:
        if number == 24:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        return httpx.Response(429, headers={"Retry-After": "3000"}) if number >= 24 else None

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_here(config, run, server.url, caller.key, Interfering(busy))
    assert time.monotonic() - start < 20
    assert last_checkpoint(run).progress.step < 3
    finished(config, run, server, caller, whole)


@pytest.mark.parametrize("waiting", [1, 3])
def test_waits_are_given_up_by_all_who_wait(waiting: int) -> None:
    begun = threading.Semaphore(0)
    retrier = Retrier(0.1, 9000, on_wait=lambda seconds, why: begun.release())

    def busy(seconds: float) -> httpx.Response:
        return httpx.Response(503, headers={"Retry-After": str(seconds)})

    with ThreadPoolExecutor(waiting) as pool:
        futures = [pool.submit(retrier, lambda: busy(5000)) for _ in range(waiting)]
        for _ in futures:
            assert begun.acquire(timeout=10)
        retrier.stop_waiting()
        for future in futures:
            with pytest.raises(WaitGivenUp):
                future.result(10)
    with pytest.raises(WaitGivenUp):
        retrier(lambda: busy(5000))
    # A short wait is kept, so that a step that is all but done is finished.
    answers = iter([busy(0.05), httpx.Response(200)])
    start = time.monotonic()
    assert retrier(lambda: next(answers)).status_code == 200
    assert time.monotonic() - start >= 0.05


def test_an_answer_from_before_does_not_lift_a_limit() -> None:
    retrier = Retrier(1, 1)
    spent_, left = ({"RateLimit": f'"default";r={r};t=60'} for r in (0, 5))
    sent = retrier.now()
    time.sleep(0.01)
    retrier.heed(httpx.Response(200, headers=spent_), sent)
    retrier.heed(httpx.Response(200, headers=left), sent)
    assert retrier.pause() > 50
    retrier.heed(httpx.Response(200, headers=left), retrier.now())
    assert retrier.pause() == 0


# --- the books --------------------------------------------------------------------------------------------------------


def test_many_threads_keep_one_account(server: Running, caller: Caller, tmp_path: Path) -> None:
    """Some answers lost, all late: log, recording, ledger and what is left agree."""
    log, recorder = QueryLog(tmp_path / LOG_FILE), Recorder(tmp_path / ANSWERS_FILE)
    spoilt = random.Random(0)

    def lose(number: int) -> None:
        late(number)
        if spoilt.random() < 0.2:
            raise httpx.ReadError("lost")

    with RemoteOracle(
        server.url,
        caller.key,
        log=log,
        recorder=recorder,
        run_id="run",
        retry_seconds=20,
        transport=Interfering(after=lose),
    ) as oracle:

        def ask(number: int) -> np.ndarray:
            return oracle.query(digits(300 + number, number), purpose=f"p{number % 3}", label=str(number))

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(24)))
        total = sum(300 + number for number in range(24))
        assert [len(answer) for answer in answers] == [300 + number for number in range(24)]
        assert spent(server, caller) == oracle.cost == total
        assert oracle.remaining == caller.budget()["remaining"] == 10**6 - total
        np.testing.assert_array_equal(ask(5), answers[5])
    again = QueryLog.read(tmp_path / LOG_FILE)
    assert (again.requests, again.charged, again.unanswered) == (log.requests, log.charged, [])
    with Recording(tmp_path) as recording, ThreadPoolExecutor(8) as pool:
        labels = [f"{number}/{start}" for number in range(24) for start in (0, 256)]
        found = list(pool.map(lambda label: recording.read(recording.answers(label)[0]), labels))
        np.testing.assert_array_equal(np.concatenate(found), np.concatenate(answers))
        costs = [recording.answers(label)[0].cost for label in labels]
    assert max(costs) == total
    assert len(set(costs)) >= len(costs) - 2  # what was had again cost nothing more, in two requests


@pytest.mark.parametrize("most", [5, 20])
def test_what_a_refusal_teaches_does_not_depend_on_who_was_first(most: int) -> None:
    def run(in_flight: int) -> tuple[set[tuple[str, int]], int | None]:
        asked: list[tuple[str, int]] = []

        def handle(request: httpx.Request) -> httpx.Response:
            if request.url.path == protocol.METADATA_ROUTE:
                tensors = {"inputs": ("images", [-1, 1, 8, 8]), "outputs": ("logits", [-1, 10])}
                described = {k: [{"name": n, "datatype": "FP32", "shape": s}] for k, (n, s) in tensors.items()}
                return httpx.Response(200, json={"name": "classifier", **described})
            body = codec.decode_request(request.read(), int(request.headers[protocol.JSON_LENGTH_HEADER]))
            rows = len(body.inputs["images"])
            time.sleep(random.random() / 200)
            if rows > most:
                return httpx.Response(413)
            asked.append((request.headers[protocol.IDEMPOTENCY_KEY_HEADER], rows))
            encoded = codec.encode_response({"logits": np.ones((rows, 10), np.float32)}, binary={"logits": True})
            headers = {protocol.JSON_LENGTH_HEADER: str(encoded.json_length)}
            return httpx.Response(200, content=encoded.body(), headers=headers)

        transport = httpx.MockTransport(handle)
        with RemoteOracle("http://foreign", run_id="run", transport=transport) as oracle, Crew(in_flight) as crew:
            sizes = [64] * 9 + [50]
            tasks = (
                lambda number=number, rows=rows: oracle.query(digits(rows, number), purpose="p", label=str(number))
                for number, rows in enumerate(sizes)
            )
            assert [len(answer) for answer in crew.in_order(tasks)] == sizes
            assert oracle.log.total == sum(sizes)
            return set(asked), oracle.log.max_rows

    alone = run(1)
    assert run(4) == run(4) == alone


def test_closing_lets_the_requests_under_way_be_answered(server: Running, caller: Caller, tmp_path: Path) -> None:
    sent, go = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        sent.set()
        assert go.wait(10)

    log = QueryLog(tmp_path / LOG_FILE)
    oracle = RemoteOracle(server.url, caller.key, log=log, transport=Interfering(after=hold))
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(oracle.query, digits(3), purpose="p", label="b")
        assert sent.wait(10)
        closing = pool.submit(oracle.close)
        time.sleep(0.05)
        assert not closing.done()
        go.set()
        closing.result(10)
        assert len(answer.result(10)) == 3
    assert QueryLog.read(tmp_path / LOG_FILE).total == 3
    with pytest.raises(RuntimeError, match="closed"):
        oracle.query(digits(3), purpose="p", label="c")
