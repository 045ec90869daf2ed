"""Training a reconstructor: what is written, what is said of it, and that the best epoch is the one that is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from oracle_server import fitting, training_reconstructor
from oracle_server.cli import app
from oracle_server.fitting import keep_best
from shared import datasets
from shared.measurements import BackProjection, Measurement, calibrate
from shared.models.loading import Reconstructor, load_reconstructor
from shared.models.weight_files import ModelError, read_weights

TRAIN = ("train-reconstructor", "--epochs", "2", "--validation", "300", "--seed", "3", "--out", "w.safetensors")


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def rmse_of(loaded: Reconstructor, images: datasets.ImageSet) -> float:
    """By numpy, over all pixels."""
    x = images.floats(slice(None)).numpy()
    seen = BackProjection(loaded.measurement, loaded.image_shape)(x)
    with torch.inference_mode():
        made = loaded.module(torch.from_numpy(seen)).numpy()
    return float(np.sqrt(np.mean((made.astype(np.float64) - x.reshape(made.shape)) ** 2)))


def test_what_is_said_of_it_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/oracle-server", *TRAIN])
    result = run(*TRAIN)
    assert "epoch 2/2" in result.stderr
    info = read_weights(Path("w.safetensors"))[1]
    assert (info.model, info.image_shape) == ("small-reconstructor", (1, 8, 8))
    assert info.command == " ".join(("oracle-server", *TRAIN))
    train, validation = datasets.train_validation(datasets.load("digits", None, "train"), 300, 3)
    assert info.measurement == calibrate([train.floats(slice(None)).numpy()], 3, 47)
    loaded = load_reconstructor(Path("w.safetensors"))
    for name, images in (("validation", validation), ("test", datasets.load("digits", None, "test"))):
        rmse = rmse_of(loaded, images)
        assert float(result.stdout.split(f"{name} RMSE ")[1].split()[0]) == pytest.approx(rmse, abs=6e-5)
        x = images.floats(slice(None)).numpy()
        assert rmse < 0.8 * x.std()  # which is the mean's; what it is given is hardly better


def test_what_is_tested_and_written_is_the_best_epoch_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def ruined(module: nn.Module, *rest: Any) -> Iterator[tuple[int, float]]:
        for epoch, loss in fitting.fit(module, *rest):
            if epoch == 2:
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
            yield epoch, loss

    monkeypatch.setattr(training_reconstructor, "fit", ruined)
    result = run(*TRAIN)
    assert "(epoch 1)" in result.stdout
    loaded = load_reconstructor(Path("w.safetensors"))
    assert float(result.stdout.split("test RMSE ")[1].split()[0]) == pytest.approx(
        rmse_of(loaded, datasets.load("digits", None, "test")), abs=6e-5
    )


def test_measurements_can_be_fewer() -> None:
    run(*TRAIN, "--rows", "9", "--epochs", "1")
    assert load_reconstructor(Path("w.safetensors")).measurement.rows == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "small-cnn"), "no reconstructor is called 'small-cnn'"),
        (("--dataset", "letters"), "no data set is called"),
        (("--rows", "65"), "64 pixels has 1 to 64 measurements, not 65"),
        (("--lr", "1e30"), "training diverged"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_writes_nothing(options: tuple[str, ...], message: str) -> None:
    result = run(*TRAIN, *options, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not Path("w.safetensors").exists()


def test_black_images_are_no_data(tmp_path: Path) -> None:
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((9, 4, 4), np.uint8), labels=np.arange(9))
    result = run(*TRAIN, "--dataset", "npz", "--data", ".", "--validation", "2", code=2)
    assert "all black" in result.stderr


def test_sides_may_differ(tmp_path: Path) -> None:
    for name in ("train", "test"):
        images = np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(20))
    run(*TRAIN, "--dataset", "npz", "--data", ".", "--validation", "2")
    loaded = load_reconstructor(Path("w.safetensors"))
    assert loaded.image_shape == (3, 4, 6)
    assert isinstance(loaded.measurement, Measurement)
    assert loaded.measurement.rows == round(72 * 576 / 784)


def test_the_first_of_the_best_epochs_is_kept() -> None:
    network = nn.Linear(1, 1)
    scores = {1: 0.25, 2: 0.5, 3: float("nan"), 4: 0.5, 5: 0.125}
    now = 0

    def epochs() -> Iterator[tuple[int, float]]:
        nonlocal now
        for now in scores:
            nn.init.constant_(network.weight, now)
            yield now, 10.0 * now

    said: list[tuple[int, float, float]] = []
    best = keep_best(network, epochs(), lambda: scores[now], lambda *line: said.append(line))
    assert (best.epoch, best.score, best.state["weight"].item()) == (2, 0.5, 2.0)
    assert [line[:2] for line in said] == [(epoch, 10.0 * epoch) for epoch in scores]


def test_no_epoch_is_the_best_of_none_that_is_a_number() -> None:
    with pytest.raises(ModelError, match="lower --lr"):
        keep_best(nn.Linear(1, 1), iter([(1, 0.0)]), lambda: float("nan"), lambda *_: None)
