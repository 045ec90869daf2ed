"""The `defender-client` command: parses, calls one function, prints.

Exit codes: 0 done; 1 the audit found a difference, or the demo missed its aim; 2 the command, configuration or data
cannot be used; 3 the budget does not cover it; 4 the oracle refused or cannot be reached; 5 another rank under torchrun
stopped, or is gone; 130 interrupted (the same command resumes).
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from defender_client import config as configs
from defender_client import jobs, progress
from defender_client import ranks as ranking
from defender_client.attack import Summary
from defender_client.attack_reconstruction import Summary as ReconstructionSummary
from defender_client.audit import Audit
from defender_client.audit import audit as run_audit
from defender_client.certify import certified_accuracy, cost
from defender_client.checkpoints import CheckpointError
from defender_client.config import ConfigError, RunConfig
from defender_client.demo import DemoFailed
from defender_client.demo import demo as run_demo
from defender_client.export import FORMATS, export_stack
from defender_client.ledger_file import read_key
from defender_client.local_audit import audit_local, check_one
from defender_client.offline_audit import LedgerAudit, audit_file
from defender_client.plan import AttackPlan, Plan, PlanUnaffordable
from defender_client.query_log import LogDamaged, QueryLog
from defender_client.ranks import Ranks, RankStopped
from defender_client.recording import RecordingError
from defender_client.replay import described
from defender_client.report import RADII
from defender_client.report import report as write_report
from defender_client.scales import FULL
from defender_client.sources import LiveOracle, LiveSource, RecordedRun, Source, source_of
from defender_client.whitebox import WhiteBoxSource
from shared.datasets import DatasetError
from shared.models.manifest import MANIFEST_FILE
from shared.version import VERSION
from shared.wire.errors import BudgetExhausted, OracleError

_SAME_CLASSIFIER = 0.99  # of a white box that is the oracle's own, but for float rounding
KEY_VARIABLE = "ORACLE_API_KEY"
URL_VARIABLE = "ORACLE_URL"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Learn a defence in front of a classifier you may only query, and certify it.\n\n"
    "The API key comes from `ORACLE_API_KEY` (or a file named by `ORACLE_API_KEY_FILE`).",
)
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Preset = Annotated[str, typer.Argument(help="A preset's name (see `presets`) or a .toml file.", show_default=False)]
_ORACLE_HELP = "The oracle's address; of one that is not ours, URL/v2/models/NAME, a .toml file or python:MODULE:NAME."
OracleUrl = Annotated[str, typer.Option("--oracle", envvar=URL_VARIABLE, help=_ORACLE_HELP)]
MaybeOracleUrl = Annotated[str | None, typer.Option("--oracle", envvar=URL_VARIABLE, help=_ORACLE_HELP)]
Budget = Annotated[
    int | None,
    typer.Option("--budget", min=0, help="Queries that the run may spend in all, of an oracle that is not ours."),
]
Input = Annotated[str | None, typer.Option("--input", help="Short for --endpoint input=NAME.")]
Output = Annotated[str | None, typer.Option("--output", help="Short for --endpoint output=NAME.")]
EndpointSettings = Annotated[
    list[str] | None,
    typer.Option("--endpoint", help="How an oracle that is not ours is asked: key=value. Repeatable."),
]
LedgerKey = Annotated[
    Path | None,
    typer.Option(
        "--ledger-key", envvar="LOCAL_LEDGER_KEY_FILE", help="File of the key that signs the run's own ledger."
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option("--ca", envvar="ORACLE_CA_FILE", help="PEM file of the authorities an https oracle is trusted by."),
]
Record = Annotated[bool, typer.Option("--record", help="Keep every answer in the run, so that it can be replayed.")]
ReplayedRun = Annotated[
    Path | None, typer.Option("--replay", help="A recorded run: take its answers, ask no oracle, spend nothing.")
]
Out = Annotated[Path, typer.Option("--out", help="The run's directory; an unfinished run in it is resumed.")]
Data = Annotated[Path | None, typer.Option("--data", help="Directory of the data set's files.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Short for --set data.dataset=NAME.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Change one value: section.key=value. Repeatable.")]
Scale = Annotated[
    str, typer.Option("--scale", help="smoke (seconds), cpu (two cores) or full: epochs, images and widths at once.")
]
WhiteBoxFile = Annotated[
    Path | None,
    typer.Option("--whitebox", help="The classifier's weights, for gradients that the oracle never gives."),
]
WhiteBoxModel = Annotated[
    str | None, typer.Option("--whitebox-model", help="Its architecture, where the file does not say it.")
]
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
    scale: Scale = FULL,
    ca: Ca = None,
    budget: Budget = None,
    input_name: Input = None,
    output_name: Output = None,
    endpoint: EndpointSettings = None,
    as_json: AsJson = False,
) -> None:
    """Queries, bytes and time a run will take, against the budget that is left. Exit code 3 if it cannot be paid."""
    with _reported_errors():
        config = _config(preset, dataset, settings, scale)
        foreign = _Foreign(budget, _described_by(input_name, output_name, endpoint))
        planned = jobs.plan_job(config, out, data, foreign.source(oracle, ca))
        if as_json:
            console.print_json(json.dumps(asdict(planned) | {"to_train": planned.to_train, "total": planned.total}))
        else:
            _print_plan(planned)
        planned.check_training()


@app.command()
def pretrain(
    preset: Preset,
    out: Out,
    data: Data = None,
    dataset: Dataset = None,
    settings: Settings = None,
    scale: Scale = FULL,
) -> None:
    """Train the autoencoder (and, if the preset says so, the denoiser) on mean squared error: zero queries."""
    with _reported_errors():
        path = jobs.pretrain_job(_config(preset, dataset, settings, scale), out, data)
        console.print(f"pretrained stack in {path}, zero queries")


@app.command()
def train(
    context: typer.Context,
    preset: Preset,
    out: Out,
    oracle: MaybeOracleUrl = None,
    data: Data = None,
    dataset: Dataset = None,
    settings: Settings = None,
    scale: Scale = FULL,
    whitebox: WhiteBoxFile = None,
    whitebox_model: WhiteBoxModel = None,
    ca: Ca = None,
    record: Record = False,
    replay: ReplayedRun = None,
    budget: Budget = None,
    input_name: Input = None,
    output_name: Output = None,
    endpoint: EndpointSettings = None,
    ledger_key: LedgerKey = None,
) -> None:
    """Train denoiser and encoder from the oracle's answers (`fo-*`: through --whitebox). Run it again to resume."""
    with _together() as ranks:
        config = _config(preset, dataset, settings, scale)
        foreign = _Foreign(budget, _described_by(input_name, output_name, endpoint), ledger_key)
        source = _source(context, oracle, ca, record, replay, foreign)
        box = _whitebox(whitebox, whitebox_model)
        trained = jobs.train_job(config, out, data, source, _announcing("run", source), box, ranks)
        console.print(f"trained stack in {trained.stack}; {trained.spent:,} queries spent by this run in all")


@app.command()
def certify(
    context: typer.Context,
    run: Annotated[Path, typer.Option("--run", help="The run's directory.")],
    oracle: MaybeOracleUrl = None,
    data: Data = None,
    images: Annotated[int | None, typer.Option(help="Certify the first N test images; 0 for all.")] = None,
    n0: Annotated[int | None, typer.Option(help="Draws that choose the class.")] = None,
    n: Annotated[int | None, typer.Option(help="Draws that bound its probability.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Probability that a certificate is wrong.")] = None,
    method: Annotated[
        str | None, typer.Option(help="fixed: n draws an image; sequential: at most n, until --radii are decided.")
    ] = None,
    radii: Annotated[
        list[float] | None, typer.Option(help="A radius that a sequential certification aims at. Repeatable.")
    ] = None,
    in_flight: Annotated[int | None, typer.Option(help="Requests at a time; the rows are the same.")] = None,
    ca: Ca = None,
    record: Record = False,
    replay: ReplayedRun = None,
    budget: Budget = None,
    input_name: Input = None,
    output_name: Output = None,
    endpoint: EndpointSettings = None,
    ledger_key: LedgerKey = None,
) -> None:
    """Certify the run's stack by randomized smoothing (Cohen et al. 2019); one row an image in certified.tsv."""
    with _together() as ranks:
        changed = {
            "images": images,
            "n0": n0,
            "n": n,
            "alpha": alpha,
            "method": method,
            "radii": radii or None,
            "in_flight": in_flight,
        }
        changes = {name: value for name, value in changed.items() if value is not None}
        foreign = _Foreign(budget, _described_by(input_name, output_name, endpoint), ledger_key)
        source = _source(context, oracle, ca, record, replay, foreign)
        certified = jobs.certify_job(run, data, source, changes, _announcing("certification", source), ranks)
        table = Table("radius", "certified accuracy", box=None)
        for radius in certified.settings.radii if certified.settings.method == "sequential" else RADII:
            table.add_row(f"{radius:.2f}", f"{certified_accuracy(certified.rows, radius):.3f}")
        console.print(table)
        abstained = sum(row.predict == -1 for row in certified.rows)
        images_done = len(certified.rows)
        console.print(f"{images_done} images, {abstained} abstained, {certified.spent:,} queries, {certified.path}")
        if certified.settings.method == "sequential" and images_done:
            each = sum(row.queries or 0 for row in certified.rows) / images_done
            console.print(f"sequential: {each:,.0f} queries an image, at most {cost(certified.settings)[1]:,}")


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
def export(
    run: Annotated[Path, typer.Argument(help="The run's directory.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Directory for the files and their manifest.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="safetensors, torch-export or onnx. Repeatable. [default: all three]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the run's stack for other programs, and for `oracle-server serve --defence`; zero queries."""
    with _reported_errors():
        manifest = export_stack(run, out, formats or FORMATS)
        if as_json:
            console.print_json(manifest.model_dump_json())
            return
        for name, entry in manifest.files.items():
            console.print(f"{out / name}: {_bytes(entry.bytes)}, SHA-256 {entry.sha256}")
        console.print(f"{out / MANIFEST_FILE}: {manifest.total_queries:,} queries spent, sigma {manifest.sigma:g}")


@app.command()
def audit(
    runs: Annotated[list[Path] | None, typer.Argument(help="Directories of all runs made with this key.")] = None,
    oracle: Annotated[str | None, typer.Option("--oracle", envvar="ORACLE_URL", help="The oracle's address.")] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="An exported ledger: no server is asked, and no API key needed.")
    ] = None,
    before: Annotated[
        Path | None, typer.Option("--ledger-before", help="An older export, which --ledger must continue.")
    ] = None,
    ca: Ca = None,
    public_key: Annotated[
        str | None,
        typer.Option(help="The ledger's key: 64 hexadecimal digits or a file. [default: as the runs kept it]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare what the client counted with the server's ledger and metrics, with an exported ledger, or, of an oracle
    that is not ours, with the run's own.

    Exit code 1 if they differ, or if the exported ledger is not as it was signed.
    """
    with _reported_errors():
        key = read_key(public_key) if public_key else None
        result: Audit | LedgerAudit
        local = check_one(runs or []) if ledger is None else None
        if ledger is not None:
            result = audit_file(ledger, key, runs or (), before)
        elif local is not None:
            result = audit_local(local, key, before)
        elif oracle is None or not runs or before is not None:
            raise ConfigError("name the runs and an oracle (--oracle), or an exported ledger (--ledger)")
        else:
            with _live(oracle, ca).connect() as remote:
                result = run_audit(runs, remote, key)
        if as_json:
            console.print_json(json.dumps(asdict(result) | {"equal": result.equal}))
        elif isinstance(result, LedgerAudit):
            _print_ledger_audit(result)
        else:
            print_audit(result)
            _print_replayed(runs or [])
        if not result.equal:
            raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the runs and the report go.")] = Path("runs/demo"),
    oracle: Annotated[
        str | None,
        typer.Option("--oracle", envvar=URL_VARIABLE, help="An oracle that is running; by default one is started."),
    ] = None,
    ca: Ca = None,
) -> None:
    """The whole story on the embedded digits: oracle, training, certificates, audit, report. About 3 minutes."""
    with _reported_errors():
        try:
            result = run_demo(out, _live(oracle, ca) if oracle else None)
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
    if result.key_from:
        console.print(f"{result.receipts:,} receipts are good, by the key {result.key_from}")
    for difference in result.differences:
        console.print(f"differs: {difference}")
    console.print(
        f"audit: {'equal' if result.equal else 'NOT EQUAL'} ({result.requests:,} requests of client '{result.client}', "
        f"budget {result.budget:,})"
    )


def _print_ledger_audit(result: LedgerAudit) -> None:
    """The accounts of an exported ledger, what the runs say, and the verdict."""
    table = Table("client", box=None)
    for column in ("requests", "queries", "in flight", "budget"):
        table.add_column(column, justify="right")
    for client in result.clients:
        numbers = (client.requests, client.spent, client.held, client.budget)
        name = f"{client.client} (revoked)" if client.revoked else client.client
        table.add_row(escape(name), *(f"{number:,}" for number in numbers))
    console.print(table)
    for purpose, queries in sorted(result.purposes.items()):
        console.print(f"runs, {purpose}: {queries:,} queries", markup=False)
    if result.purposes:
        console.print(
            f"{result.receipts:,} receipts stand in the ledger; {result.without_receipt:,} requests have none"
        )
    for difference in result.differences:
        console.print(f"differs: {difference}", markup=False)
    hidden = f", {result.hidden:,} of them of others and left out" if result.hidden else ""
    console.print(
        f"audit: {'equal' if result.equal else 'NOT EQUAL'} (ledger {result.ledger}, {result.entries:,} entries"
        f"{hidden}, its end of {result.at or 'no time'}, checked with key {result.public_key[:16]}...)"
    )


def _most(*least: int | None) -> str:
    """What stands before a number of queries that is an upper bound."""
    return "at most " if any(bound is not None for bound in least) else ""


def _print_plan(planned: Plan) -> None:
    table = Table("", "queries", box=None)
    table.add_row("noise floor", f"{planned.noise:,}")
    table.add_row("oracle labels", f"{planned.labels:,}")
    table.add_row("training", f"{_most(planned.least_training)}{planned.training:,}")
    table.add_row("validation", f"{planned.validation:,}")
    table.add_row("certification", f"{_most(planned.least)}{planned.certification:,}")
    table.add_row("total", f"{_most(planned.least, planned.least_training)}{planned.total:,}")
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


def _config(preset: str, dataset: str | None, settings: list[str] | None, scale: str) -> RunConfig:
    chosen = [f"data.dataset={json.dumps(dataset)}"] if dataset else []
    return configs.load_preset(preset, [*chosen, *(settings or [])], scale)


def _whitebox(weights: Path | None, model: str | None) -> WhiteBoxSource | None:
    if weights is None and model is not None:
        raise ConfigError("--whitebox-model names the architecture of --whitebox FILE, which is missing")
    return None if weights is None else WhiteBoxSource(weights, model)


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


def _live(url: str, ca: Path | None) -> LiveOracle:
    return LiveOracle(url, _api_key(), ca)


@dataclass(frozen=True)
class _Foreign:
    """The options of an oracle that is not ours."""

    budget: int | None
    changes: Mapping[str, Any]
    key_file: Path | None = None

    def source(self, oracle: str, ca: Path | None, record: bool = False) -> LiveSource:
        return source_of(
            oracle,
            _api_key(),
            ca,
            record=record,
            budget=self.budget,
            changes=self.changes,
            key_file=self.key_file,
        )


def _described_by(input_name: str | None, output_name: str | None, settings: list[str] | None) -> dict[str, Any]:
    named = {"input": input_name, "output": output_name}
    given = {name: value for name, value in named.items() if value is not None}
    return configs.parse_settings(settings or (), "--endpoint") | given


def _source(
    context: typer.Context,
    url: str | None,
    ca: Path | None,
    record: bool,
    replay: Path | None,
    foreign: _Foreign,
) -> LiveSource | RecordedRun:
    """The oracle or the recording that a command names; ConfigError unless it names one of them."""
    if replay is None:
        if url is None:
            raise ConfigError(f"name an oracle by --oracle URL (or {URL_VARIABLE}), or a recorded run by --replay RUN")
        return foreign.source(url, ca, record)
    # An address that only the environment names is there for other commands.
    named_by = context.get_parameter_source("oracle")
    if url is not None and named_by is not None and named_by.name == "COMMANDLINE":
        raise ConfigError("--oracle and --replay exclude each other: a replay asks no oracle")
    if record:
        raise ConfigError("--record and --replay exclude each other: a replay's answers are on record already")
    if foreign.budget is not None or foreign.changes:
        raise ConfigError("--budget and --endpoint are for an oracle that is asked: a replay asks none")
    return RecordedRun(replay)


def _announcing(what: str, source: Source) -> Callable[[Plan], None]:
    """Says what a job (`run` or `certification`) will cost; of a replay, that it will not."""

    def announce(planned: Plan) -> None:
        queries = planned.to_train if what == "run" else planned.certification
        most = _most(planned.least_training if what == "run" else planned.least)
        if isinstance(source, RecordedRun):
            errors.print(
                f"this {what} takes {most}{queries:,} answers from the recording in {source.run}: zero queries"
            )
            missing = source.unrecorded()
            if missing:
                errors.print(f"that recording is partial: answered requests are not in it ({described(missing)})")
        elif queries:
            left = "no budget" if planned.remaining is None else f"{planned.remaining:,} left"
            errors.print(f"this {what} will spend {most}{queries:,} more queries ({left})")

    return announce


def _print_replayed(runs: list[Path]) -> None:
    for run in runs:
        rows = QueryLog.of_run(run).replayed_rows
        if rows:
            console.print(f"{run} was replayed: {rows:,} answers from a recording, at zero queries")


@contextmanager
def _together() -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone; errors are reported, and rank 0 speaks for all."""
    with _reported_errors(), ranking.together() as ranks:
        if not ranks.leads:
            console.quiet = progress.console.quiet = True
        yield ranks


@contextmanager
def _reported_errors() -> Iterator[None]:
    """One line for what a user can mend, and the exit code that goes with it. SIGTERM interrupts as Ctrl-C does."""
    name = ranking.name()
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
    try:
        yield
    except (ConfigError, DatasetError, CheckpointError, LogDamaged, RecordingError, OSError) as error:
        errors.print(f"{name}error: {error}", markup=False)
        raise typer.Exit(2) from None
    except (PlanUnaffordable, BudgetExhausted) as error:
        errors.print(f"{name}budget: {error}", markup=False)
        raise typer.Exit(3) from None
    except OracleError as error:
        errors.print(f"{name}oracle: {error.title}: {error.detail}", markup=False)
        raise typer.Exit(4) from None
    except RankStopped as error:
        errors.print(f"{name}{error}; the same command resumes it", markup=False)
        raise typer.Exit(5) from None
    except KeyboardInterrupt:
        errors.print(f"{name}stopped; the same command resumes it")
        raise typer.Exit(130) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@app.command()
def attack(
    context: typer.Context,
    run: Annotated[Path, typer.Option("--run", help="The run's directory.")],
    oracle: MaybeOracleUrl = None,
    data: Data = None,
    method: Annotated[str, typer.Option(help="pgd: with a white box's gradients; square: with queries only.")] = "pgd",
    whitebox: WhiteBoxFile = None,
    whitebox_model: WhiteBoxModel = None,
    through: Annotated[
        str | None, typer.Option(help="What pgd crafts on: defended (adaptive, the default) or classifier (transfer).")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Radius of the l2 ball, pixels in [0, 1]. [default: 1]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of pgd. [default: 40]")] = None,
    step_size: Annotated[float | None, typer.Option(help="Length of a step. [default: 2 epsilon / steps]")] = None,
    images: Annotated[
        int | None, typer.Option(help="Attack the first N test images; 0 for all. [default: 100]")
    ] = None,
    copies: Annotated[
        int | None, typer.Option(help="Noisy draws averaged in an answer; 0: one, without noise. [default: 10]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random. [default: the run's]")] = None,
    queries_per_image: Annotated[
        int | None, typer.Option(help="The most that an image may cost. [default: 5000]")
    ] = None,
    ca: Ca = None,
    record: Record = False,
    replay: ReplayedRun = None,
    budget: Budget = None,
    input_name: Input = None,
    output_name: Output = None,
    endpoint: EndpointSettings = None,
    ledger_key: LedgerKey = None,
    as_json: AsJson = False,
) -> None:
    """Attack the run's stack in an l2 ball: PGD (Madry et al.) or Square Attack (Andriushchenko et al.)."""
    with _reported_errors():
        changed = {
            "method": method,
            "through": through,
            "epsilon": epsilon,
            "steps": steps,
            "step_size": step_size,
            "images": images,
            "copies": copies,
            "seed": seed,
            "queries_per_image": queries_per_image,
        }
        changes = {name: value for name, value in changed.items() if value is not None}
        foreign = _Foreign(budget, _described_by(input_name, output_name, endpoint), ledger_key)
        source = _source(context, oracle, ca, record, replay, foreign)
        box = _whitebox(whitebox, whitebox_model)
        attacked = jobs.attack_job(run, data, source, changes, box, _announcing_attack(source))
        if as_json:
            settings = attacked.settings.model_dump()
            console.print_json(
                json.dumps(asdict(attacked.summary) | {"settings": settings, "path": str(attacked.path)})
            )
        else:
            _print_attack(attacked)


def _announcing_attack(source: Source) -> Callable[[AttackPlan], None]:
    """Says what an attack may cost; of a replay, that it will not."""

    def announce(planned: AttackPlan) -> None:
        if isinstance(source, RecordedRun):
            errors.print(f"this attack takes its answers from the recording in {source.run}: zero queries")
        elif planned.queries:
            left = "no budget" if planned.remaining is None else f"{planned.remaining:,} left"
            errors.print(f"this attack will spend at most {planned.queries:,} queries ({left})")

    return announce


def _print_attack(attacked: jobs.Attacked) -> None:
    found = attacked.summary
    if isinstance(found, Summary):
        _print_attacked_classes(found)
    else:
        _print_attacked_images(found)
    settings = attacked.settings
    how = f"{settings.copies} noisy draws an answer" if settings.copies else "without noise"
    console.print(f"{settings.name}, {how}, seed {settings.seed}: {attacked.path}")


def _print_attacked_classes(found: Summary) -> None:
    table = Table("images", "clean accuracy", "under attack", "mean l2 norm", "queries", box=None)
    numbers = (found.clean_accuracy, found.accuracy, found.mean_norm)
    table.add_row(f"{found.images:,}", *map(_decimals, numbers), f"{found.queries:,}")
    console.print(table)
    if found.agreement is not None:
        console.print(f"the white box names the oracle's class for {found.agreement:.1%} of the clean draws")
        if found.agreement < _SAME_CLASSIFIER:
            console.print("so it is another classifier, and this attack a transfer: the oracle may be easier to fool")


def _print_attacked_images(found: ReconstructionSummary) -> None:
    table = Table("images", "", "RMSE", "SSIM", "mean l2 norm", "queries", box=None)
    table.add_row(f"{found.images:,}", "clean", _decimals(found.rmse), _decimals(found.ssim), "-", f"{found.queries:,}")
    under = (found.attacked_rmse, found.attacked_ssim, found.mean_norm)
    table.add_row("", "under attack", *map(_decimals, under), "")
    console.print(table)


def _decimals(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
