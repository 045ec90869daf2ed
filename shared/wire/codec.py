"""numpy arrays <-> the bytes of Open Inference Protocol v2, binary tensors and JSON both.

A binary body is J bytes of JSON (J in `Inference-Header-Content-Length`) and then the tensors' bytes in the order of
the JSON, little-endian, row-major, unpadded. Reading makes no copy of the tensor bytes: arrays are views of the body.
Whatever cannot be read raises `MalformedRequest` with what was wrong; no other exception leaves `decode_*`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pydantic_core
from numpy.typing import NDArray
from pydantic import ValidationError

from shared.wire import protocol
from shared.wire.errors import MalformedRequest

Buffer = bytes | bytearray | memoryview
Array = NDArray[Any]
M = TypeVar("M", bound=protocol.Message)


@dataclass(frozen=True)
class InferRequest:
    """A request as read: tensors by name, and how each output is wanted.

    Attributes:
        id: echoed in the answer; None if the client gave none.
        inputs: tensors by name, in the order sent. BF16 is widened to float32.
        datatypes: the wire datatype of each input.
        parameters: of the request as a whole; not checked.
        outputs: names asked for; empty means all.
        binary_outputs: per asked output, True for binary, False for JSON.
        binary_default: the same for outputs that were not named.
    """

    id: str | None
    inputs: Mapping[str, Array]
    datatypes: Mapping[str, str]
    outputs: tuple[str, ...] = ()
    binary_outputs: Mapping[str, bool] = field(default_factory=dict)
    binary_default: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def wants_binary(self, output: str) -> bool:
        """Whether `output` is to be answered as bytes."""
        return self.binary_outputs.get(output, self.binary_default)


@dataclass(frozen=True)
class InferResponse:
    """An answer as read: tensors by name."""

    model_name: str
    model_version: str | None
    id: str | None
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Encoded:
    """An encoded message: `chunks` in order are the body; `json_length` is the header's value, None for pure JSON."""

    chunks: tuple[bytes | memoryview, ...]
    json_length: int | None

    @property
    def size(self) -> int:
        """Length of the whole body in bytes."""
        return sum(len(chunk) for chunk in self.chunks)

    def body(self) -> bytes:
        """The body in one piece (a copy)."""
        return b"".join(self.chunks)


def datatype_of(array: Array) -> str:
    """The protocol's name of a numpy dtype; ValueError if it has none."""
    for name, dtype in protocol.DATATYPES.items():
        if name != "BF16" and dtype == array.dtype.newbyteorder("<"):
            return name
    raise ValueError(f"dtype {array.dtype} has no Open Inference Protocol datatype")


# --- writing -----------------------------------------------------------------------------------------------------


def _tensor_bytes(array: Array) -> memoryview:
    """Row-major little-endian bytes of an array; a view where the array already is that."""
    wire = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return memoryview(wire.reshape(-1).view(np.uint8).data)


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def encode_request(
    inputs: Mapping[str, Array],
    *,
    outputs: Sequence[str] = (),
    request_id: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    binary: bool = True,
) -> Encoded:
    """An inference request, tensors in the order given; with `binary` the outputs are asked for as bytes too."""
    tensors, chunks = _encode_tensors(inputs, dict.fromkeys(inputs, binary))
    header: dict[str, Any] = {}
    if request_id is not None:
        header["id"] = request_id
    if parameters:
        header["parameters"] = dict(parameters)
    header["inputs"] = tensors
    if outputs:
        header["outputs"] = [{"name": name, "parameters": {"binary_data": binary}} for name in outputs]
    elif binary:
        header["parameters"] = {**header.get("parameters", {}), "binary_data_output": True}
    return _join(header, chunks)


def encode_response(
    outputs: Mapping[str, Array],
    *,
    binary: Mapping[str, bool],
    request_id: str | None = None,
    model_name: str = protocol.MODEL_NAME,
    model_version: str = protocol.MODEL_VERSION,
) -> Encoded:
    """An inference answer; `binary` says per output whether its values travel as bytes or in the JSON."""
    tensors, chunks = _encode_tensors(outputs, binary)
    header: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        header["id"] = request_id
    header["outputs"] = tensors
    return _join(header, chunks)


def _encode_tensors(
    tensors: Mapping[str, Array], binary: Mapping[str, bool]
) -> tuple[list[dict[str, Any]], list[memoryview]]:
    headers: list[dict[str, Any]] = []
    chunks: list[memoryview] = []
    for name, array in tensors.items():
        header: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype_of(array)}
        if binary[name]:
            chunk = _tensor_bytes(array)
            header["parameters"] = {"binary_data_size": len(chunk)}
            chunks.append(chunk)
        else:
            header["data"] = array.reshape(-1).tolist()
        headers.append(header)
    return headers, chunks


def _join(header: Mapping[str, Any], chunks: Sequence[memoryview]) -> Encoded:
    head = _dump(header)
    return Encoded((head, *chunks), len(head) if chunks else None)


# --- reading -----------------------------------------------------------------------------------------------------


def decode_request(body: Buffer, json_length: int | None) -> InferRequest:
    """Read an inference request.

    Args:
        body: the whole body, uncompressed.
        json_length: value of `Inference-Header-Content-Length`; None if the header was absent (pure JSON).

    Raises:
        MalformedRequest: says which part could not be read and what was expected.
    """
    head, tail = _split(body, json_length)
    header = _validate(protocol.InferRequestHeader, head)
    inputs = _decode_tensors(header.inputs, tail, "input")
    if not inputs:
        raise MalformedRequest("'inputs' is empty: send one tensor under 'inputs'")
    binary: dict[str, bool] = {}
    default = _flag(header.parameters, "binary_data_output", False)
    for output in header.outputs:
        binary[output.name] = _flag(output.parameters, "binary_data", default)
    return InferRequest(
        id=header.id,
        inputs=inputs,
        datatypes={tensor.name: tensor.datatype for tensor in header.inputs},
        outputs=tuple(output.name for output in header.outputs),
        binary_outputs=binary,
        binary_default=default,
        parameters=header.parameters,
    )


def decode_response(body: Buffer, json_length: int | None) -> InferResponse:
    """Read an inference answer; raises `MalformedRequest` where it is not one."""
    head, tail = _split(body, json_length)
    header = _validate(protocol.InferResponseHeader, head)
    return InferResponse(
        header.model_name, header.model_version, header.id, _decode_tensors(header.outputs, tail, "output")
    )


def _split(body: Buffer, json_length: int | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if json_length is None:
        return view, view[:0]
    if not 0 < json_length <= len(view):
        raise MalformedRequest(
            f"{protocol.JSON_LENGTH_HEADER} is {json_length} but the body has {len(view)} bytes: "
            "the header counts the JSON bytes at the start of the uncompressed body"
        )
    return view[:json_length], view[json_length:]


def _validate(message: type[M], head: memoryview) -> M:
    try:
        # jiter bounds the nesting depth, so that a body of brackets cannot exhaust the stack.
        return message.model_validate(pydantic_core.from_json(bytes(head)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the message"
        raise MalformedRequest(f"JSON part: {where}: {first['msg']}") from None
    except ValueError as error:
        raise MalformedRequest(f"the JSON part is not valid JSON: {error}") from None


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise MalformedRequest(f"parameter '{name}' must be true or false, not {value!r}")
    return value


def _decode_tensors(headers: Sequence[protocol.TensorHeader], tail: memoryview, what: str) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    offset = 0
    for header in headers:
        if header.name in tensors:
            raise MalformedRequest(f"{what} '{header.name}' appears twice")
        dtype = protocol.DATATYPES.get(header.datatype)
        if dtype is None:
            known = ", ".join(protocol.DATATYPES)
            raise MalformedRequest(f"{what} '{header.name}': datatype '{header.datatype}' is not one of {known}")
        count = math.prod(header.shape)
        size = header.parameters.get("binary_data_size")
        if size is None:
            array = _from_json(header, dtype, count, what)
        else:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise MalformedRequest(f"{what} '{header.name}': binary_data_size must be a whole number of bytes")
            if size != count * dtype.itemsize:
                raise MalformedRequest(
                    f"{what} '{header.name}': shape {list(header.shape)} of {header.datatype} is "
                    f"{count * dtype.itemsize} bytes, but binary_data_size is {size}"
                )
            if offset + size > len(tail):
                raise MalformedRequest(
                    f"{what} '{header.name}': its {size} bytes are cut short: "
                    f"{len(tail) - offset} bytes follow the JSON"
                )
            array = np.frombuffer(tail, dtype, count, offset) if count else np.empty(0, dtype)
            offset += size
        if header.datatype == "BF16":
            # A bfloat16 is the upper half of a float32.
            array = (array.astype(np.uint32) << 16).view(np.float32)
        try:
            tensors[header.name] = array.reshape(header.shape)
        except ValueError as error:
            raise MalformedRequest(
                f"{what} '{header.name}': shape {list(header.shape)} is impossible: {error}"
            ) from None
    if offset != len(tail):
        raise MalformedRequest(
            f"{len(tail) - offset} bytes follow the last tensor: the sizes do not add up to the body"
        )
    return tensors


def _from_json(header: protocol.TensorHeader, dtype: np.dtype[Any], count: int, what: str) -> Array:
    if header.data is None:
        raise MalformedRequest(f"{what} '{header.name}' has neither 'data' nor 'binary_data_size'")
    if header.datatype == "BF16":
        raise MalformedRequest(f"{what} '{header.name}': BF16 travels only in binary")
    try:
        values = np.asarray(header.data)
    except (ValueError, OverflowError):
        raise MalformedRequest(f"{what} '{header.name}': 'data' is ragged: its rows differ in length") from None
    kinds = {"b": "b", "u": "iu", "i": "iu", "f": "fiu"}[dtype.kind]
    if header.datatype == "UINT64" and values.dtype.kind == "f":
        # numpy reads whole numbers on both sides of 2**63 as float64, which rounds them: keep them as Python's.
        values = np.asarray(header.data, dtype=object)
        kinds = "O" if all(type(value) is int for value in values.flat) else kinds
    if values.size and values.dtype.kind not in kinds:
        raise MalformedRequest(f"{what} '{header.name}': 'data' holds values that are not {header.datatype}")
    if values.size != count:
        raise MalformedRequest(
            f"{what} '{header.name}': shape {list(header.shape)} needs {count} values, 'data' has {values.size}"
        )
    if dtype.kind in "iu" and values.size:
        info = np.iinfo(dtype)
        if int(values.min()) < info.min or int(values.max()) > info.max:
            raise MalformedRequest(f"{what} '{header.name}': 'data' holds values outside {header.datatype}")
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, which the receiver refuses by name
        return values.reshape(-1).astype(dtype)
