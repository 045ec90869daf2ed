"""A reconstructor as nobody trained it: random weights, which no two images look alike through."""

from __future__ import annotations

from pathlib import Path

import torch

from shared.measurements import Measurement
from shared.models.reconstructors import SmallReconstructor
from shared.models.weight_files import WeightsInfo, write_weights

NAME = "small-reconstructor"
MEASUREMENT = Measurement(seed=11, rows=47, low=-1.5, high=2.5)


def alive(channels: int = 1) -> SmallReconstructor:
    """A reconstructor with random weights, and batch normalisations that change something."""
    model = SmallReconstructor(channels).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.ndim == 1:
                tensor.uniform_(-0.5, 1, generator=generator)
            elif tensor.ndim:
                tensor.normal_(0, 0.2, generator=generator)
    return model


def write_reconstructor(path: Path, image_shape: tuple[int, int, int] = (1, 8, 8)) -> SmallReconstructor:
    """Write one to a file that can be served; what was written."""
    model = alive(image_shape[0])
    info = WeightsInfo(NAME, command="by hand", image_shape=image_shape, measurement=MEASUREMENT)
    write_weights(path, model.state_dict(), info)
    return model
