"""Factored batches over HTTP: the logits and the charge of the rows that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from oracle_support import Caller, Running, digits, logits_of, refused, running

from oracle_server.decoders import Decoder
from oracle_server.factored import DecodedRows, Given, Part, PixelRows
from oracle_server.settings import Settings
from shared.models.autoencoder import Autoencoder, pyramid
from shared.models.decoder import decoder_of, read, write
from shared.wire import codec, protocol
from shared.wire.errors import UnacceptableValues
from shared.wire.probes import Along, Coordinates, Difference, Directions, Probes, Seeds

N, Q, D = 3, 6, 64
RNG = np.random.default_rng(5)
STEPS = np.full(Q, 0.005, np.float32)
ALONG: dict[str, Along] = {
    "directions": Directions(RNG.standard_normal((Q, D)).astype(np.float32)),
    "own directions": Directions(RNG.standard_normal((N, Q, D)).astype(np.float32)),
    "coordinates": Coordinates(np.arange(0, D, 11)),
    "seeds": Seeds(np.array([1, 2, 3], np.uint64)),
}


def inside(n: int = N) -> np.ndarray:
    """Points [n, d] with room on both sides of every pixel."""
    return (0.1 + 0.8 * digits(n).reshape(n, D)).astype(np.float32)


def ask(caller: Caller, asked: Probes, key: str | None = None, **parameters: Any) -> httpx.Response:
    encoded = codec.encode_request(asked.inputs(), parameters={"difference": asked.difference, **parameters})
    return caller.post(encoded, **({} if key is None else {"Idempotency_Key": key}))


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("along", ALONG.values(), ids=ALONG)
def test_the_answer_is_that_to_the_rows_to_the_bit(caller: Caller, along: Along, difference: Difference) -> None:
    asked = Probes(inside(), STEPS, along, difference)
    answer = ask(caller, asked)
    logits = logits_of(answer)
    assert logits.shape == (N, asked.p, 10)
    assert int(answer.headers[protocol.QUERY_CHARGE_HEADER]) == N * asked.p
    images = asked.expand(0, len(asked)).reshape(-1, 1, 8, 8)
    dense = logits_of(caller.infer(images))
    np.testing.assert_array_equal(logits.reshape(dense.shape), dense)
    assert caller.budget()["spent"] == 2 * N * asked.p


def test_ranges_make_the_whole_and_cost_no_more(caller: Caller) -> None:
    asked = Probes(inside(), STEPS, ALONG["seeds"], "central")
    whole = logits_of(ask(caller, asked)).reshape(len(asked), 10)
    parts = [
        logits_of(ask(caller, asked, rows=[start, min(start + 7, len(asked))])) for start in range(0, len(asked), 7)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    assert caller.budget()["spent"] == 2 * len(asked)


def test_pixels_outside_are_refused_or_clamped(caller: Caller) -> None:
    points = digits(N).reshape(N, D).copy()
    points[1, 5] = -0.25
    asked = Probes(points, STEPS, ALONG["coordinates"], "forward")
    refusal = refused(ask(caller, asked), 422, "unacceptable-values")
    assert refusal["index"] == [asked.p, 0, 0, 5]
    assert "clamp" in str(refusal["detail"])
    assert caller.budget()["spent"] == 0
    images = np.clip(asked.expand(0, len(asked)), 0, 1).reshape(-1, 1, 8, 8)
    clamped = logits_of(ask(caller, asked, clamp=True))
    np.testing.assert_array_equal(clamped.reshape(-1, 10), logits_of(caller.infer(images)))


def test_what_overflows_on_the_way_is_refused_or_clamped(caller: Caller) -> None:
    huge = np.full(1, 3e38, np.float32)
    asked = Probes(inside(1), huge, Directions(np.full((1, D), 10.0, np.float32)), "central")
    refused(ask(caller, asked), 422, "unacceptable-values")
    ends = np.concatenate([np.ones((1, 1, 8, 8)), np.zeros((1, 1, 8, 8))]).astype(np.float32)
    logits = logits_of(ask(caller, asked, clamp=True))
    np.testing.assert_array_equal(logits.reshape(-1, 10), logits_of(caller.infer(ends)))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"clamp": 1}, "clamp"),
        ({"difference": "sideways"}, "difference"),
        ({"rows": [0, 10**6]}, "rows"),
        ({"decoder": 7}, "decoder"),
    ],
    ids=str,
)
def test_parameters_that_are_none_are_malformed(caller: Caller, parameters: dict[str, Any], says: str) -> None:
    asked = Probes(inside(), STEPS, ALONG["seeds"], "forward")
    assert says in str(refused(ask(caller, asked, **parameters), 400, "malformed-request")["detail"])
    assert caller.budget()["spent"] == 0


def test_what_is_no_form_is_malformed(caller: Caller) -> None:
    for names in (["pixels"], ["images", "base"], ["images", "steps"]):
        encoded = codec.encode_request(dict.fromkeys(names, digits(2)))
        refused(caller.post(encoded), 400, "malformed-request")
    refused(caller.post(codec.encode_request({"latents": inside()})), 400, "malformed-request")
    assert caller.budget()["spent"] == 0


def test_rows_are_what_is_limited_however_few_bytes_ask_for_them(tmp_path: Path) -> None:
    with running(Settings(ledger=str(tmp_path / "ledger.db"), max_batch_rows=100)) as server:
        caller = server.caller()
        many = Probes(inside(1), np.full(5_000_000, 0.1, np.float32), Seeds(np.array([1], np.uint64)), "central")
        refusal = refused(ask(caller, many), 413, "too-large")
        assert refusal["max_rows"] == 100
        assert logits_of(ask(caller, many, rows=[9_999_900, 10_000_000], clamp=True)).shape == (100, 10)


def test_the_same_key_is_the_same_purchase(caller: Caller) -> None:
    asked, key = Probes(inside(), STEPS, ALONG["seeds"], "forward"), "k"
    first, again = ask(caller, asked, key), ask(caller, asked, key)
    np.testing.assert_array_equal(logits_of(first), logits_of(again))
    assert (first.headers["Query-Charge"], again.headers["Query-Charge"]) == (str(len(asked)), "0")
    other = Probes(inside(), STEPS, Seeds(np.array([1, 2, 4], np.uint64)), "forward")
    refused(ask(caller, other, key), 422, "idempotency-conflict")


def test_an_unmodified_client_can_ask(server: Running) -> None:
    caller, asked = server.caller(), Probes(inside(), STEPS, ALONG["coordinates"], "forward")
    client = triton.InferenceServerClient(server.address)
    inputs = []
    for name, values in asked.inputs().items():
        tensor = triton.InferInput(name, list(values.shape), codec.datatype_of(values))
        tensor.set_data_from_numpy(np.ascontiguousarray(values))
        inputs.append(tensor)
    answer = client.infer("classifier", inputs, headers=caller.headers, parameters={"clamp": True})
    np.testing.assert_array_equal(answer.as_numpy("logits"), logits_of(ask(caller, asked, clamp=True)))
    client.close()


def test_an_answer_in_json_has_the_same_shape(server: Running, caller: Caller) -> None:
    asked = Probes(inside(), STEPS, ALONG["coordinates"], "forward")
    tensors = [
        {"name": name, "shape": list(values.shape), "datatype": codec.datatype_of(values), "data": values.tolist()}
        for name, values in asked.inputs().items()
    ]
    answer = server.http.post(protocol.INFER_ROUTE, json={"inputs": tensors}, headers=caller.headers).json()
    (output,) = answer["outputs"]
    assert output["shape"] == [N, asked.p, 10]


def test_the_model_says_that_it_reads_them(server: Running) -> None:
    told = server.http.get(protocol.METADATA_ROUTE).json()["parameters"]
    assert told[protocol.FACTORED_PARAMETER] is told[protocol.COUNTS_PARAMETER] is True


def test_deterministic_noise_is_that_of_the_image(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('seed = 1\n[answers.noise]\nsigma = 0.5\nkind = "deterministic"\n')
    with running(Settings(ledger=str(tmp_path / "ledger.db"), policy=policy)) as server:
        caller, asked = server.caller(), Probes(inside(), STEPS, ALONG["seeds"], "forward")
        images = asked.expand(0, len(asked)).reshape(-1, 1, 8, 8)
        logits = logits_of(ask(caller, asked)).reshape(-1, 10)
        np.testing.assert_array_equal(logits, logits_of(caller.infer(images)))


def test_a_pixel_is_named_by_its_row_in_the_request_however_many_there_are() -> None:
    """2^20 values are looked at at once, which is 16,384 rows here."""
    steps = np.zeros(17_000, np.float32)
    steps[16_999] = 2.0
    asked = Probes(inside(1), steps, Coordinates(np.full(17_000, 9)), "forward")
    rows = PixelRows(Part(asked, 0, len(asked)), (1, 8, 8), clamp=False, answered=(1, asked.p))
    with pytest.raises(UnacceptableValues) as refusal:
        rows.check()
    assert refusal.value.extensions == {"index": [17_000, 0, 1, 1]}


# --- ragged: a number of directions for each point ------------------------------------------------------------------

COUNTS = np.array([2, 0, Q])


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("along", ALONG.values(), ids=ALONG)
def test_a_ragged_batch_is_answered_and_charged_as_its_rows(
    caller: Caller, along: Along, difference: Difference
) -> None:
    asked = Probes(inside(), STEPS, along, difference, COUNTS)
    rows = 3 + 8 if difference == "forward" else 2 * 8
    answer = ask(caller, asked)
    logits = logits_of(answer)
    assert logits.shape == (rows, 10)
    assert int(answer.headers[protocol.QUERY_CHARGE_HEADER]) == rows
    dense = logits_of(caller.infer(asked.expand(0, rows).reshape(-1, 1, 8, 8)))
    np.testing.assert_array_equal(logits, dense)
    assert caller.budget()["spent"] == 2 * rows


def test_a_ragged_batch_has_the_answers_of_the_uniform_one(caller: Caller) -> None:
    whole = logits_of(ask(caller, Probes(inside(), STEPS, ALONG["seeds"], "forward")))
    some = logits_of(ask(caller, Probes(inside(), STEPS, ALONG["seeds"], "forward", COUNTS)))
    np.testing.assert_array_equal(some, np.concatenate([whole[i, : 1 + count] for i, count in enumerate(COUNTS)]))


def test_ranges_of_a_ragged_batch_make_the_whole_and_cost_no_more(caller: Caller) -> None:
    asked = Probes(inside(), STEPS, ALONG["own directions"], "central", COUNTS)
    whole = logits_of(ask(caller, asked))
    parts = [ask(caller, asked, rows=[start, min(start + 3, 16)]) for start in range(0, 16, 3)]
    assert [int(part.headers[protocol.QUERY_CHARGE_HEADER]) for part in parts] == [3, 3, 3, 3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([logits_of(part) for part in parts]), whole)
    assert "0 <= start < stop <= 16" in str(refused(ask(caller, asked, rows=[0, 17]), 400, "malformed-request"))
    assert caller.budget()["spent"] == 2 * 16


@pytest.mark.parametrize(
    ("counts", "status", "code", "says"),
    [
        (np.array([0, 0, 0]), 422, "unacceptable-values", "no row at the point itself"),
        (np.array([1, Q + 1, 0]), 422, "unacceptable-values", f"counts[1] = 7: a point is stepped along 0 to {Q}"),
        (np.array([1, 1, -1]), 422, "unacceptable-values", "counts[2] = -1"),
        (np.array([1, 1]), 400, "malformed-request", "'counts' is [2]: send [3]"),
        (np.ones((3, Q), int), 400, "malformed-request", "'counts' is [3, 6]: send [3]"),
        (np.ones(3, np.float32), 400, "malformed-request", "'counts' is FP32: send INT64"),
        (np.ones(3, np.uint8), 400, "malformed-request", "'counts' is UINT8: send INT64"),
    ],
    ids=str,
)
def test_counts_that_are_none_are_refused_and_free(
    caller: Caller, counts: np.ndarray, status: int, code: str, says: str
) -> None:
    refusal = refused(ask(caller, Probes(inside(), STEPS, ALONG["seeds"], "central", counts)), status, code)
    assert says in str(refusal["detail"])
    account = caller.budget()
    assert (account["spent"], account["held"]) == (0, 0)


def test_padding_is_checked_as_all_is(caller: Caller) -> None:
    axes, own = np.zeros((N, Q), np.int64), np.zeros((N, Q, D), np.float32)
    axes[1, 5], own[1, 5, 7] = D, np.inf
    refusal = refused(
        ask(caller, Probes(inside(), STEPS, Coordinates(axes), "forward", COUNTS)), 422, "unacceptable-values"
    )
    assert "axis 64" in str(refusal["detail"])
    refused(ask(caller, Probes(inside(), STEPS, Directions(own), "forward", COUNTS)), 422, "unacceptable-values")
    assert caller.budget()["spent"] == 0


def test_a_pixel_outside_is_named_by_its_row_of_a_ragged_batch(caller: Caller) -> None:
    points = inside()
    points[2, 5] = 0.999
    axes = np.full((N, Q), 5)
    steps = np.zeros((N, Q), np.float32)
    steps[1], steps[2, 3] = 2.0, 0.005  # point 1 would be far outside, and is not stepped
    refusal = refused(
        ask(caller, Probes(points, steps, Coordinates(axes), "forward", COUNTS)), 422, "unacceptable-values"
    )
    assert refusal["index"] == [3 + 1 + 1 + 3, 0, 0, 5]


def test_the_limit_is_on_the_rows_of_a_ragged_batch(tmp_path: Path) -> None:
    with running(Settings(ledger=str(tmp_path / "ledger.db"), max_batch_rows=100)) as server:
        caller = server.caller()
        base, steps, seed = np.full((60, D), 0.5, np.float32), np.full(1000, 0.01, np.float32), ALONG["seeds"].of(0, 1)
        counts = np.zeros(60, np.int64)
        counts[7] = 40
        assert logits_of(ask(caller, Probes(base, steps, seed, "forward", counts))).shape == (100, 10)
        counts[8] = 1
        refused(ask(caller, Probes(base, steps, seed, "forward", counts)), 413, "too-large")
        assert caller.budget()["spent"] == 100


def test_the_counts_are_part_of_a_purchase(caller: Caller) -> None:
    first = ask(caller, Probes(inside(), STEPS, ALONG["seeds"], "forward", COUNTS), "k")
    again = ask(caller, Probes(inside(), STEPS, ALONG["seeds"], "forward", COUNTS), "k")
    np.testing.assert_array_equal(logits_of(first), logits_of(again))
    assert (first.headers["Query-Charge"], again.headers["Query-Charge"]) == ("11", "0")
    refused(
        ask(caller, Probes(inside(), STEPS, ALONG["seeds"], "forward", COUNTS[::-1]), "k"), 422, "idempotency-conflict"
    )


# --- latents of a decoder ------------------------------------------------------------------------------------------


@pytest.fixture
def decoding(tmp_path: Path) -> Iterator[Running]:
    with running(Settings(ledger=str(tmp_path / "ledger.db"), allow_decoders=True)) as server:
        yield server


def register(caller: Caller, scale: float = 1.0) -> tuple[str, Decoder]:
    """A decoder of latents of 12 values, registered; and a copy of it."""
    torch.manual_seed(3)
    spec, state = decoder_of(Autoencoder(pyramid((1, 8, 8), 12, 8)))
    content = write(spec, {name: scale * tensor for name, tensor in state.items()})
    answer = caller.http.post(protocol.DECODERS_ROUTE, content=content, headers=caller.headers)
    return answer.json()["decoder"], Decoder(*read(content))


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_probes_of_latents_are_answered_as_the_images_they_decode_to(decoding: Running, difference: Difference) -> None:
    caller = decoding.caller()
    name, decoder = register(caller)
    latents = RNG.random((N, 12), dtype=np.float32)
    asked = Probes(latents, np.full(12, 0.005, np.float32), Coordinates(np.arange(12)), difference)
    answer = ask(caller, asked, decoder=name)
    assert int(answer.headers[protocol.QUERY_CHARGE_HEADER]) == len(asked)
    images = decoder(asked.expand(0, len(asked)))
    np.testing.assert_array_equal(logits_of(answer).reshape(-1, 10), logits_of(caller.infer(images)))
    assert caller.budget()["spent"] == 2 * len(asked)


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_ragged_probes_of_latents_are_answered_as_the_images(decoding: Running, difference: Difference) -> None:
    caller = decoding.caller()
    name, decoder = register(caller)
    latents, axes = RNG.random((4, 12), dtype=np.float32), RNG.integers(0, 12, (4, 5))
    asked = Probes(
        latents, np.full(5, 0.005, np.float32), Coordinates(axes), difference, np.array([0, 5, 0, 1], np.int64)
    )
    answer = ask(caller, asked, decoder=name)
    assert int(answer.headers[protocol.QUERY_CHARGE_HEADER]) == len(asked) == (10 if difference == "forward" else 12)
    logits = logits_of(answer)
    assert logits.shape == (len(asked), 10)
    np.testing.assert_array_equal(logits, logits_of(caller.infer(decoder(asked.expand(0, len(asked))))))
    part = logits_of(ask(caller, asked, decoder=name, rows=[2, 9]))
    np.testing.assert_array_equal(part, logits[2:9])
    assert caller.budget()["spent"] == 2 * len(asked) + 7


def test_latents_are_answered_as_the_images_they_decode_to(decoding: Running) -> None:
    caller = decoding.caller()
    name, decoder = register(caller)
    latents = RNG.random((7, 12), dtype=np.float32)
    answer = caller.post(codec.encode_request({"latents": latents}, parameters={"decoder": name}))
    np.testing.assert_array_equal(logits_of(answer), logits_of(caller.infer(decoder(latents))))


def test_a_decoder_that_is_not_there_is_said_so(decoding: Running, tmp_path: Path) -> None:
    asked = Probes(np.zeros((1, 12), np.float32), STEPS, Seeds(np.array([1], np.uint64)), "forward")
    mine, other = decoding.caller(), decoding.caller()
    name, _ = register(mine)
    refused(ask(other, asked, decoder=name), 404, "decoder-unknown")
    with running(Settings(ledger=str(tmp_path / "other.db"))) as without:
        caller = without.caller()
        refused(ask(caller, asked, decoder=name), 403, "decoders-not-allowed")
        assert caller.budget()["spent"] == 0
    refused(ask(mine, asked, decoder=name, clamp=True), 400, "malformed-request")
    for latents in (np.zeros((1, 13), np.float32), np.zeros((0, 12), np.float32), np.zeros(12, np.float32)):
        request = codec.encode_request({"latents": latents}, parameters={"decoder": name})
        refused(mine.post(request), 400, "malformed-request")
    unknown = np.zeros((3, 12), np.float32)
    unknown[1, 2] = np.inf
    request = codec.encode_request({"latents": unknown}, parameters={"decoder": name})
    assert refused(mine.post(request), 422, "unacceptable-values")["index"] == [1, 2]
    assert (mine.budget()["spent"], other.budget()["spent"]) == (0, 0)


def test_latents_that_decode_to_no_number_are_refused_and_free(decoding: Running) -> None:
    caller = decoding.caller()
    name, _ = register(caller, scale=1e20)
    latents = np.full((2, 12), 3e38, np.float32)
    request = codec.encode_request({"latents": latents}, parameters={"decoder": name})
    refused(caller.post(request), 422, "unacceptable-values")
    account = caller.budget()
    assert (account["spent"], account["held"]) == (0, 0)


def test_decoded_rows_are_found_out_when_they_are_made() -> None:
    large = np.full((1, 2), 3e38, np.float32)
    asked = Probes(large, np.array([3e38], np.float32), Directions(np.ones((1, 2), np.float32)), "forward")
    rows = DecodedRows(Part(asked, 0, 2), lambda latents: latents.reshape(-1, 1, 1, 2), answered=(1, 2))
    np.testing.assert_array_equal(rows.images(0, 1).reshape(1, 2), large)
    with pytest.raises(UnacceptableValues):
        rows.images(0, 2)
    assert len(DecodedRows(Given(large), lambda latents: latents, answered=(1,))) == 1
