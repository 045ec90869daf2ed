"""One run of the table: planned, granted what it was planned to cost, trained, certified, audited, kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import Failed
from benchmarks.table.columns import BY_PRESET, RADII
from benchmarks.table.oracles import TableOracle
from defender_client import certify, jobs
from defender_client import config as configs
from defender_client.audit import audit
from defender_client.config import RunConfig
from defender_client.pretrain import PRETRAINED_FILE
from defender_client.progress import console
from defender_client.report import read_run
from defender_client.run_directory import locked
from defender_client.whitebox import WhiteBoxSource

_RESULT, _TIMES = "table-row.json", "times.json"


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
        config: of the run; its preset names the column.
        run: its directory.
        client: its client's name begins with this; a run that is begun anew has a client, and an account, of its own.
        data: directory of the data set's files.
        whitebox: for columns that take gradients.
        pretrained: where pre-trained stacks are kept for all runs that begin alike.
        pretrain_seed: of the pre-training; None for the run's own.
    """

    config: RunConfig
    run: Path
    client: str
    data: Path | None
    whitebox: WhiteBoxSource | None
    pretrained: Path
    pretrain_seed: int | None = None


@dataclass(frozen=True)
class Row:
    """What a run came to; it is kept beside the run.

    Attributes:
        accuracy: certified accuracy at `RADII`, in 0..1; None where n draws cannot certify that radius.
        abstained: in 0..1.
        training_queries: those for gradients; `other_queries` for the noise floor, labels and validation.
        seconds: of pre-training (of whichever run was first), training and certification.
        quality: best validation agreement.
    """

    preset: str
    seed: int
    images: int
    n: int
    accuracy: list[float | None]
    abstained: float
    training_queries: int
    other_queries: int
    certification_queries: int
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]
    samples: int
    quality: float | None
    audit: str


def make(job: Job, oracle: TableOracle) -> Row:
    """Make the run, or what is left of it; a run that is done asks nothing.

    Raises:
        Failed: its accounts differ.
        OracleError, ConfigError: as `jobs`.
    """
    known = done(job.run)
    if known is not None:
        return known
    console.print(f"[bold]{job.run.parent.name}/{job.run.name}[/bold] ({job.config.preset})")
    config = job.config
    with locked(job.run) as run_id:
        client = f"{job.client}-{run_id[:8]}"
    source = oracle.client(client)
    _begin_alike(job)
    planned = jobs.plan_job(config, job.run, job.data, source)
    with source.connect() as remote:
        statement = remote.budget()
    spent = statement.spent if statement is not None else 0
    oracle.grant(client, spent + planned.total)
    with _timed(job.run, "training"):
        jobs.train_job(config, job.run, job.data, source, lambda _: None, job.whitebox)
    with _timed(job.run, "certification"):
        jobs.certify_job(job.run, job.data, source, {}, lambda _: None)
    with source.connect() as remote:
        audited = audit([job.run], remote)
    if not audited.equal:
        raise Failed(f"{job.run}: the accounts differ: {'; '.join(audited.differences)}")
    row = _row(job)
    _write(job.run / _RESULT, asdict(row))
    return row


def done(run: Path) -> Row | None:
    """What a run came to, if it is done."""
    path = run / _RESULT
    return Row(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _row(job: Job) -> Row:
    result = read_run(job.run)
    settings, count = result.certification, len(result.rows)
    limit = certify.limit(settings, result.config.sigma)
    queries = result.queries
    training = queries.get("train", 0)
    certification = queries.get(certify.PURPOSE, 0)
    qualities = [float(point["agreement"]) for point in result.curve]
    samples = 0
    if result.curve and result.config.estimator.name != "none":
        steps, images = int(result.curve[-1]["step"]), _training_images(job)
        samples = result.config.train.samples(steps, images)
    return Row(
        preset=job.config.preset,
        seed=job.config.seed,
        images=count,
        n=settings.n,
        accuracy=[certify.certified_accuracy(result.rows, r) if r <= limit else None for r in RADII],
        abstained=sum(row.predict == -1 for row in result.rows) / count,
        training_queries=training,
        other_queries=sum(queries.values()) - training - certification,
        certification_queries=certification,
        bytes_up=result.bytes_up,
        bytes_down=result.bytes_down,
        seconds=_read(job.run / _TIMES),
        samples=samples,
        quality=max(qualities) if qualities else None,
        audit="equal",
    )


def _training_images(job: Job) -> int:
    from defender_client.data import load_splits

    return len(load_splits(job.config.data, job.data, job.config.seed).train)


def pretrained(job: Job) -> Path:
    """The pre-trained stack of all runs that begin alike, by seed, data and stack; made if it is not there."""
    config = job.config
    if job.pretrain_seed is not None:
        config = config.model_copy(update={"seed": job.pretrain_seed})
    parts = (config.seed, config.sigma, config.data, config.denoiser, config.autoencoder, config.pretrain)
    said = json.dumps([part if isinstance(part, int | float) else part.model_dump() for part in parts], sort_keys=True)
    shared = job.pretrained / hashlib.sha256(said.encode()).hexdigest()[:16]
    with _timed(shared, "pretraining"):
        if not (shared / PRETRAINED_FILE).exists():
            jobs.pretrain_job(config, shared, job.data)
    return shared / PRETRAINED_FILE


def _begin_alike(job: Job) -> None:
    """Begin with the stack that is pre-trained once for all runs like this one."""
    target = job.run / PRETRAINED_FILE
    if target.exists() or job.config.denoiser.architecture == "none":
        return
    made = pretrained(job)
    job.run.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".tmp")
    shutil.copyfile(made, partial)
    os.replace(partial, target)
    _write(job.run / _TIMES, {"pretraining": _read(made.parent / _TIMES).get("pretraining", 0.0)})


def certify_like(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with other certification settings; those that are None stay."""
    kept = {name: value for name, value in changes.items() if value is not None}
    settings = configs.CertifyConfig.model_validate(config.certify.model_dump() | kept)
    return config.model_copy(update={"certify": settings})


def title(row: Row) -> str:
    return BY_PRESET[row.preset].title


@contextmanager
def _timed(folder: Path, what: str) -> Iterator[None]:
    """Add the block's seconds to what is kept under `what`, however the block ends."""
    start = time.monotonic()
    try:
        yield
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        known = _read(folder / _TIMES)
        _write(folder / _TIMES, known | {what: known.get(what, 0.0) + time.monotonic() - start})


def _read(path: Path) -> dict[str, float]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
