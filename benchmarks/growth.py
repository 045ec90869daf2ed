"""How cost grows with a request's rows, with clients, with directions, with the latent: time, and both sides' memory.

    python -m benchmarks.growth [--weights FILE] [--rounds 5] [--only rows clients directions latent] [--quick]

The server is `oracle-server serve --allow-decoders`, in a process of its own; the clients are `RemoteOracle`s, each
with a key of its own, in this process. The sizes of an axis are asked once in rising order, in which memory is read
(resident, at its highest, sampled), and then take turns, in which time is. Memory that was used once is kept by both
programs for the next batch (`shared.process`): what a size adds is what it needs beyond all smaller ones, and beyond
the axes before it.

    rows         one request of 1 to 4096 images
    clients      1 to 64 at once, each one request after the other, the same rows in all
    directions   RGE with q = 1 to 768 in a latent of 192, two samples, the decoder merged into the oracle
    latent       CGE in a latent of 48 to 3072 of a pyramid, one sample, the decoder merged into the oracle

At the end, a request of a row more than the server's limit must be refused by that limit (413, nothing charged, the
server as before), whether it brings its rows or only what they are made of; else the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch

from benchmarks import models
from benchmarks.measuring import Disturbance, ended_by_signal, heading, interleave, ratios, spread, table
from benchmarks.serving import OurServer, start
from benchmarks.stacks import latent_stack
from defender_client import zo
from defender_client.black_box import BlackBox
from defender_client.oracle_client import RemoteOracle
from oracle_server.ledger import Ledger
from shared.process import keep_memory
from shared.wire import codec, probes, protocol

_MAX_ROWS = 4096
_CLIENT_ROWS = 32  # of a request, where there are several clients
_CLIENT_REQUESTS = 64  # of a turn, over all clients
_TURN_ROWS = 128  # that a turn of small requests has at least
_SAMPLE_S = 0.01
_MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """Seconds of each request, and of all of them; queries in all."""

    requests: list[float]
    seconds: float
    queries: int


@dataclass(frozen=True)
class Memory:
    """Resident bytes at their highest, of the server with its descendants and of this process."""

    server: int
    client: int


@dataclass(frozen=True)
class Axis:
    """What grows: turns by size, in rising order."""

    name: str
    unit: str
    turns: dict[int, Callable[[], Turn]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar-resnet20", help="cifar-resnet20, ..., or linear.")
    parser.add_argument("--weights", type=Path, help="A weights file of the model; random weights without it.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(_AXES), default=list(_AXES))
    parser.add_argument("--quick", action="store_true", help="Two sizes of each, one round.")
    parser.add_argument("--engine", default="auto")
    options = parser.parse_args()
    keep_memory()  # as the defender's own commands do
    print(heading("torch", "onnxruntime", "numpy", "httpx", "uvicorn"), flush=True)
    with ended_by_signal() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        model = models.write(options.model, options.weights, folder / "model.safetensors")
        given = ["--allow-decoders", "--max-client-decoders", "8", "--max-batch-rows", str(_MAX_ROWS)]
        server = start(folder, model, ["--engine", options.engine, *given])
        opened.callback(server.child.stop)
        disturbance = Disturbance()
        idle = _resident(server)
        print(
            f"{options.model}; idle, the server takes {idle.server / _MIB:,.0f} MiB and the client "
            f"{idle.client / _MIB:,.0f} MiB",
            flush=True,
        )
        for name in options.only:
            _measure(_AXES[name](server, folder, opened, options.quick), server, 1 if options.quick else options.rounds)
        wrong = _limit(server)
        print(f"\n{disturbance}")
    if wrong:
        raise SystemExit("\n".join(wrong))


def _measure(axis: Axis, server: OurServer, rounds: int) -> None:
    memory = {}
    for size, turn in axis.turns.items():  # rising; it is the warm-up, too
        with _watched(server) as seen:
            turn()
        memory[size] = Memory(max(each.server for each in seen), max(each.client for each in seen))
    turns = interleave(rounds, {str(size): turn for size, turn in axis.turns.items()}, warm_up=0)
    rows = []
    first = [turn.queries / turn.seconds for turn in next(iter(turns.values()))]
    for size, made in turns.items():
        rates = [turn.queries / turn.seconds for turn in made]
        rate, latency = spread(rates), spread([1000 * each for turn in made for each in turn.requests])
        held = memory[int(size)]
        cells = [f"{rate.median:,.0f}", f"{rate.low:,.0f} to {rate.high:,.0f}", f"{ratios(rates, first).median:.2f}"]
        cells += [f"{latency.median:,.1f}", f"{latency.low:,.1f} to {latency.high:,.1f}"]
        rows.append([f"{int(size):,}", *cells, f"{held.server / _MIB:,.0f}", f"{held.client / _MIB:,.0f}"])
    header = [axis.name, "queries/s", "quartiles", "of the first", f"ms {axis.unit}", "quartiles"]
    print("\n" + table([*header, "server MiB", "client MiB"], rows), flush=True)


# --- the axes ---


def _rows(server: OurServer, folder: Path, opened: ExitStack, quick: bool) -> Axis:
    oracle = opened.enter_context(RemoteOracle(server.url, server.key))
    images = models.images(_MAX_ROWS, None)

    def turn(rows: int) -> Turn:
        times = max(1, min(16, _TURN_ROWS // rows))
        return _timed([partial(_ask, oracle, images[:rows])] * times, rows * times)

    sizes = (1, 64) if quick else (1, 4, 16, 64, 256, 1024, _MAX_ROWS)
    return Axis("rows of a request", "a request", {size: partial(turn, size) for size in sizes})


def _clients(server: OurServer, folder: Path, opened: ExitStack, quick: bool) -> Axis:
    sizes = (1, 4) if quick else (1, 4, 16, 64)
    ledger = Ledger.open(str(folder / "ledger.db"))
    keys = [ledger.add_client(f"client {number}", 10**12)[1].reveal() for number in range(max(sizes))]
    ledger.close()
    oracles = [opened.enter_context(RemoteOracle(server.url, key)) for key in keys]
    images = models.images(_CLIENT_ROWS, None)
    requests = max(sizes) if quick else _CLIENT_REQUESTS

    def one(oracle: RemoteOracle, count: int) -> list[float]:
        return _timed([partial(_ask, oracle, images)] * count, 0).requests

    def turn(clients: int) -> Turn:
        with ThreadPoolExecutor(clients) as pool:
            began = time.perf_counter()
            took = list(pool.map(one, oracles[:clients], [requests // clients] * clients))
            passed = time.perf_counter() - began
        return Turn([each for some in took for each in some], passed, requests * _CLIENT_ROWS)

    return Axis(f"clients, {_CLIENT_ROWS} rows a request", "a request", {size: partial(turn, size) for size in sizes})


def _directions(server: OurServer, folder: Path, opened: ExitStack, quick: bool) -> Axis:
    oracle = opened.enter_context(RemoteOracle(server.url, server.key))
    black_box = BlackBox(latent_stack(192), oracle, _MAX_ROWS, "merged")
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, 192, generator=generator)

    def turn(q: int) -> Turn:
        return _estimate(black_box, zo.make("rge", q=q, generator=generator), points)

    sizes = (1, 16) if quick else (1, 4, 16, 64, 192, 768)
    return Axis("directions (RGE), 2 samples", "an estimate", {size: partial(turn, size) for size in sizes})


def _latent(server: OurServer, folder: Path, opened: ExitStack, quick: bool) -> Axis:
    oracle = opened.enter_context(RemoteOracle(server.url, server.key))
    generator = torch.Generator().manual_seed(0)

    black_boxes: dict[int, BlackBox] = {}

    def turn(latent: int) -> Turn:
        if latent not in black_boxes:  # only now, so that memory has what a decoder takes beside the size that needs it
            black_boxes[latent] = BlackBox(latent_stack(latent), oracle, _MAX_ROWS, "merged")
        return _estimate(black_boxes[latent], zo.make("cge"), torch.rand(1, latent, generator=generator))

    sizes = (48, 96) if quick else (48, 192, 768, 3072)
    return Axis("latent (CGE), 1 sample", "an estimate", {size: partial(turn, size) for size in sizes})


_AXES = {"rows": _rows, "clients": _clients, "directions": _directions, "latent": _latent}


def _ask(oracle: RemoteOracle, images: np.ndarray) -> None:
    # Every request a new purchase: of the same label and bytes only the first would be.
    oracle.query(images, purpose="benchmark", label=f"{time.perf_counter_ns()}")


def _estimate(black_box: BlackBox, estimator: zo.Estimator, points: torch.Tensor) -> Turn:
    """Ask for the estimate's probes, as many times as make a turn that can be timed."""
    queries = len(points) * estimator.queries_per_sample(points.shape[1])

    def ask() -> None:
        logits = black_box.probed(estimator.ask_factored(points), purpose="train", label=f"{time.perf_counter_ns()}")
        estimator.tell(logits.double().logsumexp(2))

    times = max(1, _TURN_ROWS // queries)
    return _timed([ask] * times, queries * times)


def _timed(requests: list[Callable[[], None]], queries: int) -> Turn:
    took = []
    for request in requests:
        began = time.perf_counter()
        request()
        took.append(time.perf_counter() - began)
    return Turn(took, sum(took), queries)


# --- memory ---


def _resident(server: OurServer) -> Memory:
    family, total = psutil.Process(server.child.pid), 0
    for member in (family, *family.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return Memory(total, psutil.Process(os.getpid()).memory_info().rss)


@contextmanager
def _watched(server: OurServer) -> Iterator[list[Memory]]:
    """Memory until the end of the block, every `_SAMPLE_S` seconds and once more."""
    seen, over = [_resident(server)], threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_S):
            seen.append(_resident(server))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen.append(_resident(server))


# --- the limit ---


def _limit(server: OurServer) -> list[str]:
    """Ask for a row too many, by the rows and by what they are made of; what was not as it must be."""
    pixels = int(np.prod(models.IMAGE_SHAPE))
    whole = {protocol.INPUT_NAME: models.images(_MAX_ROWS + 1, None)}
    made_of = {
        probes.BASE: np.full((1, pixels), 0.5, np.float32),
        probes.STEPS: np.full(_MAX_ROWS, 0.005, np.float32),
        probes.SEED: np.zeros(1, np.uint64),
    }
    wrong = []
    print(f"\n{_MAX_ROWS + 1:,} rows, one more than --max-batch-rows:")
    with RemoteOracle(server.url, server.key) as oracle:
        for name, inputs in (("images", whole), ("factored", made_of)):
            body = codec.encode_request(inputs, outputs=(protocol.OUTPUT_NAME,))
            headers = {
                "Authorization": f"Bearer {server.key}",
                protocol.JSON_LENGTH_HEADER: str(body.json_length),
                "Content-Length": str(body.size),
                "Content-Type": "application/octet-stream",
            }
            before = _spent(oracle)
            try:
                answer = httpx.post(server.url + protocol.INFER_ROUTE, content=iter(body.chunks), headers=headers)
                status, said = answer.status_code, json.loads(answer.content).get("error", "")
            except httpx.HTTPError as error:
                status, said = 0, str(error)
            charged = _spent(oracle) - before
            print(f"  {name}, a body of {body.size:,} bytes: {status}, {charged} charged: {said}")
            if status != httpx.codes.REQUEST_ENTITY_TOO_LARGE or charged or not server.child.alive:
                wrong.append(f"{_MAX_ROWS + 1} rows as {name} were not refused as too large, free of charge")
        oracle.query(models.images(1, None), purpose="benchmark", label="after")  # it answers as before
    return wrong


def _spent(oracle: RemoteOracle) -> int:
    budget = oracle.budget()
    assert budget is not None
    return budget.spent


if __name__ == "__main__":
    main()
