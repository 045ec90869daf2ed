"""The reconstruction task, live: images for images, and all the rest as for logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from oracle_support import Caller, Running, digits, logits_of, refused, running
from reconstructor_support import MEASUREMENT, NAME, write_reconstructor
from typer.testing import CliRunner

from oracle_server.cli import app
from oracle_server.loading import SHIPPED, load_classifier, load_model
from oracle_server.oracle import Oracle, build_oracle
from oracle_server.policy.spec import AnswerSpec, PolicyError, load_policy
from oracle_server.settings import Settings
from shared.measurements import BackProjection, Measurement
from shared.models.autoencoder import Autoencoder, pyramid
from shared.models.classifiers import SmallCNN
from shared.models.decoder import decoder_of, write
from shared.models.loading import load_reconstructor
from shared.models.weight_files import ModelError, WeightsInfo, read_weights, write_weights
from shared.wire import codec, protocol
from shared.wire.probes import Probes, Seeds

SHAPE, D = (1, 8, 8), 64
OPTIONS: dict[str, Any] = {"task": "reconstruction", "engine": "eager"}  # other engines have a test of their own


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "r.safetensors"
    write_reconstructor(path)
    return path


@pytest.fixture(scope="module")
def live(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A reconstructor, live; decoders allowed."""
    ledger = tmp_path_factory.mktemp("reconstruction") / "ledger.db"
    settings = Settings(**OPTIONS, weights=str(weights), ledger=str(ledger), allow_decoders=True)
    with running(settings) as started:
        yield started


@pytest.fixture
def caller(live: Running) -> Caller:
    return live.caller()


def made_of(response: httpx.Response) -> np.ndarray:
    return logits_of(response, "reconstruction")


def expected(images: np.ndarray) -> np.ndarray:
    """What the module that was written makes of images, by itself."""
    module = write_reconstructor(Path("w.safetensors"))
    with torch.inference_mode():
        made: np.ndarray = module(torch.from_numpy(images)).numpy()
    return made


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- answers -------------------------------------------------------------------------------------------------------


def test_images_are_answered_with_what_the_module_makes_of_them(live: Running, caller: Caller) -> None:
    images = digits(5)
    answer = caller.infer(images)
    assert made_of(answer).shape == (5, *SHAPE)
    np.testing.assert_allclose(made_of(answer), expected(images), atol=1e-5)
    assert answer.headers["Query-Charge"] == "5"
    assert live.ledger.account(caller.client.id).spent == 5
    as_json = caller.infer(images, binary=False)
    assert as_json.json()["outputs"][0]["shape"] == [5, *SHAPE]
    np.testing.assert_allclose(made_of(as_json), made_of(answer), atol=1e-6)


def test_the_same_key_is_answered_again_for_nothing(live: Running, caller: Caller) -> None:
    first, again = (caller.infer(digits(3), Idempotency_Key="k") for _ in range(2))
    np.testing.assert_array_equal(made_of(first), made_of(again))
    assert [a.headers["Query-Charge"] for a in (first, again)] == ["3", "0"]
    refused(caller.infer(digits(3, seed=1), Idempotency_Key="k"), 422, "idempotency-conflict")
    poor = live.caller(2)
    refused(poor.infer(digits(3)), 403, "budget-exhausted")
    assert live.ledger.account(poor.client.id).spent == 0


def test_factored_rows_are_answered_as_images_to_the_bit(caller: Caller) -> None:
    asked = Probes(
        (0.1 + 0.8 * digits(3)).reshape(3, D), np.full(6, 0.01, np.float32), Seeds(np.array([7], np.uint64)), "forward"
    )
    answer = caller.post(codec.encode_request(asked.inputs()))
    assert made_of(answer).shape == (3, 7, *SHAPE)
    assert answer.headers["Query-Charge"] == "21"
    dense = made_of(caller.infer(asked.expand(0, 21).reshape(-1, *SHAPE)))
    np.testing.assert_array_equal(made_of(answer).reshape(dense.shape), dense)
    part = made_of(caller.post(codec.encode_request(asked.inputs(), parameters={"rows": [5, 9]})))
    np.testing.assert_array_equal(part, dense[5:9])


def test_a_decoder_is_merged_into_it(live: Running, caller: Caller) -> None:
    autoencoder = Autoencoder(pyramid(SHAPE, 4, width=4)).eval()
    registered = caller.http.post(
        protocol.DECODERS_ROUTE, content=write(*decoder_of(autoencoder)), headers=caller.headers
    )
    assert registered.status_code == 201
    latents = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    parameters = {"decoder": registered.json()["decoder"]}
    answer = caller.post(codec.encode_request({"latents": latents}, parameters=parameters))
    with torch.inference_mode():
        decoded = autoencoder.decode(torch.from_numpy(latents)).numpy()
    assert made_of(answer).shape == (3, *SHAPE)
    np.testing.assert_allclose(made_of(answer), expected(decoded), atol=1e-5)
    asked = Probes(latents, np.full(2, 0.01, np.float32), Seeds(np.array([7], np.uint64)), "central")
    factored = caller.post(codec.encode_request(asked.inputs(), parameters=parameters | {"difference": "central"}))
    assert made_of(factored).shape == (3, 4, *SHAPE)


def test_an_answer_has_the_same_bits_in_any_company(live: Running) -> None:
    images = digits(40)
    alone = np.concatenate([made_of(live.caller().infer(image[None])) for image in images])
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda cut: made_of(live.caller().infer(images[cut:])), (0, 1, 7, 30)))
    for cut, part in zip((0, 1, 7, 30), parts, strict=True):
        np.testing.assert_array_equal(part, alone[cut:])


def test_an_unmodified_client_can_ask(live: Running, caller: Caller) -> None:
    images = digits(4)
    with triton.InferenceServerClient(live.address) as client:
        metadata = client.get_model_metadata("classifier")
        tensor = triton.InferInput("images", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images)
        wanted = [triton.InferRequestedOutput("reconstruction")]
        answer = client.infer("classifier", [tensor], outputs=wanted, headers=caller.headers)
    assert metadata["outputs"] == [{"name": "reconstruction", "datatype": "FP32", "shape": [-1, *SHAPE]}]
    np.testing.assert_array_equal(answer.as_numpy("reconstruction"), made_of(caller.infer(images)))


def test_logits_are_not_an_output_of_it(caller: Caller) -> None:
    refusal = refused(
        caller.post(codec.encode_request({"images": digits(2)}, outputs=("logits",))), 400, "malformed-request"
    )
    assert "the one output is 'reconstruction'" in str(refusal["detail"])
    assert caller.budget()["spent"] == 0


def test_the_metadata_tells_the_public_physics_and_nothing_else(live: Running, caller: Caller) -> None:
    metadata = live.http.get(protocol.METADATA_ROUTE).json()
    parameters = metadata["parameters"]
    assert parameters["task"] == "reconstruction"
    assert Measurement.model_validate(parameters["measurement"]) == MEASUREMENT
    text = json.dumps(metadata)
    assert NAME not in text
    assert "by hand" not in text
    # What it is asked about is made on the other side, of nothing but that.
    seen = BackProjection(Measurement(**parameters["measurement"]), SHAPE)(digits(3))
    np.testing.assert_allclose(made_of(caller.infer(seen)), expected(seen), atol=1e-5)


def test_a_classifiers_metadata_have_no_task(tmp_path: Path) -> None:
    with running(Settings(ledger=str(tmp_path / "ledger.db"))) as server:
        metadata = server.http.get(protocol.METADATA_ROUTE).json()
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    assert not {"task", "measurement"} & set(metadata["parameters"])


def test_colours_and_sides_that_differ(tmp_path: Path) -> None:
    shape = (3, 5, 7)
    model = write_reconstructor(tmp_path / "w.safetensors", shape)
    images = np.random.default_rng(0).random((4, *shape), dtype=np.float32)
    settings = Settings(**OPTIONS, weights="w.safetensors", ledger=str(tmp_path / "ledger.db"))
    with running(settings) as server:
        answer = made_of(server.caller().infer(images))
    with torch.inference_mode():
        np.testing.assert_allclose(answer, model(torch.from_numpy(images)).numpy(), atol=1e-5)


@pytest.mark.parametrize("engine", ["eager", "compile", "onnxruntime"])
def test_every_engine_computes_it(weights: Path, engine: str) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    oracle = build_oracle(Settings(task="reconstruction", weights=str(weights), engine=engine, engine_block=16))
    images = digits(9)
    made = oracle.predict(images)
    assert made.shape == (9, oracle.classes) == (9, D)
    np.testing.assert_allclose(made.reshape(images.shape), expected(images), atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([oracle.predict(image[None]) for image in images]), made)


def test_what_is_not_finite_is_not_written_in_json(tmp_path: Path) -> None:
    oracle = Oracle(lambda images: torch.full((len(images), D), torch.nan), SHAPE, D, measurement=MEASUREMENT)
    with running(Settings(ledger=str(tmp_path / "ledger.db")), oracle) as server:
        caller = server.caller()
        refusal = refused(caller.infer(digits(2), binary=False), 500, "internal-error")
        assert "answers are not all finite" in str(refusal["detail"])
        assert server.ledger.account(caller.client.id).spent == 0
        assert np.isnan(made_of(caller.infer(digits(2)))).all()


# --- policies ------------------------------------------------------------------------------------------------------


def test_rounding_noise_and_limits_are_for_images_too(weights: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    options: dict[str, Any] = OPTIONS | {"weights": str(weights), "policy": policy}
    policy.write_text("[answers]\ndecimals = 2\n[limits]\nbatch_rows = 4")
    with running(Settings(**options, ledger=str(tmp_path / "rounded.db"))) as server:
        caller, images = server.caller(), digits(4)
        rounded = made_of(caller.infer(images))
        np.testing.assert_allclose(rounded, expected(images), atol=0.0051)
        np.testing.assert_allclose(rounded * 100, np.round(rounded.astype(np.float64) * 100), atol=1e-4)
        assert refused(caller.infer(digits(5)), 413, "too-large")["max_rows"] == 4
    policy.write_text("seed = 3\n[answers]\nnoise = {sigma = 0.1, kind = 'deterministic'}")
    with running(Settings(**options, ledger=str(tmp_path / "noisy.db"))) as server:
        images = digits(50)
        noisy = made_of(server.caller().infer(images))
        np.testing.assert_array_equal(noisy, made_of(server.caller().infer(images)))
        assert (noisy - expected(images)).std() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("line", ["scores = 'probabilities'", "scores = 'label'", "temperature = 2.0", "top_k = 3"])
def test_what_is_for_class_scores_is_refused_at_the_start(weights: Path, tmp_path: Path, line: str) -> None:
    policy, ledger = tmp_path / "policy.toml", tmp_path / "ledger.db"
    policy.write_text(f"[answers]\n{line}")
    options = ("--weights", str(weights), "--policy", str(policy), "--ledger", str(ledger), "--port", "0")
    result = CliRunner().invoke(app, ["serve", "--task", "reconstruction", *options])
    assert result.exit_code == 2
    assert f"answers.{line.split()[0]} change scores of classes" in result.stderr
    assert not ledger.exists()
    assert load_policy(policy).answers != AnswerSpec()  # a classifier may have it


def test_each_key_that_is_for_class_scores_is_named(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("[answers]\ntop_k = 3\ntemperature = 2.0\ndecimals = 2")
    with pytest.raises(PolicyError, match=r"answers\.temperature and answers\.top_k change"):
        load_policy(tmp_path / "policy.toml", "reconstruction")


# --- loading -------------------------------------------------------------------------------------------------------


def test_it_is_loaded_alike_on_both_sides(weights: Path) -> None:
    mine = load_reconstructor(weights)
    served = load_model(Settings(task="reconstruction", weights=str(weights)))
    assert mine.image_shape == served.image_shape == SHAPE
    assert mine.measurement == MEASUREMENT
    assert not mine.module.training
    images = torch.from_numpy(digits(3))
    with torch.inference_mode():
        made = mine.module(images)
        torch.testing.assert_close(made, served.module(images), rtol=0, atol=0)
    np.testing.assert_allclose(made.numpy(), expected(digits(3)).reshape(3, D), atol=1e-6)


def test_what_a_weights_file_says_is_read_back(weights: Path) -> None:
    info = read_weights(weights)[1]
    assert info == WeightsInfo(NAME, command="by hand", image_shape=SHAPE, measurement=MEASUREMENT)


def test_every_mistake_is_told_apart(weights: Path, tmp_path: Path) -> None:
    classifier, bare = str(SHIPPED["digits-cnn"]), tmp_path / "bare.safetensors"
    state, _ = read_weights(weights)
    write_weights(bare, state, WeightsInfo())
    write_weights(
        tmp_path / "foreign.safetensors",
        SmallCNN().state_dict(),
        WeightsInfo(image_shape=SHAPE, measurement=MEASUREMENT),
    )
    write_weights(
        tmp_path / "colours.safetensors", state, WeightsInfo(NAME, image_shape=(3, 8, 8), measurement=MEASUREMENT)
    )
    reconstruction: dict[str, Any] = {"task": "reconstruction"}
    for options, message in (
        (reconstruction, "'small-reconstructor' needs --weights FILE: 'oracle-server train-reconstructor'"),
        (
            reconstruction | {"weights": classifier},
            "holds the classifier 'digits-cnn': it is for --task classification",
        ),
        (reconstruction | {"weights": "none.safetensors"}, "no weights file"),
        (reconstruction | {"weights": str(bare)}, "does not say which images"),
        (reconstruction | {"weights": "foreign.safetensors"}, "do not fit"),
        (reconstruction | {"weights": "colours.safetensors"}, "do not fit"),
        (reconstruction | {"weights": str(weights), "model": "digits-cnn"}, "no reconstructor is called 'digits-cnn'"),
        (reconstruction | {"weights": str(weights), "classes": 64}, "--classes is for classifiers"),
        (reconstruction | {"weights": str(weights), "image_size": 8}, "--image-size is for classifiers"),
        ({"weights": str(weights)}, "holds a reconstructor: it is for --task reconstruction"),
        ({"model": NAME, "weights": str(weights)}, "is a reconstructor: it is for --task reconstruction"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(Settings(**options))
    assert load_model(Settings()).image_shape == load_classifier(Settings()).image_shape


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_shape", "[1, 8]"),
        ("image_shape", "[1, 8, 0]"),
        ("image_shape", '"8x8"'),
        ("measurement", "{}"),
        ("measurement", '{"seed": 1, "rows": 5, "low": 1, "high": 1}'),
        ("measurement", "NaN"),
    ],
)
def test_a_header_that_cannot_be_read_names_its_field(name: str, value: str) -> None:
    with pytest.raises(ModelError, match=f"has a '{name}' that cannot be read"):
        WeightsInfo.from_header(WeightsInfo(NAME).header() | {name: value})
