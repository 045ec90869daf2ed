"""The gradient of one training step through a classifier that the defender holds: FO-DS and FO-AE-DS.

    dl/dtheta = (dw/dtheta)^T (dx/dw)^T df/dx^T dl/df,  x = Dec(w)    (Zhang et al., ICLR 2022, section 5: "FO-*")

The white-box ceiling of the zeroth-order columns: the same stack, loss, data and schedule, and no query.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defender_client.estimation import StepResult
from defender_client.objective import Objective
from defender_client.stack import Stack


class FirstOrder:
    """Backpropagates through a local copy of what the oracle hides.

    Args:
        stack: what is trained.
        classifier: f, images [b, c, h, w] in [0, 1] -> answers [b, k], its weights frozen.
        objective: what the answers are held against.
        micro_batch: samples that go through the stack at once; 0 for all of a step.
    """

    def __init__(self, stack: Stack, classifier: nn.Module, objective: Objective, *, micro_batch: int = 0) -> None:
        self._stack, self._classifier, self._objective = stack, classifier, objective
        self._micro_batch = micro_batch

    def backpropagate(self, images: Tensor, targets: Tensor, label: str) -> StepResult:
        """Add d (mean loss) / d theta to the gradients of the stack's parameters; `label` names nothing here.

        Args:
            images: noisy ones [b, c, h, w].
            targets: [b, ...], of the run's objective.
        """
        size = self._micro_batch or len(images)
        losses, quality = 0.0, 0.0
        norms: list[Tensor] = []
        for part, aims in zip(images.split(size), targets.split(size), strict=True):
            points = self._stack.front(part)
            points.retain_grad()
            answers = self._classifier(self._stack.back(points))
            values = self._objective.losses(answers, aims)
            values.sum().div(len(images)).backward()
            losses += float(values.detach().sum())
            quality += float(self._objective.quality(answers.detach(), aims).sum())
            if points.grad is not None:
                norms.append(points.grad.norm(dim=1) * len(images))
        return StepResult(losses / len(images), quality / len(images), float(torch.cat(norms).mean()))
