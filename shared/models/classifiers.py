"""Classifier architectures by name, and the normalisation in front of them.

CIFAR ResNets: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (3 stages of 16, 32 and
64 channels, 6n + 2 layers, option-A shortcuts). State-dict names: `conv1, bn1, layer{1,2,3}.{i}.{conv,bn}{1,2},
linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_DEPTHS = {
    "cifar-resnet20": 20,
    "cifar-resnet32": 32,
    "cifar-resnet44": 44,
    "cifar-resnet56": 56,
    "cifar-resnet110": 110,
}


class Normalize(nn.Module):
    """(images - mean) / std per channel; images [b, c, h, w] in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class _BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.pad = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # Option A: the shortcut subsamples and pads the new channels with zeros, half before and half after.
        shortcut = x
        if self.stride != 1 or self.pad:
            shortcut = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2)
            )
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for images [b, c, 32, 32]; logits [b, classes]."""

    def __init__(self, depth: int, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...), not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(channels_in, channels_out, stride)
        return nn.Sequential(first, *(_BasicBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))  # type: ignore[no-any-return]


class SmallCNN(nn.Module):
    """Three convolutions and a linear layer, for small images of any size; logits [b, classes]."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images))  # type: ignore[no-any-return]


SMALL_CNNS = ("digits-cnn", "small-cnn")


def build_own(name: str, channels: int, classes: int) -> nn.Module | None:
    """An untrained classifier of ours by name (without normalisation); None if `name` is not one of ours."""
    if name in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[name], channels, classes)
    if name in SMALL_CNNS:
        return SmallCNN(channels, classes)
    return None
