"""A network as data: a tuple of layer descriptions that builds an `nn.Sequential`, with no code in it.

A stack saved to disk names its autoencoder this way, so that whoever loads it needs nothing but the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

NonNegativeInt = Annotated[int, Field(ge=0)]
Shape = tuple[int, ...]

# For larger kernels, and for strides beyond the kernel, torch falls back on code whose time is out of all proportion to
# the multiply-adds: measured, 20 seconds for one row of a transposed convolution of kernel 1 and stride 1000.
_VECTORS = 64  # elements: a multiple of what any CPU computes at once
_MAX_KERNEL = 16


class LayerError(ValueError):
    """A layer cannot take what the one before it gives."""


@dataclass(frozen=True)
class Trace:
    """What a layer makes of one row, by arithmetic alone: nothing is built and no memory is taken.

    Attributes:
        shape: of the row it gives.
        weights: shapes of its tensors by name, as torch calls them.
        multiply_adds: of one row; for a layer without weights, the elements it writes.
        workspace: elements that it may keep beside its input and output, such as the columns of im2col.
    """

    shape: Shape
    weights: Mapping[str, Shape] = field(default_factory=dict)
    multiply_adds: int = 0
    workspace: int = 0


class _Layer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _planes(kind: str, channels: int, kernel: int, stride: int, padding: int, taken: Shape) -> tuple[int, int]:
    """Height and width of the planes that a convolution is given; LayerError where it cannot take them."""
    if len(taken) != 3 or taken[0] != channels:
        raise LayerError(f"{kind} takes rows [{channels}, h, w], not {list(taken)}")
    if padding >= kernel:
        raise LayerError(f"{kind} has padding {padding}: it must be less than its kernel, {kernel}")
    if kernel > _MAX_KERNEL:
        raise LayerError(f"{kind} has kernel {kernel}: at most {_MAX_KERNEL}")
    if stride > kernel:
        raise LayerError(f"{kind} has stride {stride}: at most its kernel, {kernel}")
    return taken[1], taken[2]


class Conv(_Layer):
    kind: Literal["conv"] = "conv"
    channels_in: PositiveInt
    channels_out: PositiveInt
    kernel: PositiveInt
    stride: PositiveInt = 1
    padding: NonNegativeInt = 0

    def build(self) -> nn.Module:
        return nn.Conv2d(self.channels_in, self.channels_out, self.kernel, self.stride, self.padding)

    def trace(self, taken: Shape) -> Trace:
        """Rows [channels_in, h, w] -> [channels_out, h', w']."""
        planes = _planes(self.kind, self.channels_in, self.kernel, self.stride, self.padding, taken)
        if min(planes) + 2 * self.padding < self.kernel:
            raise LayerError(f"{self.kind} has kernel {self.kernel}, larger than its padded rows {list(taken)}")
        # n' = floor((n + 2 padding - kernel) / stride) + 1
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in planes)
        columns = self.channels_in * self.kernel**2 * height * width
        return Trace(
            (self.channels_out, height, width),
            {"weight": (self.channels_out, self.channels_in, self.kernel, self.kernel), "bias": (self.channels_out,)},
            self.channels_out * columns,
            columns,
        )


class ConvTranspose(_Layer):
    kind: Literal["conv-transpose"] = "conv-transpose"
    channels_in: PositiveInt
    channels_out: PositiveInt
    kernel: PositiveInt
    stride: PositiveInt = 1
    padding: NonNegativeInt = 0
    output_padding: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)

    def build(self) -> nn.Module:
        return nn.ConvTranspose2d(
            self.channels_in, self.channels_out, self.kernel, self.stride, self.padding, self.output_padding
        )

    def trace(self, taken: Shape) -> Trace:
        """Rows [channels_in, h, w] -> [channels_out, h', w']."""
        planes = _planes(self.kind, self.channels_in, self.kernel, self.stride, self.padding, taken)
        if max(self.output_padding) >= self.stride:
            raise LayerError(f"{self.kind} has output_padding {list(self.output_padding)}: less than its stride")
        # n' = (n - 1) stride - 2 padding + kernel + output_padding
        height, width = (
            (n - 1) * self.stride - 2 * self.padding + self.kernel + extra
            for n, extra in zip(planes, self.output_padding, strict=True)
        )
        if min(height, width) < 1:
            raise LayerError(f"{self.kind} with padding {self.padding} leaves nothing of its rows {list(taken)}")
        columns = self.channels_out * self.kernel**2 * math.prod(planes)
        return Trace(
            (self.channels_out, height, width),
            {"weight": (self.channels_in, self.channels_out, self.kernel, self.kernel), "bias": (self.channels_out,)},
            self.channels_in * columns,
            columns,
        )


class Linear(_Layer):
    kind: Literal["linear"] = "linear"
    features_in: PositiveInt
    features_out: PositiveInt

    def build(self) -> nn.Module:
        return nn.Linear(self.features_in, self.features_out)

    def trace(self, taken: Shape) -> Trace:
        """Rows [features_in] -> [features_out]."""
        if taken != (self.features_in,):
            raise LayerError(f"{self.kind} takes rows [{self.features_in}], not {list(taken)}")
        return Trace(
            (self.features_out,),
            {"weight": (self.features_out, self.features_in), "bias": (self.features_out,)},
            self.features_in * self.features_out,
        )


class Sigmoid(nn.Sigmoid):
    """The sigmoid, with the same bits for an element wherever it stands.

    torch computes whole vectors of a tensor with one function and what is left at its end with another, which may
    differ in the last bit (seen on an AMD EPYC): which elements are left depends on the batch. So nothing is left.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():  # whose tracing would keep the example's number of elements
            return torch.sigmoid(input)
        flat = input.reshape(-1)
        count = flat.shape[0]  # not len(flat): an exported program is to have as many as it is given
        filled = F.pad(flat, (0, -count % _VECTORS))
        return torch.sigmoid(filled)[:count].view_as(input)


class Activation(_Layer):
    kind: Literal["relu", "sigmoid", "clamp"]

    def build(self) -> nn.Module:
        match self.kind:
            case "relu":
                return nn.ReLU()
            case "sigmoid":
                return Sigmoid()
            case "clamp":  # to [0, 1]
                return nn.Hardtanh(0.0, 1.0)

    def trace(self, taken: Shape) -> Trace:
        """Rows of any shape -> of the same."""
        return Trace(taken, multiply_adds=math.prod(taken))


class Flatten(_Layer):
    kind: Literal["flatten"] = "flatten"

    def build(self) -> nn.Module:
        return nn.Flatten()

    def trace(self, taken: Shape) -> Trace:
        """Rows of any shape -> their elements."""
        return Trace((math.prod(taken),))


class Unflatten(_Layer):
    kind: Literal["unflatten"] = "unflatten"
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]

    def build(self) -> nn.Module:
        return nn.Unflatten(1, self.shape)

    def trace(self, taken: Shape) -> Trace:
        """Rows [c * h * w] -> [c, h, w]."""
        if taken != (math.prod(self.shape),):
            raise LayerError(
                f"{self.kind} to {list(self.shape)} takes rows [{math.prod(self.shape)}], not {list(taken)}"
            )
        return Trace(self.shape)


Layer = Annotated[Conv | ConvTranspose | Linear | Activation | Flatten | Unflatten, Field(discriminator="kind")]


def build(layers: tuple[Layer, ...]) -> nn.Sequential:
    """The network that `layers` describe, freshly initialised."""
    return nn.Sequential(*(layer.build() for layer in layers))
