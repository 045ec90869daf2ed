"""A reconstructor of small images, for tests of both what is trained before it and what is attacked."""

from __future__ import annotations

from pathlib import Path

import torch

from shared.measurements import Measurement
from shared.models.reconstructors import SmallReconstructor
from shared.models.weight_files import WeightsInfo, write_weights

MEASUREMENT = Measurement(seed=3, rows=47, low=-1.5, high=2.5)


def write_reconstructor(path: Path) -> Path:
    """A reconstructor that was never trained: images in, images out."""
    torch.manual_seed(0)
    info = WeightsInfo(model="small-reconstructor", image_shape=(1, 8, 8), measurement=MEASUREMENT)
    write_weights(path, SmallReconstructor().eval().state_dict(), info)
    return path
