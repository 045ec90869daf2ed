"""Batch normalization over all ranks' shares of a batch, as if it were on one machine.

    mu_c = sum_r n_r mu_rc / n,   s_c^2 = sum_r [n_r s_rc^2 + n_r (mu_rc - mu_c)^2] / n    (Chan et al. 1983)
    y = gamma (x - mu) / (s^2 + eps)^(1/2) + beta
    dl/dx = gamma / (s^2 + eps)^(1/2) [g - sum g / n - x^ sum g x^ / n],  g = dl/dy, sums over all ranks

torch's own `SyncBatchNorm` is for GPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RankBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics, while it trains, are those of all ranks' images. Its share may be empty."""

    @classmethod
    def like(cls, other: nn.BatchNorm2d) -> RankBatchNorm:
        """One with the parameters and buffers of `other`, themselves."""
        made = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        made.weight, made.bias = other.weight, other.bias
        for name, buffer in other.named_buffers(recurse=False):
            setattr(made, name, buffer)
        return made.train(other.training)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, c, h, w] -> the same, normalized; called by all ranks, in the same order."""
        if not self.training or not torch.is_grad_enabled():
            plain: Tensor = super().forward(images)
            return plain
        normalized, mean, variance, count = _Normalize.apply(images, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            self.running_var.lerp_(unbiased.to(self.running_var), rate)
        shifted: Tensor = normalized * self.weight[:, None, None] + self.bias[:, None, None]
        return shifted


class _Normalize(torch.autograd.Function):
    """x -> x^, and the mean, variance (both [c], float64) and number (float64) of what it was normalized by."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        each = images.detach().transpose(0, 1).flatten(1).double()  # [c, values]
        values = torch.full((each.shape[0],), float(each.shape[1]), dtype=torch.float64, device=each.device)
        own = each.sum(dim=1) / values.clamp(min=1)
        squares = (each - own.unsqueeze(1)).square().sum(dim=1)
        sent = torch.stack([values, own, squares])
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, sent)
        counts, means, spreads = torch.stack(parts).unbind(dim=1)  # [ranks, c] each
        count = counts.sum(dim=0)
        mean = (counts * means).sum(dim=0) / count
        variance = (spreads + counts * (means - mean).square()).sum(dim=0) / count
        scale = (variance + eps).rsqrt()
        normalized = (images - mean.to(images)[:, None, None]) * scale.to(images)[:, None, None]
        ctx.save_for_backward(normalized, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalized, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None]:
        normalized, scale, count = ctx.saved_tensors
        sums = torch.stack([values.double().sum(dim=(0, 2, 3)) for values in (gradient, gradient * normalized)])
        dist.all_reduce(sums)
        first, second = (sums / count).to(gradient)[:, :, None, None]
        return (gradient - first - normalized * second) * scale.to(gradient)[:, None, None], None


def shared(module: nn.Module) -> None:
    """Replace every batch normalization within a module by one over all ranks; names and weights stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, RankBatchNorm.like(child))
        else:
            shared(child)
