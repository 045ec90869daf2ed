"""Training a reconstructor: images x from their back-projected measurements x_b, by their squared error.

    min over R   E |R(x_b) - x|^2 / d          x_b as `shared.measurements` has it

(Zhang et al., ICLR 2022, image reconstruction.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracle_server.cpus import usable_cpus
from oracle_server.fitting import EVALUATION_BATCH, Schedule, fit, keep_best
from shared import datasets
from shared.datasets import DatasetError, ImageSet
from shared.measurements import BackProjection, Float32, calibrate, usual_rows
from shared.models.reconstructors import build_reconstructor
from shared.models.weight_files import WeightsInfo, write_weights


@dataclass(frozen=True)
class ReconstructionPlan:
    """What to train, on what, and for how long.

    `rows` is the number of measurements of an image, None for the paper's share of its pixels; `validation` the number
    of training images kept for model selection; `command` is recorded in the weights.
    """

    model: str
    dataset: str
    data: Path | None
    out: Path
    rows: int | None = None
    epochs: int = 30
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0
    validation: int = 200
    image_size: int | None = None
    command: str = ""


@dataclass(frozen=True)
class ReconstructionResult:
    """Root mean squared errors over all pixels: of the best epoch on the validation images, and on the test set."""

    epoch: int
    validation_rmse: float
    test_rmse: float


@dataclass(frozen=True)
class _Pairs:
    """Images, and their back-projections float32 [n, c, h, w]."""

    images: ImageSet
    measured: Tensor


def train_reconstructor(plan: ReconstructionPlan, say: Callable[[str], None]) -> ReconstructionResult:
    """Train, keep the epoch that is best on the validation images, test it once, write it to `plan.out`.

    Args:
        plan: what to do.
        say: receives a line per epoch where there is no terminal for a progress bar.

    Raises:
        DatasetError: the data cannot be used, or not with so many measurements.
        ModelError: no reconstructor has this name, or training diverged.
    """
    torch.set_num_threads(usable_cpus())
    whole = datasets.load(plan.dataset, plan.data, "train", image_size=plan.image_size)
    test = datasets.load(plan.dataset, plan.data, "test", image_size=plan.image_size)
    train, validation = datasets.train_validation(whole, plan.validation, plan.seed)
    torch.manual_seed(plan.seed)  # initial weights; all later draws come from `generator`
    network = build_reconstructor(plan.model, whole.image_shape[0])
    rows = plan.rows or usual_rows(math.prod(whole.image_shape))
    try:
        measurement = calibrate(_batches(train), plan.seed, rows)
        project = BackProjection(measurement, whole.image_shape)
        seen, kept, last = (_pairs(images, project) for images in (train, validation, test))
    except ValueError as error:
        raise DatasetError(f"the images of '{plan.dataset}' cannot be measured: {error}") from error
    generator = torch.Generator().manual_seed(plan.seed)

    def loss_of(index: Tensor) -> Tensor:
        return F.mse_loss(network(seen.measured[index]), seen.images.floats(index))

    best = keep_best(
        network,
        fit(network, len(train), loss_of, Schedule(plan.epochs, plan.batch, plan.lr), generator),
        lambda: -_rmse(network, kept),
        lambda epoch, loss, score: say(f"epoch {epoch}/{plan.epochs}  loss {loss:.5f}  validation RMSE {-score:.4f}"),
    )
    network.load_state_dict(best.state)
    info = WeightsInfo(plan.model, command=plan.command or None, image_shape=whole.image_shape, measurement=measurement)
    write_weights(plan.out, best.state, info)
    return ReconstructionResult(best.epoch, -best.score, _rmse(network, last))


def _batches(images: ImageSet) -> Iterator[Float32]:
    for index in torch.arange(len(images)).split(EVALUATION_BATCH):
        yield images.floats(index).numpy()


def _pairs(images: ImageSet, project: BackProjection) -> _Pairs:
    return _Pairs(images, torch.cat([torch.from_numpy(project(batch)) for batch in _batches(images)]))


def _rmse(network: nn.Module, pairs: _Pairs) -> float:
    """sqrt(mean (R(x_b) - x)^2), over all pixels of all images."""
    network.eval()
    total = 0.0
    with torch.inference_mode():
        for index in torch.arange(len(pairs.images)).split(EVALUATION_BATCH):
            error = network(pairs.measured[index]) - pairs.images.floats(index)
            total += float(error.double().square().sum())
    return math.sqrt(total / pairs.measured.numel())
