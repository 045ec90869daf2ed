"""What a training sample costs on the wire: bytes up and down, in each form that its queries can be sent in.

    python -m benchmarks.bytes [--weights FILE] [--samples 10] [--query-rows 2048]

A step's queries are asked by the real client (`BlackBox` over `RemoteOracle`) of a real `oracle-server serve
--allow-decoders`, once in each form, and every byte of the TCP streams between them is counted at a relay: HTTP's own
lines and headers included, TCP's and IP's not. Forms ask the same queries: it is an error (exit status 1) if they are
not charged alike, if their gradients differ (in pixels at all; with a merged decoder, by more than float32 rounding
makes of any), or if CGE in the latent with a merged decoder sends less than 100 times fewer bytes up than as images.

Rounding is measured: as the distance of the gradient from images to the one computed in float64 from the same probes.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.measuring import ended_by_signal, heading, table
from benchmarks.serving import OurServer, start
from benchmarks.stacks import latent_stack, pixel_stack
from defender_client import zo
from defender_client.black_box import BlackBox
from defender_client.config import Form
from defender_client.losses import cross_entropy
from defender_client.oracle_client import RemoteOracle
from defender_client.stack import Stack
from shared.process import keep_memory
from shared.wire.probes import Probes

_LATENT = 192
_FEWER_UP = 100.0  # times, that a merged decoder must send of what images take, with CGE
_ROUNDINGS = 4.0  # how far apart two float32 gradients may be, in distances of one of them from float64's
_CHUNK = 2**16

Probed = Callable[[Probes, int], Tensor]
"""From probes, and the number of their first sample, to logits [n, p, k]."""


class Relay:
    """Passes TCP connections on to a port of this machine, and counts what passes.

    Attributes:
        up, down: bytes to the server and from it until now.
    """

    def __init__(self, port: int) -> None:
        self.up = self.down = 0
        self._port, self._lock = port, threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                with self._lock:  # before it is passed on: whoever has an answer finds it counted
                    self.up, self.down = self.up + up * len(data), self.down + (not up) * len(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Case:
    """An estimator, and how many samples are asked about."""

    stack: Stack
    form: Form
    estimator: str
    difference: zo.Difference
    q: int
    samples: int

    @property
    def name(self) -> str:
        space = "latent" if self.stack.autoencoder is not None else "pixels"
        named = f"RGE q={self.q}" if self.estimator == "rge" else f"CGE d={self.stack.dimension}"
        return f"{space}: {named}, {self.difference}"

    def make(self) -> zo.Estimator:
        """The estimator, its directions the same every time."""
        generator = torch.Generator().manual_seed(1)
        return zo.make(self.estimator, q=self.q, difference=self.difference, generator=generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Points [samples, d] and labels [samples]."""
        generator = torch.Generator().manual_seed(2)
        images = torch.rand(self.samples, *models.IMAGE_SHAPE, generator=generator)
        # Where the encoder would put them matters to nobody here; pixels are kept off the ends, where all is clamped.
        points = images.flatten(1) if self.stack.autoencoder is None else images.flatten(1)[:, : self.stack.dimension]
        return 0.1 + 0.8 * points, torch.randint(models.CLASSES, (self.samples,), generator=generator)


@dataclass(frozen=True)
class Sent:
    """What one form's step took: bytes on the wire and in bodies, queries charged by the server, and its gradient."""

    form: str
    up: int
    down: int
    body_up: int
    body_down: int
    charged: int
    gradient: Tensor
    once: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar-resnet20")
    parser.add_argument("--weights", type=Path, help="A weights file of the model; random weights without it.")
    parser.add_argument("--samples", type=int, default=10, help="Of a step; CGE in pixels takes one.")
    parser.add_argument("--query-rows", type=int, default=2048, help="Rows of a request, at most, as in train.")
    parser.add_argument("--only", nargs="+", default=[""], help="Cases whose names contain one of these.")
    parser.add_argument("--engine", default="auto")
    options = parser.parse_args()
    keep_memory()  # as the defender's own commands do
    print(heading("torch", "numpy", "httpx"), flush=True)
    cases = [case for case in _cases(options.samples) if any(part in case.name for part in options.only)]
    with ended_by_signal() as opened, torch.no_grad():
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        model = models.write(options.model, options.weights, folder / "model.safetensors")
        server = start(folder, model, ["--engine", options.engine, "--allow-decoders"])
        opened.callback(server.child.stop)
        relay = Relay(urlsplit(server.url).port or 80)
        opened.callback(relay.close)
        measured, roundings = {}, {}
        for case in cases:
            measured[case] = [_ask(case, form, server, relay, options.query_rows) for form in ("images", case.form)]
            if case.form == "merged":
                roundings[case] = _rounding(case, measured[case][0].gradient, models.load(model), options.query_rows)
    print(f"{options.model}; a step of {options.samples} samples, requests of at most {options.query_rows} rows\n")
    wrong = _report(measured, roundings)
    if wrong:
        raise SystemExit("\n".join(wrong))


def _cases(samples: int) -> list[Case]:
    latent, pixels = latent_stack(_LATENT), pixel_stack()
    return [
        Case(latent, "merged", "cge", "forward", 0, samples),
        Case(latent, "merged", "cge", "central", 0, samples),
        Case(latent, "merged", "rge", "forward", 20, samples),
        Case(latent, "merged", "rge", "forward", 192, samples),
        Case(pixels, "factored", "cge", "forward", 0, 1),
        Case(pixels, "factored", "rge", "forward", 20, samples),
        Case(pixels, "factored", "rge", "forward", 192, samples),
    ]


def _ask(case: Case, form: Form, server: OurServer, relay: Relay, query_rows: int) -> Sent:
    with RemoteOracle(relay.url, server.key) as oracle:
        before = relay.up
        black_box = BlackBox(case.stack, oracle, query_rows, form)
        spent, once = _spent(oracle), relay.up - before
        up, down = relay.up, relay.down

        def probed(probes: Probes, first: int) -> Tensor:
            return black_box.probed(probes, purpose="train", label=f"train/{first}")

        gradient = _gradient(case.make(), *case.batch(), probed, query_rows)
        up, down = relay.up - up, relay.down - down
        requests = oracle.log.requests.values()
        bodies = sum(request.bytes_up for request in requests), sum(request.bytes_down for request in requests)
        return Sent(form, up, down, *bodies, _spent(oracle) - spent, gradient, once)


def _spent(oracle: RemoteOracle) -> int:
    """Queries charged so far, as the server's ledger has it."""
    budget = oracle.budget()
    assert budget is not None
    return budget.spent


def _gradient(estimator: zo.Estimator, points: Tensor, labels: Tensor, probed: Probed, query_rows: int) -> Tensor:
    """The estimate [n, d] at points [n, d], in requests as `defender_client.estimation` makes them."""
    group, told = max(1, query_rows // estimator.queries_per_sample(points.shape[1])), []
    for first in range(0, len(points), group):
        probes = estimator.ask_factored(points[first : first + group])
        targets = labels[first : first + group].repeat_interleave(probes.p)
        losses = cross_entropy(probed(probes, first).flatten(0, 1), targets)
        told.append(estimator.tell(losses.view(probes.n, probes.p)))
    return torch.cat(told)


def _rounding(case: Case, gradient: Tensor, classifier: nn.Module, query_rows: int) -> float:
    """How far the first sample's gradient is from the one computed in float64; see `_distance`."""
    back, classifier = latent_stack(_LATENT).double(), classifier.double()

    def probed(probes: Probes, _: int) -> Tensor:
        rows = torch.from_numpy(probes.expand(0, len(probes))).double()
        logits = torch.cat([classifier(back.back(part)) for part in rows.split(256)])
        return logits.view(probes.n, probes.p, -1)

    points, labels = case.batch()
    exact = _gradient(case.make(), points[:1], labels[:1], probed, query_rows)
    return _distance(gradient[:1], exact)


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two gradients [n, d] in a coordinate, relative to the sample's norm."""
    return float(((a - b).abs().amax(1) / b.norm(dim=1)).max())


def _report(measured: dict[Case, list[Sent]], roundings: dict[Case, float]) -> list[str]:
    """Print what was measured; what is wrong with it."""
    wires, gradients, wrong = [], [], []
    for case, (dense, sent) in measured.items():
        queries = case.make().queries_per_sample(case.stack.dimension)
        fewer = dense.up / sent.up
        for each in (dense, sent):
            figures = [each.up, each.body_up, each.down, each.body_down]
            cells = [f"{figure / case.samples:,.0f}" for figure in figures]
            wires.append([f"{case.name}: {each.form}", f"{queries:,}", *cells, f"{dense.up / each.up:,.1f}"])
            if each.charged != queries * case.samples:
                wrong.append(f"{case.name}: {each.form} was charged {each.charged}, not {queries * case.samples}")
        apart, rounding = _distance(sent.gradient, dense.gradient), roundings.get(case, 0.0)
        gradients.append(
            [f"{case.name}: {sent.form}", f"{apart:.2g}", f"{rounding:.2g}" if rounding else "", f"{sent.charged:,}"]
        )
        if not apart <= _ROUNDINGS * rounding:
            wrong.append(f"{case.name}: {sent.form}'s gradient is {apart:.2g} from that of images, beyond rounding")
        if sent.form == "merged" and case.estimator == "cge" and fewer < _FEWER_UP:
            wrong.append(f"{case.name}: {sent.form} sends only {fewer:.1f} times fewer bytes up")
    header = ["a sample", "queries", "up", "in bodies", "down", "in bodies", "times fewer up"]
    print(table(header, wires))
    print("\nGradients: the largest difference in a coordinate, in norms of the gradient.\n")
    print(table(["", "from images", "images from float64", "queries charged, each"], gradients))
    once = {sent.form: sent.once for each in measured.values() for sent in each}
    said = ", ".join(f"{form} {count:,}" for form, count in once.items())
    print(f"\nSent once in a run, before its first step (what the oracle offers, a decoder's weights): {said} bytes.")
    return wrong


if __name__ == "__main__":
    main()
