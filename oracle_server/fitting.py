"""What all training has in common: epochs of steps under one schedule, and the best epoch on a validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from shared.models.weight_files import ModelError

EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Schedule:
    """For how long, how many images a step, and the highest rate of the one-cycle schedule."""

    epochs: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Best:
    """The epoch (from 1) with the highest score, and the weights it ended with."""

    epoch: int
    score: float
    state: dict[str, Tensor]


def fit(
    module: nn.Module, count: int, loss_of: Callable[[Tensor], Tensor], schedule: Schedule, generator: torch.Generator
) -> Iterator[tuple[int, float]]:
    """Train epoch by epoch with AdamW and a one-cycle rate; yields (epoch from 1, mean loss) after each.

    Args:
        module: whose parameters are trained; in training mode meanwhile.
        count: of training images.
        loss_of: indices int64 [b] of images -> their mean loss.
        schedule: for how long.
        generator: of the order.
    """
    steps = math.ceil(count / schedule.batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=schedule.lr, weight_decay=1e-2)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=schedule.lr, total_steps=steps * schedule.epochs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps * schedule.epochs)
        for epoch in range(1, schedule.epochs + 1):
            module.train()
            total = 0.0
            for index in torch.randperm(count, generator=generator).split(schedule.batch):
                loss = loss_of(index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
                total += loss.item() * len(index)
                progress.advance(task)
            mean_loss = total / count
            progress.update(task, description=f"epoch {epoch}  loss {mean_loss:.4f}")
            yield epoch, mean_loss


def keep_best(
    network: nn.Module,
    epochs: Iterator[tuple[int, float]],
    score_now: Callable[[], float],
    say: Callable[[int, float, float], None],
) -> Best:
    """Run through the epochs; the first one of the highest score.

    Args:
        network: whose weights are kept.
        epochs: as `fit` yields them; at least one.
        score_now: on the validation images, after each epoch; the higher the better.
        say: receives epoch, mean loss and score where there is no terminal for a progress bar.

    Raises:
        ModelError: no epoch has a score that is a number.
    """
    best = Best(0, -math.inf, {})
    for epoch, loss in epochs:
        score = score_now()
        if score > best.score:
            best = Best(epoch, score, {name: tensor.clone() for name, tensor in network.state_dict().items()})
        if not Console(stderr=True).is_terminal:
            say(epoch, loss, score)
    if not best.state:
        raise ModelError(
            "training diverged: after no epoch was the error on the validation images a number; lower --lr"
        )
    return best
