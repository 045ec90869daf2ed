"""What to do with all answers instead of their losses: gradients of any loss, Gauss-Newton directions, predictions.

    J = df/dw [d, k], as far as it was probed;    dl/dw = J dl/df
    f(w') ~ f(w) + J^T (w' - w)

A Jacobian is bought once and serves any loss, and, while the point does not move far, more than one step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gradient(jacobians: Tensor, slopes: Tensor) -> Tensor:
    """dl/dw = J dl/df: jacobians [b, d, k], slopes dl/df [b, k] -> [b, d]."""
    return torch.einsum("bdk,bk->bd", jacobians, slopes)


def predict(jacobians: Tensor, answers: Tensor, moved: Tensor) -> Tensor:
    """f(w) + J^T (w' - w): jacobians [b, d, k], answers f(w) [b, k], moved w' - w [b, d] -> [b, k]."""
    return answers + torch.einsum("bdk,bd->bk", jacobians, moved)


def gauss_newton(jacobians: Tensor, slopes: Tensor, roots: Tensor, damping: float) -> Tensor:
    """The Gauss-Newton direction, of the length that the damping allows.

        delta = (J H J^T + lambda I)^-1 J dl/df,    H = R R^T = d2l/df2 >= 0,    lambda = damping tr(J H J^T) / k

    by Woodbury's identity, A = J R:    delta = (g - A (lambda I + A^T A)^-1 A^T g) / lambda, in k dimensions, not d.

    Args:
        jacobians: J [b, d, k].
        slopes: dl/df [b, k].
        roots: R [b, k, k].
        damping: > 0; the larger, the nearer to a multiple of the gradient. Where there is no curvature, it is that.

    Returns:
        delta [b, d], times lambda: a large damping gives the gradient itself.

    Source: Levenberg 1944; Schraudolph, Neural Computation 14(7), 2002.
    """
    plain = gradient(jacobians, slopes)
    a = jacobians @ roots
    inner = a.mT @ a
    k = inner.shape[-1]
    level = damping * inner.diagonal(dim1=1, dim2=2).sum(dim=1) / k
    level = torch.where(level > 0, level, 1.0).view(-1, 1, 1)
    solved = torch.linalg.solve(inner + level * torch.eye(k, dtype=inner.dtype), a.mT @ plain.unsqueeze(2))
    correction: Tensor = (a @ solved).squeeze(2)
    return plain - correction
