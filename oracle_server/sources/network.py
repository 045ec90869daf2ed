"""What every source gives: a network, and what the source says about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

Bound = Literal["eager", "onnxruntime"]


@dataclass(frozen=True)
class Network:
    """A network without its preprocessing: float32 in, logits [n, classes] out, on the CPU.

    Attributes:
        module: the network; whoever puts preprocessing before it sets its mode.
        input_shape: of one image as the network reads it, in its own order of axes; None for what it leaves open.
        image_size: (h, w) that are usual for it; None where nothing is.
        mean, std: per channel, of the images it was trained on; None where the source does not say.
        bound: the one engine that can compute it; None where torch has its layers and any engine may.
        remembered: whether all that its answers depend on is in its layers and weights, so that what was measured of
            it may be kept.
        files: what it was read from.
    """

    module: nn.Module
    input_shape: tuple[int | None, int | None, int | None] = (None, None, None)
    image_size: tuple[int, int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    bound: Bound | None = None
    remembered: bool = True
    files: tuple[Path, ...] = ()
