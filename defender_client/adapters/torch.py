"""An oracle as a torch module: forward asks, and backward says that there are no gradients, or estimates them.

model = OracleModule(RemoteOracle(url, key))
SquareAttack(model, norm="L2", n_queries=500, eps=1.0).perturb(x, y)
model.queries
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from defender_client.adapters.counted import Counted, counted
from defender_client.callables import AnyOracle
from defender_client.zo import Estimator


class NoGradients(RuntimeError):
    """An oracle answers and gives no gradients; something asked for them."""


class OracleModule(nn.Module):
    """Images [n, c, h, w] in [0, 1] -> scores float32 [n, k]; it has no parameters.

    Args:
        oracle: any, or `Counted`.
        estimator: None to refuse gradients; else what estimates them (`make_estimator`), from queries that are counted.

    The gradient of the caller's loss l in an image x is then the estimator's of <dl/df, f(clamp(x, 0, 1))>, at the
    estimator's cost (`estimator.queries_per_sample(c h w)`) for each image and each backward pass. It is an estimate:
    second derivatives are refused.
    """

    def __init__(self, oracle: AnyOracle, estimator: Estimator | None = None) -> None:
        super().__init__()
        if estimator is not None and (estimator.guided or estimator.varies):
            raise ValueError(f"{estimator.name} needs more than an image: use rge, cge or orthonormal")
        self._asked, self._estimator = counted(oracle), estimator

    @property
    def queries(self) -> int:
        """As `Counted.queries`."""
        return self._asked.queries

    def forward(self, images: Tensor) -> Tensor:
        """Scores; a query a row.

        Raises:
            NoGradients: in a backward pass through them, without an estimator.
        """
        scores: Tensor = _Asked.apply(images, self._asked, self._estimator)
        return scores


class _Asked(torch.autograd.Function):
    """f, whose derivative nobody has."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, asked: Counted, estimator: Estimator | None) -> Tensor:
        ctx.asked, ctx.estimator = asked, estimator
        if estimator is not None:
            ctx.save_for_backward(images)
        return asked(images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if ctx.estimator is None:
            raise NoGradients(
                "the oracle answers queries and gives no gradients: use an attack that needs none, or estimate them "
                "from queries (OracleModule(oracle, estimator=make_estimator(...)))"
            )
        (images,) = ctx.saved_tensors
        return _estimated(ctx.asked, ctx.estimator, images, upstream), None, None


def _estimated(asked: Counted, estimator: Estimator, images: Tensor, upstream: Tensor) -> Tensor:
    """d <u, f(x)> / dx [n, c, h, w] for u = `upstream` [n, k]: by the chain rule the gradient of any loss of f."""
    points = images.detach().flatten(1)
    open_question = estimator.fork()
    probes = open_question.ask(points)
    rows = probes.flatten(0, 1)  # of [n, p, d]
    scores = asked(rows.clamp(0.0, 1.0).view(-1, *images.shape[1:])).double()
    weights = upstream.detach().double().repeat_interleave(probes.shape[1], dim=0)
    losses = (weights * scores).sum(dim=1).view(probes.shape[:2])
    return open_question.tell(losses).to(images.dtype).view_as(images)
