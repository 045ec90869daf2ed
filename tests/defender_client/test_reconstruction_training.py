"""Defending a reconstructor: what is measured, what is learnt, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from defender_support import PIXELS, same_tensors, spent, spent_by_purpose, tiny
from oracle_support import Caller, Running
from reconstruction_support import MEASUREMENT
from torch import nn
from torch.nn import functional as F

from defender_client import jobs
from defender_client import stack as stacks
from defender_client.config import ConfigError, load_preset
from defender_client.data import gaussian, load_splits
from defender_client.losses import squared_error
from defender_client.measured import MeasuredSet, measure, measure_splits
from defender_client.sources import LiveOracle
from defender_client.train import CURVE_FILE, STACK_FILE
from defender_client.whitebox import WhiteBoxSource, load_whitebox
from shared.measurements import BackProjection
from shared.models.reconstructors import SmallReconstructor

RECON = ("task=reconstruction", "train.epochs=3")


def train(server: Running, payer: Caller, run: Path, folder: Path, *settings: str, box: Path | None = None) -> None:
    config = tiny(folder, *RECON, *settings)
    whitebox = WhiteBoxSource(box) if box is not None else None
    jobs.train_job(config, run, None, LiveOracle(server.url, payer.key), lambda _: None, whitebox)


def curve(run: Path) -> list[float]:
    """-RMSE of each validation."""
    return [json.loads(line)["-RMSE"] for line in (run / CURVE_FILE).read_text().splitlines()]


def test_a_measured_set_shows_back_projections_and_knows_the_originals() -> None:
    plain = load_splits(load_preset("demo").data, None, 0).train
    images = measure(plain, MEASUREMENT)
    index = torch.tensor([4, 2, 7])
    assert torch.equal(images.originals(index), plain.floats(index))
    project = BackProjection(MEASUREMENT, (1, 8, 8))
    np.testing.assert_array_equal(images.floats(index).numpy(), project(plain.floats(index).numpy()))
    assert not torch.equal(images.floats(index), plain.floats(index))
    part = images.subset(slice(2, 5))
    assert isinstance(part, MeasuredSet)
    assert torch.equal(part.floats(slice(0, 1)), images.floats(slice(2, 3)))


@pytest.mark.parametrize(
    "settings", [(), PIXELS, ("estimator.name=fo",)], ids=["zo-ae-ds-cge", "zo-ds-rge", "fo-ae-ds"]
)
def test_training_brings_noisy_reconstructions_nearer_to_clean_ones(
    reconstructing: Running,
    payer: Caller,
    reconstructor: nn.Module,
    weights: Path,
    tmp_path: Path,
    settings: tuple[str, ...],
) -> None:
    more = ("train.epochs=8", "train.lr=5e-3", "estimator.q=16", "pretrain.denoiser_epochs=0")
    box = weights if "estimator.name=fo" in settings else None
    train(reconstructing, payer, tmp_path / "run", tmp_path, *settings, *more, box=box)
    qualities = curve(tmp_path / "run")
    config = tiny(tmp_path, *RECON, *settings, *more)
    splits = measure_splits(load_splits(config.data, None, config.seed), MEASUREMENT)
    clean = splits.validation.floats(slice(None))
    noisy = gaussian(clean, config.sigma, torch.Generator().manual_seed(config.seed))

    def quality(stack: stacks.Stack) -> float:
        with torch.no_grad():
            errors = squared_error(reconstructor(stack(noisy)), reconstructor(clean))
        return -float(errors.sqrt().mean())

    before = quality(stacks.load(tmp_path / "run" / "pretrained.safetensors"))
    best = quality(stacks.load(tmp_path / "run" / STACK_FILE))
    assert best == pytest.approx(max(qualities), abs=1e-5)
    assert best > before


def test_what_it_costs_is_what_was_planned(reconstructing: Running, payer: Caller, tmp_path: Path) -> None:
    source = LiveOracle(reconstructing.url, payer.key)
    planned = jobs.plan_job(tiny(tmp_path, *RECON), None, None, source)
    train(reconstructing, payer, tmp_path / "run", tmp_path)
    paid = spent_by_purpose(reconstructing, payer)
    assert paid == {"noise": 186, "labels": 112, "train": 3 * 96 * 9, "validation": 3 * 16}
    assert planned.to_train == sum(paid.values()) == spent(reconstructing, payer)


def test_the_noise_floor_is_of_the_error_to_the_original(
    reconstructing: Running, payer: Caller, tmp_path: Path
) -> None:
    train(reconstructing, payer, tmp_path / "run", tmp_path)
    kept = json.loads((tmp_path / "run" / "noise.json").read_text())
    assert kept["labels"] == []
    assert all(0 <= loss <= 1 for losses in kept["losses"] for loss in losses)  # of pixels in [0, 1]
    assert not kept["finding"]["useless"]


def test_the_same_seed_is_the_same_stack(reconstructing: Running, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(reconstructing, reconstructing.caller(10**6), tmp_path / name, tmp_path, "train.epochs=1")
    assert same_tensors(tmp_path / "one" / STACK_FILE, tmp_path / "two" / STACK_FILE)


def test_the_white_box_is_the_oracle_s(reconstructor: nn.Module, weights: Path) -> None:
    state = SmallReconstructor()
    torch.manual_seed(0)
    state = SmallReconstructor().eval()
    images = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(reconstructor(images), state(images).flatten(1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="not what this oracle hides"):
        load_whitebox(WhiteBoxSource(weights), (1, 28, 28), 784, "reconstruction")
    with pytest.raises(ConfigError, match="reconstruction"):
        load_whitebox(WhiteBoxSource(weights), (1, 8, 8), 64)


def test_tasks_that_do_not_fit(
    server: Running, caller: Caller, reconstructing: Running, payer: Caller, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="for classification, and this oracle does reconstruction"):
        train(reconstructing, payer, tmp_path / "a", tmp_path, "task=classification")
    with pytest.raises(ConfigError, match="for reconstruction, and this oracle does classification"):
        train(server, caller, tmp_path / "b", tmp_path)
    with pytest.raises(ConfigError, match="labels"):
        train(reconstructing, payer, tmp_path / "c", tmp_path, "train.targets=labels", "estimator.noise=off")
    with pytest.raises(ConfigError, match="augment"):
        tiny(tmp_path, *RECON, "data.augment=flip")
    with pytest.raises(ConfigError, match="`train` pre-trains"):
        jobs.pretrain_job(tiny(tmp_path, *RECON), tmp_path / "d", None)
    assert spent(reconstructing, payer) == spent(server, caller) == 0
    train(reconstructing, payer, tmp_path / "e", tmp_path, "train.epochs=1")
    before = spent(reconstructing, payer)
    with pytest.raises(ConfigError, match="no classes to certify"):
        jobs.certify_job(tmp_path / "e", None, LiveOracle(reconstructing.url, payer.key), {}, lambda _: None)
    assert spent(reconstructing, payer) == before


def test_the_gradient_aims_at_the_oracle_s_own_clean_output(
    reconstructing: Running, payer: Caller, reconstructor: nn.Module, tmp_path: Path
) -> None:
    """One step over all images: Adam's first moment is 0.1 times the gradient of the MSE to R(x_b)."""
    from defender_client import checkpoints

    settings = ("sigma=1e-6", "train.epochs=1", "train.batch=96", "train.weight_decay=0", "estimator.mu=1e-3")
    settings = (*settings, "estimator.difference=central", "pretrain.denoiser_epochs=3")
    train(reconstructing, payer, tmp_path / "run", tmp_path, *settings)
    saved = checkpoints.load(tmp_path / "run" / "checkpoint.safetensors")
    assert saved is not None
    stack = stacks.load(tmp_path / "run" / "pretrained.safetensors").train()
    config = tiny(tmp_path, *RECON, *settings)
    images = measure_splits(load_splits(config.data, None, 0), MEASUREMENT).train.floats(slice(None))
    F.mse_loss(reconstructor(stack(images)), reconstructor(images).detach()).backward()
    moments = [saved.optimizer["state"][i]["exp_avg"].flatten() / 0.1 for i in range(len(stack.trainable()))]
    exact = torch.cat([p.grad.flatten() for p in stack.trainable() if p.grad is not None])
    assert float(F.cosine_similarity(torch.cat(moments), exact, dim=0)) > 0.98
