"""What is asked of an oracle, in one of the forms that an Open Inference Protocol request can have.

Images     the rows themselves: any server of the protocol takes them
Latents    points of a decoder that the server merged into its classifier
Factored   probes around base points, of pixels or latents, as what they are made of
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from defender_client.oracle import OracleInfo
from shared.wire import codec, probes, protocol
from shared.wire.probes import Probes

Float32 = NDArray[np.float32]

HEADER_BYTES = 1024
"""More than the JSON part of a request."""


class Question(Protocol):
    """Rows to ask about, each of which costs a query."""

    def __len__(self) -> int:
        """Rows."""

    def take(self, start: int, stop: int) -> Question:
        """Rows `start` to `stop`."""

    def fitting(self, info: OracleInfo, most: int) -> int:
        """How many rows from the first on to ask about at once: at most `most`, and what this oracle takes; at
        least 1."""

    def encode(self, output: str = protocol.OUTPUT_NAME) -> codec.Encoded:
        """The body of a request for all rows; `output` is what the oracle calls its answers."""

    def answered(self, classes: int) -> tuple[int, ...]:
        """Flat shape of the answer, (..., k); its values are the rows' answers in order."""

    @property
    def decoder(self) -> str | None:
        """The registered decoder that is needed to answer, by its id."""


@dataclass(frozen=True)
class Images:
    """Images float32 [n, c, h, w] in [0, 1]."""

    values: Float32
    decoder: None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, start: int, stop: int) -> Images:
        return Images(self.values[start:stop])

    def fitting(self, info: OracleInfo, most: int) -> int:
        return max(1, min(len(self), most, info.max_rows))

    def encode(self, output: str = protocol.OUTPUT_NAME) -> codec.Encoded:
        return codec.encode_request({protocol.INPUT_NAME: self.values}, outputs=(output,))

    def answered(self, classes: int) -> tuple[int, ...]:
        return len(self), classes


@dataclass(frozen=True)
class Latents:
    """Latents float32 [n, d] of a registered decoder."""

    values: Float32
    decoder: str

    def __len__(self) -> int:
        return len(self.values)

    def take(self, start: int, stop: int) -> Latents:
        return Latents(self.values[start:stop], self.decoder)

    def fitting(self, info: OracleInfo, most: int) -> int:
        room = (info.body_limit - HEADER_BYTES) // (4 * self.values.shape[1]) if info.body_limit else most
        return max(1, min(len(self), most, info.row_limit or info.max_rows, room))

    def encode(self, output: str = protocol.OUTPUT_NAME) -> codec.Encoded:
        return codec.encode_request(
            {protocol.LATENTS_NAME: self.values},
            outputs=(output,),
            parameters={protocol.DECODER_PARAMETER: self.decoder},
        )

    def answered(self, classes: int) -> tuple[int, ...]:
        return len(self), classes


@dataclass(frozen=True)
class Factored:
    """Probes of pixels, clamped to [0, 1], or of latents of a registered decoder.

    Attributes:
        probes: what the rows are made of.
        decoder: the decoder's id; None for pixels.
        part: (start, stop), which of the probes' rows; None for all.
    """

    probes: Probes
    decoder: str | None
    part: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.probes) if self.part is None else self.part[1] - self.part[0]

    def take(self, start: int, stop: int) -> Factored:
        offset = self.part[0] if self.part else 0
        # Base points that have no row in it are not sent, unless they lie between others.
        first, skipped = self.probes.locate(offset + start)
        last, row = self.probes.locate(offset + stop - 1)
        whole = skipped == 0 and row + 1 == self.probes.rows_of(last)
        part = None if whole else (skipped, skipped + stop - start)
        return Factored(self.probes.of(first, last + 1), self.decoder, part)

    def fitting(self, info: OracleInfo, most: int) -> int:
        rows = max(1, min(len(self), most, info.row_limit or info.max_rows))
        if self.part is None:
            point, row = self.probes.locate(rows - 1)
            if row + 1 < self.probes.rows_of(point):
                rows = rows - row - 1 or rows  # whole points, so that none is sent twice
        while rows > 1 and info.body_limit and _bytes(self.take(0, rows)) + HEADER_BYTES > info.body_limit:
            rows = max(1, rows // 2)
        return rows

    def encode(self, output: str = protocol.OUTPUT_NAME) -> codec.Encoded:
        parameters: dict[str, Any] = {probes.DIFFERENCE_PARAMETER: self.probes.difference}
        if self.part is not None:
            parameters[probes.ROWS_PARAMETER] = list(self.part)
        if self.decoder is None:
            parameters[protocol.CLAMP_PARAMETER] = True
        else:
            parameters[protocol.DECODER_PARAMETER] = self.decoder
        return codec.encode_request(self.probes.inputs(), outputs=(output,), parameters=parameters)

    def answered(self, classes: int) -> tuple[int, ...]:
        uniform = self.part is None and self.probes.counts is None
        return (self.probes.n, self.probes.p, classes) if uniform else (len(self), classes)


def _bytes(question: Factored) -> int:
    return sum(values.nbytes for values in question.probes.inputs().values())
