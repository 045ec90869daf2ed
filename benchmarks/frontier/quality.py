"""How good estimates are: against autograd through the classifier itself, at states of real runs.

    cosine          cos(g^, g) of a sample's latent gradient, as far as the encoder lets it through; the mean, or 0
    norm ratio      |g^| / |g|, median
    batch cosine    of the sums over a batch of dw/dtheta^T g^ and dw/dtheta^T g: what a training step goes by

The state is the run's last checkpoint, its surrogate and what is known of it included. Nothing is asked of the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.table.runs import Job
from defender_client import checkpoints, zo
from defender_client.checkpoints import CHECKPOINT_FILE
from defender_client.data import gaussian, load_splits
from defender_client.estimation import make_estimator
from defender_client.objective import STABILITY
from defender_client.stack import Stack, load
from defender_client.surrogate import Surrogate
from defender_client.train import STACK_FILE
from defender_client.whitebox import WhiteBoxSource, load_whitebox

_SAMPLES = 256


@dataclass(frozen=True)
class Quality:
    """Of one variant's estimates at the end of one run; `queries` of a sample."""

    variant: str
    budget: int
    seed: int
    queries: float
    cosine: float
    norm_ratio: float
    batch_cosine: float


def measure(job: Job, variant: str, budget: int, source: WhiteBoxSource) -> Quality:
    """Measure a run that is done."""
    config = job.config
    splits = load_splits(config.data, job.data, config.seed)
    stack = load(job.run / STACK_FILE)
    saved = checkpoints.load(job.run / CHECKPOINT_FILE)
    if saved is None:
        raise FileNotFoundError(job.run / CHECKPOINT_FILE)
    stack.load_state_dict(saved.stack)
    classifier = load_whitebox(source, stack.spec.image_shape, stack.spec.classes, config.task).module
    generator = torch.Generator().manual_seed(config.seed + 1)
    images = splits.train.floats(slice(0, _SAMPLES))
    noisy = gaussian(images, config.sigma, generator)
    with torch.no_grad():
        targets = classifier(images).argmax(dim=1)
    points = stack.eval().front(noisy)
    truth = _gradients(stack, classifier, points.detach(), targets)

    estimator = make_estimator(config.estimator, config.estimator.mu, generator)
    guide = None
    if config.estimator.guided:
        surrogate = Surrogate(config.surrogate, stack.dimension, stack.spec.classes, config.seed)
        surrogate.restore(saved.beside_of("surrogate"))
        guide = surrogate.guide(points, targets, STABILITY)
    if isinstance(estimator, zo.Guided):
        estimator.alignment.restore({name: float(value) for name, value in saved.beside_of("alignment").items()})
    asked = estimator.ask_factored(points.detach(), guide)
    rows = torch.from_numpy(asked.expand(0, len(asked)))
    owners = torch.arange(len(points)).repeat_interleave(torch.from_numpy(asked.row_counts))
    with torch.no_grad():
        answers = torch.cat([classifier(stack.back(part)) for part in rows.split(1024)])
    losses = STABILITY.losses(answers, targets[owners])
    estimate = estimator.tell(losses if asked.counts is not None else losses.view(asked.n, asked.p))

    through = (points != 0) if stack.autoencoder is not None else torch.ones_like(points, dtype=torch.bool)
    ours, true = (torch.where(through, values, 0.0).detach() for values in (estimate, truth))
    alive = (true.norm(dim=1) > 0) & (ours.norm(dim=1) > 0)
    some = bool(alive.any())  # a bad guide may leave an encoder without an active latent
    parameters = [_parameters(stack, points, values) for values in (ours, true)]
    return Quality(
        variant=variant,
        budget=budget,
        seed=config.seed,
        queries=len(asked) / len(points),
        cosine=float(F.cosine_similarity(ours, true, dim=1)[alive].mean()) if some else 0.0,
        norm_ratio=float((ours.norm(dim=1) / true.norm(dim=1).clamp(min=1e-30))[alive].median()) if some else 0.0,
        batch_cosine=float(F.cosine_similarity(parameters[0], parameters[1], dim=0)),
    )


def _gradients(stack: Stack, classifier: nn.Module, points: Tensor, targets: Tensor) -> Tensor:
    at = points.requires_grad_(True)
    (found,) = torch.autograd.grad(STABILITY.losses(classifier(stack.back(at)), targets).sum(), at)
    return found


def _parameters(stack: Stack, points: Tensor, gradient: Tensor) -> Tensor:
    found = torch.autograd.grad((points * gradient).sum(), stack.trainable(), retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])
