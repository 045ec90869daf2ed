"""White-box pre-training at zero queries: the autoencoder on mean squared error, then, if asked for, the denoiser.

The autoencoder's loss is |Dec(Enc(x)) - x|^2 (Zhang et al., ICLR 2022, section 5.1), whose best linear solution is
principal components. The denoiser's, in front of the
frozen autoencoder, is |D(x + delta) - x|^2, the zero-query start that the paper compares training from scratch with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defender_client import checkpoints
from defender_client import stack as stacks
from defender_client.config import ConfigError, RunConfig
from defender_client.data import Splits, epoch_order, gaussian
from defender_client.progress import meter
from defender_client.stack import Stack, StackSpec
from shared.augmentation import augment
from shared.models.autoencoder import Autoencoder, fit_principal

PRETRAINED_FILE = "pretrained.safetensors"
_FEW, _MANY = 4096, 20_000  # images whose components are sought: where there are more pixels than the first, so few


def fresh_stack(spec: StackSpec, seed: int) -> Stack:
    """An untrained stack whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Stack(spec)


def pretrain(config: RunConfig, spec: StackSpec, run: Path, splits: Splits) -> Stack:
    """The stack as it is before the first query; kept in `run/pretrained.safetensors` and taken from there if present.

    Interrupted, it goes on from its last whole epoch.

    Returns:
        The stack, in evaluation mode.
    """
    path = run / PRETRAINED_FILE
    if path.exists():
        stack = stacks.load(path)
        # `pretrain` asks no oracle: the number of classes it went by is the data set's guess.
        stacks.check_matches(stack.spec.model_copy(update={"classes": spec.classes}), spec, path)
        stack.spec = spec
        return stack
    stack = fresh_stack(spec, config.seed)
    autoencoder = stack.autoencoder
    if autoencoder is not None and autoencoder.spec.fitted:
        _fit_principal(autoencoder, splits)
    elif autoencoder is not None:
        autoencoder.decoder.requires_grad_(True)

        def reconstruct(images: Tensor, _: torch.Generator) -> Tensor:
            return F.mse_loss(autoencoder(images), images)

        epochs = config.pretrain.autoencoder_epochs
        _fit(config, stack, autoencoder, reconstruct, "autoencoder", epochs, run, splits)
        autoencoder.decoder.requires_grad_(False)
    if stack.denoiser is not None:

        def denoise(images: Tensor, generator: torch.Generator) -> Tensor:
            return F.mse_loss(stack.denoise(gaussian(images, config.sigma, generator)), images)

        _fit(config, stack, stack.denoiser, denoise, "denoiser", config.pretrain.denoiser_epochs, run, splits)
    stacks.save(stack, path)
    return stack.eval()


def _fit_principal(autoencoder: Autoencoder, splits: Splits) -> None:
    """Principal components of the training images, or of as many as the arithmetic is worth."""
    few = math.prod(autoencoder.spec.image_shape) > _FEW
    images = splits.train.floats(slice(0, _FEW if few else _MANY))
    try:
        with meter("fit principal components", len(images), "images") as progress:
            fit_principal(autoencoder, images)
            progress.advance(len(images))
    except ValueError as error:
        raise ConfigError(f"autoencoder.architecture=pca: {error}; set a smaller autoencoder.latent") from None


def _fit(
    config: RunConfig,
    stack: Stack,
    module: nn.Module,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    what: str,
    epochs: int,
    run: Path,
    splits: Splits,
) -> None:
    """Minimise `loss_of` over `module`'s parameters: Adam with a cosine schedule, one checkpoint an epoch."""
    if not epochs:
        return
    train, settings = splits.train, config.pretrain
    path = run / f"pretrain-{what}.safetensors"
    optimizer = torch.optim.Adam(module.parameters(), settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    start = 0
    saved = checkpoints.load(path)
    if saved is not None:
        start = saved.progress.epoch
        stack.load_state_dict(saved.stack)
        optimizer.load_state_dict(saved.optimizer)
        generator.set_state(saved.generators["noise"])
    with meter(f"pretrain {what}", epochs, "epoch", start) as progress:
        for epoch in range(start, epochs):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            module.train()
            total = 0.0
            for index in epoch_order(len(train), config.seed, epoch).split(settings.batch):
                images = augment(train.floats(index), config.data.augment, generator)
                loss = loss_of(images, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(index)
            position = checkpoints.Progress(epoch=epoch + 1)
            checkpoints.save(path, position, stack, optimizer, {"noise": generator.get_state()})
            note = f"mse {total / len(train):.5f}"
            if epoch + 1 == epochs and len(splits.validation):
                note += f", validation {_validation_loss(module, loss_of, splits, config):.5f}"
            progress.advance(note=note)
    module.eval()


@torch.no_grad()
def _validation_loss(
    module: nn.Module, loss_of: Callable[[Tensor, torch.Generator], Tensor], splits: Splits, config: RunConfig
) -> float:
    module.eval()
    generator = torch.Generator().manual_seed(config.seed)
    parts = torch.arange(len(splits.validation)).split(config.pretrain.batch)
    total = sum(loss_of(splits.validation.floats(part), generator).item() * len(part) for part in parts)
    return total / len(splits.validation)
