"""Two servers over one ledger, one budget, racing clients: over SQLite and over PostgreSQL."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from oracle_support import Caller, Held, Running, digits, process, refused, running

from oracle_server.ledger import Ledger
from oracle_server.oracle import Oracle
from oracle_server.settings import Settings

CLIENTS = 16


class Flaky:
    """An engine that fails for the images which say so: those whose first pixel is above one half."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)  # so that requests are in flight together
        if float(images[:, 0, 0, 0].max()) > 0.5:  # a block may be of several requests
            raise RuntimeError("for a test")
        return torch.zeros(len(images), 3)


@dataclass(frozen=True)
class Pair:
    """Two live servers, and a client that both know."""

    one: Running
    two: Running

    def callers(self, budget: int) -> tuple[Caller, Caller]:
        """The same client, at each of the servers."""
        caller = self.one.caller(budget)
        return caller, Caller(caller.client, caller.key, self.two.http)


@contextlib.contextmanager
def two(url: str, folder: Path, engine: Callable[[], Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[Pair]:
    settings = Settings(ledger=url, signing_key=folder / "signing.key")
    with contextlib.ExitStack() as stack:
        oracles = [Oracle(engine(), (1, 8, 8), 3) for _ in range(2)]
        yield Pair(*(stack.enter_context(running(settings, oracle)) for oracle in oracles))


def images(rows: int, fails: bool = False) -> object:
    made = digits(rows)
    made[:, 0, 0, 0] = float(fails)
    return made


def test_the_last_queries_are_admitted_exactly(url: str, tmp_path: Path) -> None:
    """16 clients ask 3 times each for one of 20 queries; every third request fails and is released."""
    with two(url, tmp_path, Flaky) as pair:
        callers = pair.callers(20)
        barrier = threading.Barrier(CLIENTS)

        def ask(number: int) -> list[tuple[bool, httpx.Response]]:
            barrier.wait()
            answers = []
            for turn in range(3):
                fails = (number + turn) % 3 == 0
                key = {"Idempotency_Key": f"{number}/{turn}"}
                answers.append((fails, callers[(number + turn) % 2].infer(images(1, fails), **key)))
            return answers

        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = [each for told in pool.map(ask, range(CLIENTS)) for each in told]
        statuses = Counter((fails, response.status_code) for fails, response in answers)
        # 32 requests that would succeed, 20 that can be paid: every refusal is final, none is of what could be paid.
        assert (statuses[False, 200], statuses[False, 403]) == (20, 12)
        assert statuses[True, 500] + statuses[True, 403] == 16
        assert len(answers) == 48
        ledger = pair.one.ledger
        account = ledger.account(callers[0].client.id)
        assert (account.spent, account.held, account.remaining) == (20, 0, 0)
        assert len(ledger.entries(callers[0].client.id, kinds=("release",))) == statuses[True, 500]
        assert ledger.verify().intact


def test_a_batch_that_others_hold_back_is_admitted_when_they_fail(url: str, tmp_path: Path) -> None:
    """Nothing is left but what a request in flight at the other server holds; it fails, and the batch is answered."""
    held = Held()

    class FailsAfterwards:
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if float(images[0, 0, 0, 0]) > 0.5:
                held(images)
                raise RuntimeError("for a test")
            return torch.zeros(len(images), 3)

    with two(url, tmp_path, FailsAfterwards) as pair, ThreadPoolExecutor(2) as pool:
        one, other = pair.callers(4)
        failing = pool.submit(one.infer, images(3, fails=True))
        assert held.entered.wait(30)
        while one.budget()["held"] < 3:  # it is computed while its reservation is written
            time.sleep(0.01)
        waiting = pool.submit(other.infer, images(4))
        refused(other.infer(images(5)), 403, "budget-exhausted")  # more than there is, whatever becomes of the other
        assert not waiting.done()
        held.go.set()
        assert failing.result().status_code == 500
        assert waiting.result().status_code == 200
        assert (one.budget()["spent"], one.budget()["held"]) == (4, 0)


def test_a_key_sent_to_both_at_once_is_charged_once(url: str, tmp_path: Path) -> None:
    with two(url, tmp_path, Flaky) as pair, ThreadPoolExecutor(CLIENTS) as pool:
        callers = pair.callers(100)
        for key in ("a", "b", "c"):
            barrier = threading.Barrier(CLIENTS)

            def ask(number: int, key: str = key, barrier: threading.Barrier = barrier) -> httpx.Response:
                barrier.wait()
                return callers[number % 2].infer(images(4), Idempotency_Key=key)

            answers = list(pool.map(ask, range(CLIENTS)))
            charged = [answer for answer in answers if answer.headers.get("Query-Charge") == "4"]
            replayed = [answer for answer in answers if answer.headers.get("Query-Charge") == "0"]
            busy = [answer for answer in answers if answer.status_code == 409]
            assert len(charged) == 1
            assert len(replayed) + len(busy) == CLIENTS - 1
            assert {each.headers["Query-Receipt"] for each in (*charged, *replayed)} == {
                charged[0].headers["Query-Receipt"]
            }
            for answer in busy:
                refused(answer, 409, "request-in-flight")
            assert [caller.infer(images(4), Idempotency_Key=key).headers["Query-Charge"] for caller in callers] == [
                "0",
                "0",
            ]
        assert callers[0].budget()["spent"] == 12
        assert pair.two.ledger.verify().intact


def test_a_key_in_flight_at_the_other_server_is_refused_and_then_free(url: str, tmp_path: Path) -> None:
    held = Held()
    with two(url, tmp_path, lambda: held) as pair, ThreadPoolExecutor(1) as pool:
        one, other = pair.callers(10)
        answer = pool.submit(one.infer, images(2), Idempotency_Key="k")
        assert held.entered.wait(30)
        while one.budget()["held"] < 2:  # it is computed while its reservation is written
            time.sleep(0.01)
        refused(other.infer(images(2), Idempotency_Key="k"), 409, "request-in-flight")
        refused(other.infer(images(3), Idempotency_Key="k"), 422, "idempotency-conflict")
        held.go.set()
        assert answer.result().headers["Query-Charge"] == "2"
        assert other.infer(images(2), Idempotency_Key="k").headers["Query-Charge"] == "0"


@pytest.mark.timeout(300)
def test_what_a_killed_server_held_is_released_by_the_other(url: str, tmp_path: Path) -> None:
    """A batch that takes long is killed with its server; the other server's sweep frees its queries and its key."""
    key = tmp_path / "signing.key"
    settings = Settings(ledger=url, signing_key=key)
    with running(settings, Oracle(Flaky(), (1, 8, 8), 3)) as other, contextlib.ExitStack() as stack:
        caller = other.caller(4096)
        killed, address = stack.enter_context(process(url, "--signing-key", str(key), "--engine-block", "1"))
        http = stack.enter_context(httpx.Client(base_url=address, timeout=60))
        asking = Caller(caller.client, caller.key, http)

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                asking.infer(images(4096), Idempotency_Key="k")

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: caller.budget()["held"] == 4096)
        killed.kill()
        thread.join(60)
        assert other.ledger.account(caller.client.id).spent == 0
        until(lambda: caller.budget()["held"] == 0)  # the sweep, every five seconds
        (release,) = other.ledger.entries(caller.client.id, kinds=("release",))
        assert (release.rows, release.idempotency_key) == (4096, "k")
        assert "ended before it answered" in str(release.note)
        assert caller.infer(images(4096), Idempotency_Key="k").headers["Query-Charge"] == "4096"
        assert caller.budget()["remaining"] == 0
        assert other.ledger.verify().intact


def test_two_servers_must_have_the_same_key(url: str, tmp_path: Path) -> None:
    Ledger.open(url, signing_key=tmp_path / "signing.key").close()
    Ledger.open(str(tmp_path / "another.db"), signing_key=tmp_path / "other.key").close()
    with pytest.raises(Exception, match="not this ledger's"):
        Ledger.open(url, signing_key=tmp_path / "other.key")


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
