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
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from oracle_server.database import LedgerError
from oracle_server.exporting import export_lines
from oracle_server.key_files import DEFAULT_MODE, KeyFileError, key_file
from oracle_server.ledger import ADMIN, CLIENT, ClientExists, Ledger
from oracle_server.options import with_options_of
from oracle_server.settings import Settings
from shared.audit.signatures import SignatureInvalid, read_public_key
from shared.version import VERSION
from shared.wire.errors import OracleError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",  # as markup, [default: ...] would be a style, and vanish
    help="Hide a model and count every query.",
    pretty_exceptions_enable=False,
)
clients_app = typer.Typer(no_args_is_help=True, help="Who may query, and how much.")
ledger_app = typer.Typer(no_args_is_help=True, help="The account of every query.")
app.add_typer(clients_app, name="clients")
app.add_typer(ledger_app, name="ledger")

_MOST_FINDINGS = 20
DEFAULT_LEDGER: str = Settings.model_fields["ledger"].default
LedgerOption = Annotated[
    str,
    typer.Option("--ledger", envvar="ORACLE_LEDGER", metavar="URL", help="sqlite:///FILE, a path, or postgresql://..."),
]
SigningKey = Annotated[
    Path | None,
    typer.Option(
        "--signing-key",
        envvar="ORACLE_SIGNING_KEY",
        help="The key that signs the ledger. [default: FILE.key beside a SQLite file, else oracle-ledger.key]",
    ),
]
Name = Annotated[str, typer.Argument(help="The client's name.")]

# Options that say which model it is: of `serve` and of `model-card`.
TaskOption = Annotated[str | None, typer.Option(help="classification or reconstruction. [default: classification]")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="digits-cnn, small-cnn, cifar-resnet20|32|44|56|110, or one of torchvision's; timm:NAME, "
        "hf-hub:REPO[@REVISION], a file (.pt2, .onnx, .ts, .pt), or module:function; of the task reconstruction "
        "small-reconstructor."
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="A .safetensors, .pt or .pth file; for timm's and torchvision's own: DEFAULT, or a name."),
]
PreprocessingOption = Annotated[
    Path | None, typer.Option(help="TOML file: size, resize, mean, std, range, channels, layout, output.")
]
EngineOption = Annotated[
    str | None, typer.Option(help="auto (measured at start), eager, compile or onnxruntime. [default: auto]")
]
EngineCacheOption = Annotated[
    Path | None, typer.Option(help="Folder for what was measured at start. [default: ~/.cache/zo-defense]")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")]
ClassesOption = Annotated[int | None, typer.Option(help="Number of logits; else as the weights have it.")]
ChannelsOption = Annotated[int | None, typer.Option(help="Channels of an image; else as the weights have it.")]
ImageSizeOption = Annotated[int | None, typer.Option(help="Side of an image in pixels.")]
MeanOption = Annotated[str | None, typer.Option(help="Of pixels in [0, 1], per channel: 0.5,0.5,0.5")]
StdOption = Annotated[str | None, typer.Option(help="The same for the standard deviation.")]


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
def _ledger(url: str, signing_key: Path | None, *, create: bool = False) -> Iterator[Ledger]:
    with _one_line():
        ledger = Ledger.open(url, create=create, signing_key=signing_key)
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
    task: TaskOption = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    preprocessing: PreprocessingOption = None,
    defence: Annotated[
        Path | None, typer.Option(help="An exported stack (defender-client export), put in front of the model.")
    ] = None,
    smooth: Annotated[
        int | None, typer.Option(help="Noisy copies of an image that vote: answers are shares of the votes.")
    ] = None,
    smooth_alpha: Annotated[
        float | None, typer.Option(help="Answer with the vote's label, or abstain where it may be luck at this error.")
    ] = None,
    smooth_seed: Annotated[
        int | None, typer.Option(help="Of the noise, a secret: the same answers at every start. [default: new]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes any free port. [default: 8600]")] = None,
    ledger: Annotated[
        str | None,
        typer.Option(metavar="URL", help=f"sqlite:///FILE, a path, or postgresql://... [default: {DEFAULT_LEDGER}]"),
    ] = None,
    signing_key: Annotated[
        Path | None, typer.Option(help="The key that signs the ledger. [default: beside a SQLite ledger]")
    ] = None,
    ledger_timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait for the ledger's database. [default: 10]")
    ] = None,
    engine: EngineOption = None,
    device: DeviceOption = None,
    classes: ClassesOption = None,
    channels: ChannelsOption = None,
    image_size: ImageSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    max_batch_rows: Annotated[int | None, typer.Option(help="Most rows of a request. [default: 4096]")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Most bytes of a request. [default: 256 MiB]")] = None,
    max_bodies_bytes: Annotated[int | None, typer.Option(help="Of all requests in flight. [default: 1 GiB]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, or bfloat16, in which finite differences drown. [default: float32]")
    ] = None,
    tf32: Annotated[bool | None, typer.Option("--tf32", help="On CUDA: float32 products with 10 bits.")] = None,
    engine_block: Annotated[
        int | None, typer.Option(help="Most rows a thread computes at once. [default: as measured]")
    ] = None,
    engine_cache: EngineCacheOption = None,
    batch_wait: Annotated[
        float | None, typer.Option(help="Milliseconds an idle engine waits for company. [default: 0]")
    ] = None,
    max_queue_rows: Annotated[
        int | None, typer.Option(help="Rows let in and not answered yet; beyond them 503. [default: 32768]")
    ] = None,
    max_queue_requests: Annotated[int | None, typer.Option(help="Requests, likewise. [default: 512]")] = None,
    max_connections: Annotated[int | None, typer.Option(help="Most connections at once. [default: 512]")] = None,
    max_header_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of a request's head. [default: 64 KiB]")
    ] = None,
    max_headers: Annotated[int | None, typer.Option(help="Most headers of a request. [default: 100]")] = None,
    header_timeout: Annotated[float | None, typer.Option(help="Seconds for a head to arrive. [default: 30]")] = None,
    body_timeout: Annotated[float | None, typer.Option(help="Seconds for a body to arrive. [default: 60]")] = None,
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds to finish after SIGTERM. [default: 30]")] = None,
    allow_decoders: Annotated[
        bool | None, typer.Option("--allow-decoders", help="Let clients register decoders and query in their latents.")
    ] = None,
    max_decoder_bytes: Annotated[int | None, typer.Option(help="Most bytes of a decoder. [default: 32 MiB]")] = None,
    max_decoder_layers: Annotated[int | None, typer.Option(help="Most layers of a decoder. [default: 64]")] = None,
    max_decoder_activations: Annotated[
        int | None, typer.Option(help="Most elements in memory at once for one row. [default: 4,194,304]")
    ] = None,
    max_decoder_multiply_adds: Annotated[
        int | None, typer.Option(help="Most multiply-adds of one row. [default: 268,435,456]")
    ] = None,
    max_client_decoders: Annotated[int | None, typer.Option(help="Most decoders of a client. [default: 4]")] = None,
    max_decoders: Annotated[int | None, typer.Option(help="Most decoders of all clients. [default: 64]")] = None,
    max_decoders_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of all decoders' weights. [default: 256 MiB]")
    ] = None,
    share_decoders: Annotated[
        bool | None,
        typer.Option("--share-decoders", help="Keep them in the ledger's database, for all servers that use it."),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="TOML file: noise, rounding, limits, failures...")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate (chain): serve https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key of the certificate.")] = None,
    tls_key_password_file: Annotated[Path | None, typer.Option(help="File with the key's password.")] = None,
    metrics_access: Annotated[
        str | None,
        typer.Option("--metrics", help="open, or keyed: a client's key sees its own series. [default: open]"),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info or warning. [default: info]")] = None,
) -> None:
    """Serve a classifier, or a reconstructor. Every option can also be set by a variable ORACLE_<OPTION>."""
    settings = _serving(locals())

    from oracle_server.policy.spec import PolicyError
    from oracle_server.server import ServeError
    from oracle_server.server import serve as run
    from oracle_server.tls import TlsError
    from shared.models.weight_files import ModelError

    with _one_line(ModelError, PolicyError, ServeError, TlsError):
        run(settings, lambda url: typer.echo(f"listening on {url}"))


_OF_AN_ENGINE = ("engine", "engine_cache", "device")
_OF_IMAGES = ("preprocessing", "classes", "channels", "image_size", "mean", "std")
_OF_THE_MODEL = frozenset(("task", "model", "weights", *_OF_AN_ENGINE, *_OF_IMAGES))


@app.command()
@with_options_of(serve, only=_OF_THE_MODEL)
def model_card(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    **given: Any,
) -> None:
    """Say what these options would hide, for the operator: nothing of it can be asked of the server."""
    settings = _settings(given)

    from oracle_server.model_card import make_card
    from shared.models.weight_files import ModelError

    with _one_line(ModelError):
        card = make_card(settings)
    if as_json:
        typer.echo(card.model_dump_json(indent=1))
        return
    for name, value in card.lines():
        typer.echo(f"{name:28} {value}")


# Ray's proxy has connections, and a replica has none; decoders are always shared.
_OF_A_CONNECTION = ("max_connections", "max_header_bytes", "max_headers", "header_timeout")
_OF_TLS = ("tls_cert", "tls_key", "tls_key_password_file")
_NOT_A_REPLICA_S = frozenset((*_OF_A_CONNECTION, *_OF_TLS, "share_decoders"))


@app.command("ray")
@with_options_of(serve, without=_NOT_A_REPLICA_S)
def serve_replicas(
    replicas: Annotated[int | None, typer.Option(help="So many of them. [default: 1]")] = None,
    min_replicas: Annotated[
        int | None, typer.Option(help="With --max-replicas, at least so many. [default: 1]")
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(help="As many as there is work for, at most so many.")] = None,
    target_ongoing_requests: Annotated[
        float | None, typer.Option(help="With --max-replicas: requests under way at each. [default: Ray's, 2]")
    ] = None,
    max_ongoing_requests: Annotated[
        int | None, typer.Option(help="Passed to a replica at once. [default: twice --max-queue-requests]")
    ] = None,
    num_cpus: Annotated[
        float | None, typer.Option(help="Cores of each replica, its engine's threads. [default: 1]")
    ] = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs of each replica. [default: 0]")] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster. [default: one is started, on this machine]")
    ] = None,
    **given: Any,
) -> None:
    """Serve replicas of one oracle through Ray Serve, over one ledger in PostgreSQL. Ctrl-C ends them."""
    settings = _serving(given)

    from oracle_server.policy.spec import PolicyError
    from oracle_server.ray_app import run
    from oracle_server.replicas import ReplicasError, read_replicas

    with _one_line(PolicyError, ReplicasError):
        wanted = read_replicas(
            replicas=replicas,
            min_replicas=min_replicas,
            max_replicas=max_replicas,
            target_ongoing_requests=target_ongoing_requests,
            max_ongoing_requests=max_ongoing_requests,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        run(settings, wanted, address=address, announce=lambda url: typer.echo(f"listening on {url}"))


def _serving(options: dict[str, Any]) -> Settings:
    """The settings of a server that is about to start, and its logs."""
    settings = _settings(options)
    level = settings.log_level.upper()
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    debug = settings.log_level == "debug"
    logging.getLogger("uvicorn.error").setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("sqlalchemy.engine").setLevel(logging.DEBUG if debug else logging.WARNING)
    return settings


def _settings(options: dict[str, Any]) -> Settings:
    """Settings of a command's options, those that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("mean", "std"):
        if name in given:
            given[name] = given[name].split(",")
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # about several options, which it names
            raise typer.BadParameter(str(first["msg"]).removeprefix("Value error, ")) from None
        name = (
            "metrics" if first["loc"][:1] == ("metrics_access",) else "-".join(str(part) for part in first["loc"][:1])
        )
        option = name.replace("_", "-")
        raise typer.BadParameter(str(first["msg"]), param_hint=f"--{option}") from None


@clients_app.command("add")
def add_client(
    name: Name,
    budget: Annotated[int | None, typer.Option("--budget", min=0, help="Lifetime budget in queries (rows).")] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="A key that sees every account and may query nothing.")
    ] = False,
    ledger: LedgerOption = DEFAULT_LEDGER,
    signing_key: SigningKey = None,
    key_file_path: Annotated[
        Path | None, typer.Option("--key-file", help="Write the key there, instead of printing it.")
    ] = None,
    key_file_mode: Annotated[str, typer.Option(help="The file's mode, octal.")] = f"{DEFAULT_MODE:04o}",
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="Leave a client alone that is there, if its key file is.")
    ] = False,
) -> None:
    """Add a client. Its key is shown now and never again."""
    if admin == (budget is not None):
        raise typer.BadParameter("a client needs a budget, and an admin has none", param_hint="--budget")
    role = ADMIN if admin else CLIENT
    with _ledger(ledger, signing_key, create=True) as opened:
        try:
            if key_file_path is None:
                _, key = opened.add_client(name, budget or 0, role=role)
                typer.echo(key.reveal())
                return
            with key_file(key_file_path, _mode(key_file_mode)) as write:
                _, key = opened.add_client(name, budget or 0, role=role)
                write(key.reveal())
        except ClientExists as error:
            if not exist_ok:
                raise
            if key_file_path is None or not key_file_path.is_file():
                raise ClientExists(f"{error}, and its key is not in a --key-file: keys cannot be shown again") from None
            typer.echo(f"client '{name}' is there already, its key in {key_file_path}")
            return
        may = "see every account" if admin else f"spend {budget} queries"
        typer.echo(f"client '{name}' may {may}; its key is in {key_file_path}")


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
    signing_key: SigningKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List clients and their accounts, in queries."""
    with _ledger(ledger, signing_key) as opened:
        found = [*opened.list_clients(), *opened.list_clients(role=ADMIN)]
    if as_json:
        keep = ("name", "role", "key_id", "budget", "spent", "held", "created_at", "revoked_at")
        rows = [{name: getattr(c, name) for name in keep} | {"remaining": c.account.remaining} for c in found]
        typer.echo(json.dumps(rows))
        return
    table = Table("client", "key id", "since", "state")
    for column in ("budget", "spent", "held", "remaining"):
        table.add_column(column, justify="right")
    for c in found:
        numbers = (f"{n:,}" for n in (c.budget, c.spent, c.held, c.account.remaining))
        state = "revoked" if c.revoked else c.role if c.is_admin else "active"
        table.add_row(c.name, c.key_id, c.created_at, state, *numbers)
    Console().print(table)


@clients_app.command("set-budget")
def set_budget(
    name: Name,
    budget: Annotated[int, typer.Argument(min=0, help="Lifetime budget in queries, what was spent included.")],
    ledger: LedgerOption = DEFAULT_LEDGER,
    signing_key: SigningKey = None,
) -> None:
    """Give a client another lifetime budget; what it has spent stays spent."""
    with _ledger(ledger, signing_key) as opened:
        account = opened.set_budget(name, budget).account
    typer.echo(f"client '{name}': budget {account.budget}, spent {account.spent}, remaining {account.remaining}")


@clients_app.command()
def revoke(name: Name, ledger: LedgerOption = DEFAULT_LEDGER, signing_key: SigningKey = None) -> None:
    """Make a client's key worthless, for good."""
    with _ledger(ledger, signing_key) as opened:
        client = opened.revoke(name)
    typer.echo(f"client '{name}' is revoked since {client.revoked_at}")


@ledger_app.command()
def verify(
    ledger: LedgerOption = DEFAULT_LEDGER,
    signing_key: SigningKey = None,
    public_key: Annotated[
        str | None, typer.Option("--public-key", help="64 hexadecimal digits. [default: the signing key's own]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check every entry, the hash chain, its signature and every account; exit code 1 and what is wrong if not."""
    with _ledger(ledger, signing_key) as opened, _one_line(SignatureInvalid):
        trusted = read_public_key(public_key) if public_key else None
        found = opened.verify(trusted)
    accounts = [account for account in found.accounts.clients.values() if account.role == CLIENT]
    if as_json:
        told = {
            "intact": found.intact,
            "findings": [str(finding) for finding in found.findings],
            "entries": found.entries,
            "clients": len(accounts),
            "queries": sum(account.spent for account in accounts),
            "charges": found.accounts.charges,
            "in_flight": len(found.accounts.open),
        }
        typer.echo(json.dumps(told))
        if not found.intact:
            raise typer.Exit(1)
        return
    for finding in found.findings[:_MOST_FINDINGS]:
        typer.echo(finding, err=True)
    if len(found.findings) > _MOST_FINDINGS:
        typer.echo(f"... and {len(found.findings) - _MOST_FINDINGS} more", err=True)
    if not found.intact:
        raise typer.Exit(1)
    typer.echo(
        f"the ledger is as it was written: {found.entries} entries, chained and signed; {len(accounts)} clients, "
        f"{sum(account.spent for account in accounts)} queries in {found.accounts.charges} charges, "
        f"{len(found.accounts.open)} requests in flight"
    )


@ledger_app.command()
def export(
    ledger: LedgerOption = DEFAULT_LEDGER,
    signing_key: SigningKey = None,
    client: Annotated[
        str | None, typer.Option(help="Show this client's entries only; of the others their hashes, for the proof.")
    ] = None,
) -> None:
    """Write the ledger as lines of JSON: what it is, every entry, oldest first, and the signed end."""
    with _ledger(ledger, signing_key) as opened:
        for line in export_lines(opened, client):
            typer.echo(line)


@ledger_app.command("public-key")
def public_key(ledger: LedgerOption = DEFAULT_LEDGER, signing_key: SigningKey = None) -> None:
    """Print the key that checks the ledger's signatures: hand it to whoever is to audit it."""
    with _ledger(ledger, signing_key) as opened:
        typer.echo(opened.identity.public_key)


# Options of both trainings.
Dataset = Annotated[str, typer.Option(help="digits (embedded), mnist, fashion-mnist, cifar10, stl10, npz or folder.")]
Data = Annotated[Path | None, typer.Option(help="Directory of the data; not needed for digits.")]
Out = Annotated[Path, typer.Option(help="The .safetensors file to write.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images.")]
Batch = Annotated[int, typer.Option(min=2, help="Images a step.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate of the one-cycle schedule.")]
Validation = Annotated[int, typer.Option(min=1, help="Training images kept for choosing the best epoch.")]
ImageSize = Annotated[int | None, typer.Option(help="Resize the images of a folder to this side.")]


@app.command()
def train_classifier(
    out: Out,
    dataset: Dataset = "digits",
    data: Data = None,
    model: Annotated[
        str, typer.Option(help="digits-cnn, small-cnn, cifar-resnet20..., or one of torchvision's.")
    ] = "small-cnn",
    noise_sigma: Annotated[float, typer.Option(min=0, help="Train under Gaussian noise, in units of [0, 1].")] = 0.0,
    epochs: Epochs = 30,
    batch: Batch = 64,
    lr: Rate = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the order and the noise.")] = 0,
    validation: Validation = 200,
    image_size: ImageSize = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the same model to start from.")] = None,
    augment: Annotated[str, typer.Option(help="none, flip, or crop-flip.")] = "none",
) -> None:
    """Train a classifier to serve, for those who have none."""
    from oracle_server.training import TrainingPlan
    from oracle_server.training import train_classifier as train
    from shared.augmentation import Augmentation
    from shared.datasets import DatasetError
    from shared.models.weight_files import ModelError

    if augment not in get_args(Augmentation):
        raise typer.BadParameter(f"choose one of {', '.join(get_args(Augmentation))}", param_hint="--augment")
    options = dict(locals())
    plan = {name: options[name] for name in TrainingPlan.__dataclass_fields__ if name in options}
    with _one_line(ModelError, DatasetError):
        result = train(TrainingPlan(**plan, command=_command()), lambda line: typer.echo(line, err=True))
    typer.echo(f"validation accuracy {result.validation_accuracy:.4f} (epoch {result.epoch})")
    typer.echo(f"test accuracy {result.test_accuracy:.4f}")
    typer.echo(f"wrote {out}")


@app.command()
def train_reconstructor(
    out: Out,
    dataset: Dataset = "digits",
    data: Data = None,
    model: Annotated[str, typer.Option(help="small-reconstructor.")] = "small-reconstructor",
    rows: Annotated[
        int | None, typer.Option(min=1, help="Measurements of an image. [default: 576 of 784 pixels, as the paper]")
    ] = None,
    epochs: Epochs = 30,
    batch: Batch = 64,
    lr: Rate = 2e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of the measurements, the initial weights and the order.")] = 0,
    validation: Validation = 200,
    image_size: ImageSize = None,
) -> None:
    """Train a reconstructor to serve: it makes images of their linear measurements."""
    from oracle_server.training_reconstructor import ReconstructionPlan
    from oracle_server.training_reconstructor import train_reconstructor as train
    from shared.datasets import DatasetError
    from shared.models.weight_files import ModelError

    options = dict(locals())
    plan = {name: options[name] for name in ReconstructionPlan.__dataclass_fields__ if name in options}
    with _one_line(ModelError, DatasetError):
        result = train(ReconstructionPlan(**plan, command=_command()), lambda line: typer.echo(line, err=True))
    typer.echo(f"validation RMSE {result.validation_rmse:.4f} (epoch {result.epoch})")
    typer.echo(f"test RMSE {result.test_rmse:.4f}")
    typer.echo(f"wrote {out}")


def _command() -> str:
    """The command line as it was given, to be kept in the weights."""
    return shlex.join(["oracle-server", *sys.argv[1:]])
