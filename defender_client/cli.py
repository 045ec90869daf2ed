"""The `defender-client` command: parses, calls one function, prints.

Exit codes: 0 done; 1 the audit found a difference, or the demo missed its aim; 2 the command, configuration or data
cannot be used; 3 the budget does not cover it; 4 the oracle refused or cannot be reached; 130 interrupted (the same
command resumes).
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from defender_client import certify as certification
from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.audit import Audit
from defender_client.audit import audit as run_audit
from defender_client.checkpoints import CheckpointError
from defender_client.config import ConfigError, RunConfig
from defender_client.data import check_fit, load_splits, load_test
from defender_client.demo import DemoFailed
from defender_client.demo import demo as run_demo
from defender_client.oracle_client import RemoteOracle
from defender_client.plan import Plan, PlanUnaffordable
from defender_client.plan import plan as make_plan
from defender_client.pretrain import PRETRAINED_FILE
from defender_client.pretrain import pretrain as run_pretraining
from defender_client.query_log import LOG_FILE, LogDamaged, QueryLog
from defender_client.report import report as write_report
from defender_client.run_directory import locked
from defender_client.train import STACK_FILE
from defender_client.train import train as run_training
from shared.datasets import DatasetError
from shared.version import VERSION
from shared.wire.errors import BudgetExhausted, OracleError

KEY_VARIABLE = "ORACLE_API_KEY"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Learn a defence in front of a classifier you may only query, and certify it.\n\n"
    "The API key comes from `ORACLE_API_KEY` (or a file named by `ORACLE_API_KEY_FILE`).",
)
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Preset = Annotated[str, typer.Argument(help="A preset's name (see `presets`) or a .toml file.", show_default=False)]
OracleUrl = Annotated[str, typer.Option("--oracle", envvar="ORACLE_URL", help="The oracle's address.")]
Out = Annotated[Path, typer.Option("--out", help="The run's directory; an unfinished run in it is resumed.")]
Data = Annotated[Path | None, typer.Option("--data", help="Directory of the data set's files.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Short for --set data.dataset=NAME.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Change one value: section.key=value. Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        console.print(VERSION)
        raise typer.Exit


@app.command()
def presets() -> None:
    """List the presets."""
    table = Table("preset", "what it is", box=None)
    for name in configs.preset_names():
        table.add_row(name, configs.load_preset(name).description)
    console.print(table)


@app.command()
def plan(
    preset: Preset,
    oracle: OracleUrl,
    out: Annotated[Path | None, typer.Option("--out", help="A run that has started: count only what is left.")] = None,
    data: Data = None,
    dataset: Dataset = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Queries, bytes and time a run will take, against the budget that is left. Exit code 3 if it cannot be paid."""
    with _reported_errors():
        config = _config(preset, dataset, settings)
        if out is not None and (out / configs.CONFIG_FILE).exists():
            configs.save(config, out)  # which checks that it is the run's own
            config = config.model_copy(update={"certify": configs.certify_settings(config, out, {})})
        with RemoteOracle(oracle, _api_key()) as remote:
            splits = load_splits(config.data, data, config.seed)
            check_fit(splits.train, remote.info.image_shape)
            sizes = (len(splits.train), len(splits.validation), len(load_test(config.data, data)))
            spec = stacks.specify(config, remote.info.image_shape, remote.info.classes)
            planned = make_plan(config, spec, out, sizes, remote, measure=True)
        if as_json:
            console.print_json(json.dumps(asdict(planned) | {"to_train": planned.to_train, "total": planned.total}))
        else:
            _print_plan(planned)
        planned.check_training()


@app.command()
def pretrain(preset: Preset, out: Out, data: Data = None, dataset: Dataset = None, settings: Settings = None) -> None:
    """Train the autoencoder (and, if the preset says so, the denoiser) on mean squared error: zero queries."""
    with _reported_errors():
        config = _config(preset, dataset, settings)
        splits = load_splits(config.data, data, config.seed)
        with locked(out):
            configs.save(config, out)
            spec = stacks.specify(config, splits.train.image_shape, splits.train.classes)
            run_pretraining(config, spec, out, splits)
        console.print(f"pretrained stack in {out / PRETRAINED_FILE}, zero queries")


@app.command()
def train(
    preset: Preset,
    oracle: OracleUrl,
    out: Out,
    data: Data = None,
    dataset: Dataset = None,
    settings: Settings = None,
) -> None:
    """Train denoiser and encoder from the oracle's answers. Run it again to resume."""
    with _reported_errors():
        config = _config(preset, dataset, settings)
        splits = load_splits(config.data, data, config.seed)
        with locked(out) as run_id, _oracle(oracle, out, run_id) as remote:
            check_fit(splits.train, remote.info.image_shape)
            configs.save(config, out)
            spec = stacks.specify(config, remote.info.image_shape, remote.info.classes)
            planned = make_plan(config, spec, out, (len(splits.train), len(splits.validation), 0), remote)
            if planned.to_train:
                left = "no budget" if planned.remaining is None else f"{planned.remaining:,} left"
                errors.print(f"this run will spend {planned.to_train:,} more queries ({left})")
            planned.check_training()
            run_training(config, spec, out, splits, remote)
            console.print(f"trained stack in {out / STACK_FILE}; {remote.log.total:,} queries spent by this run in all")


@app.command()
def certify(
    run: Annotated[Path, typer.Option("--run", help="The run's directory.")],
    oracle: OracleUrl,
    data: Data = None,
    images: Annotated[int | None, typer.Option(help="Certify the first N test images; 0 for all.")] = None,
    n0: Annotated[int | None, typer.Option(help="Draws that choose the class.")] = None,
    n: Annotated[int | None, typer.Option(help="Draws that bound its probability.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Probability that a certificate is wrong.")] = None,
) -> None:
    """Certify the run's stack by randomized smoothing (Cohen et al. 2019); one row an image in certified.tsv."""
    with _reported_errors():
        config = configs.load(run)
        changed = {"images": images, "n0": n0, "n": n, "alpha": alpha}
        settings = configs.certify_settings(config, run, {k: v for k, v in changed.items() if v is not None})
        config = config.model_copy(update={"certify": settings})
        test = load_test(config.data, data)
        with locked(run) as run_id, _oracle(oracle, run, run_id) as remote:
            check_fit(test, remote.info.image_shape)
            stack = stacks.load(run / STACK_FILE)
            planned = make_plan(config, stack.spec, run, (0, 0, len(test)), remote)
            errors.print(f"this certification will spend {planned.certification:,} more queries")
            planned.check_certification()
            configs.save_certify_settings(settings, run)
            path = run / certification.CERTIFIED_FILE
            rows = certification.certify(stack, remote, test, settings, config.seed, path)
            spent = remote.log.charged[certification.PURPOSE]
        table = Table("radius", "certified accuracy", box=None)
        for radius in (0.0, 0.25, 0.5, 0.75):
            table.add_row(f"{radius:.2f}", f"{certification.certified_accuracy(rows, radius):.3f}")
        console.print(table)
        abstained = sum(row.predict == -1 for row in rows)
        console.print(f"{len(rows)} images, {abstained} abstained, {spent:,} queries, {path}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, in the order they are to be shown.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file; default: report.html in the last run.")
    ] = None,
    data: Data = None,
) -> None:
    """One HTML file (and PNGs beside it): table, certified-accuracy curve, denoised images, query account."""
    with _reported_errors():
        target = out or runs[-1] / "report.html"
        write_report(runs, target, data)
        console.print(f"report in {target}")


@app.command()
def audit(
    runs: Annotated[list[Path], typer.Argument(help="Directories of all runs made with this key.")],
    oracle: OracleUrl,
    as_json: AsJson = False,
) -> None:
    """Compare what the client counted with the server's ledger and metrics. Exit code 1 if they differ."""
    with _reported_errors():
        with RemoteOracle(oracle, _api_key()) as remote:
            result = run_audit(runs, remote)
        if as_json:
            console.print_json(json.dumps(asdict(result) | {"equal": result.equal}))
        else:
            print_audit(result)
        if not result.equal:
            raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the runs and the report go.")] = Path("runs/demo"),
    oracle: Annotated[
        str | None,
        typer.Option("--oracle", envvar="ORACLE_URL", help="An oracle that is running; by default one is started."),
    ] = None,
) -> None:
    """The whole story on the embedded digits: oracle, training, certificates, audit, report. About 3 minutes."""
    with _reported_errors():
        try:
            result = run_demo(out, oracle, _api_key() if oracle else None)
        except DemoFailed as failed:
            errors.print(f"demo failed: {failed}")
            raise typer.Exit(1) from None
        print_audit(result.audit)
        table = Table("radius", "undefended", "defended", box=None)
        for radius, (undefended, defended) in result.accuracies.items():
            table.add_row(f"{radius:.2f}", f"{undefended:.3f}", f"{defended:.3f}")
        console.print("certified accuracy")
        console.print(table)
        console.print(f"report in {result.report}")


def print_audit(result: Audit) -> None:
    """The three accounts beside each other, and the verdict."""
    table = Table("account", "queries", box=None)
    for purpose, queries in sorted(result.purposes.items()):
        table.add_row(f"  client, {purpose}", f"{queries:,}")
    table.add_row("client's logs", f"{result.logged:,}")
    table.add_row("server's ledger", f"{result.ledger:,}")
    table.add_row("server's budget statement", f"{result.statement:,}")
    table.add_row("server's metrics", "-" if result.metrics is None else f"{result.metrics:,}")
    console.print(table)
    if result.lost:
        console.print(f"{result.lost} requests were charged and their answer lost")
    for difference in result.differences:
        console.print(f"differs: {difference}")
    console.print(
        f"audit: {'equal' if result.equal else 'NOT EQUAL'} ({result.requests:,} requests of client '{result.client}', "
        f"budget {result.budget:,})"
    )


def _print_plan(planned: Plan) -> None:
    table = Table("", "queries", box=None)
    table.add_row("oracle labels", f"{planned.labels:,}")
    table.add_row("training", f"{planned.training:,}")
    table.add_row("validation", f"{planned.validation:,}")
    table.add_row("certification", f"{planned.certification:,}")
    table.add_row("total", f"{planned.total:,}")
    table.add_row("budget left", "none kept" if planned.remaining is None else f"{planned.remaining:,}")
    console.print(table)
    console.print(f"bytes: {_bytes(planned.bytes_up)} up, {_bytes(planned.bytes_down)} down")
    if planned.seconds is None:
        console.print("training time: not known before the oracle's first answers")
    else:
        console.print(f"training time: about {timedelta(seconds=round(planned.seconds))}, at the oracle's rate so far")
    if planned.remaining is not None and planned.to_train <= planned.remaining < planned.total:
        console.print("the budget covers the training, but not the certification after it")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _config(preset: str, dataset: str | None, settings: list[str] | None) -> RunConfig:
    chosen = [f"data.dataset={json.dumps(dataset)}"] if dataset else []
    return configs.load_preset(preset, [*chosen, *(settings or [])])


def _api_key() -> str | None:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    file = os.environ.get(f"{KEY_VARIABLE}_FILE")
    if not key and file:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", "it is not text")
            raise ConfigError(f"{KEY_VARIABLE}_FILE={file} cannot be read: {why}") from None
    return key or None


def _oracle(url: str, run: Path, run_id: str) -> RemoteOracle:
    return RemoteOracle(url, _api_key(), log=QueryLog(run / LOG_FILE), run_id=run_id)


@contextmanager
def _reported_errors() -> Iterator[None]:
    """One line for what a user can mend, and the exit code that goes with it. SIGTERM interrupts as Ctrl-C does."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
    try:
        yield
    except (ConfigError, DatasetError, CheckpointError, LogDamaged, OSError) as error:
        errors.print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None
    except (PlanUnaffordable, BudgetExhausted) as error:
        errors.print(f"budget: {error}", markup=False)
        raise typer.Exit(3) from None
    except OracleError as error:
        errors.print(f"oracle: {error.title}: {error.detail}", markup=False)
        raise typer.Exit(4) from None
    except KeyboardInterrupt:
        errors.print("stopped; the same command resumes it")
        raise typer.Exit(130) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
