"""White-box columns: the gradient through a classifier of the user's own, which costs no query."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from defender_support import opened, same_tensors, spent, spent_by_purpose, tiny
from oracle_support import Caller, Running
from torch import nn
from torch.nn import functional as F

from defender_client import config as configs
from defender_client import jobs
from defender_client import stack as stacks
from defender_client.config import ConfigError, RunConfig
from defender_client.data import load_splits
from defender_client.estimation import Batch
from defender_client.first_order import FirstOrder
from defender_client.losses import squared_error
from defender_client.objective import RECONSTRUCTION, STABILITY
from defender_client.sources import LiveOracle
from defender_client.train import CURVE_FILE, STACK_FILE, train
from defender_client.whitebox import Comparison, WhiteBox, WhiteBoxSource, load_whitebox
from oracle_server.loading import SHIPPED
from shared.models.classifiers import SmallCNN
from shared.models.weight_files import WeightsInfo, write_weights

FO = ("estimator.name=fo",)
DIGITS = WhiteBoxSource(SHIPPED["digits-cnn"], "digits-cnn")


def fo_here(config: RunConfig, run: Path, server: Running, caller: Caller) -> stacks.Stack:
    splits = load_splits(config.data, None, config.seed)
    with opened(run, server.url, caller.key) as oracle:
        configs.save(config, run)
        whitebox = load_whitebox(DIGITS, oracle.info.image_shape, oracle.info.classes)
        spec = stacks.specify(config, oracle.info.image_shape, oracle.info.classes)
        return train(config, spec, run, splits, oracle, whitebox)


def train_job(config: RunConfig, run: Path, server: Running, caller: Caller, box: WhiteBoxSource | None) -> None:
    jobs.train_job(config, run, None, LiveOracle(server.url, caller.key), lambda _: None, box)


@pytest.mark.parametrize("micro_batch", [0, 5])
@pytest.mark.parametrize("settings", [(), ("autoencoder.architecture=none",)], ids=["fo-ae-ds", "fo-ds"])
def test_the_gradient_is_that_of_the_mean_loss_through_the_whole(
    classifier: nn.Module, tmp_path: Path, settings: tuple[str, ...], micro_batch: int
) -> None:
    stack = stacks.Stack(stacks.specify(tiny(tmp_path, *FO, *settings), (1, 8, 8), 10)).train()
    with torch.no_grad():
        for parameter in stack.trainable():  # the U-Net's last layer starts at zero, which hides those before it
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (12,), generator=generator)
    F.cross_entropy(classifier(stack(images)).double(), labels).backward()
    exact = [p.grad.clone() for p in stack.trainable() if p.grad is not None]
    stack.zero_grad()
    result = FirstOrder(stack, classifier, STABILITY, micro_batch=micro_batch).backpropagate(
        Batch.even(images, images, labels), ""
    )
    assert float(torch.cat([g.flatten() for g in exact]).norm()) > 0
    for found, expected in zip((p.grad for p in stack.trainable()), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        logits = classifier(stack(images))
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert result.quality == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert result.gradient_norm > 0


def test_a_reconstruction_s_gradient_is_that_of_the_mean_squared_error(tmp_path: Path) -> None:
    stack = stacks.Stack(stacks.specify(tiny(tmp_path, *FO), (1, 8, 8), 64)).train()
    box = nn.Sequential(nn.Flatten(), nn.Linear(64, 64)).requires_grad_(False)
    images, targets = torch.rand(6, 1, 8, 8), torch.rand(6, 64)
    F.mse_loss(box(stack(images)), targets).backward()
    exact = [p.grad.clone() for p in stack.trainable() if p.grad is not None]
    stack.zero_grad()
    result = FirstOrder(stack, box, RECONSTRUCTION).backpropagate(Batch.even(images, images, targets), "")
    for found, expected in zip((p.grad for p in stack.trainable()), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    rmse = squared_error(box(stack(images)), targets).sqrt().mean()
    assert result.quality == pytest.approx(-float(rmse.detach()), rel=1e-6)


def test_it_pays_for_labels_and_validation_only(server: Running, caller: Caller, tmp_path: Path) -> None:
    config, run = tiny(tmp_path, *FO), tmp_path / "run"
    fo_here(config, run, server, caller)
    assert spent_by_purpose(server, caller) == {"labels": 96 + 16, "validation": 2 * 16}
    kept = Comparison.model_validate_json((run / "whitebox.json").read_bytes())
    assert kept.agreement == 1.0
    source = LiveOracle(server.url, caller.key)
    assert jobs.plan_job(config, run, None, source).to_train == 0
    fresh = jobs.plan_job(config, None, None, source)
    assert (fresh.noise, fresh.training, fresh.labels, fresh.validation) == (0, 0, 112, 32)


def test_the_same_seed_is_the_same_stack_and_resumes(server: Running, caller: Caller, tmp_path: Path) -> None:
    config = tiny(tmp_path, *FO)
    fo_here(config, tmp_path / "whole", server, caller)
    once, run = tiny(tmp_path, *FO, "train.epochs=1"), tmp_path / "cut"
    fo_here(once, run, server, caller)
    (run / "config.json").unlink()
    fo_here(config, run, server, caller)  # the constant schedule makes one epoch the beginning of two
    assert same_tensors(tmp_path / "whole" / "checkpoint.safetensors", run / "checkpoint.safetensors")


def test_a_white_box_is_needed_and_only_here(server: Running, caller: Caller, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--whitebox FILE"):
        train_job(tiny(tmp_path, *FO), tmp_path / "run", server, caller, None)
    with pytest.raises(ConfigError, match="leave out --whitebox"):
        train_job(tiny(tmp_path), tmp_path / "run", server, caller, DIGITS)
    assert spent(server, caller) == 0


def test_files_that_are_no_white_box_of_this_oracle(server: Running, caller: Caller, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_weights(other, SmallCNN(1, 7).state_dict(), WeightsInfo(model="small-cnn", image_size=8))
    nameless = tmp_path / "nameless.safetensors"
    write_weights(nameless, SmallCNN(1, 10).state_dict(), WeightsInfo(image_size=8))
    for source, message in (
        (WhiteBoxSource(other), "not what this oracle hides"),
        (WhiteBoxSource(nameless), "--whitebox-model"),
        (WhiteBoxSource(tmp_path / "none.safetensors"), "no weights file"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_job(tiny(tmp_path, *FO), tmp_path / "run", server, caller, source)
    assert spent(server, caller) == 0


def test_a_run_keeps_its_white_box(
    server: Running, caller: Caller, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, surrogate = tmp_path / "run", tmp_path / "surrogate.safetensors"
    write_weights(surrogate, SmallCNN(1, 10).state_dict(), WeightsInfo(model="small-cnn", image_size=8))
    train_job(tiny(tmp_path, *FO, "train.epochs=1"), run, server, caller, WhiteBoxSource(surrogate))
    assert "not what the oracle hides" in " ".join(capsys.readouterr().err.split())
    (run / "config.json").unlink()
    with pytest.raises(ConfigError, match="another white box"):
        train_job(tiny(tmp_path, *FO), run, server, caller, DIGITS)


# --- what noisy images are to become --------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["fo", "rge", "cge"])
def test_labels_of_the_data_set_cost_nothing_and_are_what_is_learnt(
    server: Running, caller: Caller, tmp_path: Path, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against labels that are all the same class, every estimator learns to answer that class."""
    import defender_client.jobs as module

    splits = load_splits(tiny(tmp_path).data, None, 0)
    for images in (splits.train, splits.validation):
        images.labels.fill_(3)
    monkeypatch.setattr(module, "load_splits", lambda *_: splits)
    settings = (f"estimator.name={estimator}", "estimator.q=8", "train.targets=labels", "train.epochs=12")
    config, run = tiny(tmp_path, *settings, "train.lr=1e-2", "pretrain.autoencoder_epochs=10"), tmp_path / "run"
    train_job(config, run, server, caller, DIGITS if estimator == "fo" else None)
    assert "labels" not in spent_by_purpose(server, caller)
    assert not (run / "oracle-labels.safetensors").exists()
    agreements = [float(line.split('"agreement": ')[1].rstrip("}\n")) for line in (run / CURVE_FILE).open()]
    assert max(agreements) > 0.9
    assert (run / STACK_FILE).exists()


def test_labels_that_the_oracle_has_no_score_for(server: Running, caller: Caller, tmp_path: Path) -> None:
    splits = load_splits(tiny(tmp_path).data, None, 0)
    splits.train.labels[5] = 10
    config, run = tiny(tmp_path, "train.targets=labels", "estimator.noise=off"), tmp_path / "run"
    with opened(run, server.url, caller.key) as oracle, pytest.raises(ConfigError, match="label 10"):
        train(config, stacks.specify(config, (1, 8, 8), 10), run, splits, oracle)
    assert spent(server, caller) == 0


def test_a_white_box_is_what_its_file_says(classifier: nn.Module) -> None:
    box: WhiteBox = load_whitebox(DIGITS, (1, 8, 8), 10)
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(box.module(images), classifier(images), rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in box.module.parameters())
