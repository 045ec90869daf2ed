"""Reconstructors by name: networks that make an image of its back-projected measurements.

`small-reconstructor` is a U-Net (Ronneberger et al., MICCAI 2015) of three levels with sums in place of concatenations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.models.weight_files import ModelError

RECONSTRUCTORS = ("small-reconstructor",)


class SmallReconstructor(nn.Module):
    """Back-projections [b, c, h, w] -> images [b, c, h, w] in (0, 1), of any size."""

    def __init__(self, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.enter = _convolution(channels, width)
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(n, 2 * n, stride=2), _convolution(2 * n, 2 * n)) for n in (width, 2 * width)
        )
        self.up = nn.ModuleList(nn.Conv2d(2 * n, n, 1) for n in (width, 2 * width))
        self.join = nn.ModuleList(_convolution(n, n) for n in (width, 2 * width))
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        full = self.enter(images)
        half = self.down[0](full)
        quarter = self.down[1](half)
        half = self.join[1](half + _enlarged(self.up[1](quarter), half))
        full = self.join[0](full + _enlarged(self.up[0](half), full))
        return torch.sigmoid(self.leave(full))


def build_reconstructor(name: str, channels: int) -> nn.Module:
    """An untrained reconstructor for images of so many channels. Raises `ModelError` for a name that is none."""
    check_reconstructor(name)
    return SmallReconstructor(channels)


def check_reconstructor(name: str) -> None:
    """Raise `ModelError` unless a reconstructor has this name."""
    if name not in RECONSTRUCTORS:
        raise ModelError(f"no reconstructor is called '{name}': there is {', '.join(RECONSTRUCTORS)}")


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


def _enlarged(planes: Tensor, like: Tensor) -> Tensor:
    """Each value four times, cut to the size of `like`, which may be odd."""
    return F.interpolate(planes, scale_factor=2.0)[:, :, : like.shape[2], : like.shape[3]]
