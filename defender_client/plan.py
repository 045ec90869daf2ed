"""What a run will cost before it starts: queries, bytes and time, against the budget that is left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from prometheus_client.parser import text_string_to_metric_families

from defender_client import checkpoints, labels, zo
from defender_client.certify import CERTIFIED_FILE
from defender_client.certify import read as read_rows
from defender_client.checkpoints import CHECKPOINT_FILE, Progress
from defender_client.config import RunConfig
from defender_client.data import gaussian
from defender_client.oracle_client import RemoteOracle
from defender_client.pretrain import fresh_stack
from defender_client.stack import StackSpec

_FLOAT32 = 4
_TRIAL_SECONDS = 1.0


class PlanUnaffordable(Exception):
    """The run needs more queries than the budget has left; nothing was spent."""

    def __init__(self, needed: int, remaining: int, what: str) -> None:
        super().__init__(
            f"{what} needs {needed:,} queries and the budget has {remaining:,} left ({needed - remaining:,} too few): "
            "ask the operator for more (oracle-server clients set-budget), or make the run smaller"
        )
        self.needed, self.remaining = needed, remaining


@dataclass(frozen=True)
class Plan:
    """The cost of what is left of a run; queries by purpose.

    Attributes:
        labels, training, validation, certification: queries still to buy.
        samples: training samples still to go through the stack.
        bytes_up, bytes_down: tensor bytes of all those queries, float32.
        seconds: time for training, or None where the oracle's speed is not known yet.
        remaining: the budget's queries left; None for a server that keeps none.
    """

    labels: int
    training: int
    validation: int
    certification: int
    samples: int
    bytes_up: int
    bytes_down: int
    seconds: float | None
    remaining: int | None

    @property
    def to_train(self) -> int:
        """Queries that `train` will spend."""
        return self.labels + self.training + self.validation

    @property
    def total(self) -> int:
        """Queries that training and certification will spend."""
        return self.to_train + self.certification

    def check_training(self) -> None:
        """Raises PlanUnaffordable if the budget does not cover the training."""
        if self.remaining is not None and self.to_train > self.remaining:
            raise PlanUnaffordable(self.to_train, self.remaining, "training")

    def check_certification(self) -> None:
        """Raises PlanUnaffordable if the budget does not cover the certification."""
        if self.remaining is not None and self.certification > self.remaining:
            raise PlanUnaffordable(self.certification, self.remaining, "certification")


def plan(
    config: RunConfig,
    spec: StackSpec,
    run: Path | None,
    sizes: tuple[int, int, int],
    oracle: RemoteOracle,
    *,
    measure: bool = False,
) -> Plan:
    """The cost of what is left of a run; asks the oracle for nothing that costs a query.

    Args:
        run: the run's directory if it has started; what is done there is not counted again.
        sizes: images in the training, validation and test sets.
        measure: time the defender's own part with a second of training on random images.
    """
    train, validation, test = sizes
    progress, labelled, certified = _done(run)
    samples = queries = checks = 0
    if config.estimator.name != "none":
        batches_done = min(progress.batch * config.train.batch, train)
        samples = (config.train.epochs - progress.epoch) * train - batches_done
        queries = samples * queries_per_sample(config, spec)
        every, epochs = config.train.validate_every, config.train.epochs
        # Every so many epochs, and after the last one.
        checks = validation * sum(1 for e in range(progress.epoch + 1, epochs + 1) if e % every == 0 or e == epochs)
    else:
        labelled = True
    images = min(config.certify.images or test, test)
    certification = max(images - certified, 0) * (config.certify.n0 + config.certify.n)
    bought = 0 if labelled else train + validation
    total = bought + queries + checks + certification
    budget = oracle.budget()
    seconds = None
    if measure:
        each = _oracle_seconds(oracle)
        if each is not None:
            seconds = (bought + queries + checks) * each + (samples * _own_seconds(config, spec) if samples else 0.0)
    return Plan(
        labels=bought,
        training=queries,
        validation=checks,
        certification=certification,
        samples=samples,
        bytes_up=total * math.prod(spec.image_shape) * _FLOAT32,
        bytes_down=total * spec.classes * _FLOAT32,
        seconds=seconds,
        remaining=budget.remaining if budget is not None else None,
    )


def queries_per_sample(config: RunConfig, spec: StackSpec) -> int:
    """What one training sample costs: the estimator's own statement."""
    estimator = config.estimator
    dimension = spec.autoencoder.latent if spec.autoencoder is not None else math.prod(spec.image_shape)
    made = zo.make(
        estimator.name,
        q=estimator.q,
        mu=estimator.mu,
        difference=estimator.difference,
        generator=torch.Generator(),
    )
    return made.queries_per_sample(dimension)


def _done(run: Path | None) -> tuple[Progress, bool, int]:
    if run is None:
        return Progress(), False, 0
    saved = checkpoints.load(run / CHECKPOINT_FILE)
    return (
        saved.progress if saved is not None else Progress(),
        labels.bought(run),
        len(read_rows(run / CERTIFIED_FILE)),
    )


def _oracle_seconds(oracle: RemoteOracle) -> float | None:
    """Seconds of inference per query so far, from the server's metrics; None before its first answer."""
    sums = {"oracle_inference_seconds_sum": 0.0, "oracle_batch_rows_sum": 0.0}
    for family in text_string_to_metric_families(oracle.metrics()):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
    rows = sums["oracle_batch_rows_sum"]
    return sums["oracle_inference_seconds_sum"] / rows if rows else None


def _own_seconds(config: RunConfig, spec: StackSpec) -> float:
    """Seconds per training sample of the defender's own forward and backward passes, measured on random images."""
    stack = fresh_stack(spec, 0).train()
    batch = min(config.train.batch, 32)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, *spec.image_shape, generator=generator)
    start, steps = 0.0, -1  # the first step warms up
    while steps < 1 or time.monotonic() - start < _TRIAL_SECONDS:
        if steps == 0:
            start = time.monotonic()
        stack.front(gaussian(images, config.sigma, generator)).sum().backward()
        steps += 1
    return (time.monotonic() - start) / (steps * batch)
