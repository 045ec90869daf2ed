"""Decoders that clients registered: latents in, images for the oracle out. In memory, and private to each client.

A decoder is data (`shared.models.decoder`). What it may take is bounded before anything is built of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from oracle_server.engines import VaryingAnswers, build_block_engine
from oracle_server.engines.modules import MOST
from oracle_server.rows import Float32
from oracle_server.settings import Settings
from shared.models.decoder import (
    DecoderError,
    DecoderSpec,
    UnacceptableWeights,
    decoder_id,
    read,
    read_spec,
)
from shared.models.layers import build
from shared.wire import protocol
from shared.wire.errors import DecodersNotAllowed, DecoderUnknown, MalformedRequest, TooLarge, UnacceptableValues

_THREAD_ELEMENTS = 2**22  # of activations that one thread holds at once, where more than one row is in its block
_ANCHOR, _ANCHOR_MULTIPLY_ADDS = 16, 2**29  # rows, and multiply-adds of a block: some 20 ms of a core
_MEASURE_S = 0.3  # for finding the block sizes that give the same bits; the engine's threads do it between batches


class Decoder:
    """Dec: latents float32 [n, latent] -> images float32 [n, *image_shape] in [0, 1].

    A row's image has the same bits whatever it is decoded with (`oracle_server.engines`).

    Attributes:
        id: 32 hexadecimal digits, of its content.
        latent: d.
        image_shape: (c, h, w).
        bytes: of its weights.
        block: rows computed at once, by all threads together.

    Raises:
        MalformedRequest: torch cannot compute it.
        UnacceptableValues: it gives other images of the same latents from one time to the next.
    """

    def __init__(self, spec: DecoderSpec, tensors: dict[str, Tensor]) -> None:
        cost = spec.cost()
        self.id = decoder_id(spec, tensors)
        self.latent = spec.latent
        self.image_shape = spec.image_shape
        self.bytes = cost.weight_bytes
        most = max(1, min(MOST, _THREAD_ELEMENTS // cost.activations))
        # By arithmetic and not by the clock: registered again, after a restart say, it gives the same bits again.
        anchor = 1
        while 2 * anchor <= min(most, _ANCHOR) and 2 * anchor * cost.multiply_adds <= _ANCHOR_MULTIPLY_ADDS:
            anchor *= 2
        try:
            self._engine = build_block_engine(
                _module(spec, tensors), (spec.latent,), most=most, budget_s=_MEASURE_S, anchor=anchor
            )
        except VaryingAnswers as error:
            raise UnacceptableValues(f"{error}: it was not registered") from None
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise MalformedRequest(f"the decoder cannot be computed: {reason}; it was not registered") from None
        self.block = self._engine.block

    def __call__(self, latents: Float32) -> Float32:
        """Images of latents; called in the thread that computes.

        Raises:
            UnacceptableValues: an image is not finite, which large weights or latents can make it; carries the `row`.
        """
        if not len(latents):
            return np.empty((0, *self.image_shape), np.float32)
        # torch only reads, but warns of arrays that it could not write to, such as views of a request's bytes.
        writable = np.require(latents, np.float32, ("C", "W", "A"))
        images: Float32 = self._engine(torch.from_numpy(writable)).numpy()
        # A sigmoid's values, and a clamp's, are in [0, 1] or not numbers, and one NaN makes the sum one.
        if np.isnan(images.sum(dtype=np.float64)):
            row = int(np.isnan(images).reshape(len(images), -1).any(1).argmax())
            raise UnacceptableValues(
                f"decoder {self.id} makes an image that is not finite of a latent (see `row`); nothing was charged",
                row=row,
            )
        return images


class Store(Protocol):
    """Where several servers keep the decoders' files: see `decoder_store`."""

    def keep(self, client_id: int, name: str, content: bytes, size: int) -> None: ...

    def find(self, client_id: int, name: str) -> bytes | None: ...

    def names(self, client_id: int) -> list[str]: ...

    def forget(self, client_id: int, name: str) -> bool: ...

    def close(self) -> None: ...


class Decoders:
    """Who registered which decoder; used from any thread.

    Each client holds so many, and all together so many and so many bytes of weights; beyond that, those that were
    used least recently go: the client's own first. A request that has a decoder in hand keeps it.

    Args:
        settings: the limits.
        image_shape: of the oracle's images.
        store: shared with other servers; what is not in memory is looked for there, and built again from its file.
            Then `Unavailable` may be raised wherever a decoder is asked for.
    """

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int], store: Store | None = None) -> None:
        self._settings = settings
        self._image_shape = image_shape
        self._store = store
        self._fetching = threading.Lock()
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[int, str], Decoder] = OrderedDict()  # the least recently used first

    def announced(self) -> dict[str, Any]:
        """Parameters for the model's metadata; none where decoders are not allowed."""
        limits = self._settings
        if not limits.allow_decoders:
            return {}
        return {
            protocol.DECODERS_PARAMETER: True,
            protocol.MAX_DECODER_BYTES_PARAMETER: limits.max_decoder_bytes,
            protocol.MAX_DECODER_LAYERS_PARAMETER: limits.max_decoder_layers,
            protocol.MAX_DECODER_ACTIVATIONS_PARAMETER: limits.max_decoder_activations,
            protocol.MAX_DECODER_MULTIPLY_ADDS_PARAMETER: limits.max_decoder_multiply_adds,
            protocol.MAX_CLIENT_DECODERS_PARAMETER: limits.max_client_decoders,
        }

    def check_allowed(self) -> None:
        """Raise `DecodersNotAllowed` where the server was not started with --allow-decoders."""
        if not self._settings.allow_decoders:
            raise DecodersNotAllowed(
                "this server was not started with --allow-decoders: query with images, or ask the operator"
            )

    def register(self, client_id: int, content: bytes | bytearray | memoryview) -> tuple[Decoder, bool]:
        """Read and hold a client's decoder; whether it is new to the client. It is the caller's to run this off the
        event loop.

        Raises:
            DecodersNotAllowed: decoders are off.
            MalformedRequest: not a decoder's file, or not one that gives this oracle's images.
            TooLarge: beyond a limit; carries `limit` and its value.
            UnacceptableValues: a weight is not finite.
        """
        self.check_allowed()
        decoder, new = self._hold(client_id, content)
        if self._store is not None:
            self._store.keep(client_id, decoder.id, bytes(content), decoder.bytes)
        return decoder, new

    def get(self, client_id: int, name: str) -> Decoder:
        """A client's own decoder by its id; the client's most recently used from now on.

        Raises:
            DecodersNotAllowed: decoders are off.
            DecoderUnknown: this client has none of this id.
        """
        self.check_allowed()
        decoder = self._in_memory(client_id, name) or self._fetch(client_id, name)
        if decoder is None:
            raise self._unknown(name)
        return decoder

    def of(self, client_id: int) -> list[Decoder]:
        """A client's own decoders, the least recently used first. Raises `DecodersNotAllowed`."""
        self.check_allowed()
        if self._store is not None:
            found = [self._in_memory(client_id, n) or self._fetch(client_id, n) for n in self._store.names(client_id)]
            return [decoder for decoder in found if decoder is not None]
        with self._lock:
            return [decoder for (owner, _), decoder in self._held.items() if owner == client_id]

    def delete(self, client_id: int, name: str) -> None:
        """Let go of a client's own decoder. Raises `DecodersNotAllowed` and `DecoderUnknown`, as `get` does.

        Another server that holds it in memory still knows it until others push it out: it answers its owner only.
        """
        self.check_allowed()
        kept = self._store is not None and self._store.forget(client_id, name)
        with self._lock:
            if self._held.pop((client_id, name), None) is None and not kept:
                raise self._unknown(name)

    def close(self) -> None:
        """Let go of the store."""
        if self._store is not None:
            self._store.close()

    def _in_memory(self, client_id: int, name: str) -> Decoder | None:
        with self._lock:
            decoder = self._held.get((client_id, name))
            if decoder is not None:
                self._held.move_to_end((client_id, name))
            return decoder

    def _fetch(self, client_id: int, name: str) -> Decoder | None:
        """What another server was given."""
        if self._store is None:
            return None
        with self._fetching:  # requests that come together build it once
            held = self._in_memory(client_id, name)
            content = None if held is not None else self._store.find(client_id, name)
            return held if content is None else self._hold(client_id, content)[0]

    def _hold(self, client_id: int, content: bytes | bytearray | memoryview) -> tuple[Decoder, bool]:
        """Read, check and keep in memory; whether it is new there."""
        try:
            spec = read_spec(content)
            self._check(spec, len(content))
            weights = read(content)[1]
        except UnacceptableWeights as error:
            raise UnacceptableValues(f"{error}: it was not registered") from None
        except DecoderError as error:
            raise MalformedRequest(f"{error}: send a decoder's file (docs/decoders.md)") from None
        key = (client_id, decoder_id(spec, weights))
        with self._lock:
            known = self._held.get(key)
        decoder = known or Decoder(spec, weights)  # its engine is measured, which takes a while
        with self._lock:
            self._held[key] = decoder
            self._held.move_to_end(key)
            self._evict(client_id)
        return decoder, known is None

    def _check(self, spec: DecoderSpec, size: int) -> None:
        if spec.image_shape != self._image_shape:
            raise MalformedRequest(
                f"the decoder gives images {list(spec.image_shape)}, and this oracle takes {list(self._image_shape)}"
            )
        cost, limits = spec.cost(), self._settings
        for what, value, name in (
            ("bytes", size, "max_decoder_bytes"),
            ("layers", len(spec.layers), "max_decoder_layers"),
            ("activations of a row in memory at once", cost.activations, "max_decoder_activations"),
            ("multiply-adds of a row", cost.multiply_adds, "max_decoder_multiply_adds"),
        ):
            most = getattr(limits, name)
            if value > most:
                raise TooLarge(f"the decoder has {value} {what}: at most {most}", limit=name, **{name: most})

    def _evict(self, client_id: int) -> None:
        # The last one is the decoder that was just registered: it stays, whatever its size.
        own = [key for key in self._held if key[0] == client_id]
        for key in own[: max(0, len(own) - self._settings.max_client_decoders)]:
            del self._held[key]
        total = sum(decoder.bytes for decoder in self._held.values())
        while len(self._held) > 1 and (
            len(self._held) > self._settings.max_decoders or total > self._settings.max_decoders_bytes
        ):
            total -= self._held.popitem(last=False)[1].bytes

    @staticmethod
    def _unknown(name: str) -> DecoderUnknown:
        return DecoderUnknown(
            f"you have no decoder {name!r} here: the least recently used go first, and those that are kept in memory "
            f"are gone after a restart; register it (again) with POST {protocol.DECODERS_ROUTE}"
        )


def _module(spec: DecoderSpec, tensors: dict[str, Tensor]) -> nn.Module:
    # On the meta device nothing is allocated or drawn; the weights that were read take the places.
    with torch.device("meta"):
        module = build(spec.layers)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)
