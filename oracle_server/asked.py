"""What a request asks about: its inputs, read into rows for the classifier. Whatever can be refused is refused here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from oracle_server.factored import DecodedRows, Given, Part, PixelRows, Points
from oracle_server.oracle import Oracle
from oracle_server.rows import DenseRows, Float32, Rows
from shared.wire import probes, protocol
from shared.wire.codec import InferRequest
from shared.wire.errors import MalformedRequest


class Decoder(Protocol):
    """A client's decoder: latents float32 [n, latent] -> images float32 [n, c, h, w] in [0, 1]."""

    @property
    def latent(self) -> int:
        """d, the values of a latent."""

    def __call__(self, latents: Float32) -> Float32: ...


def read_rows(
    request: InferRequest,
    oracle: Oracle,
    check_rows: Callable[[int], None],
    find_decoder: Callable[[str], Decoder],
) -> Rows:
    """The rows that a request stands for, in one of the forms of `docs/wire.md`.

    Args:
        request: as it was decoded.
        oracle: who answers.
        check_rows: refuses more rows than are answered at once.
        find_decoder: the caller's decoder of this id.

    Raises:
        MalformedRequest, TooLarge, UnacceptableValues, NotFound: as their names say; nothing was charged.
    """
    if protocol.INPUT_NAME in request.inputs:
        return _images(request, oracle, check_rows)
    if probes.BASE in request.inputs:
        return _probes(request, oracle, check_rows, find_decoder)
    if protocol.LATENTS_NAME in request.inputs:
        return _latents(request, check_rows, find_decoder)
    given = ", ".join(sorted(request.inputs))
    raise MalformedRequest(f"send '{protocol.INPUT_NAME}', '{probes.BASE}' or '{protocol.LATENTS_NAME}', not {given}")


def _images(request: InferRequest, oracle: Oracle, check_rows: Callable[[int], None]) -> Rows:
    _only_input(request, protocol.INPUT_NAME)
    _float32(request, protocol.INPUT_NAME)
    images = request.inputs[protocol.INPUT_NAME]
    if images.ndim:
        check_rows(len(images))
    oracle.check(images)
    return DenseRows(images)


def _probes(
    request: InferRequest,
    oracle: Oracle,
    check_rows: Callable[[int], None],
    find_decoder: Callable[[str], Decoder],
) -> Rows:
    decoder = _decoder(request, find_decoder)
    d = int(np.prod(oracle.image_shape)) if decoder is None else decoder.latent
    asked = probes.read(request.inputs, request.datatypes, request.parameters, d)
    part = probes.read_range(request.parameters, len(asked))
    start, stop = part or (0, len(asked))
    check_rows(stop - start)
    # Points of different numbers of rows have no common axis.
    answered = (asked.n, asked.p) if part is None and asked.counts is None else (stop - start,)
    points: Points = Part(asked, start, stop)
    clamp = _clamp(request)
    if decoder is not None:
        if clamp:
            raise MalformedRequest(f"parameter '{protocol.CLAMP_PARAMETER}' is for pixels, and these are latents")
        return DecodedRows(points, decoder, answered=answered)
    rows = PixelRows(points, oracle.image_shape, clamp=clamp, answered=answered)
    rows.check()
    return rows


def _latents(request: InferRequest, check_rows: Callable[[int], None], find_decoder: Callable[[str], Decoder]) -> Rows:
    _only_input(request, protocol.LATENTS_NAME)
    decoder = _decoder(request, find_decoder)
    if decoder is None:
        raise MalformedRequest(f"'{protocol.LATENTS_NAME}' need the parameter '{protocol.DECODER_PARAMETER}'")
    _float32(request, protocol.LATENTS_NAME)
    latents = request.inputs[protocol.LATENTS_NAME]
    if latents.ndim != 2 or latents.shape[1] != decoder.latent or not len(latents):
        raise MalformedRequest(
            f"'{protocol.LATENTS_NAME}' is {list(latents.shape)}: send [n, {decoder.latent}] with n >= 1"
        )
    check_rows(len(latents))
    probes.check_finite(protocol.LATENTS_NAME, latents)
    return DecodedRows(Given(latents), decoder, answered=(len(latents),))


def _only_input(request: InferRequest, name: str) -> None:
    if set(request.inputs) != {name}:
        others = ", ".join(sorted(set(request.inputs) - {name}))
        raise MalformedRequest(f"'{name}' comes alone, and not with {others}")


def _float32(request: InferRequest, name: str) -> None:
    if request.datatypes[name] != "FP32":
        raise MalformedRequest(f"{name} are {request.datatypes[name]}: send datatype FP32")


def _decoder(request: InferRequest, find_decoder: Callable[[str], Decoder]) -> Decoder | None:
    name = request.parameters.get(protocol.DECODER_PARAMETER)
    if name is None:
        return None
    if not isinstance(name, str):
        raise MalformedRequest(f"parameter '{protocol.DECODER_PARAMETER}' is a decoder's id, not {name!r}")
    return find_decoder(name)


def _clamp(request: InferRequest) -> bool:
    clamp = request.parameters.get(protocol.CLAMP_PARAMETER, False)
    if not isinstance(clamp, bool):
        raise MalformedRequest(f"parameter '{protocol.CLAMP_PARAMETER}' must be true or false, not {clamp!r}")
    return clamp
