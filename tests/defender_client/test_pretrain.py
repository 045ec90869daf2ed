"""White-box pre-training: it learns, costs nothing, and goes on after a kill as if there had been none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from defender_support import PIXELS, Killed, same_tensors, tiny
from torch.nn import functional as F

from defender_client import checkpoints
from defender_client import stack as stacks
from defender_client.config import ConfigError, RunConfig
from defender_client.data import Splits, gaussian, load_splits
from defender_client.pretrain import PRETRAINED_FILE, fresh_stack, pretrain
from defender_client.stack import Stack, StackSpec, specify

LONGER = ("pretrain.autoencoder_epochs=2", "pretrain.denoiser_epochs=2")


def prepared(config: RunConfig) -> tuple[StackSpec, Splits]:
    return specify(config, (1, 8, 8), 10), load_splits(config.data, None, config.seed)


def pretrained(config: RunConfig, run: Path) -> Stack:
    spec, splits = prepared(config)
    return pretrain(config, spec, run, splits)


def test_the_autoencoder_learns_to_reconstruct_and_the_denoiser_to_denoise(tmp_path: Path) -> None:
    config = tiny(tmp_path, "pretrain.autoencoder_epochs=20", "pretrain.denoiser_epochs=8", "pretrain.lr=0.01")
    spec, splits = prepared(config)
    clean = splits.validation.floats(slice(None))
    noisy = gaussian(clean, config.sigma, torch.Generator().manual_seed(0))

    @torch.no_grad()
    def losses(stack: Stack) -> tuple[float, float]:
        assert stack.autoencoder is not None
        return float(F.mse_loss(stack.autoencoder(clean), clean)), float(F.mse_loss(stack.denoise(noisy), clean))

    before = losses(fresh_stack(spec, config.seed).eval())
    stack = pretrain(config, spec, tmp_path, splits)
    after = losses(stack)
    assert after[0] < 0.6 * before[0]
    assert after[1] < 0.8 * before[1]
    assert not stack.training
    assert stack.autoencoder is not None
    assert not any(p.requires_grad for p in stack.autoencoder.decoder.parameters())


def test_principal_components_come_from_the_training_images_alone(tmp_path: Path) -> None:
    config = tiny(tmp_path, "autoencoder.architecture=pca", "autoencoder.latent=16")
    stack = pretrained(config, tmp_path / "run")
    assert stack.autoencoder is not None
    train = load_splits(config.data, None, config.seed).train.floats(slice(None))
    with torch.no_grad():
        latents = stack.autoencoder.encode(train)
        assert float(latents.mean(dim=0).abs().max()) < 1e-4
        lost = float((stack.autoencoder(train) - train).square().mean())
    assert lost < 0.35 * float((train - train.mean(dim=0)).square().mean())
    again = pretrained(config, tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), again.parameters(), strict=True))
    few = tiny(tmp_path, "autoencoder.architecture=pca", "autoencoder.latent=64", "data.train_images=60")
    with pytest.raises(ConfigError, match="a smaller autoencoder"):
        pretrained(few, tmp_path / "few")


def test_what_was_pretrained_is_taken_from_its_file(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    first = pretrained(config, tmp_path / "run")
    path = tmp_path / "run" / PRETRAINED_FILE
    written = path.stat().st_mtime_ns
    again = pretrained(config, tmp_path / "run")
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other = pretrained(config, tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_kill_after_any_epoch_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, *LONGER)
    pretrained(config, tmp_path / "whole")
    save = checkpoints.save
    saved = 0

    def dying(*arguments: object) -> None:
        nonlocal saved
        save(*arguments)  # type: ignore[arg-type]
        saved += 1
        raise Killed

    run = tmp_path / "killed"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", dying)
        for _ in range(4):
            with pytest.raises(Killed):
                pretrained(config, run)
    assert saved == 4
    assert not (run / PRETRAINED_FILE).exists()
    pretrained(config, run)
    assert same_tensors(run / PRETRAINED_FILE, tmp_path / "whole" / PRETRAINED_FILE)


def test_without_epochs_the_stack_is_as_it_was_made(tmp_path: Path) -> None:
    config = tiny(tmp_path, *PIXELS, "pretrain.denoiser_epochs=0")
    stack = pretrained(config, tmp_path / "run")
    fresh = fresh_stack(stack.spec, config.seed)
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), fresh.parameters(), strict=True))
    assert (tmp_path / "run" / PRETRAINED_FILE).exists()


def test_the_oracle_s_number_of_classes_wins_over_the_data_s(tmp_path: Path) -> None:
    # `pretrain` asks no oracle: a data set that lacks the last class would have it believe in fewer.
    config = tiny(tmp_path)
    spec, splits = prepared(config)
    pretrain(config, spec.model_copy(update={"classes": 9}), tmp_path, splits)
    assert pretrain(config, spec, tmp_path, splits).spec == spec
    assert stacks.load(tmp_path / PRETRAINED_FILE).spec.classes == 9
