"""The oracle: images in, answers out. It knows nothing of clients, budgets or HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oracle_server.defence import defend
from oracle_server.engines import build_engine
from oracle_server.loading import Reconstructor, load_model
from oracle_server.policy.randomness import Randomness
from oracle_server.rows import Float32, Rows
from oracle_server.settings import Settings
from oracle_server.smoothed import SmoothedEngine, Smoothing
from shared.measurements import Measurement
from shared.wire import protocol
from shared.wire.errors import MalformedRequest, UnacceptableValues

_LANES = 2  # measured on 2 cores, ResNet-20: see docs/results/performance.md


class Oracle:
    """Answers images [n, c, h, w] with flat rows [n, k]: a classifier's k logits, or the k = c h w pixels that a
    reconstructor makes of a back-projection.

    Attributes:
        image_shape: (c, h, w) of the images it reads.
        classes: k, the number of values of an answer.
        block: rows that are made and computed at once, at most.
        lanes: blocks that may be computed at a time.
        measurement: what a reconstructor's images are back-projections of; None for a classifier.
        smoothing: how the classifier is smoothed; None where its answers are logits.
        task: what it does.
        output_shape: of one row's answer where it leaves the server: (k,), or (c, h, w).
    """

    def __init__(
        self,
        engine: Callable[[Tensor], Tensor],
        image_shape: tuple[int, int, int],
        classes: int,
        block: int = 256,
        lanes: int = 1,
        measurement: Measurement | None = None,
        smoothing: Smoothing | None = None,
    ) -> None:
        self.image_shape = image_shape
        self.classes = classes
        self.block, self.lanes = block, lanes
        self.measurement, self.smoothing = measurement, smoothing
        self.task: protocol.Task = "classification" if measurement is None else "reconstruction"
        self.output_shape: tuple[int, ...] = (classes,) if measurement is None else image_shape
        self._engine = engine

    @property
    def output_name(self) -> str:
        """What its answers are called on the wire."""
        return protocol.OUTPUT_NAMES[self.task]

    def announced(self) -> dict[str, Any]:
        """Parameters for the model's metadata: the public physics of a reconstructor, how a classifier is smoothed."""
        if self.measurement is None:
            return {} if self.smoothing is None else self.smoothing.announced()
        return {
            protocol.TASK_PARAMETER: self.task,
            protocol.MEASUREMENT_PARAMETER: self.measurement.model_dump(),
        }

    def check(self, images: NDArray[Any]) -> None:
        """Refuse what cannot be answered; whoever charges does so after this.

        Raises:
            MalformedRequest: not float32, not [n, c, h, w] with this oracle's c, h, w, or without a row.
            UnacceptableValues: a value that is not finite or not in [0, 1]; carries the `index` of the first one.
        """
        if images.dtype != np.float32:
            raise MalformedRequest(f"images are {images.dtype}: send float32 (datatype FP32)")
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise MalformedRequest(
                f"images have shape {list(images.shape)}: send [n, {', '.join(map(str, self.image_shape))}]"
            )
        if not len(images):
            raise MalformedRequest("the batch has no row: send at least one image")
        # A NaN anywhere makes both extremes NaN, and no comparison with NaN holds.
        low, high = float(images.min()), float(images.max())
        if not (low >= 0.0 and high <= 1.0):
            raise _unacceptable(images)

    def __call__(self, rows: Rows) -> Float32:
        """Answers float32 [n, k] to rows whose images pass `check`."""
        starts = range(0, len(rows), self.block)
        return np.concatenate(
            [self.predict(rows.images(start, min(start + self.block, len(rows)))) for start in starts]
        )

    def predict(self, images: Float32) -> Float32:
        """Answers float32 [n, k] to images [n, c, h, w] that pass `check`; n at most `block`."""
        # torch only reads, but warns of arrays that it could not write to, such as views of a request's bytes.
        writable = images if images.flags.writeable and images.flags.aligned else images.copy()
        answers: Float32 = self._engine(torch.from_numpy(writable)).numpy()
        return answers


def build_oracle(settings: Settings) -> Oracle:
    """The oracle that the settings describe.

    Raises:
        ModelError: the model cannot be loaded, or the device is not there.
    """
    model, manifest = load_model(settings), None
    if settings.defence is not None:
        model, manifest = defend(model, settings.defence)
    engine = build_engine(model, settings)
    if isinstance(model, Reconstructor):
        pixels = math.prod(model.image_shape)
        return Oracle(engine, model.image_shape, pixels, engine.block, _LANES, model.measurement)
    if manifest is None or settings.smooth is None:
        return Oracle(engine, model.image_shape, model.classes, engine.block, _LANES)
    smoothing = Smoothing(manifest.sigma, settings.smooth, settings.smooth_alpha)
    voting = SmoothedEngine(engine, model.classes, smoothing, Randomness.of(settings.smooth_seed))
    return Oracle(voting, model.image_shape, model.classes, voting.block, _LANES, smoothing=smoothing)


def _unacceptable(images: Float32) -> UnacceptableValues:
    bad = ~((images >= 0.0) & (images <= 1.0))
    count = int(bad.sum())
    index = [int(i) for i in np.unravel_index(int(bad.argmax()), images.shape)]
    value = float(images[tuple(index)])
    what = f"{value:g} is outside [0, 1]" if np.isfinite(value) else f"{value} is not finite"
    return UnacceptableValues(
        f"images{index} = {what} ({count} such values of {images.size}): send pixels in [0, 1]; nothing was charged",
        index=index,
        count=count,
    )
