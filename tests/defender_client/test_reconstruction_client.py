"""A reconstructor as the client sees it: flat answers, the public physics, and recordings."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from defender_support import spent
from oracle_support import Caller, Running, digits, running
from reconstructor_support import MEASUREMENT, write_reconstructor

from defender_client.oracle import OracleInfo
from defender_client.oracle_client import RemoteOracle
from defender_client.query_log import QueryLog
from defender_client.questions import Factored, Images, Latents
from defender_client.recording import ANSWERS_FILE, Recorder, Recording
from defender_client.replay import Replay
from oracle_server.settings import Settings
from shared.measurements import Measurement
from shared.models.autoencoder import Autoencoder, pyramid
from shared.models.decoder import decoder_of, write
from shared.wire import codec, protocol
from shared.wire.errors import UnexpectedAnswer
from shared.wire.probes import Probes, Seeds

SHAPE, D = (1, 8, 8), 64
PROBES = Probes(
    (0.1 + 0.8 * digits(3)).reshape(3, D), np.full(6, 0.01, np.float32), Seeds(np.array([7], np.uint64)), "forward"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reconstruction")


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Running]:
    weights = folder / "r.safetensors"
    write_reconstructor(weights)
    settings = Settings(
        task="reconstruction",
        weights=str(weights),
        ledger=str(folder / "ledger.db"),
        engine="eager",
        max_batch_rows=16,
        allow_decoders=True,
    )
    with running(settings) as started:
        yield started


@pytest.fixture
def payer(live: Running) -> Caller:
    return live.caller()


@pytest.fixture
def remote(live: Running, payer: Caller) -> Iterator[RemoteOracle]:
    with RemoteOracle(live.url, payer.key, run_id="run", retry_seconds=20) as oracle:
        yield oracle


def expected(images: np.ndarray, tmp_path: Path) -> np.ndarray:
    """What the module that was written makes of images, flat."""
    module = write_reconstructor(tmp_path / "w.safetensors")
    with torch.inference_mode():
        made: np.ndarray = module(torch.from_numpy(images)).flatten(1).numpy()
    return made


# --- a live one ----------------------------------------------------------------------------------------------------


def test_what_it_says_of_itself(remote: RemoteOracle) -> None:
    info = remote.info
    assert (info.task, info.image_shape, info.output_shape, info.classes) == ("reconstruction", SHAPE, SHAPE, D)
    assert info.measurement == MEASUREMENT
    assert (info.scores, info.max_rows, info.factored, info.decoders) == ("logits", 16, True, True)


def test_answers_are_flat_and_cost_their_rows(
    remote: RemoteOracle, live: Running, payer: Caller, tmp_path: Path
) -> None:
    images = digits(40)  # in three requests
    made = remote.query(images, purpose="test", label="a")
    assert made.shape == (40, D)
    np.testing.assert_allclose(made, expected(images, tmp_path), atol=1e-5)
    assert spent(live, payer) == remote.log.total == 40
    np.testing.assert_array_equal(remote(torch.from_numpy(images)).numpy(), made)


def test_probes_and_latents_are_answered_flat_too(remote: RemoteOracle, tmp_path: Path) -> None:
    rows = PROBES.expand(0, len(PROBES)).reshape(-1, *SHAPE)
    answers = remote.ask(Factored(PROBES, None), purpose="test", label="f")  # 21 rows: in two parts, one of them cut
    np.testing.assert_array_equal(answers, remote.query(rows, purpose="test", label="d"))
    autoencoder = Autoencoder(pyramid(SHAPE, 4, width=4)).eval()
    name = remote.register(write(*decoder_of(autoencoder)))
    assert name is not None
    latents = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    with torch.inference_mode():
        decoded = autoencoder.decode(torch.from_numpy(latents)).numpy()
    answers = remote.ask(Latents(latents, name), purpose="test", label="l")
    np.testing.assert_allclose(answers, expected(decoded, tmp_path), atol=1e-5)


# --- recordings ----------------------------------------------------------------------------------------------------


def test_a_recorded_run_is_had_again_from_its_recording(live: Running, tmp_path: Path) -> None:
    caller, images = live.caller(), digits(20)
    with (
        closing(Recorder(tmp_path / ANSWERS_FILE)) as recorder,
        RemoteOracle(live.url, caller.key, recorder=recorder, run_id="run") as oracle,
    ):
        bought = [oracle.query(images, purpose="train", label="a")]
        bought.append(oracle.ask(Factored(PROBES, None), purpose="train", label="b"))
        info = oracle.info
    with Recording(tmp_path) as recording, closing(QueryLog(None)) as log:
        replay = Replay(recording, log)
        assert replay.info == info
        again = [replay.query(images, purpose="train", label="a")]
        again.append(replay.ask(Factored(PROBES, None), purpose="train", label="b"))
    for first, second in zip(bought, again, strict=True):
        np.testing.assert_array_equal(first, second)


def record(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """A record as the first version wrote it, by its description."""
    head = json.dumps(header).encode()
    lengths = struct.pack("<4sIII", b"ZOA1", len(head), len(payload), zlib.crc32(head))
    return lengths + struct.pack("<I", zlib.crc32(lengths)) + head + payload


def test_a_recording_of_before_there_were_reconstructors_is_read(tmp_path: Path) -> None:
    info = {"image_shape": [1, 8, 8], "classes": 3, "max_rows": 9, "scores": "logits", "factored": True}
    (tmp_path / ANSWERS_FILE).write_bytes(record({"kind": "oracle", "info": info}))
    with Recording(tmp_path) as recording:
        found = recording.info
    assert found == OracleInfo(image_shape=SHAPE, classes=3, max_rows=9, factored=True)
    assert (found.task, found.output_shape, found.measurement, found.output_name) == (
        "classification",
        None,
        None,
        "logits",
    )


# --- questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question", [Images(digits(2)), Latents(np.zeros((2, 4), np.float32), "d"), Factored(PROBES, None)], ids=type
)
def test_a_question_asks_for_the_output_by_its_name(question: Images | Latents | Factored) -> None:
    for encoded, name in ((question.encode(), "logits"), (question.encode("reconstruction"), "reconstruction")):
        assert set(codec.decode_request(encoded.body(), encoded.json_length).outputs) == {name}


# --- servers that are not ours -------------------------------------------------------------------------------------


METADATA: dict[str, Any] = {
    "name": "classifier",
    "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
    "outputs": [{"name": "reconstruction", "datatype": "FP32", "shape": [-1, 1, 16, 8]}],
    "parameters": {"task": "reconstruction", "measurement": MEASUREMENT.model_dump()},
}


def foreign(metadata: dict[str, Any], shape: tuple[int, ...] = (3, 1, 16, 8)) -> RemoteOracle:
    """A server of the same protocol, by somebody else, that answers so many ones."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == protocol.METADATA_ROUTE:
            return httpx.Response(200, json=metadata)
        name = metadata["outputs"][0]["name"]
        encoded = codec.encode_response({name: np.ones(shape, np.float32)}, binary={name: True})
        headers = {protocol.JSON_LENGTH_HEADER: str(encoded.json_length)}
        return httpx.Response(200, content=encoded.body(), headers=headers)

    return RemoteOracle("http://foreign", transport=httpx.MockTransport(handle), retry_seconds=0.3)


def test_a_reconstruction_may_be_of_another_size() -> None:
    with foreign(METADATA) as oracle:
        assert oracle.query(digits(3), purpose="test", label="a").tolist() == np.ones((3, 128)).tolist()
        assert oracle.info.output_shape == (1, 16, 8)


@pytest.mark.parametrize("shape", [(3, 128), (3, 1, 8, 16), (2, 1, 16, 8)], ids=str)
def test_an_answer_of_another_shape_is_not_read(shape: tuple[int, ...]) -> None:
    with foreign(METADATA, shape) as oracle, pytest.raises(UnexpectedAnswer, match=r"'reconstruction' \[3, 1, 16, 8\]"):
        oracle.query(digits(3), purpose="test", label="a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {}}, "does not say how its images are measured"),
        ({"parameters": {"measurement": [1]}}, "does not say how its images are measured"),
        ({"parameters": {"measurement": MEASUREMENT.model_dump() | {"rows": 0}}}, "does not say how its images"),
        ({"outputs": [{"name": "reconstruction", "datatype": "FP32", "shape": [-1, 64]}]}, "not a model that can be"),
        ({"outputs": [{"name": "reconstruction", "datatype": "FP32", "shape": [-1, 1, 0, 8]}]}, "not a model that can"),
        ({"outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]}, "not a model that can be read"),
    ],
)
def test_what_is_no_reconstructor_is_told(change: dict[str, Any], message: str) -> None:
    with foreign(METADATA | change) as oracle, pytest.raises(UnexpectedAnswer, match=message):
        oracle.query(digits(3), purpose="test", label="a")


def test_the_measurement_is_read_to_the_bit() -> None:
    measurement = Measurement(seed=2**63 - 1, rows=3, low=-0.1, high=1 / 3)
    with foreign(METADATA | {"parameters": {"measurement": measurement.model_dump()}}) as oracle:
        assert oracle.info.measurement == measurement
