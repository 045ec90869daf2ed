"""A denoiser as data, so that a run's configuration names it completely."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator
from torch import nn

from shared.models.dncnn import DnCNN
from shared.models.unet import UNet

Architecture = Literal["dncnn", "unet", "none"]

# (depth, width) where the configuration leaves them out.
DEFAULTS: dict[str, tuple[int, int]] = {"dncnn": (17, 64), "unet": (3, 16), "none": (0, 0)}


class DenoiserSpec(BaseModel):
    """Which denoiser, and how large.

    `depth` counts convolutions for `dncnn` (at least 2) and strided levels for `unet` (at least 1); `width` counts
    channels, for `unet` at full resolution, doubled at each level. Left out or 0, both are the architecture's own:
    17 and 64 (the paper's DnCNN), 3 and 16. The spec always holds the numbers in force, so a saved one stays valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture
    depth: NonNegativeInt = 0
    width: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: object) -> object:
        if not isinstance(values, dict) or values.get("architecture") not in DEFAULTS:
            return values
        depth, width = DEFAULTS[values["architecture"]]
        return {**values, "depth": values.get("depth") or depth, "width": values.get("width") or width}

    @model_validator(mode="after")
    def _check(self) -> DenoiserSpec:
        if self.architecture == "none" and (self.depth or self.width):
            raise ValueError("no denoiser has neither depth nor width")
        if self.architecture == "dncnn" and self.depth < 2:
            raise ValueError(f"a DnCNN has at least 2 layers, not {self.depth}")
        return self


def build_denoiser(spec: DenoiserSpec, channels: int) -> nn.Module | None:
    """The denoiser that `spec` describes for images of `channels` channels, freshly initialised; None for "none"."""
    if spec.architecture == "dncnn":
        return DnCNN(channels, spec.depth, spec.width)
    if spec.architecture == "unet":
        return UNet(channels, spec.depth, spec.width)
    return None
