"""The gradient of one training step, while its requests are in flight.

    g^  = ZO estimate of dl/dw from the oracle's answers          (Zhang et al., ICLR 2022)
    dl/dtheta = (dw/dtheta)^T g^, by backpropagating <w, stop_grad(g^)>, eq. 9

A step's samples are cut into micro-batches, each of which goes through the stack at once, and these into questions of
as many samples as fit into one request. While up to `in_flight` questions are with the oracle, the next ones are made
(forward pass, probes) and those answered are told and backpropagated.

Forward passes, random draws, gradients and sums happen in one thread and in the order of the samples; what is in flight
decides only when. The weights are therefore the same, bit for bit, whatever `in_flight` is. The size of the
micro-batches is part of the arithmetic: batch normalization takes its statistics over each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from defender_client import zo
from defender_client.black_box import BlackBox
from defender_client.in_flight import Crew
from defender_client.objective import Objective
from defender_client.stack import Stack
from shared.wire.probes import Probes

PURPOSE = "train"


@dataclass(frozen=True)
class StepResult:
    """What one step's answers say, averaged over the points asked about.

    Attributes:
        loss: mean loss of the run's objective.
        quality: the objective's mean quality; for classifiers the agreement, the fraction of answers whose argmax is
            the label, in 0..1.
        gradient_norm: mean l2 norm of the estimated gradient per sample.
    """

    loss: float
    quality: float
    gradient_norm: float


@dataclass(frozen=True)
class _Question:
    """Asked, and not told yet.

    Attributes:
        estimator: whose question it is.
        targets: [n, ...], of the samples asked about.
        points: w [b, d] of the micro-batch with their graph, if this is its last question.
    """

    estimator: zo.Estimator
    targets: Tensor
    points: Tensor | None


class Estimation:
    """Estimates a step's gradients and backpropagates them.

    Args:
        stack: what is trained.
        black_box: f' of this stack.
        estimator: of the gradients; its own open question, if it has one, is left alone.
        objective: what the answers are held against.
        crew: asks.
        query_rows: rows of a request, at most, where one sample does not take more.
        micro_batch: samples that go through the stack at once; 0 for all of a step.
    """

    def __init__(
        self,
        stack: Stack,
        black_box: BlackBox,
        estimator: zo.Estimator,
        objective: Objective,
        crew: Crew,
        *,
        query_rows: int,
        micro_batch: int = 0,
    ) -> None:
        self._stack, self._black_box, self._estimator, self._crew = stack, black_box, estimator, crew
        self._objective = objective
        self._probes_each = estimator.queries_per_sample(stack.dimension)
        self._group = max(1, query_rows // self._probes_each)
        self._micro_batch = micro_batch

    def backpropagate(self, images: Tensor, targets: Tensor, label: str) -> StepResult:
        """Add d (mean loss) / d theta to the gradients of the stack's parameters.

        Args:
            images: noisy ones [b, c, h, w].
            targets: [b, ...], of the run's objective.
            label: names the step's requests within the run.
        """
        rows = len(images) * self._probes_each
        told: list[Tensor] = []  # of the micro-batch under way
        norms: list[Tensor] = []
        losses, quality = 0.0, 0.0
        for question, logits in self._crew.in_order(self._questions(images, targets, label)):
            n, p, _ = logits.shape
            logits, aims = logits.flatten(0, 1), question.targets.repeat_interleave(p, dim=0)
            values = self._objective.losses(logits, aims)
            told.append(question.estimator.tell(values.view(n, p)))
            losses += float(values.sum())
            quality += float(self._objective.quality(logits, aims).sum())
            if question.points is not None:
                gradient = torch.cat(told)
                # d loss / d theta = (d w / d theta)^T g^, averaged over the batch.
                (question.points * gradient).sum().div(len(images)).backward()
                norms.append(gradient.norm(dim=1))
                told.clear()
        return StepResult(losses / rows, quality / rows, float(torch.cat(norms).mean()))

    def _questions(
        self, images: Tensor, targets: Tensor, label: str
    ) -> Iterator[Callable[[], tuple[_Question, Tensor]]]:
        """The step's questions in order, to be put to the oracle."""
        size = self._micro_batch or len(images)
        for first in range(0, len(images), size):
            points = self._stack.front(images[first : first + size])
            for start in range(0, len(points), self._group):
                stop = min(start + self._group, len(points))
                estimator = self._estimator.fork()
                probes = estimator.ask_factored(points[start:stop].detach())
                question = _Question(
                    estimator, targets[first + start : first + stop], points if stop == len(points) else None
                )
                yield self._asking(question, probes, f"{label}/{first + start}")

    def _asking(self, question: _Question, probes: Probes, label: str) -> Callable[[], tuple[_Question, Tensor]]:
        return lambda: (question, self._black_box.probed(probes, purpose=PURPOSE, label=label))
