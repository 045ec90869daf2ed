"""Rows that were not sent as images: probes around base points, and latents of a client's decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from oracle_server.rows import Float32
from shared.wire.errors import UnacceptableValues
from shared.wire.probes import Probes, check_finite

_CHECKED_AT_ONCE = 2**20  # values

Decode = Callable[[Float32], Float32]
"""Latents float32 [n, d] -> images float32 [n, c, h, w]."""


class Points(Protocol):
    """The m points of a request, float32 [m, d], made a range at a time."""

    def __len__(self) -> int: ...

    def expand(self, start: int, stop: int) -> Float32:
        """Points `start` to `stop`, float32 [stop - start, d]; the same bits whatever the range."""


class Part:
    """Rows `start` to `stop` of probes."""

    def __init__(self, probes: Probes, start: int, stop: int) -> None:
        self._probes, self._start, self._stop = probes, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def expand(self, start: int, stop: int) -> Float32:
        return self._probes.expand(self._start + start, self._start + stop)


class Given:
    """Points that were sent as they are, float32 [m, d]."""

    def __init__(self, points: Float32) -> None:
        self._points = points

    def __len__(self) -> int:
        return len(self._points)

    def expand(self, start: int, stop: int) -> Float32:
        return self._points[start:stop]


class PixelRows:
    """Points that are images.

    Args:
        points: their pixels, d = c h w values each.
        image_shape: (c, h, w).
        clamp: whether pixels outside [0, 1] are moved to its ends; else they are refused.
        answered: the leading axes of the answer.
    """

    def __init__(
        self, points: Points, image_shape: tuple[int, int, int], *, clamp: bool, answered: tuple[int, ...]
    ) -> None:
        self._points, self._image_shape, self._clamp, self._answered = points, image_shape, clamp, answered

    def __len__(self) -> int:
        return len(self._points)

    def images(self, start: int, stop: int) -> Float32:
        pixels = self._points.expand(start, stop)
        if self._clamp:
            pixels = np.clip(pixels, 0.0, 1.0)
        return pixels.reshape(stop - start, *self._image_shape)

    def arrange(self, answers: Float32) -> Float32:
        return answers.reshape(*self._answered, answers.shape[-1])

    def check(self) -> None:
        """Make every row once, and refuse what is not an image.

        Raises:
            UnacceptableValues: a pixel outside [0, 1] where they are not clamped.
        """
        if self._clamp:
            return  # finite points and directions cannot give NaN, and an infinite pixel has an end to be moved to
        step = max(1, _CHECKED_AT_ONCE // int(np.prod(self._image_shape)))
        for start in range(0, len(self), step):
            images = self.images(start, min(start + step, len(self)))
            outside = ~((images >= 0.0) & (images <= 1.0))
            if outside.any():
                index = [int(i) for i in np.unravel_index(int(outside.argmax()), images.shape)]
                value = float(images[tuple(index)])
                index[0] += start
                raise UnacceptableValues(
                    f"a pixel of row {index[0]} is {value:g}, outside [0, 1]: move the points or shorten the steps, or "
                    'send the parameter "clamp": true; nothing was charged',
                    index=index,
                )


class DecodedRows:
    """Points that are latents of a decoder, which is merged into the classifier: f'(z) = f(Dec(z)).

    (Zhang et al., ICLR 2022, section 4.)

    Args:
        points: latents.
        decode: the client's decoder.
        answered: the leading axes of the answer.
    """

    def __init__(self, points: Points, decode: Decode, *, answered: tuple[int, ...]) -> None:
        self._points, self._decode, self._answered = points, decode, answered

    def __len__(self) -> int:
        return len(self._points)

    def images(self, start: int, stop: int) -> Float32:
        latents = self._points.expand(start, stop)
        check_finite("latents", latents)  # base and steps are finite, and their sum may not be
        try:
            return self._decode(latents)
        except UnacceptableValues as refusal:
            if isinstance(row := refusal.extensions.get("row"), int):
                refusal.extensions["row"] = row + start  # of the request, and not of the block
            raise

    def arrange(self, answers: Float32) -> Float32:
        return answers.reshape(*self._answered, answers.shape[-1])
