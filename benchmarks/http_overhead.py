"""What HTTP costs: images a second through our server, against the same engine in process.

    python -m benchmarks.http_overhead [--weights FILE] [--data DIR] [--rounds 20] [--connections 1 4]
    python -m benchmarks.http_overhead --model linear

Three kinds of process take turns: the engine on a batch in memory; one `RemoteOracle`, one request at a time; several
of them at once, a connection each. The server is `oracle-server serve`, its ledger on; all have the allocator
settings of `shared.process.prepare`. `linear` computes next to nothing: its rate is the transport's ceiling.
Without --weights, weights are random; without --data, so are the images.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.measuring import Disturbance, Turn, Worker, ended_by_signal, heading, interleave, ratios, spread, table
from benchmarks.serving import OurServer, choices_in, start

_IN_PROCESS = "in process"
_IMAGE_BYTES = 4 * 3 * 32 * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar-resnet20", help="cifar-resnet20, ..., or linear.")
    parser.add_argument("--weights", type=Path, help="A weights file of the model; random weights without it.")
    parser.add_argument("--data", type=Path, help="Directory of CIFAR-10; random images without it.")
    parser.add_argument("--rows", type=int, default=256, help="Images of a request.")
    parser.add_argument("--batches", type=int, default=12, help="Requests of a turn, over all connections.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--engine", default="auto", help="Of the server and in process.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--block", type=int, default=256, help="Rows the engine takes at once, here and there.")
    parser.add_argument("--serve-options", default="", help="More options of `oracle-server serve`, as one string.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # URL: be the client
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        _client(options.worker, options.images, options.connections[0])
    else:
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    import numpy as np

    from benchmarks import models

    print(heading("torch", "onnxruntime", "numpy", "httpx", "uvicorn"), flush=True)
    common = ["--engine", options.engine, "--device", options.device]
    with ended_by_signal() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = models.write(options.model, options.weights, folder / "model.safetensors")
        batch = folder / "images.npy"
        np.save(batch, models.images(options.rows, options.data))
        block = ["--engine-block", str(options.block)]
        server = start(folder, model, [*common, *block, *shlex.split(options.serve_options)])
        stack.callback(server.child.stop)
        files = ["--model-file", str(model), "--images", str(batch), *common, "--block", str(options.block)]
        command = [sys.executable, "-m", "benchmarks.in_process", "engine", *files]
        engine = stack.enter_context(Worker(command, choices_in(folder)))
        candidates: dict[str, Callable[[], Turn]] = {_IN_PROCESS: partial(engine.turn, options.batches)}
        clients: list[Worker] = []
        for count in options.connections:
            given = ["--worker", server.url, "--images", str(batch), "--connections", str(count)]
            client = Worker([sys.executable, "-m", "benchmarks.http_overhead", *given], {"ORACLE_API_KEY": server.key})
            stack.enter_context(client)
            name = f"HTTP, {count} connection{'s' * (count > 1)}"
            candidates[name] = partial(_served, server, client, options.batches)
            clients.append(client)
        print(
            f"{options.model}, {options.rows} images a request, {options.batches} requests a turn, "
            f"{options.rounds} rounds; engine asked for {options.engine}, in process {engine.ready()}",
            flush=True,
        )
        for client in clients:
            client.ready()
        disturbance = Disturbance()
        turns = interleave(options.rounds, candidates)
        print(f"{disturbance}\n")
    _report(turns, options.rows, options.batches)


def _served(server: OurServer, client: Worker, batches: int) -> Turn:
    before = server.seconds()
    turn = client.turn(batches)
    after = server.seconds()
    return Turn(turn.wall, turn.cpu, {name: after[name] - before[name] for name in after})


def _report(turns: dict[str, list[Turn]], rows: int, batches: int) -> None:
    rates = {name: [rows * batches / turn.wall for turn in made] for name, made in turns.items()}
    lines = []
    for name, made in rates.items():
        rate, share = spread(made), ratios(made, rates[_IN_PROCESS])
        line = [name, f"{rate.median:,.0f}", f"{rate.low:,.0f} to {rate.high:,.0f}"]
        if name != _IN_PROCESS:
            line += [f"{rate.median * _IMAGE_BYTES / 1e6:,.1f}", f"{share.median:.1%}"]
            line += [f"{share.low:.1%} to {share.high:.1%}"]
        lines.append(line + [""] * (6 - len(line)))
    print(table(["", "images/s", "quartiles", "MB/s up", "of in process", "quartiles"], lines))
    print("\nA request, in ms (medians):\n")
    lines = [[name, *_costs(made, batches)] for name, made in turns.items()]
    print(table(["", "wall", "client CPU", "server CPU", "engine", "request in server", "server, not engine"], lines))
    print(
        "\nwall: a turn's time over its requests. request in server: from its head to the end of its answer, so with "
        "several connections\nit holds the wait for the engine, too. engine: as the server's metric counts it."
    )


def _costs(turns: list[Turn], requests: int) -> list[str]:
    """Milliseconds a request: wall, the worker's CPU, and what the server says where there is one."""
    columns = [[turn.wall for turn in turns], [turn.cpu for turn in turns]]
    if turns[0].parts:
        columns += [[turn.parts[name] for turn in turns] for name in ("server CPU", "inference", "requests")]
        columns += [[turn.parts["requests"] - turn.parts["inference"] for turn in turns]]
    cells = [f"{1000 * spread(column).median / requests:.2f}" for column in columns]
    return cells + [""] * (6 - len(cells))


def _client(url: str, images: Path, connections: int) -> None:
    """Be the client: a `RemoteOracle` a connection, each in a thread of its own."""
    from shared.process import prepare

    prepare()
    import itertools
    import os
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from benchmarks.measuring import Work, obey
    from defender_client.oracle_client import RemoteOracle

    def make_ready() -> tuple[Work, str]:
        batch, labels = np.load(images), itertools.count()
        oracles = [RemoteOracle(url, os.environ["ORACLE_API_KEY"]) for _ in range(connections)]
        pool = ThreadPoolExecutor(connections)

        def ask(oracle: RemoteOracle, times: int) -> None:
            for _ in range(times):
                oracle.query(batch, purpose="benchmark", label=str(next(labels)))

        def work(batches: int) -> None:
            shares = [batches // connections + (n < batches % connections) for n in range(connections)]
            list(pool.map(ask, oracles, shares))

        return work, "RemoteOracle"

    obey(make_ready)


if __name__ == "__main__":
    main()
