"""Measures the noise of an oracle's answers before a run's first step, and chooses the probes' step mu from it.

At a few training images' points w, as the run trains on them, the cross entropy of the oracle's answers is asked for
along lines (its noise eps_f) and along the estimator's directions (its slope f' and curvature). Its label is the second
largest logit at w: the loss of an image that the stack still gets wrong, which is what training learns from. (Against
the largest one, the loss of a confident answer is flat, and a few points would say little of the others. The loss of a
reconstructor is the squared error to the original image, which costs nothing to know.) Then, as root mean squares over
points and directions,

    r(mu) = E(mu) / |f'|        the relative error of a difference with step mu, E of `noise.difference_error`
    s(mu) = its part by noise

- s(mu) <= 0.1 for the mu configured: it stays. E |g^ - g|^2 grows by 1 + s^2, so that noise costs less than 1 % of the
  queries, and another step could save no more than that.
- otherwise mu is raised to the step of least error, but not beyond half of the distance between two images' points:
  what is asked there is as much about another image. It is never lowered.
- r > 1 at that step: "no slope at all" would be a better estimate than the difference is. The run is refused.

The number of queries is fixed beforehand, and spent under the purpose `noise`. Each round's answers are on disk before
the next is asked, so that a run that is killed goes on with the same questions even if the same question were answered
differently, as by an oracle that adds noise.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from defender_client import noise
from defender_client.config import ConfigError, EstimatorConfig, RunConfig
from defender_client.data import gaussian
from defender_client.losses import cross_entropy, squared_error
from defender_client.measured import MeasuredSet
from defender_client.noise import Difference, Floats, LineNoise, Outcome, Slopes
from defender_client.oracle import Oracle
from defender_client.progress import console
from defender_client.stack import Stack
from shared.datasets import ImageSet

NOISE_FILE = "noise.json"
PURPOSE = "noise"

_POINTS = 3
_LINES = 4  # rounds of one line a point
_DIRECTIONS: dict[Difference, int] = {"forward": 8, "central": 4}  # per point; 17 and 16 rows
_DISTANCE_DRAWS = 32
_NEGLIGIBLE = 0.1
_HOPELESS = 1.0
_SEED_OFFSET = 3  # beside the trainer's own generators
_CANNOT = "finite differences cannot work here"
_REMEDY = (
    "ask the oracle's operator for logits, with more decimals and without added noise; or go on regardless with "
    "--set estimator.noise=off in another --out (a copy of pretrained.safetensors there saves the pre-training)"
)


class FiniteDifferencesUseless(ConfigError):
    """Differences of this oracle's answers say nothing of the gradient; the message says what was measured."""


class Finding(BaseModel):
    """What was measured, and the step that follows from it.

    Attributes:
        noise: eps_f, in units of the loss; None where no level was found.
        slope: |f'| along the estimator's directions, loss per unit of the points.
        higher: |f''| for forward differences, |f'''| for central ones.
        accepted: fraction of directions where `higher` is certain, in 0..1; elsewhere it is coarse.
        reach: the largest step considered, in units of the points.
        configured, mu: the step of the configuration, and the one to train with.
        relative_error: r(mu), or None where nothing was found.
        useless: whether finite differences cannot work.
        text: all this in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    noise: float | None = None
    slope: float | None = None
    higher: float | None = None
    accepted: float | None = None
    reach: float
    configured: float
    mu: float
    relative_error: float | None = None
    useless: bool = False
    text: str


class NoiseFloor(BaseModel):
    """`noise.json`: the oracle's answers so far, as losses in the order asked, and what they say once all are there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: list[int] = []
    losses: list[list[float]] = []
    finding: Finding | None = None

    @property
    def queries(self) -> int:
        """Queries that the measurement took so far."""
        return sum(map(len, self.losses))


def read(run: Path) -> NoiseFloor:
    """What was measured so far; ConfigError if the file is not what was written."""
    path = run / NOISE_FILE
    try:
        return NoiseFloor.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return NoiseFloor()
    except ValidationError as error:
        raise ConfigError(
            f"{path} is damaged ({error.errors()[0]['msg']}): remove it, and what it held is asked again for free"
        ) from None


def queries(estimator: EstimatorConfig, images: int) -> int:
    """What a measurement costs with `images` training images to take its points from."""
    if not estimator.differences or estimator.noise == "off":
        return 0
    directions = _DIRECTIONS[estimator.difference]
    slopes = noise.TRIALS * noise.slope_rows(estimator.difference, directions)
    return min(_POINTS, images) * (_LINES * noise.LINE_POINTS + slopes)


def queries_left(config: RunConfig, run: Path | None, images: int, *, started: bool) -> int:
    """What `step` has still to ask for; 0 once the run has begun, with or without a measurement."""
    if run is not None and (started or read(run).finding is not None):
        return 0
    return queries(config.estimator, images)


def step(config: RunConfig, run: Path, stack: Stack, images: ImageSet, oracle: Oracle, *, started: bool) -> float:
    """mu, the step to train with: measured once, then kept in `run/noise.json`.

    Args:
        stack: as training finds it, before its first step.
        images: the training images.
        started: whether steps were made already; mu must not change between two of them.

    Raises:
        FiniteDifferencesUseless: see this module.
    """
    configured = config.estimator.mu
    if config.estimator.noise == "off" or not config.estimator.differences:
        return configured
    finding = read(run).finding
    if finding is None and started:
        console.print(f"noise floor: not measured when this run began, so mu stays at {configured:g}")
        return configured
    if finding is None:
        finding = _measure(config, run, stack, images, oracle)
        if not finding.useless:
            console.print(f"noise floor: {finding.text}")
    if finding.useless:
        raise FiniteDifferencesUseless(f"{finding.text}: {_REMEDY}")
    return finding.mu


def choose(estimator: EstimatorConfig, lines: list[LineNoise], reach: float, slopes: Slopes | None) -> Finding:
    """The step for what was measured; `slopes` is None where the lines show no level to choose by."""
    mu, level = estimator.mu, noise_level(lines)
    if slopes is None or level is None:
        return _undetermined(estimator, lines, reach)
    measured = {"noise": level, "slope": slopes.first, "higher": slopes.higher, "accepted": slopes.accepted}
    kept = {"reach": reach, "configured": mu}

    def relative(error: float) -> float | None:
        return error / slopes.first if slopes.first else None

    difference, higher = estimator.difference, slopes.higher
    by_noise = relative(noise.noise_error(difference, mu, level))
    if by_noise is not None and by_noise <= _NEGLIGIBLE:
        error = relative(noise.difference_error(difference, mu, level, higher))
        text = f"{level:.1e} in the loss, {by_noise:.1%} of a difference: mu stays at {mu:g}"
        return Finding(**measured, **kept, mu=mu, relative_error=error, text=text)
    best = min(noise.best_step(difference, level, higher), reach)
    least = relative(noise.difference_error(difference, best, level, higher))
    if least is None or least > _HOPELESS:
        wrong = "of their size and more" if least is None else f"{least:.1f} times their size"
        text = (
            f"{_CANNOT}: the oracle's answers are uncertain by {level:.1e} in the loss, whose slope is "
            f"{slopes.first:.1e}; even with the best step, mu = {best:.2g}, differences have an error of {wrong}"
        )
        return Finding(**measured, **kept, mu=mu, relative_error=least, useless=True, text=text)
    used = max(mu, best)
    error = relative(noise.difference_error(difference, used, level, higher))
    moved = f"mu raised from {mu:g} to {used:.3g}" if used > mu else f"mu stays at {mu:g}"
    text = f"{level:.1e} in the loss: {moved}, where differences have an expected error of {error:.0%}"
    return Finding(**measured, **kept, mu=used, relative_error=error, text=text)


def noise_level(lines: list[LineNoise]) -> float | None:
    """eps_f over all points, as root mean square; None unless at least half of them show one."""
    levels = [line.level for line in lines if line.level is not None]
    return float(np.sqrt(np.mean(np.square(levels)))) if 2 * len(levels) >= len(lines) else None


def _undetermined(estimator: EstimatorConfig, lines: list[LineNoise], reach: float) -> Finding:
    """No level at most points: the answers do not move, or nothing in them can be told from the loss itself."""
    mu = estimator.mu
    still = sum(line.outcome is Outcome.TOO_CLOSE for line in lines)
    if 2 * still >= len(lines) - sum(line.outcome is Outcome.FOUND for line in lines):
        text = (
            f"{_CANNOT}: the oracle's answers hardly change within {reach:.2g} of a point, as where labels are all it "
            "gives, or its rounding is coarse"
        )
        return Finding(reach=reach, configured=mu, mu=mu, useless=True, text=text)
    text = f"none could be told from the loss itself: mu stays at {mu:g}"
    return Finding(reach=reach, configured=mu, mu=mu, text=text)


class _Questions:
    """Losses at points of the stack's decoder, asked of the oracle or, where they were asked before a kill, from disk.

    A classifier's labels are those of the second largest logits in the middle of the first round's lines.

    Args:
        aims: what a reconstructor's answers at the points are held against, [points, k]; None for a classifier.
    """

    def __init__(self, run: Path, stack: Stack, oracle: Oracle, aims: Tensor | None) -> None:
        self._run, self._stack, self._oracle, self._aims = run, stack, oracle, aims
        self.kept = read(run)
        self._round = 0

    def __call__(self, points: Floats) -> Floats:
        number, self._round = self._round, self._round + 1
        if number == len(self.kept.losses):
            answers = self._ask(torch.from_numpy(points).float(), number)
            labels, losses = self._losses(answers)
            self.keep(NoiseFloor(labels=labels, losses=[*self.kept.losses, losses.tolist()]))
        return np.array(self.kept.losses[number])

    def _losses(self, answers: Tensor) -> tuple[list[int], Tensor]:
        """The labels, none for a reconstructor, and the losses of the answers."""
        if self._aims is not None:
            aims = self._aims.repeat_interleave(len(answers) // len(self._aims), dim=0)
            return [], squared_error(answers, aims)
        middle = answers[noise.LINE_POINTS // 2 :: noise.LINE_POINTS]
        labels = self.kept.labels or middle.topk(2).indices[:, 1].tolist()
        targets = torch.tensor(labels).repeat_interleave(len(answers) // len(labels))
        return labels, cross_entropy(answers, targets)

    def keep(self, floor: NoiseFloor) -> None:
        """Write the file, whole or not at all."""
        self.kept = floor
        path = self._run / NOISE_FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(floor.model_dump_json() + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def _ask(self, points: Tensor, number: int) -> Tensor:
        images = self._stack.back(points).numpy()
        return torch.from_numpy(self._oracle.query(images, purpose=PURPOSE, label=f"{PURPOSE}/{number}"))


@torch.no_grad()
def _measure(config: RunConfig, run: Path, stack: Stack, images: ImageSet, oracle: Oracle) -> Finding:
    estimator = config.estimator
    generator = torch.Generator().manual_seed(config.seed * 7 + _SEED_OFFSET)
    stack.eval()
    index = torch.randperm(len(images), generator=generator)[:_POINTS]
    points = _points(stack, images, index, config.sigma, generator)
    count, d = points.shape
    # Noise is a property of the answers, whatever the direction: random ones leave no coordinate still.
    across = _sphere((_LINES, count, d), generator)
    along = _directions(estimator, count, d, generator)
    draws = torch.randint(len(images), (_DISTANCE_DRAWS,), generator=generator)
    others = torch.from_numpy(_points(stack, images, draws, config.sigma, generator))
    # Never below mu: the run would ask there anyway.
    reach = max(float(torch.pdist(others).median()) / 2, estimator.mu)

    aims = images.originals(index).flatten(1) if isinstance(images, MeasuredSet) else None
    ask = _Questions(run, stack, oracle, aims)
    half = noise.LINE_POINTS // 2
    lines = noise.measure_noise(ask, points, across, estimator.mu / half, reach / half)
    level = noise_level(lines)
    slopes = None
    if level is not None:
        levels = np.array([level if line.level is None else line.level for line in lines])
        slopes = noise.measure_slopes(ask, points, along, levels, estimator.difference, reach)
    finding = choose(estimator, lines, reach, slopes)
    ask.keep(ask.kept.model_copy(update={"finding": finding}))
    return finding


def _points(stack: Stack, images: ImageSet, index: Tensor, sigma: float, generator: torch.Generator) -> Floats:
    """w [b, d] of noisy images, as training asks about them."""
    return stack.front(gaussian(images.floats(index), sigma, generator)).double().numpy()


def _directions(estimator: EstimatorConfig, count: int, d: int, generator: torch.Generator) -> Floats:
    """Unit vectors [count, n, d] as the estimator probes along: coordinates for CGE, the sphere for the others."""
    shape = (count, _DIRECTIONS[estimator.difference])
    if estimator.name not in ("cge", "active-cge"):
        return _sphere((*shape, d), generator)
    chosen = torch.randint(d, shape, generator=generator)
    return np.asarray(torch.nn.functional.one_hot(chosen, d).double().numpy())


def _sphere(shape: tuple[int, ...], generator: torch.Generator) -> Floats:
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    return np.asarray((normal / normal.norm(dim=-1, keepdim=True)).numpy())
