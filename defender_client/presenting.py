"""Images as an endpoint takes them, and what it answers as scores.

The client's images are float32 [n, c, h, w] in [0, 1]. What is sent of a pixel x is (x - mean) / std, float64 before
it is rounded to the datatype, or round(255 x) as UINT8: two images less than 1/510 apart may then be the same question.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defender_client.endpoint import Factors, Layout
from defender_client.oracle import Scores
from shared.wire.errors import UnexpectedAnswer

Float32 = NDArray[np.float32]

_DTYPES = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}


def laid_out(images: Float32, layout: Layout, datatype: str, mean: Factors, std: Factors) -> NDArray[Any]:
    """Images [n, c, h, w] in [0, 1] as [n, c, h, w], [n, h, w, c] or [n, c h w], of a datatype of `Datatype`."""
    values: NDArray[Any] = images
    if datatype == "UINT8":
        values = as_bytes(images)
    elif mean != 0 or std != 1:
        values = (images.astype(np.float64) - _channels(mean)) / _channels(std)
    if layout == "nhwc":
        values = values.transpose(0, 2, 3, 1)
    elif layout == "flat":
        values = values.reshape(len(values), -1)
    return np.ascontiguousarray(values, dtype=_DTYPES.get(datatype))


def as_bytes(images: Float32) -> NDArray[np.uint8]:
    """Pixels in [0, 1] as whole numbers from 0 to 255."""
    whole: NDArray[np.uint8] = np.rint(np.clip(images, 0.0, 1.0) * np.float32(255)).astype(np.uint8)
    return whole


def as_png(image: Float32) -> str:
    """One image [c, h, w], c 1 or 3, as a PNG file in base64."""
    pixels = as_bytes(image)
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def as_scores(answer: NDArray[Any], rows: int, classes: int, scores: Scores) -> Float32:
    """An answer as scores float32 [rows, classes].

    Labels may come as numbers [rows] or [rows, 1]: they become 1 at the label, 0 elsewhere.

    Raises:
        UnexpectedAnswer: another shape, values that are not finite, labels that are no classes, or probabilities
            outside [0, 1].
    """
    if scores == "label" and answer.size == rows and answer.shape in ((rows,), (rows, 1)):
        return _one_hot(answer.reshape(-1), classes)
    if answer.shape != (rows, classes):
        raise UnexpectedAnswer(f"expected scores [{rows}, {classes}], the oracle sent {list(answer.shape)}")
    if answer.dtype.kind not in "fiu" or not np.isfinite(answer).all():
        raise UnexpectedAnswer("the oracle sent scores that are not finite numbers")
    found = np.array(answer, dtype=np.float32)
    if scores == "probabilities" and (found.min(initial=0.0) < 0 or found.max(initial=0.0) > 1 + 1e-3):
        raise UnexpectedAnswer("the oracle's probabilities are not in [0, 1]: are they logits? Say scores = 'logits'")
    return found


def _one_hot(labels: NDArray[Any], classes: int) -> Float32:
    numbers = labels.astype(np.int64) if labels.dtype.kind in "fiu" else None
    if numbers is None or not np.array_equal(numbers, labels) or ((numbers < 0) | (numbers >= classes)).any():
        raise UnexpectedAnswer(f"the oracle sent labels that are not whole numbers from 0 to {classes - 1}")
    scores = np.zeros((len(labels), classes), np.float32)
    scores[np.arange(len(labels)), numbers] = 1.0
    return scores


def _channels(factors: Factors) -> NDArray[np.float64]:
    return np.asarray(factors, dtype=np.float64).reshape(-1, 1, 1)
