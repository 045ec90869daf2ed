"""How far images are from those they should be: RMSE and SSIM, each per image."""

from __future__ import annotations

from typing import Any

import torch
from skimage.metrics import structural_similarity
from torch import Tensor

_WINDOW = 7
"""Side of SSIM's window, in pixels: scikit-image's own default, uniform."""


def rmse(images: Tensor, references: Tensor) -> Tensor:
    """Root mean squared error of each image: [b, c, h, w] twice -> [b] >= 0, float64.

    Raises:
        ValueError: shapes that differ, or are not [b, c, h, w].
    """
    _check(images, references)
    # sqrt(1/d sum_i (x_i - y_i)^2)
    return (images.double() - references.double()).square().flatten(1).mean(dim=1).sqrt()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image, the mean over its channels: [b, c, h, w] in [0, 1] twice -> [b], float64.

    1 for equal images; -1 at least. After Wang et al., IEEE TIP 2004, as scikit-image computes it: windows of 7 x 7
    pixels, C1 = 0.01^2 and C2 = 0.03^2 for values in [0, 1].

    Raises:
        ValueError: shapes that differ, or are not [b, c, h, w], or images smaller than a window.
    """
    _check(images, references)
    if min(images.shape[2:]) < _WINDOW:
        raise ValueError(
            f"SSIM compares windows of {_WINDOW} x {_WINDOW} pixels: images of {list(images.shape[2:])} have none"
        )
    pairs = zip(images.double().numpy(), references.double().numpy(), strict=True)
    similarity: Any = structural_similarity  # its package says that it is typed, and this function is not
    values = [similarity(x, y, data_range=1.0, channel_axis=0, win_size=_WINDOW) for x, y in pairs]
    return torch.tensor(values, dtype=torch.float64)


def _check(images: Tensor, references: Tensor) -> None:
    if images.ndim != 4 or images.shape != references.shape:
        raise ValueError(
            f"images and references must both be [b, c, h, w], not {list(images.shape)} and {list(references.shape)}"
        )
