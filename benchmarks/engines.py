"""Images a second and page faults a batch of each engine, in process, against PyTorch as people run it.

    python benchmarks/engines.py [--weights FILE] [--rows 256] [--rounds 15]

ResNet-20, float32, batches of 256 images, all cores. Each variant is a process of its own, which answers one round
when told to; rounds are interleaved, so that all meet the same machine. `plain` is the module in NCHW order, called
directly: with the memory settings of our programs, and `malloc as it is`, as people run it. The others are this
server's engines, with those settings and without. Ratios are of medians: to `plain` ("x plain"), and to it as people
run it ("x people"). "by CPU" is what the processor's time alone would allow, on a machine that others use meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from oracle_server.cpus import usable_cpus

_KEPT = ("plain", "eager", "compile", "onnxruntime", "auto")
_FREE = ("plain", "eager", "compile", "onnxruntime")
_WARM_S = 2.0


@dataclass
class Variant:
    """One process. `seconds`, `cpu_seconds` of all cores and `faults` of each round."""

    name: str
    child: subprocess.Popen[str]
    seconds: list[float]
    cpu_seconds: list[float]
    faults: list[int]
    chosen: str = ""


def worker(engine: str, keep: bool, weights: str | None, rows: int) -> None:
    """Answer one batch for each line read, and say what it took."""
    if keep:
        from shared import process

        process.prepare()
    import torch

    from oracle_server.engines import build_engine
    from oracle_server.loading import Classifier, load_classifier
    from oracle_server.settings import Settings
    from shared.models.classifiers import Normalize, build_own

    torch.manual_seed(0)
    if weights is None:
        network = build_own("cifar-resnet20", 3, 10)
        assert network is not None
        module = torch.nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), network).eval().requires_grad_(False)
        classifier = Classifier(module, (3, 32, 32), 10)
    else:
        classifier = load_classifier(Settings(model="cifar-resnet20", weights=weights))
    chosen = engine
    if engine == "plain":
        torch.set_num_threads(usable_cpus())
        answer = torch.inference_mode()(classifier.module.forward)
    else:
        answer = build_engine(classifier, Settings(engine=engine))  # type: ignore[arg-type]
        chosen = f"{answer.name}, {answer.ladder.sizes[-1]} rows a block"  # type: ignore[attr-defined]
    images = torch.rand(rows, 3, 32, 32)
    began = time.perf_counter()
    while time.perf_counter() - began < _WARM_S:
        answer(images)
    print(json.dumps(chosen), flush=True)
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began, cpu_began = time.perf_counter(), time.process_time()
        answer(images)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(json.dumps([seconds, cpu_seconds, faults]), flush=True)


def start(engine: str, keep: bool, options: argparse.Namespace) -> Variant | None:
    command = [sys.executable, __file__, "--worker", engine, "--rows", str(options.rows)]
    command += ["--keep"] * keep + (["--weights", options.weights] if options.weights else [])
    given = {k: v for k, v in os.environ.items() if keep or (k != "OMP_WAIT_POLICY" and not k.startswith("MALLOC_"))}
    given["PYTHONPATH"] = str(Path(__file__).parents[1])
    child = subprocess.Popen(command, env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.readline()
    if not said:
        print(f"{engine} did not start", file=sys.stderr)
        return None
    return Variant(engine + ("" if keep else ", malloc as it is"), child, [], [], [], json.loads(said))


def ask(variant: Variant) -> None:
    assert variant.child.stdin is not None
    assert variant.child.stdout is not None
    variant.child.stdin.write("\n")
    variant.child.stdin.flush()
    seconds, cpu_seconds, faults = json.loads(variant.child.stdout.readline())
    variant.seconds.append(seconds)
    variant.cpu_seconds.append(cpu_seconds)
    variant.faults.append(faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="Of a CIFAR ResNet-20; by default random ones.")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.keep, options.weights, options.rows)
        return
    wanted = [(engine, True) for engine in _KEPT] + [(engine, False) for engine in _FREE]
    variants = [variant for variant in (start(*each, options) for each in wanted) if variant]
    for _ in range(options.rounds):
        for variant in variants:
            ask(variant)
    medians = {variant.name: statistics.median(variant.seconds) for variant in variants}
    plain, people = medians["plain"], medians["plain, malloc as it is"]
    print(f"ResNet-20, {options.rows} images a batch, {options.rounds} interleaved rounds, {usable_cpus()} cores")
    print(
        f"{'engine':30} {'images/s':>8}  {'(quartiles)':15} {'x plain':>8} {'x people':>8} {'by CPU':>8} {'faults':>8}"
    )
    for variant in variants:
        low, _, high = statistics.quantiles(variant.seconds, n=4)
        median = medians[variant.name]
        by_cpu = options.rows * usable_cpus() / statistics.median(variant.cpu_seconds)
        spread = f"({options.rows / high:,.0f}-{options.rows / low:,.0f})"
        said = "" if variant.chosen == variant.name.split(",")[0] else f"  {variant.chosen}"
        print(
            f"{variant.name:30} {options.rows / median:8,.0f}  {spread:15} {plain / median:8.2f} {people / median:8.2f}"
            f" {by_cpu:8,.0f} {statistics.median(variant.faults):8,.0f}{said}"
        )
    for variant in variants:
        variant.child.kill()
        variant.child.wait()


if __name__ == "__main__":
    main()
