"""Makes the table: oracles, jobs in order, and after each of them the table as far as it is."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measuring import Failed, heading
from benchmarks.table import writing
from benchmarks.table.columns import BY_PRESET, Column
from benchmarks.table.oracles import Hidden, TableOracle, retrain
from benchmarks.table.runs import Job, Row, certify_like, make
from defender_client import certify
from defender_client import config as configs
from defender_client.config import RunConfig
from defender_client.data import load_splits
from defender_client.plan import queries_per_sample
from defender_client.progress import console
from defender_client.stack import specify
from defender_client.whitebox import WhiteBoxSource
from oracle_server.loading import SHIPPED

Retraining = Mapping[str, Mapping[str, list[str]]]


def make_table(options: argparse.Namespace, retraining: Retraining) -> None:
    """Make or go on with the table in `options.out`."""
    said = heading("torch", "numpy", "scipy")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    with _Oracles(options, retraining) as oracles:
        if not options.equal_only:
            _part(options, oracles, "table", _table_jobs(options), said)
        if options.equal_queries:
            _part(options, oracles, "equal-queries", _equal_jobs(options), said)


def _part(options: argparse.Namespace, oracles: _Oracles, name: str, jobs: Iterable[Job], said: str) -> None:
    rows: dict[str, dict[int, Row]] = {}
    certified: dict[str, dict[int, list[certify.Row]]] = {}
    config: RunConfig | None = None
    text = ""
    for job in jobs:
        config = job.config
        row = make(job, oracles.of(BY_PRESET[config.preset]))
        rows.setdefault(config.preset, {})[config.seed] = row
        certified.setdefault(config.preset, {})[config.seed] = certify.read(job.run / certify.CERTIFIED_FILE)
        text = writing.write_table(options.out, name, rows, certified, said)
    if config is None:
        return
    limit = certify.limit(config.certify, config.sigma)
    about = f"{options.dataset}, {options.model}, sigma {config.sigma:g}, n = {config.certify.n:,}, {options.scale}"
    if name == "table":
        writing.curves(certified, options.out / "certified-accuracy.png", limit, about)
    else:
        writing.bars(rows, options.out / "equal-queries.png", options.equal_queries)
    console.print(text, markup=False)


@dataclass
class _Oracles:
    """The servers that the columns need, each started when the first run needs it."""

    options: argparse.Namespace
    retraining: Retraining
    _stack: ExitStack = field(default_factory=ExitStack)
    _started: dict[bool, TableOracle] = field(default_factory=dict)

    def __enter__(self) -> _Oracles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, column: Column) -> TableOracle:
        if column.retrained not in self._started:
            options = self.options
            hidden = Hidden(options.model, options.weights)
            name = "oracle"
            if column.retrained:
                name, weights = "oracle-rs", options.out / "rs.safetensors"
                retrain(hidden, weights, _retraining(options, self.retraining))
                hidden = Hidden(options.model, weights)
            oracle = TableOracle(options.out / name, hidden, options.serve_options)
            self._stack.callback(oracle.stop)
            self._started[column.retrained] = oracle
        return self._started[column.retrained]


def _retraining(options: argparse.Namespace, known: Retraining) -> list[str]:
    by_dataset = known[options.scale]
    data = [] if options.data is None else ["--data", str(options.data)]
    sigma = _config(options, "rs", 0).sigma
    chosen = by_dataset.get(options.dataset, by_dataset["*"])
    return ["--dataset", options.dataset, *data, "--noise-sigma", f"{sigma:g}", *chosen]


def _table_jobs(options: argparse.Namespace) -> Iterator[Job]:
    for seed in options.seeds:
        for preset in options.columns:
            yield _job(options, _config(options, preset, seed), f"seed-{seed}")


def _equal_jobs(options: argparse.Namespace) -> Iterator[Job]:
    for seed in options.equal_seeds or options.seeds:
        for preset in options.columns:
            if not BY_PRESET[preset].queries:
                continue
            config = _config(options, preset, seed)
            yield _job(options, _within(config, options), f"equal-{options.equal_queries}/seed-{seed}")


def _within(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The configuration with as many steps as the training queries pay for, and one validation at the end of each of
    four quarters at most."""
    images = load_splits(config.data, options.data, config.seed).train
    each = queries_per_sample(config, specify(config, images.image_shape, images.classes))
    step = each * config.train.batch
    steps = options.equal_queries // step
    if not steps:
        raise Failed(f"--equal-queries {options.equal_queries}: one step of {config.preset} takes {step} queries")
    settings = config.train.model_copy(update={"steps": steps})
    epochs = settings.total_epochs(len(images))
    return config.model_copy(update={"train": settings.model_copy(update={"validate_every": max(1, epochs // 4)})})


def _config(options: argparse.Namespace, preset: str, seed: int) -> RunConfig:
    settings = [f"data.dataset={options.dataset}", f"seed={seed}", *options.settings]
    config = configs.load_preset(preset, settings, options.scale)
    return certify_like(config, {"images": options.images, "n": options.n})


def _job(options: argparse.Namespace, config: RunConfig, group: str) -> Job:
    column = BY_PRESET[config.preset]
    weights = options.weights or SHIPPED[options.model]
    return Job(
        config=config,
        run=options.out / "runs" / group / config.preset,
        client=f"{group.replace('/', '-')}-{config.preset}",
        data=options.data,
        whitebox=WhiteBoxSource(weights, options.model) if column.whitebox else None,
        pretrained=options.out / "pretrained",
        pretrain_seed=options.pretrain_seed,
    )
