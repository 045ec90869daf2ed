"""Random flips and crops of training images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Augmentation = Literal["none", "flip", "crop-flip"]

_CROP_PADDING = 4


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Random flips, or crops after padding by 4 pixels and flips; images [b, c, h, w] keep their shape."""
    if kind == "none":
        return images
    b, c, h, w = images.shape
    if kind == "crop-flip":
        padded = F.pad(images, (_CROP_PADDING,) * 4)
        offsets = torch.randint(0, 2 * _CROP_PADDING + 1, (2, b, 1), generator=generator)
        rows = (offsets[0] + torch.arange(h))[:, None, :, None]
        columns = (offsets[1] + torch.arange(w))[:, None, None, :]
        batch, channel = torch.arange(b)[:, None, None, None], torch.arange(c)[None, :, None, None]
        images = padded[batch, channel, rows, columns]
    flip = torch.rand(b, generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)
