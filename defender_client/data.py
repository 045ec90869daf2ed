"""The images a run uses: splits as its configuration says, order and augmentation from seeds and generators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from defender_client.config import ConfigError, DataConfig
from shared import datasets
from shared.datasets import ImageSet
from shared.models.autoencoder import Shape


@dataclass(frozen=True)
class Splits:
    """Training and validation images; the validation split is cut from the training set, never from the test set."""

    train: ImageSet
    validation: ImageSet


def load_splits(config: DataConfig, data: Path | None, seed: int) -> Splits:
    """The training set's two parts, the same for the same seed; DatasetError where the data cannot be used."""
    whole = datasets.load(config.dataset, data, "train", image_size=config.image_size)
    train, validation = datasets.train_validation(whole, config.validation_images, seed)
    if config.train_images:
        train = train.subset(slice(0, config.train_images))
    return Splits(train, validation)


def load_test(config: DataConfig, data: Path | None) -> ImageSet:
    """The test set; used for certification and attacks only."""
    return datasets.load(config.dataset, data, "test", image_size=config.image_size)


def check_fit(images: ImageSet, image_shape: Shape) -> None:
    """ConfigError unless the images have the shape the oracle takes."""
    if images.image_shape != image_shape:
        raise ConfigError(
            f"the oracle takes images {list(image_shape)} but the data set has {list(images.image_shape)}: "
            "choose the data set the classifier was trained for (data.dataset), or data.image_size for a folder"
        )


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0..count-1 that depends on the seed and the epoch alone, so a resumed run finds it again."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def gaussian(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """x + delta, delta ~ N(0, sigma^2 I)."""
    return images + sigma * torch.randn(images.shape, generator=generator)
