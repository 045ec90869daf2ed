"""Images as a reconstructor is shown them: back-projections of their measurements, made when they are needed.

    x_b = clamp((A A^T x - low) / (high - low), 0, 1)    (see `shared.measurements`)

A and its range are public: the oracle says which. Noise, denoiser, autoencoder and attack live on x_b; the originals x
are what a reconstruction is held against in the end, and never what training aims at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defender_client.data import Splits
from shared.datasets import ImageSet
from shared.measurements import BackProjection, Measurement


@dataclass(frozen=True)
class MeasuredSet(ImageSet):
    """An image set whose `floats` are back-projections, float32 [b, c, h, w] in [0, 1]."""

    project: BackProjection

    def floats(self, index: Tensor | slice) -> Tensor:
        return torch.from_numpy(self.project(self.originals(index).numpy()))

    def originals(self, index: Tensor | slice) -> Tensor:
        """The images themselves at `index`, float32 [b, c, h, w] in [0, 1]."""
        return super().floats(index)

    def subset(self, index: Tensor | slice) -> MeasuredSet:
        return MeasuredSet(self.images[index], self.labels[index], self.classes, self.project)


def measure(images: ImageSet, measurement: Measurement) -> MeasuredSet:
    """An image set as it is measured."""
    project = BackProjection(measurement, images.image_shape)
    return MeasuredSet(images.images, images.labels, images.classes, project)


def measure_splits(splits: Splits, measurement: Measurement) -> Splits:
    """Both splits as they are measured."""
    return Splits(measure(splits.train, measurement), measure(splits.validation, measurement))
