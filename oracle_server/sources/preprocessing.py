"""What stands between a client's images in [0, 1] and what a network was trained on: declared in a small TOML file.

    z = (range * resize(x) - mean) / std, its channels in the network's order, its axes in the network's layout

It is part of what engines compute, in front of the network, and what a client's decoder makes passes through it too.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from shared.models.classifiers import Normalize
from shared.models.weight_files import ModelError

Interpolation = Literal["bilinear", "bicubic", "nearest"]


def _sides(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


# (h, w) in pixels; one number for both.
Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_sides)]


class Preprocessing(BaseModel):
    """A preprocessing file; what it leaves out is as the model's source says, or not done.

    Attributes:
        size: (h, w) of the images that clients send.
        resize: (h, w) of what the network reads; by default as sent.
        interpolation: how; all but nearest with antialiasing where the image becomes smaller.
        range: 1 where the network reads [0, 1] before normalisation, 255 where it reads [0, 255].
        mean, std: per channel, in the units of `range` and in the order of `channels`.
        channels: the order in which the network reads colours. Clients send red, green, blue.
        layout: the network's order of axes.
        output: what the network answers with. Of probabilities the logarithm is taken: they are served as logits, whose
            softmax they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size | None = None
    resize: Size | None = None
    interpolation: Interpolation = "bilinear"
    range: Literal[1, 255] = 1
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"
    output: Literal["logits", "probabilities", "log-probabilities"] = "logits"


def read_preprocessing(path: Path | None) -> Preprocessing:
    """A preprocessing file; without one, the default.

    Raises:
        ModelError: it cannot be read, or says something that is not there.
    """
    if path is None:
        return Preprocessing()
    try:
        return Preprocessing.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise ModelError(f"--preprocessing {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"--preprocessing {path} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(
            f"--preprocessing {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; it may say "
            f"{', '.join(Preprocessing.model_fields)}"
        ) from error


class Resize(nn.Module):
    """Images [n, c, h, w] in [0, 1] to [n, c, *size] in [0, 1]."""

    def __init__(self, size: tuple[int, int], interpolation: Interpolation) -> None:
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, images: Tensor) -> Tensor:
        if self.interpolation == "nearest":
            return F.interpolate(images, self.size, mode="nearest-exact")
        resized = F.interpolate(images, self.size, mode=self.interpolation, antialias=True, align_corners=False)
        return resized.clamp(0.0, 1.0) if self.interpolation == "bicubic" else resized  # which overshoots

    def extra_repr(self) -> str:
        return f"{self.size}, {self.interpolation}"


class Scale(nn.Module):
    """Multiplied by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return images * self.factor

    def extra_repr(self) -> str:
        return str(self.factor)


class ReverseChannels(nn.Module):
    """[n, c, h, w], its channels from last to first."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(1)


class ChannelsLast(nn.Module):
    """[n, c, h, w] to [n, h, w, c]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1).contiguous()


class Logarithm(nn.Module):
    """log p, of which p is the softmax; what is too small for a float32 counts as the smallest one."""

    def forward(self, probabilities: Tensor) -> Tensor:
        return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()


def with_preprocessing(
    network: nn.Module, declared: Preprocessing, mean: Sequence[float], std: Sequence[float], sent: tuple[int, int]
) -> nn.Sequential:
    """The network behind what is declared, in evaluation mode: images [n, c, *sent] in [0, 1] to logits [n, classes].

    Normalisation is always there, so that it can be found; the rest only where it does something.
    """
    steps: list[nn.Module] = []
    if declared.resize is not None and declared.resize != sent:
        steps.append(Resize(declared.resize, declared.interpolation))
    if declared.channels == "bgr":
        steps.append(ReverseChannels())
    if declared.range != 1:
        steps.append(Scale(declared.range))
    steps.append(Normalize(mean, std))
    if declared.layout == "nhwc":
        steps.append(ChannelsLast())
    steps.append(network)
    if declared.output == "probabilities":
        steps.append(Logarithm())
    return nn.Sequential(*steps).eval().requires_grad_(False)
