"""What is hidden is told to the operator, and nothing of it to anybody else."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import httpx
import numpy as np
import pytest
from oracle_support import Running, digits, running
from sources_support import tiny, write_export, write_onnx
from typer.testing import CliRunner

from oracle_server.cli import app
from oracle_server.ledger import ADMIN
from oracle_server.loading import SHIPPED
from oracle_server.model_card import make_card
from oracle_server.settings import Settings
from shared.wire import codec, protocol


def card(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["model-card", "--json", *arguments])
    assert result.exit_code == 0, result.output
    told: dict[str, object] = json.loads(result.stdout)
    return told


def test_the_card_of_the_shipped_classifier(tmp_path: Path) -> None:
    told = card("--engine-cache", str(tmp_path), "--mean", "0.5")
    shipped = SHIPPED["digits-cnn"]
    assert told["model"] == "digits-cnn"
    assert told["architecture"] == "shared.models.classifiers.SmallCNN"
    assert told["files"] == {str(shipped): hashlib.sha256(shipped.read_bytes()).hexdigest()}
    assert told["image_shape"] == [1, 8, 8]
    assert (told["classes"], told["answers"], told["engine"]) == (10, "logits", None)
    preprocessing = told["preprocessing"]
    assert isinstance(preprocessing, dict)
    assert preprocessing["mean"] == [0.5]
    plain = CliRunner().invoke(app, ["model-card"])
    assert f"sha256 {hashlib.sha256(shipped.read_bytes()).hexdigest()}" in plain.stdout


def test_the_card_of_a_program(tmp_path: Path) -> None:
    network = tiny()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    onnx, export = write_onnx(network, tmp_path / "m.onnx", rows=2), write_export(network, tmp_path / "m.pt2")
    told = make_card(Settings(model=str(onnx)))
    assert (told.source, told.architecture, told.batch) == ("onnx", "an ONNX graph", "2 to 2")
    assert told.files == {str(onnx): hashlib.sha256(onnx.read_bytes()).hexdigest()}
    assert told.parameters is not None
    assert parameters - 12 <= told.parameters <= parameters  # the exporter folds the batch normalisation's 12 away
    told = make_card(Settings(model=str(export)))
    assert (told.source, told.parameters, told.batch) == ("torch.export", parameters, "1 to 8")


def test_the_same_weights_have_the_same_digest_whatever_file_they_are_in(tmp_path: Path) -> None:
    network = tiny()
    first = make_card(Settings(model=str(write_export(network, tmp_path / "a.pt2"))))
    again = make_card(Settings(model=str(write_export(network, tmp_path / "b.pt2", rows=1))))
    network.last.bias.data.add_(1e-6)
    other = make_card(Settings(model=str(write_export(network, tmp_path / "c.pt2"))))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256


def test_a_mistake_is_one_line() -> None:
    result = CliRunner().invoke(app, ["model-card", "--model", "resnet19"])
    assert result.exit_code == 2
    assert result.stderr.startswith("oracle-server: no classifier is called 'resnet19'")


def everything_told(server: Running) -> dict[str, httpx.Response]:
    """Each answer there is to have: of every documented route and method, with a client's key, an administrator's and
    none, of what is refused, and of queries."""
    http, caller = server.http, server.caller(100)
    _, admin = server.ledger.add_client("admin", 0, role=ADMIN)
    keys = {"": {}, "client": caller.headers, "admin": {"Authorization": f"Bearer {admin.reveal()}"}}
    answers: dict[str, httpx.Response] = {}
    shape = server.service.oracle.image_shape
    images = np.zeros((2, *shape), np.float32)
    for name, response in (
        ("query", caller.infer(images)),
        ("query in JSON", caller.infer(images, binary=False)),
        ("other shape", caller.infer(digits(1)[:, :, :3])),
        ("out of range", caller.infer(images + 2)),
        ("nothing", caller.post(codec.encode_request({"a": images}))),
        ("too many", caller.infer(np.zeros((101, *shape), np.float32))),
    ):
        answers[name] = response
    document = http.get("/openapi.json").json()
    paths = {path: set(item) for path, item in document["paths"].items()}
    paths |= {"/docs": {"get"}, "/openapi.json": {"get"}, "/": {"get"}, "/dashboard": {"get"}, "/nothing": {"get"}}
    for path, methods in paths.items():
        at = path.replace("{model}", protocol.MODEL_NAME).replace("{version}", protocol.MODEL_VERSION)
        for method in methods:
            for who, headers in keys.items():
                with http.stream(method, at, headers=headers, timeout=5) as response:
                    if "event-stream" not in response.headers.get("content-type", ""):
                        response.read()
                        answers[f"{method} {at} {who}"] = response
    return answers


@pytest.mark.parametrize("kind", ["named", "onnx", "export"])
def test_nothing_a_client_can_ask_for_says_what_is_hidden(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "oracle_server")
    secret = tmp_path / "a-secret-folder"
    secret.mkdir()
    model = {
        "named": lambda: "digits-cnn",
        "onnx": lambda: str(write_onnx(tiny(), secret / "secret.onnx")),
        "export": lambda: str(write_export(tiny(), secret / "secret.pt2")),
    }[kind]()
    settings = Settings(model=model, ledger=str(tmp_path / "l.db"), allow_decoders=True, engine_block=4, engine="auto")
    told = make_card(settings)
    with running(settings) as server:
        answers = everything_told(server)
        engine = server.service.oracle._engine.name  # type: ignore[attr-defined]
    assert {200, 400, 401, 404} <= {response.status_code for response in answers.values()}
    hidden = {model, "digits-cnn", "SmallCNN", "secret", told.architecture, engine, ".onnx", ".pt2", "torch"}
    hidden |= {*told.files, *told.files.values(), str(told.parameters), f"{told.parameters:,}"}
    if told.weights_sha256:
        hidden |= {told.weights_sha256, told.weights_sha256[:12]}
    for name, response in answers.items():
        seen = f"{response.text} {dict(response.headers)}"
        found = [word for word in hidden if word.lower() in seen.lower()]
        assert not found, (name, found)
