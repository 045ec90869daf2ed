"""A decoder as data: what a client registers with an oracle, so that queries may be made in its latent.

    f'(z) = f(Dec(z))    the decoder merged into the black box (Zhang et al., ICLR 2022, section 4)

Its file is one safetensors byte string: the specification as JSON in the metadata, under `decoder`, and float32 weights
named as those of the `nn.Sequential` that the specification builds. Neither holds code, and reading them runs none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from shared.models.autoencoder import Autoencoder
from shared.models.layers import Activation, Flatten, Layer, LayerError, Shape, Unflatten

METADATA: Final = "decoder"
MAX_HEADER_BYTES: Final = 256 * 1024  # of the safetensors header, specification included
_ID_DIGITS = 32
_LENGTH_BYTES = 8  # the header's length, little-endian, at the start of the file


class DecoderError(ValueError):
    """This is no decoder; the message says why."""


class UnreadableDecoder(DecoderError):
    """The bytes are not a decoder's file: not safetensors, without a specification, or with other tensors than its."""


class UnacceptableWeights(DecoderError):
    """A weight is not finite."""


@dataclass(frozen=True)
class Cost:
    """What a decoder takes, by arithmetic on its specification.

    Attributes:
        weight_bytes: of its float32 weights.
        activations: most elements in memory at once for one row: a layer's input, output and workspace.
        multiply_adds: of one row.
    """

    weight_bytes: int
    activations: int
    multiply_adds: int


class DecoderSpec(BaseModel):
    """Latents [n, latent] -> images [n, *image_shape] in [0, 1]: the last layer that computes is a sigmoid or a
    clamp."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent: PositiveInt
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    layers: tuple[Layer, ...]

    @model_validator(mode="after")
    def _maps_latents_to_images(self) -> DecoderSpec:
        given, _, _ = _walk(self)
        if given != self.image_shape:
            raise ValueError(f"the layers give rows {list(given)}, and image_shape is {list(self.image_shape)}")
        # A reshaping moves values and changes none.
        last = next((layer for layer in reversed(self.layers) if not isinstance(layer, Flatten | Unflatten)), None)
        if not (isinstance(last, Activation) and last.kind in ("sigmoid", "clamp")):
            raise ValueError("the last layer that computes must be a sigmoid or a clamp, so that pixels are in [0, 1]")
        return self

    def cost(self) -> Cost:
        """What it takes to run; nothing is built to find out."""
        return _walk(self)[1]

    def tensors(self) -> dict[str, Shape]:
        """Shapes of its weights by name, as in the state dict of `build(layers)`."""
        return _walk(self)[2]


def _walk(spec: DecoderSpec) -> tuple[Shape, Cost, dict[str, Shape]]:
    shape: Shape = (spec.latent,)
    tensors: dict[str, Shape] = {}
    activations = spec.latent
    multiply_adds = 0
    for i, layer in enumerate(spec.layers):
        try:
            traced = layer.trace(shape)
        except LayerError as error:
            raise ValueError(f"layer {i}: {error}") from None
        tensors |= {f"{i}.{name}": weight for name, weight in traced.weights.items()}
        activations = max(activations, math.prod(shape) + math.prod(traced.shape) + traced.workspace)
        multiply_adds += traced.multiply_adds
        shape = traced.shape
    weight_bytes = 4 * sum(math.prod(weight) for weight in tensors.values())
    return shape, Cost(weight_bytes, activations, multiply_adds), tensors


def decoder_of(autoencoder: Autoencoder) -> tuple[DecoderSpec, dict[str, Tensor]]:
    """The decoder of an autoencoder, and its weights as they are now.

    Raises:
        DecoderError: it does not end in a sigmoid or a clamp, or gives images of another shape than the autoencoder
            says.
    """
    whole = autoencoder.spec
    try:
        spec = DecoderSpec(latent=whole.latent, image_shape=whole.image_shape, layers=whole.decoder)
    except ValidationError as error:
        raise DecoderError(_first(error)) from None
    return spec, {name: tensor.detach().cpu() for name, tensor in autoencoder.decoder.state_dict().items()}


def write(spec: DecoderSpec, state: Mapping[str, Tensor]) -> bytes:
    """The file of a decoder; the same bytes for the same decoder.

    Args:
        spec: what it is.
        state: its weights, float32, as `build(spec.layers).state_dict()` names them.

    Raises:
        DecoderError: `state` is not of `spec`.
        UnacceptableWeights: a weight is not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    _check_names(spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise DecoderError(f"the weight '{name}' is {tensor.dtype}: it must be float32")
    _check_finite(tensors)
    return safetensors.torch.save(tensors, {METADATA: spec.model_dump_json()})


def read_spec(content: bytes | bytearray | memoryview) -> DecoderSpec:
    """The specification in a decoder's file; of the weights, only what the header says of them is checked.

    Raises:
        UnreadableDecoder: as its name says.
    """
    header = _header(memoryview(content))
    metadata = header.pop("__metadata__", None)
    text = metadata.get(METADATA) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise UnreadableDecoder(f"the file's metadata has no '{METADATA}': it holds the specification as JSON")
    try:
        spec = DecoderSpec.model_validate_json(text.encode())
    except ValidationError as error:
        raise UnreadableDecoder(f"the specification is not of a decoder: {_first(error)}") from None
    except UnicodeEncodeError:  # JSON can escape half a character
        raise UnreadableDecoder("the specification is not of a decoder: it is no text") from None
    shapes: dict[str, Shape] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") != "F32":
            raise UnreadableDecoder(f"the weight {name!r} is not float32 (dtype F32)")
        shape = entry.get("shape")
        shapes[name] = tuple(shape) if isinstance(shape, list) else ()
    _check_names(spec, shapes)
    return spec


def read(content: bytes | bytearray | memoryview) -> tuple[DecoderSpec, dict[str, Tensor]]:
    """A decoder and its weights from its file; takes as much memory again as the file, and no more.

    Raises:
        UnreadableDecoder: as its name says.
        UnacceptableWeights: a weight is not finite.
    """
    spec = read_spec(content)
    try:
        # It sees to it that the tensors' bytes neither overlap nor leave gaps, and that there are as many as declared.
        tensors = safetensors.torch.load(bytes(content))
    except SafetensorError as error:
        raise UnreadableDecoder(f"the file cannot be read as safetensors: {error}") from None
    _check_finite(tensors)
    return spec, tensors


def decoder_id(spec: DecoderSpec, tensors: Mapping[str, Tensor]) -> str:
    """The name of a decoder: the first 32 hexadecimal digits of SHA-256 over specification and weights.

    Of the specification as compact JSON, a zero byte, and the weights' little-endian bytes sorted by name, so that it
    does not depend on how a file arranges them.
    """
    digest = hashlib.sha256(spec.model_dump_json().encode() + b"\0")
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()[:_ID_DIGITS]


def _header(content: memoryview) -> dict[str, Any]:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    if len(content) < _LENGTH_BYTES or length > len(content) - _LENGTH_BYTES:
        raise UnreadableDecoder("the file is no safetensors file, or cut short: its header is longer than the file")
    if length > MAX_HEADER_BYTES:
        raise UnreadableDecoder(f"the file's header has {length} bytes: at most {MAX_HEADER_BYTES}")
    try:
        header = json.loads(
            bytes(content[_LENGTH_BYTES : _LENGTH_BYTES + length]).decode(), object_pairs_hook=_without_doubles
        )
    except (ValueError, RecursionError) as error:
        raise UnreadableDecoder(f"the file's header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise UnreadableDecoder("the file's header is no JSON object")
    return header


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Which of two values a reader takes is its own choice; ours and safetensors' must be the same.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def _check_names(spec: DecoderSpec, shapes: Mapping[str, Shape]) -> None:
    expected = spec.tensors()
    for name in sorted(expected.keys() - shapes.keys())[:1]:
        raise UnreadableDecoder(f"the weight '{name}' {list(expected[name])} is missing")
    for name in sorted(shapes.keys() - expected.keys())[:1]:
        raise UnreadableDecoder(f"the specification has no weight {name!r}")
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise UnreadableDecoder(f"the weight '{name}' has shape {list(shape)}, not {list(expected[name])}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise UnacceptableWeights(f"the weight '{name}' holds values that are not finite")


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
