"""A live server under a policy: what its clients see, and that nothing refused is ever charged."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from oracle_support import Caller, Held, Running, digits, logits_of, refused, running
from scipy import special
from typer.testing import CliRunner

from oracle_server.cli import app
from oracle_server.oracle import Oracle
from oracle_server.policy.policy import Policy
from oracle_server.policy.spec import LatencySpec, LimitSpec, PolicySpec
from oracle_server.settings import Settings
from shared.wire import protocol
from shared.wire.errors import RateLimited


@contextmanager
def under(tmp_path: Path, policy: str | None, oracle: Oracle | None = None, name: str = "a") -> Iterator[Running]:
    """A server of the digits classifier under a policy, or under none, with a ledger of that name."""
    file = None
    if policy is not None:
        file = tmp_path / f"{name}.toml"
        file.write_text(policy)
    with running(Settings(ledger=str(tmp_path / f"{name}.db"), policy=file), oracle) as started:
        yield started


def spent(server: Running, caller: Caller) -> int:
    """What the ledger says, and that it agrees with itself."""
    assert server.ledger.verify().intact
    return server.ledger.account(caller.client.id).spent


def parameters(server: Running) -> dict[str, object]:
    found: dict[str, object] = server.http.get(protocol.METADATA_ROUTE).json()["parameters"]
    return found


# --- no policy -----------------------------------------------------------------------------------------------------


def conversation(server: Running) -> list[tuple[int, list[tuple[str, str]], bytes]]:
    """Answers and refusals of every kind, without what must differ from one server to the next."""
    caller = server.caller(budget=40)
    http, auth = caller.http, caller.headers
    answers = [http.get(path) for path in ("/v2", "/v2/health/ready", protocol.METADATA_ROUTE, "/openapi.json")]
    answers += [
        http.post("/v2/repository/index"),
        caller.infer(digits(16)),
        caller.infer(digits(16), Idempotency_Key="k"),
        caller.infer(digits(16), Idempotency_Key="k"),
        caller.infer(digits(3, seed=1), binary=False),
        caller.infer(digits(3), Idempotency_Key="k"),
        caller.infer(digits(9)),
        caller.infer(np.full((1, 1, 8, 8), 2, np.float32)),
        caller.infer(np.zeros((4097, 1, 8, 8), np.float32)),
        http.post(protocol.INFER_ROUTE, content=b"{", headers=auth),
        http.post(protocol.INFER_ROUTE, content=b"{"),
    ]
    differing = {"date", protocol.QUERY_RECEIPT_HEADER.lower()}
    return [
        (a.status_code, [(k, v) for k, v in a.headers.multi_items() if k not in differing], a.content) for a in answers
    ]


def test_an_empty_policy_is_no_policy_to_the_last_bit(tmp_path: Path) -> None:
    with under(tmp_path, None, name="none") as server:
        plain = conversation(server)
    with under(tmp_path, "seed = 5\n[answers]\n[limits]\n", name="empty") as server:
        assert conversation(server) == plain
    assert [status for status, _, _ in plain] == [200] * 5 + [200] * 4 + [422, 403, 422, 413, 400, 401]
    assert not any(name.startswith("ratelimit") for _, headers, _ in plain for name, _ in headers)


# --- answers -------------------------------------------------------------------------------------------------------


def test_what_is_told_of_the_logits_and_what_the_metadata_says(tmp_path: Path) -> None:
    images = digits(7)
    with under(tmp_path, None, name="none") as server:
        logits = logits_of(server.caller().infer(images)).astype(np.float64)
        assert "scores" not in parameters(server)
    with under(tmp_path, "[answers]\nscores = 'probabilities'\ntop_k = 2\ndecimals = 3", name="top") as server:
        told = logits_of(server.caller().infer(images))
        as_json = logits_of(server.caller().infer(images, binary=False))
        assert parameters(server)["scores"] == "probabilities"
    probabilities = special.softmax(logits, axis=1)
    expected = np.where(probabilities >= np.sort(probabilities, axis=1)[:, [-2]], probabilities, 0)
    np.testing.assert_allclose(told, expected, atol=0.00051)
    np.testing.assert_allclose(told, np.round(told.astype(np.float64), 3), atol=1e-7)
    np.testing.assert_array_equal(told, as_json)
    with under(tmp_path, "[answers]\nscores = 'label'", name="label") as server:
        np.testing.assert_array_equal(logits_of(server.caller().infer(images)), np.eye(10)[logits.argmax(axis=1)])
        assert parameters(server)["scores"] == "label"


NOISY = "seed = 3\n[answers]\nnoise = {{sigma = 1.0, kind = '{}'}}"


def test_fresh_noise_is_paid_for(tmp_path: Path) -> None:
    images = digits(5)
    with under(tmp_path, None, name="none") as server:
        logits = logits_of(server.caller().infer(images))
    with under(tmp_path, NOISY.format("fresh")) as server:
        caller = server.caller()
        first, again = (caller.infer(images, Idempotency_Key="k") for _ in range(2))
        other = caller.infer(images, Idempotency_Key="other")
        assert [a.headers["Query-Charge"] for a in (first, again, other)] == ["5", "0", "5"]
        assert spent(server, caller) == 10
    told = logits_of(first)
    np.testing.assert_array_equal(told, logits_of(again))
    assert (told != logits_of(other)).all()
    assert 0.5 < (told - logits).std() < 1.5
    with under(tmp_path, NOISY.format("fresh")) as server:  # the same seed, ledger and charge: after a restart, too
        restarted = caller_of(caller, server).infer(images, Idempotency_Key="k")
        assert restarted.headers["Query-Charge"] == "0"
        np.testing.assert_array_equal(logits_of(restarted), told)


def caller_of(caller: Caller, server: Running) -> Caller:
    """The same client at another server."""
    return Caller(caller.client, caller.key, server.http)


def test_deterministic_noise_is_not_even_for_sale(tmp_path: Path) -> None:
    images = digits(6)
    with under(tmp_path, None, name="none") as server:
        logits = logits_of(server.caller().infer(images))
    with under(tmp_path, NOISY.format("deterministic")) as server:
        caller = server.caller()
        whole = logits_of(caller.infer(images))
        halves = [logits_of(caller.infer(half)) for half in (images[:1], images[1:])]
    # The classifier's own sums may differ in the last bits from batch to batch; the noise does not.
    np.testing.assert_allclose(np.concatenate(halves), whole, atol=1e-5)
    assert (np.abs(whole - logits) > 1e-4).mean() > 0.9


# --- batches and rates ---------------------------------------------------------------------------------------------


def test_a_batch_beyond_the_cap_is_413_and_costs_nothing(tmp_path: Path) -> None:
    with under(tmp_path, "[limits]\nbatch_rows = 8") as server:
        caller = server.caller()
        assert parameters(server)["max_batch_rows"] == 8
        assert refused(caller.infer(digits(9)), 413, "too-large")["max_rows"] == 8
        assert spent(server, caller) == 0
        logits_of(caller.infer(digits(8)))
        assert spent(server, caller) == 8


@pytest.mark.parametrize("tell", [True, False])
def test_a_cap_may_be_kept_to_oneself(tmp_path: Path, tell: bool) -> None:
    policy = f"[limits]\nbatch_rows = 8\nannounce_batch_rows = false\ntell_limit = {str(tell).lower()}"
    with under(tmp_path, policy) as server:
        assert "max_batch_rows" not in parameters(server)
        for rows in (9, 5000):  # the server's own cap of 4096 is not told either
            answer = server.caller().infer(np.zeros((rows, 1, 8, 8), np.float32))
            problem = refused(answer, 413, "too-large")
            assert problem.get("max_rows") == (8 if tell else None)
            assert tell or not {"8", "4096"} & set(str(problem["detail"]).split())


def test_rates_are_429_with_what_one_needs_to_know_and_cost_nothing(tmp_path: Path) -> None:
    with under(tmp_path, "[limits]\nrequests_per_minute = 60\nrows_per_minute = 1\nrow_burst = 10") as server:
        caller = server.caller()
        assert parameters(server)["max_batch_rows"] == 10
        answered = caller.infer(digits(7))
        logits_of(answered)
        policy = '"requests";q=60;w=60, "rows";q=1;w=60;oracle-burst=10'
        assert answered.headers["RateLimit-Policy"] == policy
        assert answered.headers["RateLimit"] == '"requests";r=59;t=1, "rows";r=3;t=60'
        short = caller.infer(digits(5))
        problem = refused(short, 429, "rate-limited")
        assert problem["violated-policies"] == ["rows"]
        assert 115 <= int(short.headers["Retry-After"]) <= 120
        assert short.headers["RateLimit-Policy"] == policy
        assert '"rows";r=3;t=' in short.headers["RateLimit"]
        # A batch that could never pass is not told to wait.
        never = caller.infer(digits(11))
        assert refused(never, 413, "too-large")["max_rows"] == 10
        assert "Retry-After" not in never.headers
        assert '"rows";r=3;t=' in never.headers["RateLimit"]
        logits_of(caller.infer(digits(3)))
        assert spent(server, caller) == 10
        logits_of(server.caller().infer(digits(10)))  # another client's limits are its own


def left(answer: httpx.Response) -> int:
    """Rows left by an answer's RateLimit field."""
    return int(answer.headers["RateLimit"].split('"rows";r=')[1].split(";")[0])


def test_only_an_answer_takes_of_a_limit(tmp_path: Path) -> None:
    with under(tmp_path, "[limits]\nrows_per_minute = 1\nrow_burst = 100") as server:
        caller = server.caller(budget=10)
        assert left(caller.infer(digits(4), Idempotency_Key="k")) == 96
        conflict = caller.infer(digits(5), Idempotency_Key="k")
        refused(conflict, 422, "idempotency-conflict")
        poor = caller.infer(digits(50))
        refused(poor, 403, "budget-exhausted")
        malformed = caller.http.post(protocol.INFER_ROUTE, content=b"{", headers=caller.headers)
        refused(malformed, 400, "malformed-request")
        assert [left(a) for a in (conflict, poor, malformed)] == [96] * 3
        server.service.gate.close()
        draining = caller.infer(digits(1))
        refused(draining, 503, "unavailable")
        assert left(draining) == 96
        assert spent(server, caller) == 4


def test_a_request_in_flight_has_taken_already(tmp_path: Path) -> None:
    held = Held()
    policy = "[limits]\nrows_per_minute = 1\nrow_burst = 10"
    with under(tmp_path, policy, Oracle(held, (1, 8, 8), 3)) as server, ThreadPoolExecutor(1) as pool:
        caller = server.caller()
        first = pool.submit(caller.infer, digits(8))
        assert held.entered.wait(10)
        refused(caller.infer(digits(3)), 429, "rate-limited")
        held.go.set()
        logits_of(first.result())
        assert spent(server, caller) == 8


def test_a_request_cut_off_while_it_waits_gives_back_what_it_took() -> None:
    entered = asyncio.Event()

    async def forever(_seconds: float) -> None:
        entered.set()
        await asyncio.Event().wait()

    spec = PolicySpec(latency=LatencySpec(milliseconds=5), limits=LimitSpec(rows_per_minute=10))
    policy = Policy(spec, max_batch_rows=100, clock=lambda: 0, sleep=forever)

    async def request() -> None:
        with policy.visit(1) as visit:
            await visit.admit(10)

    async def scenario() -> None:
        task = asyncio.create_task(request())
        await asyncio.wait_for(entered.wait(), 10)
        with pytest.raises(RateLimited) as caught:
            await request()
        assert caught.value.headers["RateLimit"] == '"rows";r=0;t=6'
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with policy.visit(1) as visit:
            assert visit.headers["RateLimit"] == '"rows";r=10'

    asyncio.run(scenario())


# --- time and chance -----------------------------------------------------------------------------------------------


def test_the_latency_is_waited_out_by_those_admitted_only() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    spec = PolicySpec(
        latency=LatencySpec(milliseconds=5, per_row_microseconds=100), limits=LimitSpec(rows_per_minute=15)
    )
    policy = Policy(spec, max_batch_rows=100, clock=lambda: 0, sleep=sleep)

    async def scenario() -> None:
        with policy.visit(1) as visit:
            await visit.admit(10)
        with pytest.raises(RateLimited), policy.visit(1) as visit:
            await visit.admit(10)

    asyncio.run(scenario())
    assert slept == [0.006]


def test_others_are_served_while_one_waits(tmp_path: Path) -> None:
    with under(tmp_path, "[latency]\nper_row_microseconds = 0.5e6") as server, ThreadPoolExecutor(1) as pool:
        caller = server.caller()
        slow, meanwhile = pool.submit(caller.infer, digits(2)), 0
        while not slow.done():
            assert caller.budget()["spent"] in (0, 2)
            meanwhile += not slow.done()
        logits_of(slow.result())
        assert slow.result().elapsed.total_seconds() > 1
        assert meanwhile > 5  # a wait that held the event loop or the ledger's thread would let one or two through


def test_chance_refuses_before_the_charge_and_after_the_answer(tmp_path: Path) -> None:
    with under(tmp_path, "seed = 1\n[failures]\nunavailable = 0.3\ninternal = 0.3") as server:
        caller = server.caller()
        answers = [caller.infer(digits(2), Idempotency_Key=f"k{i // 2}") for i in range(60)]
        statuses = [answer.status_code for answer in answers]
        assert {200, 500, 503} == set(statuses)
        for answer in answers:
            if answer.status_code == 503:
                refused(answer, 503, "unavailable")
                assert answer.headers["Retry-After"] == "1"
            if answer.status_code == 500:
                refused(answer, 500, "internal-error")
        paid = {i // 2 for i in range(60) if statuses[i] == 200}
        assert spent(server, caller) == 2 * len(paid)
        assert sum(int(a.headers["Query-Charge"]) for a in answers if a.status_code == 200) == 2 * len(paid)
    with under(tmp_path, "seed = 1\n[failures]\nunavailable = 0.3\ninternal = 0.3", name="b") as server:
        caller = server.caller()
        again = [caller.infer(digits(2), Idempotency_Key=f"k{i // 2}").status_code for i in range(60)]
        assert again == statuses


def test_a_failed_answer_takes_nothing_of_a_limit(tmp_path: Path) -> None:
    policy = "[failures]\ninternal = 1.0\n[limits]\nrows_per_minute = 1\nrow_burst = 10"
    with under(tmp_path, policy) as server:
        caller = server.caller()
        answers = [caller.infer(digits(8)) for _ in range(3)]
        for answer in answers:
            refused(answer, 500, "internal-error")
            assert left(answer) == 10
        assert spent(server, caller) == 0


def test_a_downtime_is_told_to_its_end_and_readiness_says_so(tmp_path: Path) -> None:
    with under(tmp_path, "[[downtime]]\nafter = 0\nseconds = 1000\n[limits]\nrows_per_minute = 10") as server:
        caller = server.caller()
        for answer in (
            caller.infer(digits(1)),
            server.http.get("/v2/health/ready"),
            server.http.get("/v2/models/classifier/ready"),
        ):
            refused(answer, 503, "unavailable")
            assert 900 < int(answer.headers["Retry-After"]) <= 1000
        assert caller.infer(digits(1)).headers["RateLimit"] == '"rows";r=10'
        assert server.http.post("/v2/repository/index").json()[0]["state"] == "UNAVAILABLE"
        assert server.http.get("/v2/health/live").status_code == 200
        assert caller.budget()["spent"] == spent(server, caller) == 0


def test_a_downtime_begins_and_ends() -> None:
    clock = {"now": 5}
    spec = PolicySpec.model_validate({"downtime": [{"after": 10, "seconds": 2.5}]})
    policy = Policy(spec, max_batch_rows=1, clock=lambda: clock["now"])
    found = []
    for seconds in (0, 9.999, 10, 12, 12.5, 100):
        clock["now"] = 5 + round(seconds * 1e9)
        found.append(policy.down_for)
    assert found[0] == found[1] == found[4] == found[5] == 0
    assert math.isclose(found[2], 2.5)
    assert math.isclose(found[3], 0.5)


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_mistake_in_a_policy_ends_the_start_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.toml").write_text("[answers]\ndecimal = 2")
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--policy", "p.toml"])
    assert result.exit_code == 2, result.output
    assert "the policy p.toml: there is no key answers.decimal: did you mean answers.decimals?" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "oracle-ledger.db").exists()  # it is read before anything is made
    monkeypatch.setenv("ORACLE_POLICY", "none.toml")
    assert Settings().policy == Path("none.toml")
    result = CliRunner().invoke(app, ["serve", "--port", "0"])
    assert result.exit_code == 2
    assert "none.toml cannot be read" in result.stderr


def test_limits_are_documented(server: Running) -> None:
    infer = server.http.get("/openapi.json").json()["paths"]["/v2/models/{model}/infer"]["post"]
    assert "429" in infer["responses"]
    assert {"RateLimit", "RateLimit-Policy"} <= set(infer["responses"]["200"]["headers"])
