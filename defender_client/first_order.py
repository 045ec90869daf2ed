"""The gradient of one training step through a classifier that the defender holds: FO-DS and FO-AE-DS.

    dl/dtheta = (dw/dtheta)^T (dx/dw)^T df/dx^T dl/df,  x = Dec(w)    (Zhang et al., ICLR 2022, section 5: "FO-*")

The white-box ceiling of the zeroth-order columns: the same stack, loss, data and schedule, and no query.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defender_client.estimation import Batch, StepResult
from defender_client.objective import Objective
from defender_client.stack import Stack


class FirstOrder:
    """Backpropagates through a local copy of what the oracle hides.

    Args:
        stack: what is trained.
        classifier: f, images [b, c, h, w] in [0, 1] -> answers [b, k], its weights frozen.
        objective: what the answers are held against.
        micro_batch: samples that go through the stack at once; 0 for all of a step.
        mse: weight of the denoiser's mean squared error beside the loss.
    """

    def __init__(
        self, stack: Stack, classifier: nn.Module, objective: Objective, *, micro_batch: int = 0, mse: float = 0.0
    ) -> None:
        self._stack, self._classifier, self._objective = stack, classifier, objective
        self._micro_batch, self._mse = micro_batch, mse

    def backpropagate(self, batch: Batch, label: str) -> StepResult:
        """Add d (mean loss) / d theta to the gradients of the stack's parameters; `label` names nothing here.

        Args:
            batch: the step's samples.
        """
        size, count = self._micro_batch or len(batch), len(batch)
        quality = 0.0
        norms: list[Tensor] = []
        losses: list[Tensor] = []
        for start in range(0, count, size):
            part = batch.part(start, start + size)
            denoised = self._stack.denoise(part.noisy)
            points = self._stack.encode(denoised)
            points.retain_grad()
            answers = self._classifier(self._stack.back(points))
            values = self._objective.losses(answers, part.targets)
            loss = (values * part.weights).sum().div(count)
            if self._mse:
                loss = loss + self._mse * F.mse_loss(denoised, part.clean) * (len(part) / count)
            loss.backward()
            losses.append(values.detach())
            quality += float(self._objective.quality(answers.detach(), part.targets).sum())
            if points.grad is not None:
                norms.append(points.grad.norm(dim=1) * count)
        each = torch.cat(losses)
        return StepResult(float(each.mean()), quality / count, float(torch.cat(norms).mean()), each)

    def again(self) -> float:
        """Nothing is kept: what a step took was the gradient at those weights."""
        return 0.0
