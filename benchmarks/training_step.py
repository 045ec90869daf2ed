"""A training step of ZO-AE-DS over HTTP, against a plain loop in process that asks one direction at a time.

    python -m benchmarks.training_step [--weights FILE] [--data DIR] [--cases cge-central ...] [--denoiser unet:3:16]

Ours is `defender_client`'s own training step against `oracle-server serve`, its ledger on. The loop is what the
method's public code does: classifier, decoder and denoiser in one process, for each direction the whole batch through
decoder and classifier; then backpropagation. It asks for the clean images' labels twice a step, as that code does (ours
asks once a run). Both have the same stack (the paper's autoencoder, d = 192), classifier, differences, threads and
allocator settings, and take turns. Without --weights, weights are random; without --data, so are the images.

Cases: `cge-central` (2 d probes a sample: the public code), `cge-forward` (d + 1: the paper), `rge-Q` (q + 1).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import (
    Disturbance,
    Turn,
    Work,
    Worker,
    ended_by_signal,
    heading,
    interleave,
    ratios,
    spread,
    table,
)
from benchmarks.serving import OurServer, choices_in, start

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from defender_client.config import EstimatorConfig, RunConfig
    from defender_client.data import Splits
    from defender_client.oracle import Oracle
    from defender_client.stack import Stack

    Classify = Callable[[Tensor], Tensor]
    Step = Callable[[Tensor], None]

_SIGMA, _MU = 0.25, 0.005
_LABEL_QUERIES = 2  # a sample and step, of the public code

# Where a step's time goes: the part's name, and what is timed for it. What is not there is not timed.
_PARTS = (
    ("denoise and encode", "defender_client.stack:Stack.front"),
    ("ask", "defender_client.zo.base:Estimator.ask"),
    ("ask", "defender_client.zo.base:Estimator.ask_factored"),
    ("decode", "defender_client.stack:Stack.back"),
    ("encode request", "defender_client.questions:Images.encode"),
    ("encode request", "defender_client.questions:Factored.encode"),
    ("digest request", "defender_client.request_key:digest"),
    ("send, wait, receive", "defender_client.oracle_client.connection:Connection.post"),
    ("tell", "defender_client.zo.base:Estimator.tell"),
    ("backward", "torch:Tensor.backward"),
    ("optimizer", "torch.optim:Adam.step"),
)
_REST = "the rest, and waiting for other threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar-resnet20", help="Of the classifier.")
    parser.add_argument("--weights", type=Path, help="A weights file of the model; random weights without it.")
    parser.add_argument("--data", type=Path, help="Directory of CIFAR-10; random images without it.")
    parser.add_argument("--cases", nargs="+", default=["cge-central", "cge-forward", "rge-20", "rge-192"], type=_case)
    parser.add_argument("--denoiser", default="dncnn:17:64", help="ARCHITECTURE:DEPTH:WIDTH, such as unet:3:16.")
    parser.add_argument("--batch", type=int, default=128, help="Samples of a step.")
    parser.add_argument("--batches", type=int, default=1, help="Steps of a turn.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--loops", nargs="+", choices=["eager", "engine"], default=["eager"], help="What the loop's classifier runs on."
    )
    parser.add_argument("--engine", default="auto", help="Of the server.")
    parser.add_argument("--device", default="cpu", help="Of the server's engine.")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Of our run's configuration.")
    parser.add_argument("--serve-options", default="", help="More options of `oracle-server serve`, as one string.")
    parser.add_argument("--worker", choices=["ours", "loop"], help=argparse.SUPPRESS)
    parser.add_argument("--model-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is None:
        _compare(options)
    else:
        _work(options)


def _case(name: str) -> str:
    kind, _, how = name.partition("-")
    if not (kind == "cge" and how in ("central", "forward")) and not (kind == "rge" and how.isdigit() and int(how)):
        raise argparse.ArgumentTypeError(f"'{name}' is none of cge-central, cge-forward, rge-Q")
    return name


# --- the comparison ---


def _compare(options: argparse.Namespace) -> None:
    from benchmarks import models

    print(heading("torch", "onnxruntime", "numpy", "httpx", "uvicorn"), flush=True)
    with ended_by_signal() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = models.write(options.model, options.weights, folder / "model.safetensors")
        given = ["--engine", options.engine, "--device", options.device]
        server = start(folder, model, [*given, *shlex.split(options.serve_options)])
        stack.callback(server.child.stop)
        common = [*given, "--model-file", str(model), "--url", server.url, "--denoiser", options.denoiser]
        common += ["--batch", str(options.batch), *(part for pair in options.set for part in ("--set", pair))]
        common += [] if options.data is None else ["--data", str(options.data)]

        environment = {"ORACLE_API_KEY": server.key} | choices_in(folder)
        workers: list[Worker] = []

        def worker(*arguments: str) -> Worker:
            command = [sys.executable, "-m", "benchmarks.training_step", *arguments, *common]
            started = stack.enter_context(Worker(command, environment, patience=3600))
            workers.append(started)
            return started

        candidates: dict[str, Callable[[], Turn]] = {}
        for case in options.cases:
            candidates[f"{case}, ours"] = partial(
                _served, server, worker("--worker", "ours", "--cases", case), options.batches
            )
            for engine in options.loops:
                loop = worker("--worker", "loop", "--cases", case, "--loops", engine)
                candidates[f"{case}, loop ({engine})"] = partial(loop.turn, options.batches)
        print(
            f"{options.model}, denoiser {options.denoiser}, {options.batch} samples a step, "
            f"{options.batches} steps a turn, {options.rounds} rounds",
            flush=True,
        )
        for each in workers:
            each.ready()
        disturbance = Disturbance()
        turns = interleave(options.rounds, candidates, warm_up=0)  # each worker has taken a small step already
        print(f"{disturbance}\n")
    print(report(turns, options.batch * options.batches))


def _served(server: OurServer, client: Worker, steps: int) -> Turn:
    before = server.seconds()
    turn = client.turn(steps)
    after = server.seconds()
    own = {f"server: {name}": after[name] - before[name] for name in after}
    return Turn(turn.wall, turn.cpu, turn.parts | own)


def report(turns: dict[str, list[Turn]], samples: int) -> str:
    """Times a sample, ours against the loop of the same case; and where ours spends its own."""
    lines = []
    for name, made in turns.items():
        case, _, who = name.partition(", ")
        walls = [turn.wall / samples for turn in made]
        took = spread(walls)
        ours = [turn.wall / samples for turn in turns[f"{case}, ours"]]
        faster = "" if who == "ours" else ratios(walls, ours).show(".2f")
        quartiles = f"{1000 * took.low:.1f} to {1000 * took.high:.1f}"
        lines.append([name, f"{1000 * took.median:.1f}", quartiles, f"{1 / took.median:,.1f}", faster])
    text = table(["", "ms a sample", "quartiles", "samples/s", "times that of ours"], lines)
    timed = {name: made for name, made in turns.items() if name.endswith(", ours")}

    def each(part: str, made: list[Turn]) -> str:
        return f"{1000 * spread([turn.parts.get(part, 0.0) for turn in made]).median / samples:.2f}"

    parts = dict.fromkeys(part for made in timed.values() for turn in made for part in turn.parts)
    rows = [[part, *(each(part, made) for made in timed.values())] for part in parts]
    text += f"\n\nOurs, in ms a sample (medians):\n\n{table(['', *timed], rows)}\n"
    return text + (
        "\nParts of the main thread add up to the step; 'other threads' overlap with it. server: CPU, seconds of its "
        "engine, and of\nits requests from head to end of answer: what is not the engine's is reading, checking, the "
        "ledger and sending."
    )


# --- the workers ---


def _work(options: argparse.Namespace) -> None:
    from shared.process import prepare

    prepare()
    from benchmarks.measuring import obey

    with ExitStack() as opened:
        obey(partial(_ready, options, opened))


def _ready(options: argparse.Namespace, opened: ExitStack) -> tuple[Work, str]:
    import torch

    from oracle_server.cpus import usable_cpus

    torch.set_num_threads(usable_cpus())
    torch.manual_seed(0)
    config, stack, splits = _setting(options)
    batch = torch.arange(options.batch)
    watch = Stopwatch()
    if options.worker == "ours":
        step = our_step(options, config, stack, splits, opened, watch)
    else:
        step = loop_step(config, stack, splits, _classifier(options))
    step(batch[:4])

    def work(steps: int) -> dict[str, float]:
        watch.start()
        for _ in range(steps):
            step(batch)
        return watch.parts() if options.worker == "ours" else {}

    return work, options.worker


def _setting(options: argparse.Namespace) -> tuple[RunConfig, Stack, Splits]:
    """The run's configuration, a fresh stack, and one batch of images to train on."""
    import torch

    from benchmarks import models
    from defender_client import stack as stacks
    from defender_client.config import load_preset
    from defender_client.data import Splits
    from defender_client.stack import Stack
    from shared.datasets import ImageSet

    kind, _, how = options.cases[0].partition("-")
    architecture, depth, width = options.denoiser.split(":")
    settings = [
        f"sigma={_SIGMA}",
        "autoencoder.latent=192",
        f"denoiser.architecture={architecture}",
        f"denoiser.depth={depth}",
        f"denoiser.width={width}",
        f"estimator.name={kind}",
        f"estimator.mu={_MU}",
        f"estimator.difference={how if kind == 'cge' else 'forward'}",
        *([f"estimator.q={how}"] if kind == "rge" else []),
        f"train.batch={options.batch}",
        *options.set,
    ]
    config = load_preset("zo-ae-ds-cge", settings)
    stack = Stack(stacks.specify(config, models.IMAGE_SHAPE, models.CLASSES))
    pixels = torch.from_numpy(models.images(options.batch, options.data)).mul(255).round().to(torch.uint8)
    images = ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.int64), models.CLASSES)
    return config, stack, Splits(images, images.subset(slice(0, 0)))


def our_step(
    options: argparse.Namespace, config: RunConfig, stack: Stack, splits: Splits, opened: ExitStack, watch: Stopwatch
) -> Step:
    """One step of the defender's own training, on images by index. All that this benchmark knows of its inside."""
    import os
    from dataclasses import replace

    import torch

    from defender_client.labels import oracle_answers
    from defender_client.objective import STABILITY
    from defender_client.sources import LiveOracle
    from defender_client.train import _Trainer

    run = Path(opened.enter_context(tempfile.TemporaryDirectory()))
    oracle: Oracle = opened.enter_context(LiveOracle(options.url, os.environ["ORACLE_API_KEY"]).open(run, run.name))
    watch.attach()
    sets = {"train": splits.train, "validation": splits.validation}
    answers = oracle_answers(run, oracle, sets, config.train.query_rows)
    labels = {name: STABILITY.targets_of(answers[name]) for name in sets}
    objective = replace(STABILITY, losses=watch.timing("losses", STABILITY.losses))
    trainer = _Trainer(config, run, splits, oracle, stack, objective, labels, config.estimator.mu, None)

    def step(index: Tensor) -> None:
        trainer._train_on(index, torch.ones(len(index), dtype=torch.float64), 0)
        trainer._progress = replace(trainer._progress, step=trainer._progress.step + 1)

    return step


def loop_step(config: RunConfig, stack: Stack, splits: Splits, classify: Classify) -> Step:
    """One step of the method, plainly, on images by index.

    l(z) = CE(f(Dec(z)), argmax f(x)), z = Enc(D(x + delta)); then the gradient of <z, g> (Zhang et al., ICLR 2022).
    """
    import torch
    from torch.nn.functional import cross_entropy

    from shared.augmentation import augment

    optimizer = torch.optim.Adam(stack.trainable(), config.train.lr, weight_decay=config.train.weight_decay)
    generator = torch.Generator().manual_seed(1)

    def step(index: Tensor) -> None:
        stack.train()
        x = augment(splits.train.floats(index), config.data.augment, generator)
        with torch.no_grad():
            for _ in range(_LABEL_QUERIES):
                labels = classify(x).argmax(1)
        z = stack.front(x + config.sigma * torch.randn(x.shape, generator=generator))
        with torch.no_grad():

            def loss(point: Tensor) -> Tensor:
                return cross_entropy(classify(stack.back(point)), labels, reduction="none")

            gradient = plain_gradient(config.estimator, loss, z.detach(), generator)
        optimizer.zero_grad()
        (z * gradient).sum().div(len(index)).backward()
        optimizer.step()

    return step


def plain_gradient(
    estimator: EstimatorConfig, loss: Callable[[Tensor], Tensor], z: Tensor, generator: Generator
) -> Tensor:
    """The estimate [b, d] at z [b, d] of the gradient of losses [b], one direction of the whole batch at a time.

    RGE: g = (1/q) sum_i (d/mu) [l(z + mu u_i) - l(z)] u_i, u_i uniform on the unit sphere, its own for each sample;
    CGE: g = sum_i [l(z + mu e_i) - l(z)] / mu e_i; either with [l(z + mu u) - l(z - mu u)] / 2 for the difference.
    """
    import torch
    from torch.nn.functional import one_hot

    b, d = z.shape
    random, mu = estimator.name == "rge", estimator.mu
    gradient = torch.zeros_like(z)
    base = loss(z) if estimator.difference == "forward" else None
    for i in range(estimator.q if random else d):
        if random:
            u = torch.randn(b, d, generator=generator)
            u = u / u.norm(dim=1, keepdim=True)
        else:
            u = one_hot(torch.tensor([i]), d).float()
        ahead = loss(z + mu * u)
        change = ahead - base if base is not None else (ahead - loss(z - mu * u)) / 2
        gradient += change[:, None] / mu * u
    return gradient * d / estimator.q if random else gradient


def _classifier(options: argparse.Namespace) -> Classify:
    """f: plain PyTorch, or the oracle's engine."""
    from benchmarks import models

    module = models.load(options.model_file)
    if options.loops[0] == "eager":
        return module
    from oracle_server.engines import build_engine
    from oracle_server.loading import Classifier
    from oracle_server.settings import Settings

    classifier = Classifier(module, models.IMAGE_SHAPE, models.CLASSES)
    return build_engine(classifier, Settings(engine=options.engine, device=options.device))


class Stopwatch:
    """Seconds by part, each without the parts inside it; of the main thread, and of all others together."""

    def __init__(self) -> None:
        self._lock, self._local = threading.Lock(), threading.local()
        self._times: dict[str, float] = {}
        self._names: dict[str, None] = {}  # in their order
        self._start = 0.0

    def attach(self) -> None:
        """Time `_PARTS` from now on, those whose module is loaded and has them."""
        for name, place in _PARTS:
            module, _, path = place.partition(":")
            *outer, last = path.split(".")
            holder: Any = sys.modules.get(module)
            for part in outer:
                holder = getattr(holder, part, None)
            timed = getattr(holder, last, None)
            if timed is not None:
                setattr(holder, last, self.timing(name, timed))

    def start(self) -> None:
        """Forget what was counted."""
        self._times, self._start = {}, time.perf_counter()

    def parts(self) -> dict[str, float]:
        """Seconds by part since the start; what no part holds is the rest."""
        passed = time.perf_counter() - self._start
        own = {name: self._times.get(name, 0.0) for name in self._names}
        others = {name: seconds for name, seconds in self._times.items() if name not in own}
        return own | {_REST: passed - sum(own.values())} | others

    def timing(self, name: str, timed: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its seconds counted under this name."""
        self._names[name] = None

        def call(*arguments: Any, **named: Any) -> Any:
            inside = getattr(self._local, "inside", None)
            self._local.inside, start = [0.0], time.perf_counter()
            try:
                return timed(*arguments, **named)
            finally:
                passed = time.perf_counter() - start
                main = threading.current_thread() is threading.main_thread()
                key = name if main else f"other threads: {name}"
                with self._lock:
                    self._times[key] = self._times.get(key, 0.0) + passed - self._local.inside[0]
                self._local.inside = inside
                if inside is not None:
                    inside[0] += passed

        return call


if __name__ == "__main__":
    main()
