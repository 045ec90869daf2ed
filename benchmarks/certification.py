"""Certification throughput over HTTP: images and queries a second, and whether drawing noise stalls the oracle.

    python -m benchmarks.certification [--weights FILE] [--n 1000] [--images 4] [--in-flight 1 2 4]
                                       [--denoiser none unet:3:16] [--rounds 5]

What `defender_client.certify` does once its decoder is registered, against `oracle-server serve --allow-decoders` in a
process of its own, with several requests in flight, and with the decoder merged into the oracle or images sent. Beside
it, each in turn: the oracle's own rate (its engine in a process, on a batch in memory) and the defender's own (noise
drawn, denoised and brought into the form that is sent, asked of nobody). Their bounds:

    shared   1 / (1 / oracle + 1 / defender)    where both share this machine's cores
    apart    min(oracle, defender)              where each has as many of its own

"engine busy" is the share of the time in which the oracle computed logits, by its own metric
(`oracle_inference_seconds`); in the rest it decoded, or waited. Requests, noise included, and certificates must be the
same with any number of requests in flight, else the exit status is 1. The paper's denoiser, dncnn:17:64, costs ten
times what ResNet-20 does: give it a small --n.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measuring import Disturbance, Worker, ended_by_signal, heading, interleave, ratios, spread, table
from benchmarks.serving import OurServer, choices_in, start

if TYPE_CHECKING:
    from defender_client.config import Form
    from defender_client.stack import Stack
    from shared.datasets import ImageSet

_ORACLE, _N0, _BATCH, _BATCHES = "oracle, in process", 100, 256, 4
_FORMS: tuple[Form, ...] = ("merged", "images")
_METRICS = (
    "oracle_inference_seconds_sum",
    "oracle_queue_wait_seconds_sum",
    "oracle_queue_wait_seconds_count",
)


@dataclass(frozen=True)
class Turn:
    """Queries answered, or made, a second; of a certification also what its server says of it, and what came of it.

    Attributes:
        queries: a second.
        busy: share of the time in which the engine computed.
        wait: seconds that a request waited for the engine.
        sent: bytes of requests' bodies, of an image certified.
        outcome: the certificate of each image, and the requests' labels and digests.
    """

    queries: float
    busy: float = 0.0
    wait: float = 0.0
    sent: float = 0.0
    outcome: frozenset[object] = frozenset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar-resnet20", help="cifar-resnet20, ..., or linear.")
    parser.add_argument("--weights", type=Path, help="A weights file of the model; random weights without it.")
    parser.add_argument("--n", type=int, default=1000, help=f"Draws of an image, after {_N0} that select its class.")
    parser.add_argument("--images", type=int, default=4, help="Of a turn.")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--denoiser", nargs="+", default=["none", "unet:3:16"], help="none, or ARCHITECTURE:DEPTH:WIDTH; a table each."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", default="auto", help="Of the server and in process.")
    options = parser.parse_args()
    from shared.process import prepare

    prepare()  # before torch is there, as the defender's own commands do
    import numpy as np

    from benchmarks import models

    print(heading("torch", "onnxruntime", "numpy", "httpx", "uvicorn"), flush=True)
    with ended_by_signal() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        model = models.write(options.model, options.weights, folder / "model.safetensors")
        batch = folder / "images.npy"
        np.save(batch, models.images(_BATCH, None))
        server = start(folder, model, ["--engine", options.engine, "--allow-decoders"])
        opened.callback(server.child.stop)
        files = ["--model-file", str(model), "--images", str(batch), "--engine", options.engine]
        command = [sys.executable, "-m", "benchmarks.in_process", "engine", *files]
        engine = opened.enter_context(Worker(command, choices_in(folder)))
        print(
            f"{options.model}; {options.images} images a turn, n = {options.n} and n0 = {_N0} draws each, "
            f"{options.rounds} rounds; engine asked for {options.engine}, in process {engine.ready()}",
            flush=True,
        )
        wrong = [name for name in options.denoiser if not _table(options, name, server, engine)]
    if wrong:
        raise SystemExit(f"certificates depend on what is in flight, with denoiser {', '.join(wrong)}")


def _table(options: argparse.Namespace, denoiser: str, server: OurServer, engine: Worker) -> bool:
    """Measure and print one denoiser's figures; whether certificates were the same."""
    import torch

    from benchmarks import models
    from benchmarks.stacks import latent_stack
    from shared.datasets import ImageSet

    stack, generator = latent_stack(192, denoiser), torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (options.images, *models.IMAGE_SHAPE), dtype=torch.uint8, generator=generator)
    test = ImageSet(pixels, torch.zeros(options.images, dtype=torch.int64), models.CLASSES)

    def oracle() -> Turn:
        return Turn(_BATCH * _BATCHES / engine.turn(_BATCHES).wall)

    candidates: dict[str, Callable[[], Turn]] = {_ORACLE: oracle}
    for form in _FORMS:
        candidates[_own(form)] = partial(_draw, stack, test, form, options.n)
        for count in options.in_flight:
            candidates[_case(form, count)] = partial(_certify, stack, test, form, options.n, count, server)
    disturbance = Disturbance()
    turns = interleave(options.rounds, candidates)
    print(f"\ndenoiser {denoiser}; {disturbance}\n")
    print(report(turns, options.in_flight, options.n), flush=True)
    return all(
        len({turn.outcome for count in options.in_flight for turn in turns[_case(form, count)]}) == 1 for form in _FORMS
    )


def report(turns: dict[str, list[Turn]], in_flight: list[int], n: int) -> str:
    """The table, of turns by candidate, a round each."""
    rates = {name: [turn.queries for turn in made] for name, made in turns.items()}
    each, rows = _N0 + n, []
    for name in (_ORACLE, *map(_own, _FORMS)):
        rate = spread(rates[name])
        rows.append([name, "", f"{rate.median:,.0f}", f"{rate.low:,.0f} to {rate.high:,.0f}", *[""] * 6])
    for form in _FORMS:
        own = list(zip(rates[_ORACLE], rates[_own(form)], strict=True))
        shared, apart = [1 / (1 / a + 1 / b) for a, b in own], [min(pair) for pair in own]
        for count in in_flight:
            name = _case(form, count)
            made, rate = turns[name], spread(rates[name])
            cells = [f"{rate.median / each:.3g}", f"{rate.median:,.0f}", f"{rate.low:,.0f} to {rate.high:,.0f}"]
            cells += [f"{ratios(rates[name], rates[_case(form, in_flight[0])]).median:.2f}"]
            cells += [f"{ratios(rates[name], bound).median:.0%}" for bound in (shared, apart)]
            cells += [f"{spread([turn.busy for turn in made]).median:.0%}"]
            cells += [f"{1000 * spread([turn.wait for turn in made]).median:,.1f}"]
            cells += [f"{spread([turn.sent for turn in made]).median / 1e6:,.2f}"]
            rows.append([name, *cells])
    header = ["", "images/s", "queries/s", "quartiles", f"of {in_flight[0]} in flight", "of shared", "of apart"]
    return table([*header, "engine busy", "ms of wait", "MB an image"], rows)


def _own(form: Form) -> str:
    return f"defender alone, {form}"


def _case(form: Form, in_flight: int) -> str:
    return f"{form}, {in_flight} in flight"


def _certify(stack: Stack, test: ImageSet, form: Form, n: int, in_flight: int, server: OurServer) -> Turn:
    """Certify the images, as `defender_client.certify` does once the decoder is registered."""
    import torch

    from defender_client.certify import DefendedOracle
    from defender_client.in_flight import Crew
    from defender_client.oracle_client import RemoteOracle
    from defender_client.smoothing import Smooth

    with RemoteOracle(server.url, server.key) as oracle, Crew(in_flight) as crew:
        base = DefendedOracle(stack, oracle, form=form)

        def drawn() -> Iterator[tuple[torch.Tensor, torch.Generator]]:
            for index, image in enumerate(test.floats(slice(None))):
                base.start(f"certify/{index}")
                yield image, torch.Generator().manual_seed(index)

        smooth = Smooth(base, test.classes, stack.spec.sigma)
        before, began = [server.metric(name) for name in _METRICS], time.perf_counter()
        found = list(smooth.certify_each(drawn(), _N0, n, 0.001, 1000, partial(base.scores, crew=crew)))
        took = time.perf_counter() - began
        after = [server.metric(name) for name in _METRICS]
    inference, waited, requests = (b - a for a, b in zip(before, after, strict=True))
    sent = sum(request.bytes_up for request in oracle.log.requests.values())
    keys = {key.removeprefix(oracle.run_id) for key in oracle.log.requests}
    outcome = frozenset({*enumerate(found)} | keys)
    queries = len(test) * (_N0 + n)
    return Turn(queries / took, inference / took, waited / requests, sent / len(test), outcome)


def _draw(stack: Stack, test: ImageSet, form: Form, n: int) -> Turn:
    """What the defender does for the same certificates, but for asking."""
    import torch

    from defender_client.smoothing import Smooth

    def scores(images: torch.Tensor) -> torch.Tensor:
        points = stack.front(images)
        if form == "images":
            stack.back(points)
        return torch.zeros(len(images), test.classes)

    smooth, began = Smooth(scores, test.classes, stack.spec.sigma), time.perf_counter()
    images = ((image, torch.Generator().manual_seed(number)) for number, image in enumerate(test.floats(slice(None))))
    for _ in smooth.certify_each(images, _N0, n, 0.001, 1000):
        pass
    return Turn(len(test) * (_N0 + n) / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
