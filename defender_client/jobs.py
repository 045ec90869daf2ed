"""What the commands do, from the first check to the last file: the order of a run's steps stands here and nowhere else.

    pretrain   configuration, autoencoder and denoiser; asks no oracle
    plan       configuration, shapes, cost; spends nothing
    train      lock, configuration, plan, check against the budget, train
    certify    lock, configuration, plan, check against the budget, certify
    attack     lock, configuration, white box, plan, check against the budget, attack

Answers come from an oracle or from a recording (`sources`). A job that is run again does what is left of it. `train`
and `certify` may be shared out (`ranks`): then each rank calls them, and rank 0 locks, plans and announces. Each
raises what its parts raise: ConfigError and DatasetError for what cannot be used, PlanUnaffordable before anything is
spent, OracleError for a refusal, RecordingError for a recording that does not have this run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defender_client import attack as attacks
from defender_client import attack_reconstruction as reconstruction_attacks
from defender_client import certify as certification
from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.config import AttackConfig, CertifyConfig, RunConfig
from defender_client.data import Splits, check_fit, load_splits, load_test
from defender_client.errors import ConfigError
from defender_client.measured import measure, measure_splits
from defender_client.oracle import Oracle, OracleInfo
from defender_client.plan import AttackPlan, Plan, plan_attack
from defender_client.plan import plan as make_plan
from defender_client.pretrain import PRETRAINED_FILE
from defender_client.pretrain import pretrain as run_pretraining
from defender_client.ranks import ALONE, Ranks
from defender_client.run_directory import check_identity, locked
from defender_client.sources import LiveSource, Source
from defender_client.train import STACK_FILE, check_whitebox
from defender_client.train import train as run_training
from defender_client.whitebox import WhiteBoxSource, load_whitebox
from shared.datasets import ImageSet

Announce = Callable[[Plan], None]
"""Told what a job will cost, before it is checked against the budget and before anything is spent."""


@dataclass(frozen=True)
class Trained:
    """A trained run: where its stack is, and the queries that the run has spent in all."""

    stack: Path
    spent: int


@dataclass(frozen=True)
class Certified:
    """A certified run: all its rows, the file they are in, the queries that its certification spent in all, and the
    settings that made them."""

    rows: list[certification.Row]
    path: Path
    spent: int
    settings: CertifyConfig


def plan_job(config: RunConfig, run: Path | None, data: Path | None, source: LiveSource) -> Plan:
    """The cost of what is left of a run (`run` None: of one that has not started); asks nothing that costs a query."""
    if run is not None and (run / configs.CONFIG_FILE).exists():
        configs.save(config, run)  # which checks that it is the run's own
        config = config.model_copy(update={"certify": configs.certify_settings(config, run, {})})
    with source.connect(run) as oracle:
        splits = load_splits(config.data, data, config.seed)
        check_fit(splits.train, oracle.info.image_shape)
        sizes = (len(splits.train), len(splits.validation), len(load_test(config.data, data)))
        spec = stacks.specify(config, oracle.info.image_shape, oracle.info.classes)
        return make_plan(config, spec, run, sizes, oracle, measure=True)


def pretrain_job(config: RunConfig, run: Path, data: Path | None) -> Path:
    """Train autoencoder and denoiser at zero queries; returns the file of the pretrained stack."""
    if config.task == "reconstruction":
        raise ConfigError(
            "`pretrain` asks no oracle, and how images are measured is the oracle's to say: `train` pre-trains first"
        )
    splits = load_splits(config.data, data, config.seed)
    with locked(run):
        configs.save(config, run)
        spec = stacks.specify(config, splits.train.image_shape, splits.train.classes)
        run_pretraining(config, spec, run, splits)
    return run / PRETRAINED_FILE


def train_job(
    config: RunConfig,
    run: Path,
    data: Path | None,
    source: Source,
    announce: Announce,
    whitebox: WhiteBoxSource | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train a run's stack from the oracle's answers, or through a classifier that the user holds."""
    check_whitebox(config, whitebox is not None)
    check_shareable(config, ranks)
    splits = load_splits(config.data, data, config.seed)
    with _session(run, source, ranks) as oracle:
        _train(config, run, splits, 0, oracle, announce, whitebox, ranks)
        return Trained(run / STACK_FILE, ranks.total(oracle.log.total))


def certify_job(
    run: Path,
    data: Path | None,
    source: Source,
    changes: Mapping[str, Any],
    announce: Announce,
    ranks: Ranks = ALONE,
) -> Certified:
    """Certify a run's stack; `changes` are certification settings other than those the run has."""
    config = configs.load(run)
    config = config.model_copy(update={"certify": configs.certify_settings(config, run, changes)})
    check_certifiable(config)
    test = load_test(config.data, data)
    with _session(run, source, ranks) as oracle:
        return _certify(config, run, test, oracle, announce, ranks)


def train_and_certify_job(
    config: RunConfig, run: Path, data: Path | None, source: Source, announce: Announce
) -> Certified:
    """Both, in one session; `announce` is told of the cost of both."""
    check_certifiable(config)
    splits, test = load_splits(config.data, data, config.seed), load_test(config.data, data)
    with _session(run, source) as oracle:
        _train(config, run, splits, len(test), oracle, announce)
        return _certify(config, run, test, oracle, lambda _: None)


def check_shareable(config: RunConfig, ranks: Ranks) -> None:
    """ConfigError where there are several ranks and nothing that can be shared out among them."""
    if ranks.alone:
        return
    if not config.estimator.zeroth_order:
        raise ConfigError(f"'{config.preset}' makes no gradient of queries, and is not shared out: leave out torchrun")
    if config.train.inner_steps > 1:
        raise ConfigError("train.inner_steps uses answers again where they were given: it is for one process")


def check_task(config: RunConfig, info: OracleInfo) -> None:
    """ConfigError unless the oracle answers with what the configuration is for."""
    if config.task != info.task:
        raise ConfigError(f"'{config.preset}' is for {config.task}, and this oracle does {info.task}: choose another")


def check_certifiable(config: RunConfig) -> None:
    """ConfigError unless a certificate means something, of classes, and aims at radii that can be reached."""
    if config.task != "classification":
        raise ConfigError(f"'{config.preset}' is for {config.task}: it has no classes to certify; see `attack`")
    certification.check(config.certify, config.sigma)


@contextmanager
def _session(run: Path, source: Source, ranks: Ranks = ALONE) -> Iterator[Oracle]:
    with ExitStack() as stack:
        run_id = ranks.from_leader(lambda: stack.enter_context(locked(run)))
        if not ranks.leads:
            check_identity(run, run_id)
        with ranks.leader_first():
            oracle = stack.enter_context(source.open(run, run_id, ranks))
        yield oracle


def _train(
    config: RunConfig,
    run: Path,
    splits: Splits,
    test_images: int,
    oracle: Oracle,
    announce: Announce,
    source: WhiteBoxSource | None = None,
    ranks: Ranks = ALONE,
) -> None:
    info = oracle.info
    check_fit(splits.train, info.image_shape)
    check_task(config, info)
    if info.measurement is not None:
        splits = measure_splits(splits, info.measurement)
    whitebox = load_whitebox(source, info.image_shape, info.classes, info.task) if source is not None else None
    spec = stacks.specify(config, oracle.info.image_shape, oracle.info.classes)
    with ranks.leader_first():
        configs.save(config, run)
        if ranks.leads:
            planned = make_plan(config, spec, run, (len(splits.train), len(splits.validation), test_images), oracle)
            announce(planned)
            planned.check_training()
    run_training(config, spec, run, splits, oracle, whitebox, ranks)


def _certify(
    config: RunConfig, run: Path, test: ImageSet, oracle: Oracle, announce: Announce, ranks: Ranks = ALONE
) -> Certified:
    check_fit(test, oracle.info.image_shape)
    stack = stacks.load(run / STACK_FILE)
    stacks.check_matches(
        stack.spec, stacks.specify(config, oracle.info.image_shape, oracle.info.classes), run / STACK_FILE
    )
    with ranks.leader_first():
        if ranks.leads:
            planned = make_plan(config, stack.spec, run, (0, 0, len(test)), oracle)
            announce(planned)
            planned.check_certification()
            configs.save_certify_settings(config.certify, run)
    path = run / certification.CERTIFIED_FILE
    rows = certification.certify(stack, oracle, test, config.certify, config.seed, path, ranks)
    return Certified(rows, path, ranks.total(oracle.log.charged[certification.PURPOSE]), config.certify)


@dataclass(frozen=True)
class Attacked:
    """An attacked run: all rows of the attack, the file they are in, and the settings that made them."""

    rows: list[attacks.Row] | list[reconstruction_attacks.Row]
    path: Path
    settings: AttackConfig

    @property
    def summary(self) -> attacks.Summary | reconstruction_attacks.Summary:
        """What all rows say, of a classifier or of a reconstructor."""
        if self.rows and isinstance(self.rows[0], reconstruction_attacks.Row):
            return reconstruction_attacks.summary(self.rows)
        rows: list[Any] = self.rows
        return attacks.summary(rows)


def attack_job(
    run: Path,
    data: Path | None,
    source: Source,
    changes: Mapping[str, Any],
    whitebox: WhiteBoxSource | None,
    announce: Callable[[AttackPlan], None],
) -> Attacked:
    """Attack a run's stack; `changes` are settings other than the defaults, or those that the attack was started with.

    `whitebox` is a copy of what the oracle hides, which `pgd` needs.
    """
    config = configs.load(run)
    test = load_test(config.data, data)
    stack = stacks.load(run / STACK_FILE)
    spec = stack.spec
    shape, k = spec.image_shape, spec.classes
    stacks.check_matches(spec, stacks.specify(config, shape, k), run / STACK_FILE)
    copy = load_whitebox(whitebox, shape, k, config.task) if whitebox is not None else None
    settings = configs.attack_settings(config, run, {**changes, "whitebox": copy.digest if copy is not None else None})
    if config.task == "reconstruction" and settings.method != "pgd":
        raise ConfigError("a reconstruction is attacked by pgd, with a white box: square looks for another class")
    attacks.check(settings, shape)
    path = run / f"{settings.name}.tsv"
    known = reconstruction_attacks.read(path) if config.task == "reconstruction" else attacks.read(path)
    with _session(run, source) as oracle:
        check_task(config, oracle.info)
        check_fit(test, oracle.info.image_shape)
        planned = plan_attack(settings, run, len(test), [row.idx for row in known], oracle)
        announce(planned)
        planned.check()
        configs.save_attack_settings(settings, run)
        module, form = copy.module if copy is not None else None, config.certify.query_form
        if oracle.info.measurement is None:
            return Attacked(attacks.attack(stack, oracle, test, settings, module, path, form), path, settings)
        if module is None:
            raise ConfigError("a reconstruction is attacked with a white box: name its weights by --whitebox FILE")
        shown = measure(test, oracle.info.measurement)
        rows = reconstruction_attacks.attack(stack, oracle, shown, settings, module, path, form)
        return Attacked(rows, path, settings)
