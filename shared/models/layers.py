"""A network as data: a tuple of layer descriptions that builds an `nn.Sequential`, with no code in it.

A stack saved to disk names its autoencoder this way, so that whoever loads it needs nothing but the file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import nn

NonNegativeInt = Annotated[int, Field(ge=0)]


class _Layer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Conv(_Layer):
    kind: Literal["conv"] = "conv"
    channels_in: PositiveInt
    channels_out: PositiveInt
    kernel: PositiveInt
    stride: PositiveInt = 1
    padding: NonNegativeInt = 0

    def build(self) -> nn.Module:
        return nn.Conv2d(self.channels_in, self.channels_out, self.kernel, self.stride, self.padding)


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


class Linear(_Layer):
    kind: Literal["linear"] = "linear"
    features_in: PositiveInt
    features_out: PositiveInt

    def build(self) -> nn.Module:
        return nn.Linear(self.features_in, self.features_out)


class Activation(_Layer):
    kind: Literal["relu", "sigmoid"]

    def build(self) -> nn.Module:
        return nn.ReLU() if self.kind == "relu" else nn.Sigmoid()


class Flatten(_Layer):
    kind: Literal["flatten"] = "flatten"

    def build(self) -> nn.Module:
        return nn.Flatten()


class Unflatten(_Layer):
    kind: Literal["unflatten"] = "unflatten"
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]

    def build(self) -> nn.Module:
        return nn.Unflatten(1, self.shape)


Layer = Annotated[Conv | ConvTranspose | Linear | Activation | Flatten | Unflatten, Field(discriminator="kind")]


def build(layers: tuple[Layer, ...]) -> nn.Sequential:
    """The network that `layers` describe, freshly initialised."""
    return nn.Sequential(*(layer.build() for layer in layers))
