"""What several requests in flight gain: a training step and a certification, with 1, 2, 4, ... requests at a time.

    python benchmarks/in_flight.py [--model digits-cnn] [--in-flight 1 2 4] [--latency 0 50] [--rounds 5]
                                   [--estimator cge] [--q 20] [--samples 64] [--micro-batch 0] [--query-rows 2048]
                                   [--certify-n 4000] [--server "--engine eager ..."]

The server runs in a process of its own on this machine, so that without a latency client and model share its cores;
`--latency` (milliseconds, each a table of its own) makes it a server that is far away. The settings take turns, round
by round; medians and spread are printed, and ratios to one request at a time, round by round. The stack's weights are
random: they cost what others cost. Results are compared: they are the same whatever is in flight.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from defender_client import stack as stacks
from defender_client import zo
from defender_client.black_box import BlackBox
from defender_client.certify import DefendedOracle
from defender_client.config import EstimatorConfig, RunConfig, TrainConfig
from defender_client.estimation import Batch, Estimation
from defender_client.in_flight import Crew
from defender_client.objective import STABILITY
from defender_client.oracle_client import RemoteOracle
from defender_client.smoothing import Smooth
from oracle_server.ledger import Ledger

_SIGMA, _ALPHA, _BATCH = 0.25, 0.001, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--in-flight", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument(
        "--latency", type=float, nargs="*", default=[0.0, 50.0], help="Milliseconds before each answer."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--estimator", choices=zo.NAMES, default="cge")
    parser.add_argument("--q", type=int, default=20, help="Directions of rge.")
    parser.add_argument("--samples", type=int, default=64, help="Of a step.")
    parser.add_argument("--micro-batch", type=int, default=0)
    parser.add_argument("--query-rows", type=int, default=2048)
    parser.add_argument("--certify-n", type=int, default=4000, help="Draws of one image; 0 certifies nothing.")
    parser.add_argument("--server", default="", help="More options of `oracle-server serve`.")
    options = parser.parse_args()
    for latency in options.latency:
        with tempfile.TemporaryDirectory() as folder, _server(Path(folder), options, latency) as (url, key):
            _table(options, latency, url, key)


def _table(options: argparse.Namespace, latency: float, url: str, key: str) -> None:
    print(f"latency {latency:g} ms: {options.model}, {options.estimator}, {options.samples} samples a step")
    steps: dict[int, list[float]] = {count: [] for count in options.in_flight}
    certifications: dict[int, list[float]] = {count: [] for count in options.in_flight}
    results = set()
    for round_ in range(-1, options.rounds):  # the first warms up
        for count in options.in_flight:
            with RemoteOracle(url, key) as oracle, Crew(count) as crew:
                config = RunConfig.model_validate({"preset": "benchmark", "sigma": _SIGMA})
                torch.manual_seed(0)
                stack = stacks.Stack(stacks.specify(config, oracle.info.image_shape, oracle.info.classes))
                step, result = _step(options, stack, oracle, crew)
                draws, certificate = _certification(options, stack, oracle, crew)
                results.add((result, certificate))
            if round_ >= 0:
                steps[count].append(step)
                certifications[count].append(draws)
    what = [("step, ms per sample", steps, -1), ("certification, draws/s", certifications, 1)]
    for name, figures, better in what:
        for count, values in figures.items():
            if not any(values):
                continue
            ratios = [(a / b) ** better for a, b in zip(values, figures[options.in_flight[0]], strict=True)]
            print(
                f"  {name:24s} in flight {count:3d}   median {statistics.median(values):9.2f}   "
                f"min {min(values):9.2f}   max {max(values):9.2f}   times as fast {statistics.median(ratios):5.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )
    print(f"  results: {'all the same' if len(results) == 1 else 'NOT the same'}", flush=True)
    if len(results) != 1:
        sys.exit(1)


def _step(
    options: argparse.Namespace, stack: stacks.Stack, oracle: RemoteOracle, crew: Crew
) -> tuple[float, tuple[float, ...]]:
    """Milliseconds per sample of a step's estimation and backpropagation; and what came of it."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(options.samples, *stack.spec.image_shape, generator=generator)
    labels = torch.randint(stack.spec.classes, (options.samples,), generator=generator)
    estimation = Estimation(
        stack.train(),
        BlackBox(stack, oracle, options.query_rows),
        zo.make(options.estimator, q=options.q, difference="central", generator=generator),
        STABILITY,
        crew,
        TrainConfig(query_rows=options.query_rows, micro_batch=options.micro_batch),
        EstimatorConfig(),
    )
    batch = Batch.even(images, images, labels)
    start = time.perf_counter()
    result = estimation.backpropagate(batch, "train/0")
    took = 1000 * (time.perf_counter() - start) / options.samples
    gradients = [p.grad.double().sum().item() for p in stack.trainable() if p.grad is not None]
    return took, (result.loss, result.quality, result.gradient_norm, *gradients)


def _certification(
    options: argparse.Namespace, stack: stacks.Stack, oracle: RemoteOracle, crew: Crew
) -> tuple[float, tuple[float, ...]]:
    """Draws a second over three images; and the certificates."""
    if not options.certify_n:
        return 0.0, ()
    base = DefendedOracle(stack, oracle)
    smooth = Smooth(base, stack.spec.classes, stack.spec.sigma)
    images = (
        (
            torch.rand(stack.spec.image_shape, generator=torch.Generator().manual_seed(n)),
            torch.Generator().manual_seed(n),
        )
        for n in range(3)
    )
    start = time.perf_counter()
    found = list(smooth.certify_each(images, 100, options.certify_n, _ALPHA, _BATCH, partial(base.scores, crew=crew)))
    took = time.perf_counter() - start
    return 3 * (options.certify_n + 100) / took, tuple(certificate.successes for certificate in found)


@contextmanager
def _server(folder: Path, options: argparse.Namespace, latency: float) -> Iterator[tuple[str, str]]:
    """An oracle in a process of its own; its address and a key."""
    ledger = folder / "ledger.db"
    opened = Ledger.open(str(ledger))
    _, key = opened.add_client("benchmark", 10**12)
    opened.close()
    policy = folder / "policy.toml"
    policy.write_text(f"[latency]\nmilliseconds = {latency}\n")
    command = [sys.executable, "-m", "oracle_server", "serve", "--model", options.model, "--port", "0"]
    command += ["--ledger", str(ledger), "--policy", str(policy), *shlex.split(options.server)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if "listening on http" in line:
                    yield line.split("listening on ")[1].split()[0], key.reveal()
                    break
            else:
                raise SystemExit("".join(said))
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.close()


if __name__ == "__main__":
    main()
