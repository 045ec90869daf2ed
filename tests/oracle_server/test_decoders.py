"""Registered decoders: over HTTP, private, bounded, exact, and never a way to hurt the server."""

from __future__ import annotations

import gzip
import http.client
import json
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from oracle_support import Caller, Held, Running, digits, logits_of, process, refused, running
from torch import Tensor, nn

from oracle_server.decoders import Decoder, Decoders
from oracle_server.ledger import Ledger
from oracle_server.oracle import Oracle
from oracle_server.settings import Settings
from shared.models.autoencoder import (
    RELU,
    SIGMOID,
    Autoencoder,
    AutoencoderSpec,
    Shape,
    paper_cifar,
    principal,
    pyramid,
)
from shared.models.decoder import DecoderSpec, decoder_id, decoder_of, write
from shared.models.layers import ConvTranspose, Layer, Linear, Unflatten, build
from shared.wire import protocol
from shared.wire.errors import (
    BY_CODE,
    DecodersNotAllowed,
    DecoderUnknown,
    MalformedRequest,
    TooLarge,
    UnacceptableValues,
)

ROUTE = protocol.DECODERS_ROUTE
SHAPE = (1, 8, 8)
MIB = 2**20


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The digits classifier with decoders allowed, in limits small enough to be reached."""
    folder = tmp_path_factory.mktemp("decoders")
    settings = Settings(
        ledger=f"sqlite:///{folder}/ledger.db",
        signing_key=folder / "signing.key",
        allow_decoders=True,
        max_decoder_bytes=64 * 1024,
        max_client_decoders=3,
        max_decoders=64,
        body_timeout=2.0,
    )
    with running(settings) as started:
        yield started


def made(spec: AutoencoderSpec, seed: int = 0) -> tuple[DecoderSpec, dict[str, Tensor]]:
    """A decoder whose weights are large enough for images that differ."""
    decoder, state = decoder_of(Autoencoder(spec))
    generator = torch.Generator().manual_seed(seed)
    return decoder, {name: 0.2 * torch.randn(x.shape, generator=generator) for name, x in state.items()}


def mlp(latent: int, hidden: int, shape: Shape = SHAPE, seed: int = 0) -> tuple[DecoderSpec, dict[str, Tensor]]:
    out = int(np.prod(shape))
    layers: tuple[Layer, ...] = (
        Linear(features_in=latent, features_out=hidden),
        RELU,
        Linear(features_in=hidden, features_out=out),
        SIGMOID,
        Unflatten(shape=shape),
    )
    generator = torch.Generator().manual_seed(seed)
    spec = DecoderSpec(latent=latent, image_shape=shape, layers=layers)
    return spec, {name: torch.randn(shape, generator=generator) for name, shape in spec.tensors().items()}


def content(seed: int = 0) -> bytes:
    return write(*mlp(4, 3, seed=seed))


def register(caller: Caller, body: bytes, **headers: str) -> httpx.Response:
    return caller.http.post(ROUTE, content=body, headers=caller.headers | headers)


def held_by(caller: Caller) -> list[str]:
    answer = caller.http.get(ROUTE, headers=caller.headers)
    assert answer.status_code == 200
    found = protocol.DecoderList.model_validate(answer.json())
    assert found.client == caller.client.name
    return [decoder.decoder for decoder in found.decoders]


# --- over HTTP -----------------------------------------------------------------------------------------------------


def test_register_list_delete(live: Running) -> None:
    caller = live.caller()
    spec, state = mlp(4, 3)
    first = register(caller, write(spec, state))
    assert first.status_code == 201
    assert first.json() == {
        "decoder": decoder_id(spec, state),
        "latent": 4,
        "image_shape": list(SHAPE),
        "bytes": 4 * (4 * 3 + 3 + 3 * 64 + 64),
    }
    again = register(caller, gzip.compress(write(spec, state)), **{"Content-Encoding": "gzip"})
    assert (again.status_code, again.json()) == (200, first.json())
    other = register(caller, content(1)).json()["decoder"]
    assert held_by(caller) == [first.json()["decoder"], other]
    gone = caller.http.delete(f"{ROUTE}/{other}", headers=caller.headers)
    assert (gone.status_code, gone.content) == (204, b"")
    assert held_by(caller) == [first.json()["decoder"]]
    refused(caller.http.delete(f"{ROUTE}/{other}", headers=caller.headers), 404, "decoder-unknown")
    assert (caller.budget()["spent"], caller.budget()["held"]) == (0, 0)


def test_a_decoder_is_its_client_s_alone(live: Running) -> None:
    owner, other = live.caller(), live.caller()
    name = register(owner, content()).json()["decoder"]
    assert held_by(other) == []
    unknown = refused(other.http.delete(f"{ROUTE}/{name}", headers=other.headers), 404, "decoder-unknown")
    with pytest.raises(DecoderUnknown):
        live.service.decoders.get(other.client.id, name)
    # What another client has and what nobody has are told apart by nothing.
    nobody = refused(other.http.delete(f"{ROUTE}/{'0' * 32}", headers=other.headers), 404, "decoder-unknown")
    assert {**unknown, "detail": "", "error": ""} == {**nobody, "detail": "", "error": ""}
    assert str(unknown["detail"]).replace(name, "0" * 32) == nobody["detail"]
    assert register(other, content()).status_code == 201  # new to this client, whoever else has it
    assert other.http.delete(f"{ROUTE}/{name}", headers=other.headers).status_code == 204
    assert held_by(owner) == [name]
    assert live.service.decoders.get(owner.client.id, name).latent == 4


@pytest.mark.parametrize(("method", "path"), [("POST", ROUTE), ("GET", ROUTE), ("DELETE", f"{ROUTE}/x")])
def test_a_key_is_needed(live: Running, method: str, path: str) -> None:
    body = content() if method == "POST" else b""
    refused(live.http.request(method, path, content=body), 401, "unauthorized")


def test_the_metadata_says_so(live: Running) -> None:
    parameters = live.http.get(protocol.METADATA_ROUTE).json()["parameters"]
    assert {name: value for name, value in parameters.items() if "decoder" in name} == {
        "decoders": True,
        "max_decoder_bytes": 64 * 1024,
        "max_decoder_layers": 64,
        "max_decoder_activations": 4 * MIB,
        "max_decoder_multiply_adds": 256 * MIB,
        "max_client_decoders": 3,
    }


def test_off_unless_allowed(tmp_path: Path) -> None:
    settings = Settings(ledger=f"sqlite:///{tmp_path}/l.db", signing_key=tmp_path / "key")
    with running(settings, Oracle(Held(), SHAPE, 3)) as started:
        assert "decoder" not in started.http.get(protocol.METADATA_ROUTE).text
        caller = started.caller()
        answers = [
            register(caller, content()),
            caller.http.get(ROUTE, headers=caller.headers),
            caller.http.delete(f"{ROUTE}/x", headers=caller.headers),
        ]
        for answer in answers:
            problem = refused(answer, 403, "decoders-not-allowed")
            assert "--allow-decoders" in str(problem["detail"])
        with pytest.raises(DecodersNotAllowed):
            started.service.decoders.get(caller.client.id, "x")


def test_queries_are_answered_while_a_decoder_is_built(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    caller, slow, go = live.caller(), threading.Event(), threading.Event()
    registered = Decoders.register

    def wait(*args: Any) -> tuple[Decoder, bool]:
        slow.set()
        assert go.wait(30)
        return registered(*args)

    monkeypatch.setattr(Decoders, "register", wait)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(register(caller, content())))
    thread.start()
    assert slow.wait(30)
    assert caller.infer(digits(2)).status_code == 200
    go.set()
    thread.join(30)
    assert answers[0].status_code == 201


def test_registering_changes_no_answer_and_no_thread_count(live: Running) -> None:
    caller, threads = live.caller(), torch.get_num_threads()
    images = digits(50)
    expected = logits_of(caller.infer(images))
    stop = threading.Event()

    def churn() -> None:
        other, seed = live.caller(), 0
        while not stop.is_set():
            seed += 1
            assert register(other, content(seed)).status_code == 201

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            np.testing.assert_array_equal(logits_of(caller.infer(images)), expected)
    finally:
        stop.set()
        thread.join(30)
    assert torch.get_num_threads() == threads


# --- limits --------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(live: Running) -> None:
    caller, other = live.caller(), live.caller()
    others = register(other, content()).json()["decoder"]
    names = [register(caller, content(seed)).json()["decoder"] for seed in range(3)]
    in_hand = live.service.decoders.get(caller.client.id, names[1])
    live.service.decoders.get(caller.client.id, names[0])
    fourth = register(caller, content(3)).json()["decoder"]
    assert held_by(caller) == [names[1], names[0], fourth]
    fifth = register(caller, content(4)).json()["decoder"]
    assert held_by(caller) == [names[0], fourth, fifth]
    assert held_by(other) == [others]
    # A request in flight goes on with what it was given.
    assert in_hand(np.zeros((2, 4), np.float32)).shape == (2, *SHAPE)


def limited(**limits: int) -> Decoders:
    return Decoders(Settings(allow_decoders=True, **limits), SHAPE)  # type: ignore[arg-type]


def test_all_clients_together_hold_so_many() -> None:
    decoders = limited(max_decoders=3)
    names = [decoders.register(client, content())[0].id for client in (1, 2, 3)]
    decoders.get(1, names[0])
    decoders.register(4, content())
    assert [len(decoders.of(client)) for client in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_all_clients_together_hold_so_many_bytes() -> None:
    one = 4 * mlp(4, 3)[0].cost().weight_bytes // 4
    decoders = limited(max_decoders_bytes=2 * one)
    for client in (1, 2, 3):
        decoders.register(client, content())
    assert [len(decoders.of(client)) for client in (1, 2, 3)] == [0, 1, 1]
    alone = limited(max_decoders_bytes=1)
    assert alone.register(1, content())[1]  # one always finds room: its own limit is another
    assert len(alone.of(1)) == 1


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ("max_decoder_bytes", 1000),
        ("max_decoder_layers", 4),
        ("max_decoder_activations", 127),
        ("max_decoder_multiply_adds", 4 * 3 + 3 + 3 * 64 + 64 - 1),
    ],
)
def test_each_limit(limit: str, most: int) -> None:
    with pytest.raises(TooLarge, match=str(most)) as refusal:
        limited(**{limit: most}).register(1, content())
    assert refusal.value.extensions == {"limit": limit, limit: most}
    exactly = {"max_decoder_bytes": len(content()), "max_decoder_layers": 5}.get(limit, most + 1)
    assert limited(**{limit: exactly}).register(1, content())[1]


def test_the_body_is_bounded_before_it_is_read(live: Running) -> None:
    caller = live.caller()
    large = write(*mlp(256, 100))
    assert len(large) > 64 * 1024
    for body, headers in ((large, {}), (gzip.compress(bytes(10 * MIB)), {"Content-Encoding": "gzip"})):
        problem = refused(register(caller, body, **headers), 413, "too-large")
        assert problem["limit"] == "max_decoder_bytes"
        assert problem["max_decoder_bytes"] == 64 * 1024
    refused(register(caller, content(), **{"Content-Encoding": "zstd"}), 400, "malformed-request")


def test_another_oracle_s_images(live: Running) -> None:
    problem = refused(register(live.caller(), write(*mlp(4, 3, (1, 4, 16)))), 400, "malformed-request")
    assert "[1, 4, 16]" in str(problem["detail"])
    assert "[1, 8, 8]" in str(problem["detail"])


ENORMOUS: dict[str, dict[str, Any]] = {
    "linear": {
        "latent": 10**9,
        "layers": [
            {"kind": "linear", "features_in": 10**9, "features_out": 10**9},
            {"kind": "linear", "features_in": 10**9, "features_out": 64},
        ],
    },
    "beyond any integer": {
        "latent": 10**30,
        "layers": [{"kind": "linear", "features_in": 10**30, "features_out": 64}],
    },
    "a lone stride": {
        "latent": 4,
        "layers": [
            {"kind": "unflatten", "shape": [1, 2, 2]},
            {"kind": "conv-transpose", "channels_in": 1, "channels_out": 1, "kernel": 1, "stride": 1000},
            {"kind": "conv", "channels_in": 1, "channels_out": 1, "kernel": 1, "stride": 1000},
            {"kind": "flatten"},
            {"kind": "linear", "features_in": 4, "features_out": 64},
        ],
    },
    "strides": {
        "latent": 4,
        "layers": [
            {"kind": "unflatten", "shape": [1, 2, 2]},
            *(4 * [{"kind": "conv-transpose", "channels_in": 1, "channels_out": 1, "kernel": 16, "stride": 16}]),
            {"kind": "flatten"},
            {"kind": "linear", "features_in": 131072**2, "features_out": 64},
        ],
    },
    "kernel": {
        "latent": 1,
        "layers": [
            {"kind": "unflatten", "shape": [1, 1, 1]},
            {"kind": "conv-transpose", "channels_in": 1, "channels_out": 1, "kernel": 10**6, "padding": 499996},
        ],
    },
    "strides back and forth": {
        "latent": 4,
        "layers": [
            {"kind": "unflatten", "shape": [1, 2, 2]},
            *(3 * [{"kind": "conv-transpose", "channels_in": 1, "channels_out": 1, "kernel": 16, "stride": 16}]),
            *(3 * [{"kind": "conv", "channels_in": 1, "channels_out": 1, "kernel": 16, "stride": 16}]),
            {"kind": "flatten"},
            {"kind": "linear", "features_in": 4, "features_out": 64},
        ],
    },
}


@pytest.mark.parametrize("name", ENORMOUS)
def test_enormous_decoders_are_refused_before_they_take_memory(live: Running, name: str) -> None:
    caller, this = live.caller(), psutil.Process()
    tail = [{"kind": "unflatten", "shape": list(SHAPE)}, {"kind": "sigmoid"}]
    if name == "kernel":
        tail = [{"kind": "sigmoid"}]
    spec = {"image_shape": list(SHAPE), **ENORMOUS[name]}
    spec["layers"] = [*spec["layers"], *tail]
    # As far as the header goes, the weights are what they should be.
    header = {"__metadata__": {"decoder": json.dumps(spec)}}
    try:
        shapes = DecoderSpec.model_validate(spec).tensors()
    except ValueError:
        shapes = {}
    end = 0
    for weight, shape in shapes.items():
        size = 4 * int(np.prod([int(n) for n in shape], dtype=object))
        header[weight] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}  # type: ignore[dict-item]
        end += size
    text = json.dumps(header).encode()
    before = this.memory_info().rss
    began = time.perf_counter()
    answer = register(caller, struct.pack("<Q", len(text)) + text)
    assert answer.status_code in (400, 413), answer.text
    assert time.perf_counter() - began < 5
    assert this.memory_info().rss - before < 64 * MIB


# --- hostile files -------------------------------------------------------------------------------------------------


def mutated(chance: random.Random, good: bytes) -> bytes:
    """A decoder's file as it should not be."""
    (length,) = struct.unpack("<Q", good[:8])
    body = bytearray(good)
    # Files that are still good take the longest: the server measures what they decode to.
    (kind,) = chance.choices(range(7), (1, 24, 8, 8, 24, 8, 8))
    if kind == 0:  # bits, anywhere
        for _ in range(chance.randint(1, 8)):
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    elif kind == 1:  # bits of the header
        for _ in range(chance.randint(1, 4)):
            body[8 + chance.randrange(length)] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del body[chance.randrange(len(body)) :]
    elif kind == 3:
        body[:8] = struct.pack("<Q", chance.choice([0, 1, 2, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]))
    elif kind == 4:  # one number in the header
        text = bytes(body[8 : 8 + length])
        digits_at = [i for i, c in enumerate(text) if 48 <= c <= 57]
        at = chance.choice(digits_at)
        new = chance.choice([b"0", b"-1", b"1e9", b"999999999", b"1000000000000000000000", b"null", b"NaN", b"1.5"])
        text = text[:at] + new + text[at + 1 :]
        body = bytearray(struct.pack("<Q", len(text)) + text + bytes(body[8 + length :]))
    elif kind == 5:  # weights that are no numbers
        at = 8 + length + 4 * chance.randrange((len(body) - 8 - length) // 4)
        body[at : at + 4] = struct.pack("<f", chance.choice([float("nan"), float("inf"), -float("inf")]))
    else:
        body = bytearray(chance.randbytes(chance.randrange(200)))
    return bytes(body)


def test_hundreds_of_mutated_files(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    opened = Ledger.open(f"sqlite:///{ledger}")
    _, key = opened.add_client("fuzz", 10)
    opened.close()
    files = [write(*made(pyramid(SHAPE, 8))), content(), write(*mlp(7, 5))]
    chance = random.Random(0)
    with process(ledger, "--engine", "eager", "--allow-decoders", "--max-decoder-layers", "9") as (child, url):
        parameters = httpx.get(url + protocol.METADATA_ROUTE).json()["parameters"]
        assert (parameters["decoders"], parameters["max_decoder_layers"]) == (True, 9)
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        statuses: Counter[int] = Counter()

        def send(body: bytes) -> None:
            connection.request("POST", ROUTE, body, {"Authorization": f"Bearer {key.reveal()}"})
            answer = connection.getresponse()
            said = json.loads(answer.read())
            statuses[answer.status] += 1
            if answer.status >= 300:
                assert answer.status < 500, (body, said)
                assert BY_CODE[said["code"]].status == answer.status

        for good in files:  # kernels and buffers are made once
            send(good)
        for _ in range(60):
            send(mutated(chance, chance.choice(files)))
        before = psutil.Process(child.pid).memory_info().rss
        for _ in range(400):
            send(mutated(chance, chance.choice(files)))
        grown = psutil.Process(child.pid).memory_info().rss - before
        connection.request("GET", ROUTE, headers={"Authorization": f"Bearer {key.reveal()}"})
        assert connection.getresponse().status == 200
        connection.close()
    assert grown < 24 * MIB
    assert statuses[400] > 250
    assert statuses[422] > 10
    assert statuses[201] > 2  # a weight changed by a bit is another decoder


# --- what it computes ----------------------------------------------------------------------------------------------

DECODERS = {
    "paper": lambda: made(paper_cifar()),
    "pyramid 1x8x8": lambda: made(pyramid(SHAPE, 8)),
    "pyramid 3x32x32, latent 48": lambda: made(pyramid((3, 32, 32), 48)),
    "pyramid 3x17x23": lambda: made(pyramid((3, 17, 23), 33, width=8)),
    "principal components": lambda: made(principal((3, 9, 7), 33)),
    "perceptron": lambda: mlp(7, 5),
    "wide perceptron": lambda: mlp(100, 33, (3, 5, 5)),
}


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
def test_images_are_the_module_s_and_do_not_depend_on_their_company(make: Any) -> None:
    spec, state = make()
    decoder = Decoder(spec, state)
    module = build(spec.layers)
    module.load_state_dict(state)
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((150, spec.latent)).astype(np.float32)
    images = decoder(latents)
    assert (images.dtype, images.shape) == (np.float32, (150, *spec.image_shape))
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std(0).mean() > 1e-3  # else any decoder would do
    with torch.no_grad():
        np.testing.assert_allclose(images, module(torch.from_numpy(latents)).numpy(), rtol=0, atol=1e-6)
    for _ in range(25):
        rows = generator.permutation(150)[: generator.integers(1, 150)]
        np.testing.assert_array_equal(decoder(latents[rows]).view(np.int32), images[rows].view(np.int32))
    for row in range(8):
        np.testing.assert_array_equal(decoder(latents[row : row + 1])[0].view(np.int32), images[row].view(np.int32))


def test_it_reads_what_requests_hold() -> None:
    decoder = Decoder(*mlp(4, 3))
    latents = np.random.default_rng(0).random((5, 4), dtype=np.float32)
    body = b"x" + latents.tobytes()
    view = np.frombuffer(body, np.uint8)[1:].view(np.float32).reshape(5, 4)  # neither writable nor aligned
    np.testing.assert_array_equal(decoder(view), decoder(latents))
    np.testing.assert_array_equal(decoder(np.asfortranarray(latents)), decoder(latents))
    assert decoder(latents[:0]).shape == (0, *SHAPE)


def overflowing() -> tuple[DecoderSpec, dict[str, Tensor]]:
    """Finite weights, and infinity minus infinity for a latent whose first coordinate is large."""
    layers: tuple[Layer, ...] = (
        Linear(features_in=1, features_out=2),
        Linear(features_in=2, features_out=64),
        SIGMOID,
        Unflatten(shape=SHAPE),
    )
    spec = DecoderSpec(latent=1, image_shape=SHAPE, layers=layers)
    state = {name: torch.zeros(shape) for name, shape in spec.tensors().items()}
    state["0.weight"] += 1e38
    state["1.weight"] += torch.tensor([1.0, -1.0])
    return spec, state


def test_an_image_that_is_no_number() -> None:
    decoder = Decoder(*overflowing())
    latents = np.zeros((9, 1), np.float32)
    assert decoder(latents).shape == (9, *SHAPE)
    latents[7] = 100
    with pytest.raises(UnacceptableValues, match="not finite") as refusal:
        decoder(latents)
    assert refusal.value.extensions == {"row": 7}


def test_what_is_found_out_while_computing_is_told_and_free(tmp_path: Path) -> None:
    decoder = Decoder(*overflowing())

    def engine(images: Tensor) -> Tensor:
        decoder(np.full((len(images), 1), 100, np.float32))
        return images.flatten(1)

    settings = Settings(ledger=f"sqlite:///{tmp_path}/l.db", signing_key=tmp_path / "key")
    with running(settings, Oracle(engine, SHAPE, 64)) as started:
        caller = started.caller()
        assert refused(caller.infer(digits(2)), 422, "unacceptable-values")["row"] == 0
        assert (caller.budget()["spent"], caller.budget()["held"]) == (0, 0)


def test_what_torch_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("could not create a primitive\nsecond line")

    monkeypatch.setattr(nn.Linear, "forward", fail)
    with pytest.raises(MalformedRequest, match=r"could not create a primitive; it was not registered"):
        limited().register(1, content())


def test_uncommon_layers_are_computed() -> None:
    layers: tuple[Layer, ...] = (
        Unflatten(shape=(1, 1, 1)),
        ConvTranspose(channels_in=1, channels_out=1, kernel=16, stride=16, padding=4),
        SIGMOID,
    )
    spec = DecoderSpec(latent=1, image_shape=SHAPE, layers=layers)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in spec.tensors().items()}
    expected = torch.sigmoid(0.5 * state["1.weight"][0, 0, 4:-4, 4:-4] + state["1.bias"])
    decoder, _ = limited().register(1, write(spec, state))
    np.testing.assert_allclose(decoder(np.full((1, 1), 0.5, np.float32))[0, 0], expected.numpy(), atol=1e-6)
