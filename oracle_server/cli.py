"""`oracle-server`: parse, call one function, print.

Commands import what they call when they are called: torch takes seconds to import, and `clients add` does not need it.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from oracle_server.database import LedgerError
from oracle_server.key_files import DEFAULT_MODE, KeyFileError, key_file
from oracle_server.ledger import ClientExists, Ledger
from oracle_server.settings import Settings
from shared.version import VERSION
from shared.wire.errors import OracleError

app = typer.Typer(no_args_is_help=True, help="Hide a classifier and count every query.", pretty_exceptions_enable=False)
clients_app = typer.Typer(no_args_is_help=True, help="Who may query, and how much.")
ledger_app = typer.Typer(no_args_is_help=True, help="The account of every query.")
app.add_typer(clients_app, name="clients")
app.add_typer(ledger_app, name="ledger")

DEFAULT_LEDGER: str = Settings.model_fields["ledger"].default
LedgerOption = Annotated[
    str, typer.Option("--ledger", envvar="ORACLE_LEDGER", metavar="URL", help="sqlite:///FILE, or a path.")
]
Budget = Annotated[int, typer.Option("--budget", min=0, help="Lifetime budget in queries (rows).")]
Name = Annotated[str, typer.Argument(help="The client's name.")]


@contextmanager
def _one_line(*errors: type[Exception]) -> Iterator[None]:
    """What the user can mend is one line on stderr and exit code 2; a traceback is for what we must mend."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (LedgerError, KeyFileError, OracleError, *errors)):
            raise
        typer.echo(f"oracle-server: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _ledger(url: str, *, create: bool = False) -> Iterator[Ledger]:
    with _one_line():
        ledger = Ledger.open(url, create=create)
        try:
            yield ledger
        finally:
            ledger.close()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"oracle-server {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="digits-cnn, small-cnn, cifar-resnet20|32|44|56|110, or one of torchvision's.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A .safetensors, .pt or .pth file; for torchvision's own: DEFAULT or their name.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes any free port. [default: 8600]")] = None,
    ledger: Annotated[
        str | None, typer.Option(metavar="URL", help=f"sqlite:///FILE, or a path. [default: {DEFAULT_LEDGER}]")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="auto or eager. [default: auto]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of logits; else as the weights have it.")] = None,
    channels: Annotated[int | None, typer.Option(help="Channels of an image; else as the weights have it.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of an image in pixels.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of pixels in [0, 1], per channel: 0.5,0.5,0.5")] = None,
    std: Annotated[str | None, typer.Option(help="The same for the standard deviation.")] = None,
    max_batch_rows: Annotated[int | None, typer.Option(help="Most rows of a request. [default: 4096]")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Most bytes of a request. [default: 256 MiB]")] = None,
    engine_block: Annotated[int | None, typer.Option(help="Rows the engine takes at once. [default: 256]")] = None,
    body_timeout: Annotated[float | None, typer.Option(help="Seconds for a body to arrive. [default: 60]")] = None,
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds to finish after SIGTERM. [default: 30]")] = None,
) -> None:
    """Serve a classifier. Every option can also be set by a variable ORACLE_<OPTION>."""
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("mean", "std"):
        if name in given:
            given[name] = given[name].split(",")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)

    from oracle_server.server import ServeError
    from oracle_server.server import serve as run
    from oracle_server.weight_files import ModelError

    with _one_line(ModelError, ServeError):
        run(_settings(given), lambda url: typer.echo(f"listening on {url}"))


def _settings(given: dict[str, Any]) -> Settings:
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "-".join(str(part) for part in first["loc"][:1]).replace("_", "-")
        raise typer.BadParameter(str(first["msg"]), param_hint=f"--{option}") from None


@clients_app.command("add")
def add_client(
    name: Name,
    budget: Budget,
    ledger: LedgerOption = DEFAULT_LEDGER,
    key_file_path: Annotated[
        Path | None, typer.Option("--key-file", help="Write the key there, instead of printing it.")
    ] = None,
    key_file_mode: Annotated[str, typer.Option(help="The file's mode, octal.")] = f"{DEFAULT_MODE:04o}",
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="Leave a client alone that is there, if its key file is.")
    ] = False,
) -> None:
    """Add a client. Its key is shown now and never again."""
    with _ledger(ledger, create=True) as opened:
        try:
            if key_file_path is None:
                _, key = opened.add_client(name, budget)
                typer.echo(key.reveal())
                return
            with key_file(key_file_path, _mode(key_file_mode)) as write:
                _, key = opened.add_client(name, budget)
                write(key.reveal())
        except ClientExists as error:
            if not exist_ok:
                raise
            if key_file_path is None or not key_file_path.is_file():
                raise ClientExists(f"{error}, and its key is not in a --key-file: keys cannot be shown again") from None
            typer.echo(f"client '{name}' is there already, its key in {key_file_path}")
            return
        typer.echo(f"client '{name}' may spend {budget} queries; its key is in {key_file_path}")


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise KeyFileError(f"--key-file-mode {text}: give an octal mode such as 0640")
    return mode


@clients_app.command("list")
def list_clients(
    ledger: LedgerOption = DEFAULT_LEDGER,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List clients and their accounts, in queries."""
    with _ledger(ledger) as opened:
        found = opened.list_clients()
    if as_json:
        keep = ("name", "key_id", "budget", "spent", "created_at", "revoked_at")
        rows = [{name: getattr(c, name) for name in keep} | {"remaining": c.account.remaining} for c in found]
        typer.echo(json.dumps(rows))
        return
    table = Table("client", "key id", "since", "state")
    for column in ("budget", "spent", "remaining"):
        table.add_column(column, justify="right")
    for c in found:
        numbers = (f"{n:,}" for n in (c.budget, c.spent, c.account.remaining))
        table.add_row(c.name, c.key_id, c.created_at, "revoked" if c.revoked else "active", *numbers)
    Console().print(table)


@clients_app.command("set-budget")
def set_budget(
    name: Name,
    budget: Annotated[int, typer.Argument(min=0, help="Lifetime budget in queries, what was spent included.")],
    ledger: LedgerOption = DEFAULT_LEDGER,
) -> None:
    """Give a client another lifetime budget; what it has spent stays spent."""
    with _ledger(ledger) as opened:
        account = opened.set_budget(name, budget).account
    typer.echo(f"client '{name}': budget {account.budget}, spent {account.spent}, remaining {account.remaining}")


@clients_app.command()
def revoke(name: Name, ledger: LedgerOption = DEFAULT_LEDGER) -> None:
    """Make a client's key worthless, for good."""
    with _ledger(ledger) as opened:
        client = opened.revoke(name)
    typer.echo(f"client '{name}' is revoked since {client.revoked_at}")


@ledger_app.command()
def verify(ledger: LedgerOption = DEFAULT_LEDGER) -> None:
    """Check that what each client has spent is what the entries add up to; exit code 1 and the difference if not."""
    with _ledger(ledger) as opened:
        differences = opened.verify()
        found = opened.list_clients()
    for d in differences:
        typer.echo(f"client '{d.client}': {d.what} is {d.stored} and its entries say {d.entries}", err=True)
    if differences:
        raise typer.Exit(1)
    typer.echo(f"the ledger agrees with itself: {len(found)} clients, {sum(c.spent for c in found)} queries charged")


@ledger_app.command()
def export(ledger: LedgerOption = DEFAULT_LEDGER) -> None:
    """Write every entry as a line of JSON, oldest first."""
    with _ledger(ledger) as opened:
        names = {client.id: client.name for client in opened.list_clients()}
        after = 0
        while page := opened.entries(after=after):
            for entry in page:
                typer.echo(json.dumps({"client": names.get(entry.client_id), **asdict(entry)}))
            after = page[-1].seq


@app.command()
def train_classifier(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    dataset: Annotated[
        str, typer.Option(help="digits (embedded), mnist, fashion-mnist, cifar10, stl10, npz or folder.")
    ] = "digits",
    data: Annotated[Path | None, typer.Option(help="Directory of the data; not needed for digits.")] = None,
    model: Annotated[
        str, typer.Option(help="digits-cnn, small-cnn, cifar-resnet20..., or one of torchvision's.")
    ] = "small-cnn",
    noise_sigma: Annotated[float, typer.Option(min=0, help="Train under Gaussian noise, in units of [0, 1].")] = 0.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 30,
    batch: Annotated[int, typer.Option(min=2, help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the one-cycle schedule.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the order and the noise.")] = 0,
    validation: Annotated[int, typer.Option(min=1, help="Training images kept for choosing the best epoch.")] = 200,
    image_size: Annotated[int | None, typer.Option(help="Resize the images of a folder to this side.")] = None,
) -> None:
    """Train a classifier to serve, for those who have none."""
    from oracle_server.training import TrainingPlan
    from oracle_server.training import train_classifier as train
    from oracle_server.weight_files import ModelError
    from shared.datasets import DatasetError

    options = dict(locals())
    plan = {name: options[name] for name in TrainingPlan.__dataclass_fields__ if name in options}
    with _one_line(ModelError, DatasetError):
        result = train(TrainingPlan(**plan, command=_command()), lambda line: typer.echo(line, err=True))
    typer.echo(f"validation accuracy {result.validation_accuracy:.4f} (epoch {result.epoch})")
    typer.echo(f"test accuracy {result.test_accuracy:.4f}")
    typer.echo(f"wrote {out}")


def _command() -> str:
    """The command line as it was given, to be kept in the weights."""
    return shlex.join(["oracle-server", *sys.argv[1:]])
