"""The command: `python -m benchmarks.peers setup|run`; see the package."""

from __future__ import annotations

import argparse
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import benchmarks.peers
from benchmarks import serving
from benchmarks.measuring import (
    Child,
    Disturbance,
    Failed,
    Turn,
    Worker,
    ended_by_signal,
    heading,
    interleave,
    ratios,
    spread,
    table,
)
from benchmarks.peers import environments
from benchmarks.peers.candidates import CANDIDATES, EAGER_AS_RUN, OURS, Candidate, InProcess, Ours, Peer


def main() -> None:
    options = _options()
    if options.what == "setup":
        _set_up(options.venvs, options.only)
    else:
        _run(options)


def _options() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers", description=benchmarks.peers.__doc__, formatter_class=form
    )
    commands = parser.add_subparsers(dest="what", required=True)
    setup = commands.add_parser("setup", help="Install the frameworks.")
    run = commands.add_parser("run", help="Compare.")
    for command in (setup, run):
        command.add_argument(
            "--venvs", type=Path, required=True, help="Where the environments are, outside of the repository."
        )
    setup.add_argument("--only", nargs="+", choices=list(environments.PACKAGES), default=list(environments.PACKAGES))
    run.add_argument("--only", nargs="+", metavar="NAME", help="Candidates whose name holds one of these.")
    run.add_argument("--model", default="cifar-resnet20", help="cifar-resnet20, ..., or linear.")
    run.add_argument("--weights", type=Path, help="A weights file of the model; random weights without it.")
    run.add_argument("--data", type=Path, help="Directory of CIFAR-10; random images without it.")
    run.add_argument("--rows", type=int, default=256, help="Images of a request, and rows an engine takes at once.")
    run.add_argument("--batches", type=int, default=4, help="Requests of a turn.")
    run.add_argument("--rounds", type=int, default=15)
    run.add_argument("--engine", default="auto", help="Of our server.")
    run.add_argument("--serve-options", default="", help="More options of `oracle-server serve`, as one string.")
    return parser.parse_args()


def _set_up(folder: Path, names: list[str]) -> None:
    for name in names:
        failure = environments.set_up(folder, name)
        print(f"{name}: {failure or environments.version_in(folder, name)}", flush=True)


@dataclass
class Entry:
    """A candidate that is ready: its worker, its server where it has one, and the CPU seconds of its own turns."""

    worker: Worker
    server: Child | None
    served: float = 0.0

    def turn(self, batches: int) -> Turn:
        if self.server is None:
            return self.worker.turn(batches)
        before = self.server.cpu()
        turn = self.worker.turn(batches)
        spent = self.server.cpu() - before
        self.served += spent
        return Turn(turn.wall, turn.cpu, {"server CPU": spent})


@dataclass(frozen=True)
class Bench:
    """What all candidates are given."""

    options: argparse.Namespace
    folder: Path
    model: Path
    images: Path
    expected: Path

    def start(self, candidate: Candidate, stack: ExitStack) -> Entry:
        """Start a candidate; `stack` ends it. Raises `Failed` with the reason why it does not take part."""
        batch = ["--images", str(self.images), "--expected", str(self.expected)]
        match candidate:
            case InProcess():
                settings = ["--engine", self.options.engine, "--block", str(self.options.rows)]
                command = [sys.executable, "-m", "benchmarks.in_process", *candidate.arguments]
                command += ["--model-file", str(self.model), *batch, *settings]
                worker = Worker(command, serving.choices_in(self.folder))
                entry = Entry(stack.enter_context(worker), None)
                worker.ready()
                return entry
            case Ours():
                home = self.folder / candidate.client
                home.mkdir()
                given = ["--engine", self.options.engine, "--engine-block", str(self.options.rows), "--device", "cpu"]
                given += shlex.split(self.options.serve_options)
                server = serving.start(home, self.model, given, choices=self.folder)
                stack.callback(server.child.stop)
                return self._asked(
                    candidate.client, server.url, server.child, batch, stack, {"ORACLE_API_KEY": server.key}
                )
            case Peer():
                return self._peer(candidate, batch, stack)

    def _peer(self, peer: Peer, batch: list[str], stack: ExitStack) -> Entry:
        from oracle_server.cpus import usable_cpus

        if environments.version_in(self.options.venvs, peer.environment) is None:
            raise Failed(f"'{peer.environment}' is not installed in {self.options.venvs}: see `setup`")
        python = str(environments.python_of(self.options.venvs, peer.environment))
        port = _free_port()
        told = {
            "BENCHMARK_MODEL": str(self.model),
            "BENCHMARK_THREADS": str(usable_cpus()),
            "BENTOML_HOME": str(self.folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
        }
        server = Child([python, "-m", *(part.format(port=port) for part in peer.command)], told)
        stack.callback(server.stop)
        url = f"http://127.0.0.1:{port}"
        serving.await_answer(url + peer.health, server)
        asker = python if peer.own_client else sys.executable
        return self._asked(peer.client, url + peer.route, server, batch, stack, told, asker)

    @staticmethod
    def _asked(
        kind: str,
        url: str,
        server: Child,
        batch: list[str],
        stack: ExitStack,
        environment: dict[str, str],
        python: str = sys.executable,
    ) -> Entry:
        command = [python, "-m", "benchmarks.peers.clients", kind, "--url", url, *batch]
        client = stack.enter_context(Worker(command, environment))
        try:
            client.ready()
        except Failed as error:
            raise Failed(f"{error}; its server said: {server.reason()}") from None
        return Entry(client, server)


def _run(options: argparse.Namespace) -> None:
    chosen = [each for each in CANDIDATES if not options.only or any(part in each.name for part in options.only)]
    print(heading("torch", "onnxruntime", "numpy", "httpx", "uvicorn", "tritonclient"))
    found = {name: environments.version_in(options.venvs, name) for name in environments.PACKAGES}
    print(f"peers: {', '.join(f'{name} {version}' for name, version in found.items() if version)}", flush=True)
    with ended_by_signal() as stack:
        bench = _bench(options, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        entries: dict[str, Entry] = {}
        missing: dict[str, str] = {}
        for candidate in chosen:
            started = ExitStack()
            try:
                entries[candidate.name] = bench.start(candidate, started)
                stack.enter_context(started)
            except (Failed, OSError) as error:
                started.close()
                missing[candidate.name] = str(error)
                print(f"does not take part: {candidate.name}: {error}", flush=True)
        print(
            f"{options.model}, {options.rows} images a request, one connection, {options.batches} requests a turn, "
            f"{options.rounds} rounds",
            flush=True,
        )
        disturbance = Disturbance()
        at_start = {name: entry.server.cpu() for name, entry in entries.items() if entry.server}
        candidates: dict[str, Callable[[], Turn]] = {
            name: partial(entry.turn, options.batches) for name, entry in entries.items()
        }
        turns = interleave(options.rounds, candidates)
        idle = {
            name: entry.server.cpu() - at_start[name] - entry.served
            for name, entry in entries.items()
            if entry.server is not None
        }
        print(f"{disturbance}")
    print(f"CPU s of servers outside of their turns: {', '.join(f'{n} {s:.1f}' for n, s in idle.items())}\n")
    print(report(turns, options.rows, options.batches))
    for name, reason in missing.items():
        print(f"\nDid not take part: {name}: {reason}")


def _bench(options: argparse.Namespace, folder: Path) -> Bench:
    import numpy as np
    import torch

    from benchmarks import models

    model = models.write(options.model, options.weights, folder / "model.safetensors")
    images = models.images(options.rows, options.data)
    np.save(folder / "images.npy", images)
    with torch.inference_mode():
        np.save(folder / "expected.npy", models.load(model)(torch.from_numpy(images)).numpy())
    return Bench(options, folder, model, folder / "images.npy", folder / "expected.npy")


def report(turns: dict[str, list[Turn]], rows: int, batches: int) -> str:
    """The table: rates, ratios to eager PyTorch in process as people run it, and ours over each."""
    rates = {name: [rows * batches / turn.wall for turn in made] for name, made in turns.items()}
    lines = []
    for name, made in turns.items():
        rate = spread(rates[name])
        to_eager = f"{ratios(rates[name], rates[EAGER_AS_RUN]).median:.2f}" if EAGER_AS_RUN in rates else ""
        ours_over = ratios(rates[OURS], rates[name]).show(".2f") if OURS in rates else ""
        cpu = [spread([turn.cpu for turn in made]).median]
        cpu += [spread([turn.parts["server CPU"] for turn in made]).median] if "server CPU" in made[0].parts else []
        lines.append(
            [
                name,
                f"{rate.median:,.0f}",
                f"{rate.low:,.0f} to {rate.high:,.0f}",
                to_eager,
                ours_over,
                " + ".join(f"{1000 * seconds / batches:.0f}" for seconds in cpu),
            ]
        )
    header = ["", "images/s", "quartiles", "of eager", "ours over it", "CPU ms a request (client + server)"]
    return table(header, lines)


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
