"""Training a classifier for those who have none; with `noise_sigma`, one that withstands Gaussian noise.

Gaussian augmentation: Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML
2019, section 3.3: each training image gets fresh noise N(0, sigma^2 I).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracle_server.cpus import usable_cpus
from oracle_server.fitting import EVALUATION_BATCH, Schedule, fit, keep_best
from shared import datasets
from shared.augmentation import Augmentation, augment
from shared.datasets import DatasetError, ImageSet
from shared.models.architectures import build
from shared.models.classifiers import Normalize
from shared.models.loading import ClassifierSource, load_classifier
from shared.models.weight_files import ModelError, WeightsInfo, write_weights


@dataclass(frozen=True)
class TrainingPlan:
    """What to train, on what, and for how long.

    `weights` is a file to start from, of the same model, instead of random weights; its normalisation is kept.
    `noise_sigma` is in pixel units of [0, 1]; `validation` is the number of training images kept for model selection;
    `command` is recorded in the weights, so that they say how they came to be.
    """

    model: str
    dataset: str
    data: Path | None
    out: Path
    noise_sigma: float = 0.0
    epochs: int = 30
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0
    validation: int = 200
    image_size: int | None = None
    weights: Path | None = None
    augment: Augmentation = "none"
    command: str = ""


@dataclass(frozen=True)
class TrainingResult:
    """Accuracies in [0, 1], under the plan's noise: of the best epoch on the validation images, and on the test set."""

    epoch: int
    validation_accuracy: float
    test_accuracy: float


def train_classifier(plan: TrainingPlan, say: Callable[[str], None]) -> TrainingResult:
    """Train, keep the epoch that is best on the validation images, test it once, write it to `plan.out`.

    Args:
        plan: what to do.
        say: receives a line per epoch where there is no terminal for a progress bar.

    Raises:
        DatasetError: the data cannot be used.
        ModelError: no classifier has this name, or it cannot read these images.
    """
    torch.set_num_threads(usable_cpus())
    whole = datasets.load(plan.dataset, plan.data, "train", image_size=plan.image_size)
    test = datasets.load(plan.dataset, plan.data, "test", image_size=plan.image_size)
    train, validation = datasets.train_validation(whole, plan.validation, plan.seed)
    channels, size, width = whole.image_shape
    if size != width:
        raise DatasetError(f"images of '{plan.dataset}' are {size} x {width}: make them square (see --image-size)")
    network, mean, std = _start(plan, train)
    module = nn.Sequential(Normalize(mean, std), network)
    generator = torch.Generator().manual_seed(plan.seed)

    def loss_of(index: Tensor) -> Tensor:
        images = augment(train.floats(index), plan.augment, generator)
        images = _noisy(images, plan.noise_sigma, generator)
        return F.cross_entropy(module(images), train.labels[index])

    best = keep_best(
        network,
        fit(module, len(train), loss_of, Schedule(plan.epochs, plan.batch, plan.lr), generator),
        lambda: _accuracy(module, validation, plan),
        lambda epoch, loss, accuracy: say(
            f"epoch {epoch}/{plan.epochs}  loss {loss:.4f}  validation accuracy {accuracy:.4f}"
        ),
    )
    network.load_state_dict(best.state)
    result = TrainingResult(best.epoch, best.score, _accuracy(module, test, plan))
    info = WeightsInfo(plan.model, channels, size, whole.classes, mean, std, plan.command or None)
    write_weights(plan.out, best.state, info)
    return result


def _start(plan: TrainingPlan, train: ImageSet) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The network to train, and its normalisation."""
    channels, size, _ = train.image_shape
    if plan.weights is None:
        torch.manual_seed(plan.seed)  # initial weights; all later draws come from `generator`
        return build(plan.model, channels, train.classes), *_moments(train)
    loaded = load_classifier(ClassifierSource(plan.model, str(plan.weights)))
    if (loaded.image_shape, loaded.classes) != ((channels, size, size), train.classes):
        raise ModelError(
            f"{plan.weights} maps images {list(loaded.image_shape)} to {loaded.classes} classes, and the data set has "
            f"{list(train.image_shape)} and {train.classes}"
        )
    normalize, network = loaded.module.children()
    mean, std = (tuple(normalize.get_buffer(name).flatten().tolist()) for name in ("mean", "std"))
    return network.requires_grad_(True), mean, std


def _moments(train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of images in [0, 1]."""
    pixels = train.images.transpose(0, 1).flatten(1).double() / 255.0
    mean, std = pixels.mean(1), pixels.std(1).clamp_min(1e-3)
    return tuple(round(float(x), 4) for x in mean), tuple(round(float(x), 4) for x in std)


def _noisy(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """images + N(0, sigma^2 I)."""
    return images + sigma * torch.randn(images.shape, generator=generator) if sigma else images


def _accuracy(module: nn.Module, images: ImageSet, plan: TrainingPlan) -> float:
    """Share of images classified rightly under the plan's noise, the same noise at every call."""
    generator = torch.Generator().manual_seed(plan.seed)
    module.eval()
    right = 0
    with torch.inference_mode():
        for index in torch.arange(len(images)).split(EVALUATION_BATCH):
            logits = module(_noisy(images.floats(index), plan.noise_sigma, generator))
            right += int((logits.argmax(1) == images.labels[index]).sum())
    return right / len(images)
