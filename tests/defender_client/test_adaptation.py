"""An oracle that takes less than it says, answers in other scores, or hands out receipts of its own making."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from defender_support import Killed, spent
from oracle_support import Caller, Running, digits
from torch import tensor
from torch.nn import functional as F

from defender_client.audit import audit
from defender_client.oracle_client import RemoteOracle
from defender_client.query_log import LOG_FILE, QueryLog
from shared.wire import codec, protocol
from shared.wire.errors import TooLarge, UnexpectedAnswer


class Capped(httpx.BaseTransport):
    """Real HTTP to a server that says it takes many rows, with something between that refuses more than `cap`.

    Args:
        cap: None refuses nothing.
        tells: whether the refusal says what is taken (`max_rows`).
        dies: the request, counted from 1, at which the client is killed; `answered` says whether after its answer.
    """

    def __init__(self, cap: int | None, *, tells: bool = True, dies: int = 0, answered: bool = False) -> None:
        self._real = httpx.HTTPTransport()
        self.cap, self._tells, self._dies, self._answered = cap, tells, dies, answered
        self.asked: list[int] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != protocol.INFER_ROUTE:
            return self._real.handle_request(request)
        body = request.read()
        rows = len(codec.decode_request(body, int(request.headers[protocol.JSON_LENGTH_HEADER])).inputs["images"])
        self.asked.append(rows)
        dies = len(self.asked) == self._dies
        if dies and not self._answered:
            raise Killed
        if self.cap is not None and rows > self.cap:
            told = {"max_rows": self.cap} if self._tells else {}
            response = httpx.Response(413, json={"detail": "too many", **told})
        else:
            response = self._real.handle_request(request)
            response.read()
        if dies:
            raise Killed
        return response

    def close(self) -> None:
        self._real.close()


def remote(server: Running, caller: Caller, transport: Capped, path: Path | None = None) -> RemoteOracle:
    log = None if path is None else QueryLog(path)
    return RemoteOracle(server.url, caller.key, run_id="run", retry_seconds=5, transport=transport, log=log)


def ask(oracle: RemoteOracle, label: str = "b", rows: int = 40) -> np.ndarray:
    return oracle.query(digits(rows), purpose="test", label=label)


def labels(oracle: RemoteOracle) -> list[str]:
    return [request.key.split("/", 1)[1].rsplit("/", 1)[0] for request in oracle.log.requests.values()]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_cap_that_the_refusal_tells(server: Running, caller: Caller) -> None:
    capped = Capped(16)
    with remote(server, caller, Capped(None)) as free, remote(server, caller, capped) as oracle:
        np.testing.assert_allclose(ask(oracle), ask(free, "whole"), atol=1e-5)
        assert capped.asked == [40, 16, 16, 8]
        assert labels(oracle) == ["b/0", "b/0", "b/16", "b/32"]
        ask(oracle, "another", 20)
        assert capped.asked[4:] == [16, 4]
        assert oracle.log.total == 60
    assert spent(server, caller) == 60 + 40


def test_a_cap_that_nobody_tells_is_found_by_halving(server: Running, caller: Caller) -> None:
    capped = Capped(11, tells=False)
    with remote(server, caller, capped) as oracle:
        assert ask(oracle).shape == (40, 10)
        assert capped.asked == [40, 20, 10, 10, 10, 10]
        assert oracle.log.max_rows == 10
    assert spent(server, caller) == 40


@pytest.mark.parametrize("told", [40, 99, 0, -3, "ten", None, True, 2.5])
def test_a_cap_that_makes_no_sense_is_not_believed(server: Running, caller: Caller, told: Any) -> None:
    capped = Capped(30)
    real = capped.handle_request

    def lying(request: httpx.Request) -> httpx.Response:
        response = real(request)
        return httpx.Response(413, json={"detail": "no", "max_rows": told}) if response.status_code == 413 else response

    capped.handle_request = lying  # type: ignore[method-assign]
    with remote(server, caller, capped) as oracle:
        ask(oracle)
    assert capped.asked == [40, 20, 20]


@pytest.mark.parametrize("tells", [True, False])
def test_a_single_image_that_is_too_large_is_an_error(server: Running, caller: Caller, tells: bool) -> None:
    capped = Capped(0, tells=tells)
    with remote(server, caller, capped) as oracle, pytest.raises(TooLarge):
        ask(oracle)
    assert capped.asked == [40, 20, 10, 5, 2, 1]
    assert spent(server, caller) == 0


def test_a_run_started_again_knows_the_cap(server: Running, caller: Caller, tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    with remote(server, caller, Capped(16), path) as oracle:
        ask(oracle)
    again = Capped(16)
    with remote(server, caller, again, path) as oracle:
        ask(oracle)
        ask(oracle, "new")
    assert again.asked == [16, 16, 8] * 2  # not one refusal
    assert spent(server, caller) == QueryLog.read(path).total == 80


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("tells", [True, False], ids=["told", "halved"])
def test_a_kill_at_any_request_pays_nothing_twice(
    server: Running, caller: Caller, tmp_path: Path, tells: bool, answered: bool
) -> None:
    path = tmp_path / LOG_FILE
    with remote(server, caller, Capped(None)) as free:
        expected = [ask(free, "whole"), ask(free, "another", 21)]
    kills = 0
    for number in itertools.count(1):
        transport = Capped(11, tells=tells, dies=number, answered=answered)
        with remote(server, caller, transport, path) as oracle:
            try:
                found = [ask(oracle), ask(oracle, "c", 21)]
                break
            except Killed:
                kills += 1
    assert kills > 4
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert spent(server, caller) - 61 == QueryLog.read(path).total == 61


def test_what_was_paid_whole_is_asked_whole_again(server: Running, caller: Caller, tmp_path: Path) -> None:
    path, transport = tmp_path / LOG_FILE, Capped(None)
    with remote(server, caller, transport, path) as oracle:
        first = ask(oracle, "a")
        transport.cap = 16
        ask(oracle, "b")
        transport.cap = None
        np.testing.assert_array_equal(ask(oracle, "a"), first)
    transport = Capped(None)
    with remote(server, caller, transport, path) as oracle:
        np.testing.assert_array_equal(ask(oracle, "a"), first)
        ask(oracle, "b")
        # Other bytes under the same label are another purchase.
        oracle.query(digits(40, seed=1), purpose="test", label="a")
    assert transport.asked == [40, 16, 16, 8, 16, 16, 8]
    assert spent(server, caller) == QueryLog.read(path).total == 80 + 40


def test_a_lost_answer_that_became_too_large_is_paid_again_and_both_books_know(
    server: Running, caller: Caller, tmp_path: Path
) -> None:
    path = tmp_path / "run" / LOG_FILE
    with remote(server, caller, Capped(None, dies=1, answered=True), path) as oracle, pytest.raises(Killed):
        ask(oracle)
    assert spent(server, caller) == 40
    transport = Capped(16)
    with remote(server, caller, transport, path) as oracle:
        ask(oracle)
        assert transport.asked == [40, 16, 16, 8]
        assert [request.rows for request in oracle.log.unanswered] == [40]
        assert spent(server, caller) == 80
        result = audit([tmp_path / "run"], oracle)
        assert (result.differences, result.logged, result.lost) == ((), 80, 1)


def test_a_cap_in_the_log_that_is_none_is_damage(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    for value in (0, -1, "3", None):
        path.write_text(json.dumps({"max_rows": value}) + "\n")
        with pytest.raises(ValueError, match="damaged in line 1"):
            QueryLog.read(path)


# --- scores and receipts ----------------------------------------------------------------------------------------------


def foreign(scores: np.ndarray, parameters: dict[str, Any], **headers: str) -> RemoteOracle:
    """A server that says of its scores what `parameters` say."""
    metadata = {
        "name": "classifier",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, scores.shape[1]]}],
        "parameters": parameters,
    }

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == protocol.METADATA_ROUTE:
            return httpx.Response(200, json=metadata)
        encoded = codec.encode_response({"logits": scores}, binary={"logits": True})
        every = {protocol.JSON_LENGTH_HEADER: str(encoded.json_length), **headers}
        return httpx.Response(200, content=encoded.body(), headers=every)

    return RemoteOracle("http://foreign", transport=httpx.MockTransport(handle), retry_seconds=0.3)


LOGITS = np.array([[2.0, -1.0, 0.5], [-30.0, 30.0, 0.0]], np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("parameters", [{}, {"scores": "logits"}])
def test_logits_are_what_they_are(parameters: dict[str, Any]) -> None:
    with foreign(LOGITS, parameters) as oracle:
        np.testing.assert_array_equal(ask(oracle, rows=2), LOGITS)
        assert oracle.info.scores == "logits"


def test_probabilities_become_logits_up_to_a_constant() -> None:
    with foreign(softmax(LOGITS), {"scores": "probabilities"}) as oracle:
        found = ask(oracle, rows=2)
        assert oracle.info.scores == "probabilities"
    assert found.dtype == np.float32
    np.testing.assert_allclose(found - found[:, :1], LOGITS - LOGITS[:, :1], atol=1e-4)
    for label in range(3):  # and so the loss is the same
        targets = tensor([label, label])
        ours, theirs = (F.cross_entropy(tensor(logits), targets, reduction="none") for logits in (found, LOGITS))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_probability_rounded_to_nothing_has_a_finite_logarithm() -> None:
    with foreign(np.array([[1.0, 0.0, -0.01]], np.float32), {"scores": "probabilities"}) as oracle:
        found = ask(oracle, rows=1)
    assert found[0, 0] == 0
    assert found[0, 1] == found[0, 2] == pytest.approx(np.log(np.finfo(np.float32).tiny))


def test_labels_stay_as_they_are() -> None:
    one_hot = np.eye(3, dtype=np.float32)
    with foreign(one_hot, {"scores": "label"}) as oracle:
        np.testing.assert_array_equal(ask(oracle, rows=3), one_hot)


@pytest.mark.parametrize("kind", ["ranks", "", None, 3, ["logits"]])
def test_scores_that_cannot_be_read_are_told(kind: Any) -> None:
    with foreign(LOGITS, {"scores": kind}) as oracle, pytest.raises(UnexpectedAnswer, match="logits, probabilities"):
        ask(oracle, rows=2)


RECEIPTS: list[Callable[[], dict[str, str]]] = [
    lambda: {protocol.QUERY_RECEIPT_HEADER: "zo1." + "aB-_9" * 80 + ".=="},
    lambda: {protocol.QUERY_RECEIPT_HEADER: "17"},
    dict,
]


@pytest.mark.parametrize("headers", RECEIPTS, ids=["signed", "number", "stripped"])
def test_a_receipt_is_kept_as_it_came(tmp_path: Path, headers: Callable[[], dict[str, str]]) -> None:
    path = tmp_path / LOG_FILE
    with foreign(LOGITS, {}, **headers()) as oracle:
        oracle.log = QueryLog(path)
        ask(oracle, rows=2)
    expected = headers().get(protocol.QUERY_RECEIPT_HEADER)
    assert json.loads(path.read_text().splitlines()[-1])["receipt"] == expected
    (request,) = QueryLog.read(path).requests.values()
    assert request.receipt == expected
