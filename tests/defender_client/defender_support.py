"""Real parts for the defender's tests: small runs, processes that can be killed, connections that break."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import safetensors.torch
import torch
from oracle_support import Caller, Running

from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.certify import CERTIFIED_FILE, Row, certify
from defender_client.config import RunConfig
from defender_client.data import load_splits, load_test
from defender_client.oracle_client import RemoteOracle
from defender_client.oracle_client.retrying import Clock
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.recording import ANSWERS_FILE, Recorder
from defender_client.run_directory import locked
from defender_client.stack import Stack
from defender_client.train import STACK_FILE, train
from oracle_server.server import listen
from shared.wire import protocol

# A run of seconds: latent 8, three steps an epoch, several requests a step; one at a time, so that they can be counted.
TINY = """\
description = "for tests"
sigma = 0.25
[data]
validation_images = 16
train_images = 96
[denoiser]
architecture = "unet"
depth = 1
width = 4
[autoencoder]
latent = 8
width = 8
[estimator]
name = "cge"
q = 3
[pretrain]
autoencoder_epochs = 1
denoiser_epochs = 1
batch = 32
[train]
epochs = 2
batch = 32
query_rows = 128
in_flight = 1
[certify]
n0 = 10
n = 100
images = 4
in_flight = 1
"""
DNCNN = ("denoiser.architecture=dncnn", "denoiser.depth=3", "denoiser.width=8")
RGE = ("estimator.name=rge",)
PIXELS = ("autoencoder.architecture=none", "pretrain.autoencoder_epochs=0", *RGE)


def write_tiny(folder: Path) -> Path:
    """The tiny preset as a file."""
    path = folder / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


def tiny(folder: Path, *settings: str) -> RunConfig:
    """The tiny configuration with `--set` changes."""
    return configs.load_preset(str(write_tiny(folder)), settings)


MAX_ROWS = 256  # of a batch, for the server of these tests


@dataclass(frozen=True)
class Trained:
    """A run that was trained and certified, and the client whose budget paid for it."""

    run: Path
    config: RunConfig
    caller: Caller


# --- runs in this process --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    run: Path, url: str, key: str, transport: httpx.BaseTransport | None = None, *, record: bool = False
) -> Iterator[RemoteOracle]:
    """The oracle as a command sees it: with the run's lock, id and log, and with `record` its recording."""
    with (
        locked(run) as run_id,
        RemoteOracle(
            url,
            key,
            log=QueryLog(run / LOG_FILE),
            recorder=Recorder(run / ANSWERS_FILE) if record else None,
            run_id=run_id,
            retry_seconds=20,
            transport=transport,
        ) as oracle,
    ):
        yield oracle


def train_here(
    config: RunConfig,
    run: Path,
    url: str,
    key: str,
    transport: httpx.BaseTransport | None = None,
    *,
    record: bool = False,
) -> Stack:
    """What `train` does, without the command."""
    splits = load_splits(config.data, None, config.seed)
    with opened(run, url, key, transport, record=record) as oracle:
        configs.save(config, run)
        return train(config, stacks.specify(config, oracle.info.image_shape, oracle.info.classes), run, splits, oracle)


def certify_here(
    config: RunConfig,
    run: Path,
    url: str,
    key: str,
    transport: httpx.BaseTransport | None = None,
    *,
    record: bool = False,
) -> list[Row]:
    """What `certify` does, without the command."""
    settings = configs.certify_settings(config, run, {})
    with opened(run, url, key, transport, record=record) as oracle:
        configs.save_certify_settings(settings, run)
        stack, test = stacks.load(run / STACK_FILE), load_test(config.data, None)
        return certify(stack, oracle, test, settings, config.seed, run / CERTIFIED_FILE)


def spent(server: Running, caller: Caller) -> int:
    """What the ledger has charged this client."""
    return server.ledger.account(caller.client.id).spent


def spent_by_purpose(server: Running, caller: Caller) -> dict[str, int]:
    """Charges on the ledger by the purpose in their key, RUN/PURPOSE/..."""
    found: dict[str, int] = {}
    after = 0
    while page := server.ledger.entries(caller.client.id, after=after, kinds=("charge",)):
        for entry in page:
            if entry.rows:
                purpose = (entry.idempotency_key or "/none").split("/")[1]
                found[purpose] = found.get(purpose, 0) + entry.rows
        after = page[-1].seq
    return found


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two safetensors files hold the same names and the same bits."""
    a, b = safetensors.torch.load_file(first), safetensors.torch.load_file(second)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(_bits(a[name]), _bits(b[name])) for name in a
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# --- connections that break -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing that expects an `Exception` may stop it."""


class Interfering(httpx.BaseTransport):
    """Real HTTP, except that something happens to chosen inference requests, counted from 1.

    Args:
        before: called with the number before the request is sent; it may raise, or return an answer of its own.
        after: called with the number when the server has answered; it may raise, or return another answer: either way
            the server's is lost.
    """

    def __init__(
        self,
        before: Callable[[int], httpx.Response | None] = lambda number: None,
        after: Callable[[int], httpx.Response | None] = lambda number: None,
    ) -> None:
        self._real = httpx.HTTPTransport()
        self._before, self._after = before, after
        self._lock = threading.Lock()
        self.count = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != protocol.INFER_ROUTE:
            return self._real.handle_request(request)
        with self._lock:
            self.count += 1
            number = self.count
        own = self._before(number)
        if own is not None:
            return own
        response = self._real.handle_request(request)
        response.read()
        return self._after(number) or response

    def close(self) -> None:
        self._real.close()


def at(number: int, error: BaseException) -> Callable[[int], None]:
    """Raise `error` at one request."""

    def act(current: int) -> None:
        if current == number:
            raise error

    return act


class CuttingProxy:
    """A TCP proxy to a server; `cut(...)` says what becomes of the next answers."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._listener, self.url = listen("127.0.0.1", 0)
        self._cuts: list[tuple[int, bool]] = []
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self, *, sent: int = 0, reset: bool = False) -> None:
        """Of the next answer, let `sent` bytes through, then close the connection: in good order, or with a reset."""
        self._cuts.append((sent, reset))

    @property
    def cuts_left(self) -> int:
        return len(self._cuts)

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                near, _ = self._listener.accept()
                thread = threading.Thread(target=self._relay, args=(near, socket.create_connection(self._target)))
                self._threads.append(thread)
                thread.start()

    def _relay(self, near: socket.socket, far: socket.socket) -> None:
        # One thread for both directions: a socket that another thread is reading from would not close.
        with near, far, contextlib.suppress(OSError):
            while not self._closing.is_set():
                for source in select.select([near, far], [], [], 0.05)[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is far and self._cuts:
                        sent, reset = self._cuts.pop(0)
                        near.sendall(data[:sent])
                        if reset:  # with nothing to linger for, closing sends RST
                            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    (far if source is near else near).sendall(data)


class FakeTime:
    """Time that passes only while somebody sleeps; `slept` says how long each time."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()
        self.clock = Clock(lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


# --- processes that can be killed -------------------------------------------------------------------------------------

# Forked from a process that has imported everything once: as real as any other, and there at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["defender_client.exits", "defender_client.printing", "oracle_server.app", "oracle_server.cli", "torchvision"]
)


def _command(package: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    # Whoever runs the tests in the background may have ignored SIGINT, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [package, *arguments]
    importlib.import_module(f"{package}.cli").app(arguments)


@dataclass
class Command:
    """`python -m PACKAGE ARGUMENTS` in a process of its own."""

    process: BaseProcess
    output: Path

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; minus the signal that killed it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.said}"
        return self.process.exitcode

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    @property
    def said(self) -> str:
        """What it has printed so far, on either stream."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


@contextlib.contextmanager
def command(
    package: str, *arguments: str | Path, output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Command]:
    """Start a command; it is killed at the end if it still runs."""
    process = _context.Process(
        target=_command, args=(package, [str(a) for a in arguments], dict(environment or {}), str(output))
    )
    process.start()
    started = Command(process, output)
    try:
        yield started
    finally:
        started.signal(signal.SIGKILL)
        process.join(30)
        process.close()


@dataclass
class ServerProcess:
    """An oracle that can be killed and started again, on the same port and ledger."""

    ledger: Path
    options: tuple[str, ...] = ()
    port: int = 0
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _command: Command | None = None
    _starts: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._starts += 1
        output = self.ledger.with_name(f"server-{self._starts}.log")
        arguments = ("serve", "--port", str(self.port), "--ledger", str(self.ledger), *self.options)
        self._command = self._stack.enter_context(command("oracle_server", *arguments, output=output))
        wait_until(lambda: "listening on" in self.said or not self.running)
        assert self.running, self.said
        self.port = int(self.said.split("listening on http://127.0.0.1:")[1].split()[0])

    @property
    def running(self) -> bool:
        return self._command is not None and self._command.running

    @property
    def said(self) -> str:
        return self._command.said if self._command is not None else ""

    def kill(self) -> None:
        assert self._command is not None
        self._command.signal(signal.SIGKILL)
        self._command.wait(10)

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Poll until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
