"""Makes the frontier: the runs in order, and after each of them the table as far as it is."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.frontier import writing
from benchmarks.frontier.quality import Quality, measure
from benchmarks.frontier.variants import BY_NAME, Variant
from benchmarks.measuring import Failed, heading
from benchmarks.table.oracles import Hidden, TableOracle
from benchmarks.table.runs import Job, Row, certify_like, done, make, pretrained
from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.config import RunConfig
from defender_client.data import gaussian, load_splits
from defender_client.estimation import make_estimator
from defender_client.progress import console
from defender_client.whitebox import WhiteBoxSource
from oracle_server.loading import SHIPPED

_QUALITY = "quality.json"
_BASE = "zo-ae-ds-cge"
_SAMPLE = 256  # images by which the cost of a sample is estimated


@dataclass(frozen=True)
class Point:
    """One run of the frontier."""

    variant: Variant
    budget: int
    seed: int
    job: Job


def make_frontier(options: argparse.Namespace) -> None:
    """Make or go on with the frontier in `options.out`."""
    said = heading("torch", "numpy", "scipy")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    source = WhiteBoxSource(options.weights or SHIPPED[options.model], options.model)
    oracle = TableOracle(out / "oracle", Hidden(options.model, options.weights), options.serve_options)
    try:
        for point in _points(options):
            make(point.job, oracle)
            if point.variant.queries and not (point.job.run / _QUALITY).exists():
                _keep(point.job.run, measure(point.job, point.variant.name, point.budget, source))
            writing.write(out, *_done(out), said)
    finally:
        oracle.stop()
    console.print((out / "frontier.md").read_text(encoding="utf-8"), markup=False)


def _keep(run: Path, quality: Quality) -> None:
    partial = run / f"{_QUALITY}.tmp"
    partial.write_text(json.dumps(asdict(quality)) + "\n", encoding="utf-8")
    os.replace(partial, run / _QUALITY)


def _done(out: Path) -> tuple[writing.Rows, list[Quality]]:
    """All that is done in `out`, by this command and those before it, which may have had other variants and budgets."""
    rows: dict[str, dict[int, dict[int, Row]]] = {}
    qualities = []
    for path in sorted(out.glob("runs/*/*/seed-*")):
        row = done(path)
        if row is None or path.parts[-3] not in BY_NAME:
            continue
        rows.setdefault(path.parts[-3], {}).setdefault(int(path.parts[-2]), {})[row.seed] = row
        if (path / _QUALITY).exists():
            qualities.append(Quality(**json.loads((path / _QUALITY).read_text(encoding="utf-8"))))
    return rows, qualities


def _points(options: argparse.Namespace) -> Iterator[Point]:
    # All variants at one seed and budget before the next: what is there after an hour can be read.
    for seed in options.seeds:
        for budget in [0, *options.budgets]:
            for name in options.variants:
                variant = BY_NAME[name]
                if variant.queries != (budget > 0):
                    continue
                job = Job(
                    config=_config(options, variant, seed),
                    run=options.out / "runs" / variant.name / str(budget) / f"seed-{seed}",
                    client=f"{variant.name}-{budget}-{seed}",
                    data=options.data,
                    whitebox=None,
                    pretrained=options.out / "pretrained",
                )
                if budget:
                    least, most = options.samples
                    cost = _sample_cost(job)
                    if not least <= budget / cost <= most:
                        continue
                    job = replace(job, config=_within(job, budget, cost))
                yield Point(variant, budget, seed, job)


def _config(options: argparse.Namespace, variant: Variant, seed: int) -> RunConfig:
    common = [f"data.dataset={options.dataset}", f"seed={seed}", *options.settings]
    config = configs.load_preset(variant.preset, [*common, *variant.settings], options.scale)
    # Certified alike, whatever their presets say.
    alike = configs.load_preset(_BASE, common, options.scale).certify
    return certify_like(config.model_copy(update={"certify": alike}), {"images": options.images, "n": options.n})


def _within(job: Job, budget: int, cost: float) -> RunConfig:
    """The configuration with as many steps as the budget buys at `cost` queries a sample, and a validation at the end
    of each quarter at most."""
    config = job.config
    step = cost * config.train.batch * config.train.draws
    if budget < step:
        raise Failed(f"--budgets {budget}: one step takes {step:.0f} queries")
    settings = config.train.model_copy(update={"steps": int(budget / step)})
    images = len(load_splits(config.data, job.data, config.seed).train)
    every = max(1, settings.total_epochs(images) // 4)
    return config.model_copy(update={"train": settings.model_copy(update={"validate_every": every})})


def _sample_cost(job: Job) -> float:
    """Queries of a training sample, on average over noisy images before the first step: what active coordinates cost is
    known from the points alone, and nothing is asked for it."""
    config, stack = job.config, stacks.load(pretrained(job))
    clean = load_splits(config.data, job.data, config.seed).train.floats(slice(0, _SAMPLE))
    with torch.no_grad():
        points = stack.front(gaussian(clean, config.sigma, torch.Generator().manual_seed(config.seed)))
    estimator = make_estimator(config.estimator, config.estimator.mu, torch.Generator().manual_seed(0))
    return len(estimator.ask_factored(points, torch.ones_like(points))) / len(points)
