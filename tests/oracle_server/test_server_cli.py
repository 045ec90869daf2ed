"""`oracle-server` as its user meets it."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_support import pay
from typer.testing import CliRunner, Result

from oracle_server.cli import app
from oracle_server.keys import ApiKey
from oracle_server.ledger import Ledger
from oracle_server.loading import load_classifier
from oracle_server.server import listen
from oracle_server.settings import Settings
from shared.audit.export import examine
from shared.audit.signatures import read_public_key
from shared.models.weight_files import read_weights
from shared.version import VERSION


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_a_client_is_added_listed_changed_and_revoked() -> None:
    key = run("clients", "add", "a", "--budget", "10").stdout.strip()
    assert ApiKey.parse(key)
    run("clients", "set-budget", "a", "20")
    (listed,) = json.loads(run("clients", "list", "--json").stdout)
    assert (listed["name"], listed["budget"], listed["remaining"], listed["revoked_at"]) == ("a", 20, 20, None)
    run("clients", "revoke", "a")
    shown = run("clients", "list").stdout
    assert "revoked" in shown
    assert key not in shown
    assert Path("oracle-ledger.db").is_file()


def test_a_key_file_is_for_its_owner_and_adding_again_may_be_fine() -> None:
    add = ("clients", "add", "a", "--budget", "10", "--key-file", "keys/a")
    assert "zo_" not in run(*add).stdout
    key = Path("keys/a").read_text()
    assert ApiKey.parse(key.strip())
    assert Path("keys/a").stat().st_mode & 0o777 == 0o640
    assert "already" in run(*add, code=2).stderr
    run(*add, "--exist-ok")
    assert Path("keys/a").read_text() == key
    Path("keys/a").unlink()
    assert "cannot be shown again" in run(*add, "--exist-ok", code=2).stderr
    run("clients", "add", "b", "--budget", "1", "--key-file", "b", "--key-file-mode", "0600")
    assert Path("b").stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in Path().iterdir() if p.name.startswith(".")) == []


def test_verify_and_export_explain_the_ledger() -> None:
    run("clients", "add", "a", "--budget", "10")
    ledger = Ledger.open("oracle-ledger.db")
    pay(ledger, ledger.get_client("a").id, 4, "k")
    ledger.close()
    assert "4 queries" in run("ledger", "verify").stdout
    told = json.loads(run("ledger", "verify", "--json").stdout)
    assert (told["intact"], told["queries"], told["findings"]) == (True, 4, [])
    exported = run("ledger", "export").stdout.encode().splitlines(keepends=True)
    entries = [json.loads(line)["entry"] for line in exported[1:-1]]
    assert [(e["kind"], e["rows"]) for e in entries] == [("client", 0), ("budget", 0), ("reserve", 4), ("charge", 4)]
    assert examine(exported, read_public_key(run("ledger", "public-key").stdout)).findings == ()
    with sqlite3.connect("oracle-ledger.db") as connection:
        connection.execute("UPDATE clients SET spent = 3")
    assert "spent is 3 and its entries say 4" in run("ledger", "verify", code=1).stderr
    told = json.loads(run("ledger", "verify", "--json", code=1).stdout)
    assert not told["intact"]
    assert "spent is 3 and its entries say 4" in told["findings"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clients", "list"), "no ledger"),
        (("clients", "add", "a", "--budget", "1", "--ledger", "mysql://h/d"), "not supported"),
        (("clients", "add", "a", "--budget", "1", "--key-file-mode", "9", "--key-file", "f"), "octal"),
        (("serve", "--model", "resnet19", "--port", "0"), "did you mean resnet1"),
        (("serve", "--model", "resnet18", "--port", "0"), "needs --weights"),
        (("serve", "--weights", "none.safetensors", "--port", "0"), "no weights file"),
        (("serve", "--ledger", "none/x.db", "--port", "0"), "does not exist"),
        (("serve", "--engine", "warp"), "--engine"),
        (("serve", "--mean", "a,b"), "--mean"),
        (("train-classifier", "--dataset", "letters", "--out", "x.safetensors"), "no data set"),
        (("train-classifier", "--model", "resnet19", "--out", "x.safetensors"), "no classifier"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not Path("x.safetensors").exists()


def test_a_port_in_use_is_a_mistake_too() -> None:
    taken, url = listen("127.0.0.1", 0)
    with taken:
        assert "in use" in run("serve", "--port", url.rsplit(":", 1)[1], code=2).stderr


def test_an_unknown_client_is_a_mistake() -> None:
    run("clients", "add", "a", "--budget", "1")
    assert "no client 'b'" in run("clients", "revoke", "b", code=2).stderr


def test_the_version() -> None:
    assert run("--version").stdout.strip() == f"oracle-server {VERSION}"


def test_a_trained_classifier_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    train = (
        "train-classifier",
        "--epochs",
        "2",
        "--validation",
        "100",
        "--noise-sigma",
        "0.1",
        "--out",
        "w.safetensors",
    )
    monkeypatch.setattr(sys, "argv", ["/somewhere/oracle-server", *train])
    result = run(*train)
    assert "epoch 2/2" in result.stderr
    assert float(result.stdout.split("test accuracy ")[1].split()[0]) > 0.5
    _, info = read_weights(Path("w.safetensors"))
    assert (info.model, info.channels, info.image_size, info.classes) == ("small-cnn", 1, 8, 10)
    assert info.command == " ".join(("oracle-server", *train))
    assert load_classifier(Settings(model="small-cnn", weights="w.safetensors")).image_shape == (1, 8, 8)


def test_training_goes_on_from_weights_that_are_there() -> None:
    few = ("train-classifier", "--epochs", "1", "--validation", "100", "--lr", "1e-9")
    run(*few, "--epochs", "6", "--lr", "2e-3", "--out", "first.safetensors")
    result = run(*few, "--weights", "first.safetensors", "--augment", "flip", "--out", "second.safetensors")
    before, after = read_weights(Path("first.safetensors")), read_weights(Path("second.safetensors"))
    # At a rate of nothing, what comes out is what went in; from random weights it would be a tenth.
    assert float(result.stdout.split("test accuracy ")[1].split()[0]) > 0.5
    assert after[1].mean == pytest.approx(before[1].mean)
    assert torch.allclose(after[0]["linear.weight"], before[0]["linear.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "none.safetensors"), "no weights file"),
        (("--augment", "rotate"), "none, flip, crop-flip"),
        (("--dataset", "npz", "--data", "data", "--weights", "first.safetensors"), "and the data set has"),
    ],
)
def test_weights_and_augmentations_that_cannot_be_used(options: tuple[str, ...], message: str) -> None:
    run("train-classifier", "--epochs", "1", "--out", "first.safetensors")
    Path("data").mkdir()
    rng = np.random.default_rng(0)
    np.savez("data/a.npz", images=rng.integers(0, 255, (400, 8, 8), np.uint8), labels=rng.integers(0, 3, 400))
    result = run("train-classifier", "--epochs", "1", "--out", "x.safetensors", *options, code=2)
    assert message in " ".join(result.output.split())
    assert not Path("x.safetensors").exists()
