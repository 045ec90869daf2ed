"""Queries over HTTP against the live server: answers, charges, and every refusal."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from oracle_support import Caller, Running, digits, logits_of, refused, running

from oracle_server.loading import load_classifier
from oracle_server.oracle import Oracle
from oracle_server.settings import Settings
from shared.audit.signatures import Receipt, read_public_key
from shared.wire import codec, protocol


class SlowOrFailing:
    """An engine whose next call waits for `go`, fails, or answers NaN, as told."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.fail = self.nan = False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.go.wait(30)
        if self.fail:
            raise RuntimeError("the secret reason")
        return torch.full((len(images), 3), float("nan") if self.nan else 0.5)


@pytest.fixture
def engine() -> SlowOrFailing:
    return SlowOrFailing()


@pytest.fixture
def odd_server(engine: SlowOrFailing, tmp_path: Path) -> Running:
    with running(Settings(ledger=str(tmp_path / "ledger.db")), Oracle(engine, (1, 8, 8), 3)) as started:
        yield started


# --- answers -------------------------------------------------------------------------------------------------------


def test_logits_are_the_classifiers_and_the_headers_say_what_they_cost(caller: Caller) -> None:
    images = digits(5)
    answer = caller.infer(images)
    with torch.inference_mode():
        expected = load_classifier(Settings()).module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(logits_of(answer), expected, atol=1e-5)
    assert answer.headers["Query-Charge"] == "5"
    assert answer.headers["Query-Remaining"] == "9995"
    receipt = Receipt.parse(answer.headers["Query-Receipt"])
    head = caller.http.get(protocol.LEDGER_ROUTE, headers=caller.headers).json()
    receipt.verify(read_public_key(head["public_key"]))
    assert receipt.ledger == head["ledger"]
    page = caller.http.get(protocol.CHARGES_ROUTE, headers=caller.headers).json()
    assert [(entry["seq"], entry["rows"]) for entry in page["entries"]] == [(receipt.entry.seq, 5)]
    assert receipt.entry.body_sha256 == hashlib.sha256(answer.request.content).hexdigest()


def test_json_in_and_json_out(caller: Caller) -> None:
    images = digits(2)
    answer = caller.infer(images, binary=False)
    assert answer.headers["content-type"] == "application/json"
    np.testing.assert_allclose(logits_of(answer), logits_of(caller.infer(images)), atol=1e-6)
    nested = {"inputs": [{"name": "images", "shape": [2, 1, 8, 8], "datatype": "FP32", "data": images.tolist()}]}
    answer = caller.post(codec.Encoded((json.dumps(nested).encode(),), None))
    assert answer.json()["outputs"][0]["shape"] == [2, 10]


def test_a_version_may_be_named_and_the_id_is_echoed(caller: Caller) -> None:
    encoded = codec.encode_request({"images": digits(1)}, request_id="seven")
    headers = caller.headers | {protocol.JSON_LENGTH_HEADER: str(encoded.json_length)}
    url = f"/v2/models/{protocol.MODEL_NAME}/versions/{protocol.MODEL_VERSION}/infer"
    answer = caller.http.post(url, content=encoded.body(), headers=headers)
    length = int(answer.headers[protocol.JSON_LENGTH_HEADER])
    assert codec.decode_response(answer.content, length).id == "seven"


# --- the budget ----------------------------------------------------------------------------------------------------


def test_the_budget_ends_at_the_exact_query(server: Running) -> None:
    caller = server.caller(budget=10)
    logits_of(caller.infer(digits(7)))
    problem = refused(caller.infer(digits(4)), 403, "budget-exhausted")
    assert (problem["requested"], problem["remaining"], problem["budget"]) == (4, 3, 10)
    assert "retry-after" not in caller.infer(digits(4)).headers
    assert caller.budget()["spent"] == 7  # a refused batch charges nothing
    assert caller.infer(digits(3)).headers["Query-Remaining"] == "0"
    refused(caller.infer(digits(1)), 403, "budget-exhausted")
    assert caller.budget() == {"client": caller.client.name, "budget": 10, "spent": 10, "held": 0, "remaining": 0}


def test_sixteen_threads_race_for_the_last_queries(server: Running) -> None:
    caller = server.caller(budget=10)
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: caller.infer(digits(1)).status_code, range(32)))
    assert sorted(statuses) == [200] * 10 + [403] * 22
    assert caller.budget()["spent"] == 10
    assert server.ledger.verify().intact


# --- idempotency ---------------------------------------------------------------------------------------------------


def test_a_replay_is_answered_again_for_free(server: Running) -> None:
    caller = server.caller(budget=5)
    first, again = (caller.infer(digits(5), Idempotency_Key="k1") for _ in range(2))
    np.testing.assert_array_equal(logits_of(again), logits_of(first))
    assert (first.headers["Query-Charge"], again.headers["Query-Charge"]) == ("5", "0")
    assert first.headers["Query-Receipt"] == again.headers["Query-Receipt"]
    assert again.headers["Query-Remaining"] == "0"
    refused(caller.infer(digits(5, seed=1), Idempotency_Key="k1"), 422, "idempotency-conflict")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ü"])
def test_an_idempotency_key_is_visible_ascii(caller: Caller, key: str) -> None:
    encoded = codec.encode_request({"images": digits(1)})
    headers = [
        (b"Idempotency-Key", key.encode("latin-1")),
        (b"Authorization", caller.headers["Authorization"].encode()),
    ]
    headers.append((protocol.JSON_LENGTH_HEADER.encode(), str(encoded.json_length).encode()))
    refused(caller.http.post(protocol.INFER_ROUTE, content=encoded.body(), headers=headers), 400, "malformed-request")
    assert caller.budget()["spent"] == 0


def test_a_key_in_flight_is_told_to_wait(odd_server: Running, engine: SlowOrFailing) -> None:
    caller = odd_server.caller()
    engine.go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(caller.infer, digits(2), Idempotency_Key="k")
        assert engine.entered.wait(10)
        second = caller.infer(digits(2), Idempotency_Key="k")
        refused(second, 409, "request-in-flight")
        assert second.headers["retry-after"] == "1"
        engine.go.set()
        logits_of(first.result())
    assert caller.infer(digits(2), Idempotency_Key="k").headers["Query-Charge"] == "0"
    assert caller.budget()["spent"] == 2


def test_a_client_that_hangs_up_has_paid_and_can_have_the_answer(odd_server: Running, engine: SlowOrFailing) -> None:
    caller = odd_server.caller()
    engine.go.clear()
    with httpx.Client(base_url=odd_server.url, timeout=0.3) as impatient, pytest.raises(httpx.ReadTimeout):
        Caller(caller.client, caller.key, impatient).infer(digits(2), Idempotency_Key="k")
    assert (caller.budget()["spent"], caller.budget()["held"]) == (0, 2)
    engine.go.set()
    while (answer := caller.infer(digits(2), Idempotency_Key="k")).status_code == 409:
        time.sleep(0.05)
    assert answer.headers["Query-Charge"] == "0"
    assert (caller.budget()["spent"], caller.budget()["held"]) == (2, 0)


# --- failures ------------------------------------------------------------------------------------------------------


def test_nothing_is_computed_for_who_cannot_pay(odd_server: Running, engine: SlowOrFailing) -> None:
    """A reservation is written while its rows are computed, but not where the account does not cover them."""
    poor = odd_server.caller(1)
    refused(poor.infer(digits(2)), 403, "budget-exhausted")
    assert not engine.entered.is_set()
    logits_of(poor.infer(digits(1)))
    assert engine.entered.is_set()


def test_a_failed_answer_costs_nothing_and_its_key_is_free(
    odd_server: Running, engine: SlowOrFailing, caplog: pytest.LogCaptureFixture
) -> None:
    caller = odd_server.caller()
    engine.fail = True
    answer = caller.infer(digits(2), Idempotency_Key="k")
    refused(answer, 500, "internal-error")
    assert "secret reason" not in answer.text
    assert "secret reason" in caplog.text
    assert caller.key not in caplog.text
    assert caller.budget()["spent"] == 0
    engine.fail = False
    assert caller.infer(digits(2), Idempotency_Key="k").headers["Query-Charge"] == "2"
    page = caller.http.get(protocol.CHARGES_ROUTE, headers=caller.headers).json()
    assert [entry["rows"] for entry in page["entries"]] == [2]
    told = [entry.kind for entry in odd_server.ledger.entries(caller.client.id)]
    assert told == ["client", "budget", "reserve", "release", "reserve", "charge"]
    assert odd_server.ledger.verify().intact


def test_logits_that_are_not_finite_go_in_binary_but_not_in_json(odd_server: Running, engine: SlowOrFailing) -> None:
    caller = odd_server.caller()
    engine.nan = True
    assert np.isnan(logits_of(caller.infer(digits(1)))).all()
    problem = refused(caller.infer(digits(1), binary=False), 500, "internal-error")
    assert "binary" in str(problem["detail"])
    assert caller.budget()["spent"] == 1


def test_what_no_route_foresaw_is_a_problem_without_details(
    odd_server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caller = odd_server.caller()
    monkeypatch.setattr(type(odd_server.ledger), "find_client", lambda *_: 1 / 0)
    answer = caller.infer(digits(1))
    refused(answer, 500, "internal-error")
    assert "division" not in answer.text
    assert "division" in caplog.text
    monkeypatch.undo()
    logits_of(caller.infer(digits(1)))


def test_a_ledger_that_fails_answers_nothing_uncharged(odd_server: Running) -> None:
    from sqlalchemy import text

    caller = odd_server.caller()
    with odd_server.ledger._writing.begin() as connection:
        connection.execute(text("ALTER TABLE entries RENAME TO gone"))
    answer = caller.infer(digits(1))
    refused(answer, 503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    with odd_server.ledger._writing.begin() as connection:
        connection.execute(text("ALTER TABLE gone RENAME TO entries"))
    assert caller.budget()["spent"] == 0


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "status", "code"),
    [
        (np.where(digits(2) > 0.99, np.nan, digits(2)).astype("f4"), 422, "unacceptable-values"),
        (digits(2) + np.float32(0.5), 422, "unacceptable-values"),
        (digits(2).astype(np.float64), 400, "malformed-request"),
        (digits(2)[:, 0], 400, "malformed-request"),
        (np.zeros((2, 3, 8, 8), np.float32), 400, "malformed-request"),
        (np.zeros((0, 1, 8, 8), np.float32), 400, "malformed-request"),
        (digits(65), 413, "too-large"),
    ],
    ids=["NaN", "range", "dtype", "rank", "shape", "no row", "rows"],
)
def test_images_that_cannot_be_answered(caller: Caller, images: np.ndarray, status: int, code: str) -> None:
    refused(caller.infer(images), status, code)
    if np.isfinite(images).all():  # JSON has no NaN
        refused(caller.infer(images, binary=False), status, code)
    assert caller.budget()["spent"] == 0


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"", None),
        (b"{", None),
        (b"[" * 100_000, None),
        (b"{}", None),
        (b'{"inputs":[]}', None),
        (b'{"inputs":[]}', "99"),
        (b'{"inputs":[]}', "-1"),
        (b'{"inputs":[]}', "1_3"),
        (
            codec.encode_request({"images": digits(1)}).body()[:-1],
            str(codec.encode_request({"images": digits(1)}).json_length),
        ),
        (codec.encode_request({"pictures": digits(1)}, binary=False).body(), None),
        (codec.encode_request({"images": digits(1), "more": digits(1)}, binary=False).body(), None),
        (codec.encode_request({"images": digits(1)}, outputs=["gradient"], binary=False).body(), None),
    ],
)
def test_bodies_that_cannot_be_read(caller: Caller, body: bytes, length: str | None) -> None:
    headers = caller.headers | ({protocol.JSON_LENGTH_HEADER: length} if length else {})
    answer = caller.http.post(protocol.INFER_ROUTE, content=body, headers=headers)
    refused(answer, 400, "malformed-request")
    assert caller.budget()["spent"] == 0


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer nonsense", "Basic eDp5", f"Bearer zo_{'0' * 16}_{'a' * 43}"]
)
def test_without_a_known_key_there_is_no_answer(server: Running, header: str | None) -> None:
    encoded = codec.encode_request({"images": digits(1)}, binary=False)
    headers = {"Authorization": header} if header else {}
    for answer in (
        server.http.post(protocol.INFER_ROUTE, content=encoded.body(), headers=headers),
        server.http.get(protocol.BUDGET_ROUTE, headers=headers),
        server.http.get(protocol.CHARGES_ROUTE, headers=headers),
    ):
        refused(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_right_id_with_a_wrong_secret_is_not_enough(caller: Caller) -> None:
    wrong = Caller(caller.client, f"zo_{caller.client.key_id}_{'a' * 43}", caller.http)
    refused(wrong.infer(digits(1)), 401, "unauthorized")


def test_a_revoked_key_is_told_so(server: Running) -> None:
    caller = server.caller()
    server.ledger.revoke(caller.client.name)
    refused(caller.infer(digits(1)), 403, "client-revoked")
    refused(caller.http.get(protocol.BUDGET_ROUTE, headers=caller.headers), 403, "client-revoked")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not-found"),
        ("GET", "/v2/models/resnet", 404, "not-found"),
        ("POST", "/v2/models/resnet/infer", 404, "not-found"),
        ("POST", "/v2/models/classifier/versions/2/infer", 404, "not-found"),
        ("GET", "/v2/models/classifier/config", 404, "not-found"),
        ("GET", protocol.INFER_ROUTE, 405, "method-not-allowed"),
        ("DELETE", "/v2", 405, "method-not-allowed"),
    ],
)
def test_what_is_not_there(caller: Caller, method: str, path: str, status: int, code: str) -> None:
    refused(caller.http.request(method, path, headers=caller.headers), status, code)


@pytest.mark.parametrize("query", ["after=-1", "limit=0", "limit=1001", "after=x"])
def test_pages_are_numbers(caller: Caller, query: str) -> None:
    refused(caller.http.get(f"{protocol.CHARGES_ROUTE}?{query}", headers=caller.headers), 400, "malformed-request")


# --- beside the queries --------------------------------------------------------------------------------------------


def test_charges_come_in_pages_and_only_ones_own(server: Running) -> None:
    caller, other = server.caller(), server.caller()
    for rows in (1, 2, 3):
        caller.infer(digits(rows), Idempotency_Key=f"key-{rows}")
        other.infer(digits(rows))
    after, found = 0, []
    while after is not None:
        url = f"{protocol.CHARGES_ROUTE}?after={after}&limit=2"
        page = protocol.ChargePage.model_validate(caller.http.get(url, headers=caller.headers).json())
        found += page.entries
        after = page.next_after
    assert [(e.kind, e.rows, e.idempotency_key) for e in found] == [("charge", n, f"key-{n}") for n in (1, 2, 3)]


def test_metadata_tells_shapes_and_nothing_of_the_classifier(server: Running) -> None:
    paths = ["/v2", "/v2/health/live", "/v2/health/ready", "/metrics", "/docs", "/openapi.json"]
    for base in ("/v2/models/classifier", "/v2/models/classifier/versions/1"):
        paths += [base, f"{base}/ready"]
    for path in paths:
        answer = server.http.get(path)
        assert answer.status_code == 200, path
        for word in ("digits", "cnn", "resnet", "weight", "safetensors", "torch", "gradient", "label", "loss"):
            assert word not in answer.text.lower(), (path, word)
    metadata = protocol.ModelMetadata.model_validate(server.http.get("/v2/models/classifier").json())
    assert metadata.platform == "opaque"
    assert metadata.inputs[0].shape == (-1, 1, 8, 8)
    assert metadata.outputs[0].shape == (-1, 10)
    told = {name: value for name, value in metadata.parameters.items() if "decoder" not in name}
    assert told == {"max_batch_rows": 64, "max_body_bytes": 2**20, "factored": True, "counts": True}
    assert server.http.get("/v2").json()["extensions"] == [protocol.BINARY_EXTENSION]
    assert server.http.post("/v2/repository/index", content=b'{"ready":true}').json()[0]["state"] == "READY"


def test_the_documentation_lists_headers_and_refusals(server: Running) -> None:
    infer = server.http.get("/openapi.json").json()["paths"]["/v2/models/{model}/infer"]["post"]
    assert {p["name"] for p in infer["parameters"]} >= {"Idempotency-Key", protocol.JSON_LENGTH_HEADER}
    assert set(infer["responses"]["200"]["headers"]) >= {"Query-Charge", "Query-Remaining", "Query-Receipt"}
    assert set(infer["responses"]) >= {"400", "401", "403", "404", "409", "413", "422", "500", "503"}
    assert infer["security"]
