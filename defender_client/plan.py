"""What a run will cost before it starts: queries, bytes and time, against the budget that is left."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from prometheus_client.parser import text_string_to_metric_families

from defender_client import attack, certify, checkpoints, labels, noise_floor
from defender_client.black_box import best_form
from defender_client.checkpoints import CHECKPOINT_FILE, Progress
from defender_client.config import AttackConfig, RunConfig
from defender_client.data import gaussian
from defender_client.estimation import make_estimator
from defender_client.oracle import Oracle, OracleInfo
from defender_client.pretrain import fresh_stack
from defender_client.query_log import QueryLog, log_files
from defender_client.request_key import RequestKey
from defender_client.sampling import needed
from defender_client.stack import StackSpec
from shared.wire.errors import NotFound

_FLOAT32, _INT64 = 4, 8  # bytes
_TRIAL_SECONDS = 1.0


class PlanUnaffordable(Exception):
    """The run needs more queries than the budget has left; nothing was spent."""

    def __init__(self, needed: int, remaining: int, what: str) -> None:
        super().__init__(
            f"{what} needs {needed:,} queries and the budget has {remaining:,} left ({needed - remaining:,} too few): "
            "ask the operator for more (oracle-server clients set-budget; of an oracle that is not ours, --budget), or "
            "make the run smaller"
        )
        self.needed, self.remaining = needed, remaining


@dataclass(frozen=True)
class Plan:
    """The cost of what is left of a run; queries by purpose.

    Attributes:
        noise, labels, training, validation, certification: queries still to buy; `noise` measures the noise floor. A
            sequential certification buys at most so many, and so does training where a sample's cost depends on which
            of its latents are active.
        samples: training samples still to go through the stack.
        bytes_up, bytes_down: tensor bytes of all those queries, in the form that the oracle takes them.
        seconds: time for training, or None where the oracle's speed is not known yet.
        remaining: the budget's queries left; None for a server that keeps none.
        least: queries that the certification cannot do without; None where it takes all of `certification`.
        least_training: the same of `training`.
    """

    noise: int
    labels: int
    training: int
    validation: int
    certification: int
    samples: int
    bytes_up: int
    bytes_down: int
    seconds: float | None
    remaining: int | None
    least: int | None = None
    least_training: int | None = None

    @property
    def to_train(self) -> int:
        """Queries that `train` will spend, at most."""
        return self.noise + self.labels + self.training + self.validation

    @property
    def total(self) -> int:
        """Queries that training and certification will spend, at most."""
        return self.to_train + self.certification

    def check_training(self) -> None:
        """Raises PlanUnaffordable if the budget does not cover the training, or what it cannot do without."""
        spared = 0 if self.least_training is None else self.training - self.least_training
        needed = self.to_train - spared
        if self.remaining is not None and needed > self.remaining:
            what = "training" if self.least_training is None else "training, at the least,"
            raise PlanUnaffordable(needed, self.remaining, what)

    def check_certification(self) -> None:
        """Raises PlanUnaffordable if the budget does not cover the certification, or what one that is sequential needs
        where every image is decided at the first look."""
        needed = self.certification if self.least is None else self.least
        if self.remaining is not None and needed > self.remaining:
            what = "certification" if self.least is None else "certification, at the least,"
            raise PlanUnaffordable(needed, self.remaining, what)


def plan(
    config: RunConfig,
    spec: StackSpec,
    run: Path | None,
    sizes: tuple[int, int, int],
    oracle: Oracle,
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
    progress, paid = _progress(run), _paid(run, oracle)
    samples = queries = checks = bought = noise = 0
    least_training: int | None = None
    if config.estimator.name != "none" and train:
        settings = config.train
        every, epochs = settings.validate_every, settings.total_epochs(train)
        whole = settings.samples(settings.total_steps(train), train)
        samples = whole - settings.samples(progress.step, train)
        # What stands behind the checkpoint, less what was paid beyond it before a kill: that is asked again, for free.
        each_costs, least_each = _sample_costs(config, spec)
        queries = min(samples * each_costs, _left(whole * each_costs, paid, "train"))
        if least_each < each_costs:
            least_training = min(samples * least_each, queries)
        checked = [epoch for epoch in range(1, epochs + 1) if epoch % every == 0 or epoch == epochs]
        checks = min(
            validation * sum(epoch > progress.epoch for epoch in checked),
            _left(validation * len(checked), paid, "validation"),
        )
        if settings.targets == "oracle" and (run is None or not labels.bought(run)):
            bought = _left(len(needed(train, settings, config.seed)) + validation, paid, labels.PURPOSE)
        started = progress != Progress()
        noise = _left(noise_floor.queries_left(config, run, train, started=started), paid, noise_floor.PURPOSE)
    least, certification = _certification(config, run, test, paid)
    to_train = noise + bought + queries + checks
    total = to_train + certification
    budget = oracle.budget()
    seconds = None
    if measure:
        each = _oracle_seconds(oracle)
        if each is not None:
            seconds = to_train * each + (samples * _own_seconds(config, spec) if samples else 0.0)
    return Plan(
        noise=noise,
        labels=bought,
        training=queries,
        validation=checks,
        certification=certification,
        samples=samples,
        bytes_up=_bytes_up(config, spec, oracle.info, samples, queries, checks, certification, noise + bought),
        bytes_down=total * spec.classes * _FLOAT32,
        seconds=seconds,
        remaining=budget.remaining if budget is not None else None,
        least=least if config.certify.method == "sequential" else None,
        least_training=least_training,
    )


def _bytes_up(
    config: RunConfig,
    spec: StackSpec,
    info: OracleInfo,
    samples: int,
    queries: int,
    checks: int,
    certification: int,
    others: int,
) -> int:
    """Tensor bytes of the requests in the form that the oracle takes; what a request has but once is left out."""
    image = math.prod(spec.image_shape) * _FLOAT32
    point = image if spec.autoencoder is None else spec.autoencoder.latent * _FLOAT32
    best = best_form(spec, info)
    train, certify_ = ({"auto": best}.get(form, form) for form in (config.train.query_form, config.certify.query_form))
    training = 0
    if config.estimator.zeroth_order:
        along = _directions_bytes(config, point)
        training = queries * image if train == "images" else samples * (point + along)
    checking = checks * (point if train == "merged" else image)
    return training + checking + certification * (point if certify_ == "merged" else image) + others * image


def _directions_bytes(config: RunConfig, point: int) -> int:
    """Bytes that say where one sample is probed, at most; `point` are those of a point."""
    name = config.estimator.name
    if name == "rge":
        return _INT64  # a seed
    if name == "cge":
        return 0  # the same for all
    if name == "active-cge":
        return (point // _FLOAT32 + 1) * _INT64
    return max(config.estimator.q, 1) * point


def queries_per_sample(config: RunConfig, spec: StackSpec) -> int:
    """What one training sample costs, or costs at most: the estimator's own statement; nothing where no query makes the
    gradient."""
    return _sample_costs(config, spec)[0]


def _sample_costs(config: RunConfig, spec: StackSpec) -> tuple[int, int]:
    """At most, and at least."""
    estimator = config.estimator
    if not estimator.zeroth_order:
        return 0, 0
    dimension = spec.autoencoder.latent if spec.autoencoder is not None else math.prod(spec.image_shape)
    made = make_estimator(estimator, estimator.mu, torch.Generator())
    most = made.queries_per_sample(dimension)
    # Without an active latent there is the query at the point itself, or none.
    least = int(estimator.difference == "forward") if made.varies else most
    return most, least


def _progress(run: Path | None) -> Progress:
    saved = checkpoints.load(run / CHECKPOINT_FILE) if run is not None else None
    return saved.progress if saved is not None else Progress()


def _paid(run: Path | None, oracle: Oracle) -> dict[str, int]:
    """Queries the run has paid for by their label; requests whose answer was lost as the ledger settles them."""
    if run is None or not log_files(run):
        return {}
    log = QueryLog.of_run(run)
    paid = Counter({asked.key: asked.charged for asked in log.requests.values() if asked.charged and not asked.lost})
    lost = {request.key for request in log.unanswered}
    if lost:
        with suppress(NotFound):  # a server that keeps no ledger
            for entry in oracle.charges():
                if entry.idempotency_key in lost:
                    paid[entry.idempotency_key] += entry.rows
    by_label: Counter[str] = Counter()
    for key, rows in paid.items():
        by_label[RequestKey.parse(key).label] += rows
    return dict(by_label)


def _left(total: int, paid: dict[str, int], label: str) -> int:
    """What is left of `total` queries after those paid under labels that begin with `label`."""
    return max(0, total - sum(rows for paid_label, rows in paid.items() if paid_label.startswith(f"{label}/")))


def _certification(config: RunConfig, run: Path | None, test: int, paid: dict[str, int]) -> tuple[int, int]:
    """Queries left to certify the images that have no row yet: at least, at most."""
    settings = config.certify
    done = certify.done(run / certify.CERTIFIED_FILE) if run is not None else set()
    todo = [index for index in range(min(settings.images or test, test)) if index not in done]
    begun: Counter[str] = Counter()  # an image that a kill interrupted is paid for in part
    for label, rows in paid.items():
        begun[label.rsplit("/", 2)[0]] += rows  # IMAGE/CALL/POSITION
    paid_each = [begun[certify.image_label(settings, config.seed, index)] for index in todo]
    least, most = (sum(max(0, each - before) for before in paid_each) for each in certify.cost(settings))
    return least, most


def _oracle_seconds(oracle: Oracle) -> float | None:
    """Seconds of inference per query so far, from the server's metrics; None before its first answer."""
    sums = {"oracle_inference_seconds_sum": 0.0, "oracle_batch_rows_sum": 0.0}
    try:
        metrics = oracle.metrics()
    except NotFound:  # a server that is not ours
        return None
    for family in text_string_to_metric_families(metrics):
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


@dataclass(frozen=True)
class AttackPlan:
    """The cost of what is left of an attack.

    Attributes:
        queries: the most that it will still buy; an image that is wrong before, or soon fooled, costs less.
        remaining: the budget's queries left; None for a server that keeps none.
    """

    queries: int
    remaining: int | None

    def check(self) -> None:
        """Raises PlanUnaffordable if the budget does not cover the attack."""
        if self.remaining is not None and self.queries > self.remaining:
            raise PlanUnaffordable(self.queries, self.remaining, "the attack")


def plan_attack(settings: AttackConfig, run: Path, test: int, done: Iterable[int], oracle: Oracle) -> AttackPlan:
    """The cost of what is left of an attack on a test set of `test` images; asks nothing that costs a query.

    Args:
        done: the images, by their index, that are attacked already.
    """
    begun: Counter[str] = Counter()  # an image that a kill interrupted is paid for in part
    for label, rows in _paid(run, oracle).items():
        begun[label.rsplit("/", 2)[0]] += rows  # IMAGE/CALL/POSITION
    todo = attack.images_left(settings, test, done)
    queries = sum(max(0, settings.most - begun[attack.image_label(settings, index)]) for index in todo)
    budget = oracle.budget()
    return AttackPlan(queries, budget.remaining if budget is not None else None)
