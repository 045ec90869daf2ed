"""Goodput under overload: what is answered when more is asked than can be computed, and whether the ledger agrees.

    python benchmarks/overload.py [--model cifar-resnet20 [--weights FILE]] [--rows 64] [--clients 4] [--seconds 8]
        [--rounds 3] [--times 1 2 5 10] [--connections 4 16 48] [--serve "--max-queue-rows 8192 ..."]

First closed loops (every connection sends its next request when the last was answered) with more and more connections:
the most rows a second that are answered is the peak. Then open loops, in which requests are sent at a multiple of the
peak's rate, whatever comes back; no Retry-After is honoured. Each round measures the peak again before its multiples,
and the ratios are taken within it. Senders are processes of their own on the same cores, and what they take is lacking
in the server; the bodies are sent whole. Without --weights the classifier's weights are random.

At the end the server is told to stop, and its ledger is compared with the answers that arrived. Exit code 1 if they
differ.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import multiprocessing.pool
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import uvloop

from oracle_server.ledger import Ledger
from shared.wire import codec, protocol

_SENDERS = 2  # processes
_WARM_UP_S = 1.5
_MOST_CONNECTIONS = 240  # of a sender: both together stay below what a server takes
_SHAPES = {"digits-cnn": (1, 8, 8)}


@dataclass(frozen=True)
class Load:
    """What one sender does: `rate` requests a second, or a closed loop on each of `connections` if it is 0."""

    port: int
    keys: tuple[str, ...]
    rows: int
    shape: tuple[int, ...]
    seconds: float
    rate: float
    connections: int


@dataclass
class Seen:
    """What the senders saw. Rows are counted from the end of the warm-up on, `charged` and `answers` always."""

    rows: int = 0
    charged: int = 0
    answers: int = 0
    sent: int = 0
    unsent: int = 0  # because all connections waited for an answer
    lost: int = 0  # connections that ended without one
    statuses: Counter[int] = field(default_factory=Counter)
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)  # since the last byte was handed to the kernel

    def add(self, other: Seen) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Connection(asyncio.Protocol):
    """One request at a time, as bytes that were made before."""

    def __init__(self, sender: Sender) -> None:
        self._sender, self._buffer = sender, bytearray()
        self._left = -1  # bytes of the answer's body to come; -1 in its head
        self._status, self._charge, self._closing = 0, 0, False
        self._began = self._handed_over = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by name
        self._transport.set_write_buffer_limits(high=0)

    def ask(self, request: tuple[bytes, bytes]) -> None:
        self._began = self._handed_over = time.perf_counter()
        self._transport.writelines(request)
        self._handed_over = time.perf_counter()

    def resume_writing(self) -> None:
        self._handed_over = time.perf_counter()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._left < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).lower()
            del self._buffer[: end + 4]
            self._status = int(head[9:12])
            fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
            self._left = int(fields.get(b"content-length", b"0"))
            self._charge = int(fields.get(b"query-charge", b"0"))
            self._closing = fields.get(b"connection") == b"close"
        self._left -= len(self._buffer)
        self._buffer.clear()
        if self._left <= 0:
            self._left = -1
            if self._closing:
                self._transport.close()
            self._sender.answered(self, self._status, self._charge, self._began, self._handed_over)

    def connection_lost(self, exc: Exception | None) -> None:
        self._sender.lost(self)

    @property
    def usable(self) -> bool:
        return not self._closing and not self._transport.is_closing()


class Sender:
    """The connections of one process."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._requests = itertools.cycle(_requests(load))
        self._free: deque[Connection] = deque()
        self._busy: set[Connection] = set()
        self._opening = 0
        self._seen = Seen()
        self._counting = self._closed_loop = False
        self._idle = asyncio.Event()

    async def run(self) -> Seen:
        load, start = self._load, time.perf_counter()
        end = start + _WARM_UP_S + load.seconds
        for _ in range(load.connections):
            await self._open()
        self._closed_loop = not load.rate
        if self._closed_loop:
            for connection in list(self._free):
                self._ask(connection)
            self._free.clear()
        due, interval = start, 1 / load.rate if load.rate else 0.05
        while (now := time.perf_counter()) < end:
            self._counting = now > start + _WARM_UP_S
            while load.rate and due <= now:
                due += interval
                self._send()
            await asyncio.sleep(max(0.0, min(due if load.rate else now + interval, end) - time.perf_counter()))
        self._counting = self._closed_loop = False
        while self._busy:  # every answer is waited for, or the ledger could not be compared
            self._idle.clear()
            await self._idle.wait()
        return self._seen

    def _send(self) -> None:
        while self._free:
            connection = self._free.popleft()
            if connection.usable:
                self._ask(connection)
                return
        if len(self._busy) + self._opening < _MOST_CONNECTIONS:
            self._opening += 1
            opening = asyncio.ensure_future(self._open())
            opening.add_done_callback(lambda _: self._opened())
        elif self._counting:
            self._seen.unsent += 1

    def _opened(self) -> None:
        self._opening -= 1
        if self._free:
            self._ask(self._free.popleft())

    async def _open(self) -> None:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self), "127.0.0.1", self._load.port
        )
        self._free.append(connection)

    def _ask(self, connection: Connection) -> None:
        self._busy.add(connection)
        self._seen.sent += self._counting
        connection.ask(next(self._requests))

    def answered(self, connection: Connection, status: int, charge: int, began: float, handed_over: float) -> None:
        seen, now = self._seen, time.perf_counter()
        self._busy.discard(connection)
        self._idle.set()
        if status == 200:
            seen.answers += 1
            seen.charged += charge
        if self._counting:
            seen.statuses[status] += 1
            if status == 200:
                seen.rows += self._load.rows
                seen.answered_s.append(now - began)
            else:
                seen.refused_s.append(now - handed_over)
        if not connection.usable:
            return
        if self._closed_loop:
            self._ask(connection)
        else:
            self._free.append(connection)

    def lost(self, connection: Connection) -> None:
        if connection in self._busy:
            self._seen.lost += 1
            self._busy.discard(connection)
            self._idle.set()


def _requests(load: Load) -> Iterator[tuple[bytes, bytes]]:
    images = np.random.default_rng(0).random((load.rows, *load.shape), dtype=np.float32)
    encoded = codec.encode_request({protocol.INPUT_NAME: images})
    body = bytes(encoded.body())
    for key in load.keys:
        head = (
            f"POST {protocol.INFER_ROUTE} HTTP/1.1\r\nHost: oracle\r\nAuthorization: Bearer {key}\r\n"
            f"{protocol.JSON_LENGTH_HEADER}: {encoded.json_length}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        yield head.encode(), body


def send(load: Load) -> Seen:
    """One sender, in this process."""
    return uvloop.run(Sender(load).run())


@dataclass(frozen=True)
class Bench:
    """A server, and processes that ask it."""

    pool: multiprocessing.pool.Pool
    load: Load
    total: Seen

    def offer(self, *, rate: float = 0.0, connections: int = 1) -> Seen:
        """What all senders together saw of `rate` requests a second, or of so many closed loops."""
        load = self.load
        shares = [connections // _SENDERS + (i < connections % _SENDERS) for i in range(_SENDERS)]
        loads = [
            Load(load.port, load.keys, load.rows, load.shape, load.seconds, rate / _SENDERS, share)
            for share in shares
            if share
        ]
        seen = Seen()
        for each in self.pool.map(send, loads, chunksize=1):
            seen.add(each)
        self.total.add(seen)
        return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--weights", type=Path, help="a file; random weights are made for a model without its own")
    parser.add_argument("--rows", type=int, default=64, help="of a request")
    parser.add_argument("--clients", type=int, default=4, help="API keys, which take turns")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement, after its warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=float, nargs="+", default=[1, 2, 5, 10], help="the peak's rate")
    parser.add_argument("--connections", type=int, nargs="+", default=[4, 16, 48], help="of the closed loops")
    parser.add_argument("--serve", default="", help="options for oracle-server serve")
    arguments = parser.parse_args()
    shape = _SHAPES.get(arguments.model, (3, 32, 32))
    with tempfile.TemporaryDirectory() as folder:
        ledger_file = Path(folder) / "ledger.db"
        ledger = Ledger.open(str(ledger_file))
        keys = tuple(ledger.add_client(f"client-{i}", 10**12)[1].reveal() for i in range(arguments.clients))
        ledger.close()
        weights = arguments.weights or _random_weights(arguments.model, Path(folder))
        options = ["--model", arguments.model, *(["--weights", str(weights)] if weights else [])]
        with _server(ledger_file, [*options, *shlex.split(arguments.serve)]) as port:
            load = Load(port, keys, arguments.rows, shape, arguments.seconds, 0.0, 1)
            with multiprocessing.get_context("spawn").Pool(_SENDERS) as pool:
                bench = Bench(pool, load, Seen())
                _measure(bench, arguments)
            _server_side(port)
        sys.exit(not _agrees(ledger_file, bench.total))


def _measure(bench: Bench, arguments: argparse.Namespace) -> None:
    rows, seconds = arguments.rows, arguments.seconds
    print(f"{arguments.model}, {rows} rows a request, {arguments.clients} clients\n\nclosed loops")
    goodput = {}
    for connections in arguments.connections:
        seen = bench.offer(connections=connections)
        goodput[connections] = seen.rows / seconds
        print(f"{connections:6d} connections {goodput[connections]:10,.0f} rows/s   {_quantiles(seen)}", flush=True)
    best = max(goodput, key=lambda each: goodput[each])
    print(f"\nopen loops, each beside the peak ({best} connections) of its round")
    ratios: dict[float, list[float]] = {times: [] for times in arguments.times}
    for _ in range(arguments.rounds):
        peak = bench.offer(connections=best).rows / seconds
        print(f"  peak               {peak:10,.0f} rows/s", flush=True)
        for times in arguments.times:
            seen = bench.offer(rate=times * peak / rows, connections=_SENDERS)
            ratios[times].append(seen.rows / seconds / peak)
            offered = (seen.sent * rows) / seconds
            told = f"{times:6g} x offered {offered:11,.0f} answered {seen.rows / seconds:10,.0f} rows/s"
            unsent = f" not sent {seen.unsent}" if seen.unsent else ""
            print(f"{told}   {_quantiles(seen)}   {dict(seen.statuses)}{unsent}", flush=True)
    print("\ngoodput / peak     least median   most")
    for times, found in ratios.items():
        print(f"{times:6g} x        {min(found):8.3f} {statistics.median(found):6.3f} {max(found):6.3f}")


def _quantiles(seen: Seen) -> str:
    told = []
    for name, taken in (("answers", seen.answered_s), ("refusals", seen.refused_s)):
        if taken:
            half, most, worst = (1000 * float(np.quantile(taken, q)) for q in (0.5, 0.95, 0.99))
            told.append(f"{name} p50 {half:.1f} p95 {most:.1f} p99 {worst:.1f} ms")
    return "; ".join(told)


def _server_side(port: int) -> None:
    """What the server's own metrics say of its refusals and its blocks."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{protocol.METRICS_ROUTE}") as answer:
        values = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    name = "oracle_overload_refusal_seconds"
    refused = float(values[f"{name}_count"])
    if refused:
        soon = float(values[f'{name}_bucket{{le="0.01"}}'])
        mean = 1000 * float(values[f"{name}_sum"]) / refused
        print(f"\nserver: {refused:,.0f} refusals, {soon / refused:.2%} within 10 ms of their end, mean {mean:.2f} ms")
    blocks = float(values["oracle_block_rows_count"])
    print(f"server: {blocks:,.0f} blocks of {float(values['oracle_block_rows_sum']) / blocks:.1f} rows in the mean")


def _agrees(path: Path, seen: Seen) -> bool:
    """Whether the ledger holds the charges of the answers that arrived and no others."""
    ledger = Ledger.open(str(path), create=False)
    verification = ledger.verify()
    accounts = verification.accounts
    spent = sum(account.spent for account in accounts.clients.values())
    held = len(accounts.open)
    ledger.close()
    print(
        f"ledger: {accounts.charges:,} charges of {spent:,} queries, {held} left open, "
        f"{len(verification.findings)} findings; "
        f"answers: {seen.answers:,} that say {seen.charged:,} were charged; {seen.lost} connections ended without one"
    )
    return verification.intact and (accounts.charges, spent, held) == (seen.answers, seen.charged, 0)


def _random_weights(model: str, folder: Path) -> Path | None:
    """A file of random weights; None for a model that comes with its own."""
    if model in _SHAPES:
        return None
    import torch
    from safetensors.torch import save_file

    from shared.models.architectures import build

    torch.manual_seed(0)
    path = folder / "random.safetensors"
    save_file(build(model, 3, 10).state_dict(), path)
    return path


@contextmanager
def _server(ledger: Path, options: list[str]) -> Iterator[int]:
    """`oracle-server serve` in a process of its own; its port. It must end well when it is told to."""
    command = [sys.executable, "-m", "oracle_server", "serve", "--port", "0", "--ledger", str(ledger), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            if not line.startswith("listening on "):
                sys.exit(f"the server did not start: {line}")
            yield int(line.strip().rsplit(":", 1)[1])
            child.send_signal(signal.SIGTERM)
            if child.wait(120):
                sys.exit(f"the server ended with exit code {child.returncode}")
        finally:
            child.kill()


if __name__ == "__main__":
    main()
