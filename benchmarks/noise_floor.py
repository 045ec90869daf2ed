"""What the measured noise floor says of oracles that round or add noise, beside what is true: docs/noise.md's table.

    python benchmarks/noise_floor.py [--estimator cge|rge] [--difference forward|central] [--seeds 3]

The hidden digits classifier behind the demo's pre-trained stack (latent 16), in this process. For each oracle: eps_f as
measured, the mu chosen from a configured 0.005, and the relative error of differences with that mu: expected, and
measured against the gradient of the training loss, by automatic differentiation through the exact classifier, at 200
points of the validation split. Beside it the least such error over a grid of mu, and that at 0.005.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from defender_client import noise_floor, zo
from defender_client import stack as stacks
from defender_client.config import RunConfig, load_preset
from defender_client.data import Splits, gaussian, load_splits
from defender_client.losses import cross_entropy
from defender_client.pretrain import pretrain
from defender_client.stack import Stack
from oracle_server.loading import load_classifier
from oracle_server.settings import Settings

Answers = Callable[[Tensor], Tensor]
_POINTS = 200
_STEPS = tuple(0.005 * 2**k for k in range(11))


@dataclass
class LocalOracle:
    """The oracle without the wire: answers and counts."""

    answer: Answers
    queries: int = 0

    def query(self, images: np.ndarray, *, purpose: str, label: str) -> np.ndarray:
        self.queries += len(images)
        return self.answer(torch.from_numpy(images)).numpy()


def oracles(classifier: nn.Module, seed: int) -> dict[str, Answers]:
    """Named oracles over one classifier."""

    @torch.no_grad()
    def exact(images: Tensor) -> Tensor:
        return classifier(images)

    def rounded(decimals: int) -> Answers:
        return lambda images: exact(images).round(decimals=decimals)

    def noisy(sigma: float) -> Answers:
        generator = torch.Generator().manual_seed(seed)

        def answer(images: Tensor) -> Tensor:
            logits = exact(images)
            return logits + sigma * torch.randn(logits.shape, generator=generator)

        return answer

    def labels(images: Tensor) -> Tensor:
        logits = exact(images)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()

    found: dict[str, Answers] = {"exact": exact}
    found |= {f"{k} decimal{'s' * (k != 1)}": rounded(k) for k in (4, 3, 2, 1, 0)}
    found |= {f"noise {sigma:g}": noisy(sigma) for sigma in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
    found["label only"] = labels
    return found


@dataclass(frozen=True)
class Truth:
    """Points the measurement did not see, with the exact loss and its gradient there."""

    points: Tensor
    labels: Tensor
    losses: Tensor
    gradient: Tensor


def truth(classifier: nn.Module, stack: Stack, splits: Splits, sigma: float) -> Truth:
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        points = stack.front(gaussian(splits.validation.floats(slice(0, _POINTS)), sigma, generator))
    points.requires_grad_(True)
    labels = classifier(splits.validation.floats(slice(0, _POINTS))).argmax(1)
    losses = cross_entropy(classifier(stack.back(points)), labels)
    (gradient,) = torch.autograd.grad(losses.sum(), points)
    return Truth(points.detach(), labels, losses.detach(), gradient.detach().double())


@torch.no_grad()
def measured_error(answer: Answers, stack: Stack, known: Truth, config: RunConfig, mu: float) -> float:
    """|difference - <g, u>| over |<g, u>|, as root mean squares over the estimator's directions at all points."""
    estimator = config.estimator
    made = zo.make(
        estimator.name, q=16, mu=mu, difference=estimator.difference, generator=torch.Generator().manual_seed(5)
    )
    probes = made.ask(known.points)
    n, p, d = probes.shape
    losses = cross_entropy(answer(stack.back(probes.view(n * p, d))), known.labels.repeat_interleave(p)).view(n, p)
    if estimator.difference == "forward":
        steps, differences = probes[:, 1:] - known.points[:, None], losses[:, 1:] - losses[:, :1]
    else:
        ahead, behind = probes.chunk(2, 1)
        steps, differences = ahead - behind, losses[:, : p // 2] - losses[:, p // 2 :]
    lengths = steps.double().norm(dim=2)
    slopes = torch.einsum("nd,npd->np", known.gradient, steps.double()) / lengths
    return float(((differences / lengths - slopes).square().mean() / slopes.square().mean()).sqrt())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", default="demo")
    arguments.add_argument("--estimator", default="cge", choices=["cge", "rge"])
    arguments.add_argument("--difference", default="forward", choices=["forward", "central"])
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--pretrained", type=Path, help="a run's directory, to take its pretrained stack from")
    chosen = arguments.parse_args()
    torch.manual_seed(0)
    classifier = load_classifier(Settings()).module.eval()
    settings = [f"estimator.name={chosen.estimator}", f"estimator.difference={chosen.difference}"]
    print("| oracle | noise floor | mu | error, expected | measured | least of any mu | at 0.005 | queries |")
    print("|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as folder:
        base = load_preset(chosen.preset, settings)
        splits = load_splits(base.data, None, base.seed)
        spec = stacks.specify(base, (1, 8, 8), 10)
        stack = pretrain(base, spec, chosen.pretrained or Path(folder), splits)
        known = truth(classifier, stack, splits, base.sigma)
        for seed in range(chosen.seeds):
            config = base.model_copy(update={"seed": seed})
            for name, answer in oracles(classifier, seed).items():
                run = Path(folder) / f"{name}-{seed}"
                run.mkdir()
                oracle = LocalOracle(answer)
                with contextlib.suppress(noise_floor.FiniteDifferencesUseless):
                    noise_floor.step(config, run, stack, splits.train, oracle, started=False)
                finding = noise_floor.read(run).finding
                assert finding is not None
                errors = {mu: measured_error(answer, stack, known, config, mu) for mu in (finding.mu, *_STEPS)}
                best = min(_STEPS, key=errors.__getitem__)
                cells = [
                    "-" if finding.noise is None else f"{finding.noise:.1e}",
                    "refused" if finding.useless else f"{finding.mu:.2g}",
                    "-" if finding.relative_error is None else f"{finding.relative_error:.1%}",
                    "-" if finding.useless else f"{errors[finding.mu]:.1%}",
                    f"{errors[best]:.1%} at {best:.2g}",
                    f"{errors[base.estimator.mu]:.1%}",
                ]
                print(f"| {name} | {' | '.join(cells)} | {oracle.queries} |", flush=True)


if __name__ == "__main__":
    main()
