"""The `defender-client` command: parses, calls one function, prints.

Exit codes: 0 done; 1 the audit found a difference, or the demo missed its aim; 2 the command, configuration or data
cannot be used; 3 the budget does not cover it; 4 the oracle refused or cannot be reached; 5 another rank under torchrun
stopped, or is gone; 130 interrupted (the same command resumes).

Commands import what they call when they are called: torch takes seconds, and neither `--help` nor a shell that
completes a word needs it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from defender_client.preset_files import described_presets, preset_names
from defender_client.scales import FULL
from defender_client.terminal import URL_VARIABLE, console, errors, speaker
from shared.version import VERSION

if TYPE_CHECKING:
    from defender_client.audit import Audit
    from defender_client.offline_audit import LedgerAudit
    from defender_client.options import Foreign
    from defender_client.ranks import Ranks
    from defender_client.sources import LiveSource, RecordedRun

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Learn a defence in front of a classifier you may only query, and certify it.\n\n"
    "The API key comes from `ORACLE_API_KEY` (or a file named by `ORACLE_API_KEY_FILE`), the address from `--oracle` "
    "or `ORACLE_URL`.",
    epilog="First what it would cost, then the run, its certificate and its account:\n\n"
    "- `defender-client plan zo-ae-ds --data DIR`\n"
    "- `defender-client train zo-ae-ds --data DIR --out runs/mine`\n"
    "- `defender-client certify --run runs/mine --data DIR`\n"
    "- `defender-client audit runs/mine`\n\n"
    "Exit codes: 0 done, 1 accounts differ, 2 cannot be used, 3 over budget, 4 refused or unreachable, 5 another rank "
    "stopped, 130 interrupted. Whatever was interrupted or killed goes on by the same command.",
)


def _completed_preset(incomplete: str) -> list[str]:
    return [name for name in preset_names() if name.startswith(incomplete)]


Preset = Annotated[
    str,
    typer.Argument(
        help="A preset's name (see `presets`) or a .toml file.", show_default=False, autocompletion=_completed_preset
    ),
]
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
    str,
    typer.Option(
        "--scale",
        help="smoke (seconds), cpu (two cores) or full: epochs, images and widths at once.",
        autocompletion=lambda: ["smoke", "cpu", "full"],
    ),
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
def presets(as_json: AsJson = False) -> None:
    """List the presets: where a run begins. A .toml file of your own is one, too."""
    if as_json:
        from defender_client.printing import print_json

        print_json(described_presets())
        return
    table = Table("preset", "what it is", box=None)
    for name, what in described_presets().items():
        table.add_row(name, what)
    console.print(table)


@app.command(epilog="`defender-client plan zo-ae-ds --oracle http://HOST:8600 --data DIR --set train.epochs=4`")
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
        from defender_client import jobs, printing
        from defender_client.options import Foreign, config_of, described_by

        config = config_of(preset, dataset, settings, scale)
        foreign = Foreign(budget, described_by(input_name, output_name, endpoint))
        planned = jobs.plan_job(config, out, data, foreign.source(oracle, ca))
        if as_json:
            printing.print_json(printing.plan_as_json(planned))
        else:
            printing.print_plan(planned)
        planned.check_training()


@app.command(
    epilog="`defender-client pretrain zo-ae-ds --data DIR --out runs/mine`, on a machine that reaches no oracle"
)
def pretrain(
    preset: Preset,
    out: Out,
    data: Data = None,
    dataset: Dataset = None,
    settings: Settings = None,
    scale: Scale = FULL,
    as_json: AsJson = False,
) -> None:
    """Train the autoencoder (and, if the preset says so, the denoiser) on mean squared error: zero queries."""
    with _reported_errors():
        from defender_client import jobs, printing
        from defender_client.options import config_of

        path = jobs.pretrain_job(config_of(preset, dataset, settings, scale), out, data)
        if as_json:
            printing.print_json({"stack": str(path), "queries": 0})
        else:
            console.print(f"pretrained stack in {path}, zero queries")


@app.command(
    epilog="`defender-client train zo-ae-ds --oracle http://HOST:8600 --data DIR --out runs/mine --set train.lr=0.0005`"
    "\n\nOn several processes: `torchrun --nproc-per-node 2 -m -- defender_client train ...`. Of a server that is not "
    "ours: `--oracle URL/v2/models/NAME --budget N`. Curves: `tensorboard --logdir runs`."
)
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
    as_json: AsJson = False,
) -> None:
    """Train denoiser and encoder from the oracle's answers (`fo-*`: through --whitebox). Run it again to resume."""
    with _together() as ranks:
        from defender_client import jobs, printing
        from defender_client.options import Foreign, config_of, described_by, whitebox_of

        config = config_of(preset, dataset, settings, scale)
        foreign = Foreign(budget, described_by(input_name, output_name, endpoint), ledger_key)
        source = _source(context, oracle, ca, record, replay, foreign)
        box = whitebox_of(whitebox, whitebox_model)
        trained = jobs.train_job(config, out, data, source, printing.announcing("run", source), box, ranks)
        if as_json:
            printing.print_json({"stack": str(trained.stack), "queries": trained.spent})
        else:
            console.print(f"trained stack in {trained.stack}; {trained.spent:,} queries spent by this run in all")


@app.command(
    epilog="`defender-client certify --run runs/mine --data DIR --images 500 --method sequential --radii 0 --radii 0.5`"
)
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
    as_json: AsJson = False,
) -> None:
    """Certify the run's stack by randomized smoothing (Cohen et al. 2019); one row an image in certified.tsv."""
    with _together() as ranks:
        from defender_client import jobs, printing
        from defender_client.options import Foreign, described_by

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
        foreign = Foreign(budget, described_by(input_name, output_name, endpoint), ledger_key)
        source = _source(context, oracle, ca, record, replay, foreign)
        announce = printing.announcing("certification", source)
        certified = jobs.certify_job(run, data, source, changes, announce, ranks)
        if as_json:
            printing.print_json(printing.certified_as_json(certified))
        else:
            printing.print_certified(certified)


@app.command(epilog="`defender-client report runs/undefended runs/mine --data DIR`")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, in the order they are to be shown.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file; default: report.html in the last run.")
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """One HTML file (and PNGs beside it): table, certified-accuracy curve, denoised images, query account."""
    with _reported_errors():
        from defender_client import printing
        from defender_client.report import report as write_report

        target = out or runs[-1] / "report.html"
        write_report(runs, target, data)
        if as_json:
            printing.print_json({"report": str(target)})
        else:
            console.print(f"report in {target}")


@app.command(epilog="`oracle-server serve --model NAME --defence DIR --smooth 100` serves it, a robust classifier")
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
        from defender_client.export import FORMATS, export_stack
        from defender_client.printing import print_exported

        manifest = export_stack(run, out, formats or FORMATS)
        if as_json:
            console.print_json(manifest.model_dump_json())
        else:
            print_exported(manifest, out)


@app.command(
    epilog="- `defender-client audit runs/mine --oracle http://HOST:8600`\n"
    "- `defender-client audit runs/mine --ledger ledger.jsonl --public-key HEX`, of `oracle-server ledger export`"
)
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
        from dataclasses import asdict

        from defender_client import printing

        result = _audited(runs or [], oracle, ledger, before, ca, public_key)
        if as_json:
            printing.print_json(asdict(result) | {"equal": result.equal})
        else:
            printing.print_any_audit(result, runs or [])
        if not result.equal:
            raise typer.Exit(1)


def _audited(
    runs: list[Path],
    oracle: str | None,
    ledger: Path | None,
    before: Path | None,
    ca: Path | None,
    public_key: str | None,
) -> Audit | LedgerAudit:
    from defender_client.audit import audit as run_audit
    from defender_client.config import ConfigError
    from defender_client.ledger_file import read_key
    from defender_client.local_audit import audit_local, check_one
    from defender_client.offline_audit import audit_file
    from defender_client.options import live

    key = read_key(public_key) if public_key else None
    if ledger is not None:
        return audit_file(ledger, key, runs, before)
    local = check_one(runs)
    if local is not None:
        return audit_local(local, key, before)
    if oracle is None or not runs or before is not None:
        raise ConfigError("name the runs and an oracle (--oracle), or an exported ledger (--ledger)")
    with live(oracle, ca).connect() as remote:
        return run_audit(runs, remote, key)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the runs and the report go.")] = Path("runs/demo"),
    oracle: Annotated[
        str | None,
        typer.Option("--oracle", envvar=URL_VARIABLE, help="An oracle that is running; by default one is started."),
    ] = None,
    ca: Ca = None,
    as_json: AsJson = False,
) -> None:
    """The whole story on the embedded digits: oracle, training, certificates, audit, report. About 3 minutes."""
    with _reported_errors():
        from defender_client import printing
        from defender_client.demo import demo as run_demo
        from defender_client.options import live

        result = run_demo(out, live(oracle, ca) if oracle else None)
        if as_json:
            printing.print_json(printing.demo_as_json(result))
        else:
            printing.print_demo(result)


@app.command(
    epilog="- `defender-client attack --run runs/mine --data DIR --whitebox FILE`: adaptive PGD\n"
    "- `defender-client attack --run runs/mine --data DIR --method square`: with queries only"
)
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
        from defender_client import jobs, printing
        from defender_client.options import Foreign, described_by, whitebox_of

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
        foreign = Foreign(budget, described_by(input_name, output_name, endpoint), ledger_key)
        source = _source(context, oracle, ca, record, replay, foreign)
        box = whitebox_of(whitebox, whitebox_model)
        attacked = jobs.attack_job(run, data, source, changes, box, printing.announcing_attack(source))
        if as_json:
            printing.print_json(printing.attack_as_json(attacked))
        else:
            printing.print_attack(attacked)


def _source(
    context: typer.Context, url: str | None, ca: Path | None, record: bool, replay: Path | None, foreign: Foreign
) -> LiveSource | RecordedRun:
    from defender_client.options import source_from

    named_by = context.get_parameter_source("oracle")
    typed = named_by is not None and named_by.name == "COMMANDLINE"
    return source_from(url, typed, ca, record, replay, foreign)


@contextmanager
def _together() -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone; errors are reported, and rank 0 speaks for all."""
    with _reported_errors():
        from defender_client import progress
        from defender_client.ranks import together

        with together() as ranks:
            if not ranks.leads:
                console.quiet = progress.console.quiet = True
            yield ranks


@contextmanager
def _reported_errors() -> Iterator[None]:
    """One line for what a user can mend, and the exit code that goes with it. SIGTERM interrupts as Ctrl-C does."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"{speaker()}stopped; the same command resumes it")
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        from defender_client.exits import exit_of

        known = exit_of(error)
        if known is None:
            raise
        code, said = known
        errors.print(f"{speaker()}{said}", markup=False)
        raise typer.Exit(code) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
