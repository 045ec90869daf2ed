"""Any server of the Open Inference Protocol v2: tensor names and shapes as its metadata says, images as it takes them.

Source: the Open Inference Protocol specification, "Inference Protocol, HTTP/REST" and "Binary Tensor Data Extension".
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from defender_client.endpoint import Datatype, Layout, V2Endpoint
from defender_client.errors import ConfigError
from defender_client.oracle import OracleInfo
from defender_client.oracle_client.connection import Connection
from defender_client.paying import Paying
from defender_client.presenting import as_scores, laid_out
from shared.wire import codec, protocol
from shared.wire.errors import MalformedRequest, MethodNotAllowed, NotFound, UnexpectedAnswer

_SEVERAL_CHANNELS = (1, 3, 4)


class _Tensor(BaseModel):
    name: str
    datatype: str
    shape: tuple[int, ...]


class _Metadata(BaseModel):
    """What servers say of a model; some leave out, or send null for, what is not known."""

    model_config = ConfigDict(extra="ignore")

    inputs: tuple[_Tensor, ...] | None = None
    outputs: tuple[_Tensor, ...] | None = None
    parameters: dict[str, Any] | None = None


class _Server(BaseModel):
    extensions: tuple[str, ...] | None = Field(default=None)


@dataclass(frozen=True)
class _Settled:
    """How this model is asked."""

    info: OracleInfo
    input: str
    output: str | None
    datatype: str
    layout: Layout
    binary: bool


class ForeignV2:
    """An `Asker` for a model behind the protocol.

    Args:
        endpoint: the description.
        connection: to its server; closed with this.
    """

    def __init__(self, endpoint: V2Endpoint, connection: Connection) -> None:
        self._endpoint, self._connection = endpoint, connection
        version = f"/versions/{endpoint.version}" if endpoint.version else ""
        self._route = f"/v2/models/{endpoint.model}{version}"
        self._lock = threading.Lock()
        self._settled: _Settled | None = None

    @property
    def info(self) -> OracleInfo:
        """Shapes and limits; ConfigError where neither metadata nor description says enough."""
        return self._how().info

    def scores(self, images: NDArray[np.float32], paying: Paying) -> NDArray[np.float32]:
        """See `Asker`."""
        how, said = self._how(), self._endpoint
        values = laid_out(images, how.layout, how.datatype, said.mean, said.std)
        outputs = () if how.output is None else (how.output,)
        encoded = codec.encode_request({how.input: values}, outputs=outputs, binary=how.binary)
        headers = {"Content-Length": str(encoded.size)}
        if encoded.json_length is None:
            headers["Content-Type"] = "application/json"
        else:
            headers["Content-Type"] = "application/octet-stream"
            headers[protocol.JSON_LENGTH_HEADER] = str(encoded.json_length)
        response = self._connection.post_paid(f"{self._route}/infer", encoded, headers, paying)
        length = response.headers.get(protocol.JSON_LENGTH_HEADER)
        try:
            answer = codec.decode_response(response.content, int(length) if length else None)
        except (MalformedRequest, ValueError) as error:
            raise UnexpectedAnswer(f"{said.name}: the answer cannot be read: {error}") from None
        output = how.output if how.output is not None else next(iter(answer.outputs), "")
        if output not in answer.outputs:
            raise UnexpectedAnswer(f"{said.name}: the answer has no output '{output}', but {list(answer.outputs)}")
        return as_scores(answer.outputs[output], len(images), how.info.classes, how.info.scores)

    def stop_waiting(self) -> None:
        """See `Asker`."""
        self._connection.stop_waiting()

    def close(self) -> None:
        """See `Asker`."""
        self._connection.close()

    def _how(self) -> _Settled:
        with self._lock:
            if self._settled is None:
                self._settled = settle(self._endpoint, self._metadata(), self._extensions())
            return self._settled

    def _metadata(self) -> _Metadata:
        try:
            content = self._connection.get(self._route).content
        except NotFound:
            raise ConfigError(
                f"{self._endpoint.url} has no model '{self._endpoint.model}': see --endpoint model=NAME"
            ) from None
        try:
            return _Metadata.model_validate_json(content)
        except ValidationError as error:
            raise UnexpectedAnswer(
                f"{self._endpoint.name} did not answer as expected: {error.errors()[0]['msg']}"
            ) from None

    def _extensions(self) -> Sequence[str]:
        if self._endpoint.binary is not None:
            return ()  # nobody asks
        try:
            return _Server.model_validate_json(self._connection.get("/v2").content).extensions or ()
        except (NotFound, MethodNotAllowed, UnexpectedAnswer, ValidationError):
            return ()


def settle(endpoint: V2Endpoint, metadata: _Metadata, extensions: Sequence[str]) -> _Settled:
    """How to ask a model: as the description says, else as the metadata says.

    Raises:
        ConfigError: neither says enough; the message says what to give.
    """
    image = _chosen(endpoint.input, metadata.inputs or (), "input", endpoint)
    answer = _chosen(endpoint.output, metadata.outputs or (), "output", endpoint)
    if image is None and endpoint.input is None:
        raise ConfigError(f"{endpoint.name} does not say what its input is called: name it by --input NAME")
    datatype = endpoint.datatype or (image.datatype if image is not None else "FP32")
    if datatype not in get_args(Datatype):
        raise ConfigError(
            f"{endpoint.name}: input '{image.name if image else ''}' is {datatype}, and images are sent as "
            f"{', '.join(get_args(Datatype))}"
        )
    if datatype == "UINT8" and endpoint.normalises:
        raise ConfigError(f"{endpoint.name}: its input is UINT8, the pixels themselves: leave mean and std out")
    dims = image.shape if image is not None else ()
    layout, shape = _geometry(endpoint, dims)
    classes = endpoint.classes
    if classes is None and answer is not None and len(answer.shape) == 2 and answer.shape[-1] >= 1:
        classes = answer.shape[-1] if endpoint.scores != "label" or answer.shape[-1] > 1 else None
    if classes is None:
        raise ConfigError(f"{endpoint.name} does not say how many classes there are: give --endpoint classes=N")
    # A first dimension that is fixed is a batch of that many; most servers write -1.
    rows = min(endpoint.rows, dims[0]) if len(dims) in (2, 4) and dims[0] > 0 else endpoint.rows
    return _Settled(
        info=OracleInfo(image_shape=shape, classes=classes, max_rows=rows, scores=endpoint.scores),
        input=image.name if image is not None else endpoint.input or "",
        output=answer.name if answer is not None else endpoint.output,
        datatype=datatype,
        layout=layout,
        binary=protocol.BINARY_EXTENSION in extensions if endpoint.binary is None else endpoint.binary,
    )


def _chosen(name: str | None, tensors: Sequence[_Tensor], what: str, endpoint: V2Endpoint) -> _Tensor | None:
    """The tensor of that name, or the only one; None where the metadata does not say."""
    if not tensors:
        return None
    names = ", ".join(tensor.name for tensor in tensors)
    if name is None:
        if len(tensors) > 1:
            raise ConfigError(f"{endpoint.name} has several {what}s ({names}): choose one by --{what} NAME")
        return tensors[0]
    found = next((tensor for tensor in tensors if tensor.name == name), None)
    if found is None:
        raise ConfigError(f"{endpoint.name} has no {what} '{name}': it has {names}")
    return found


def _geometry(endpoint: V2Endpoint, dims: tuple[int, ...]) -> tuple[Layout, tuple[int, int, int]]:
    """The layout, and (c, h, w)."""
    layout = endpoint.layout or _layout(endpoint, dims)
    shape = endpoint.shape
    if shape is None and len(dims) == 4 and layout != "flat":
        c, h, w = (dims[1], dims[2], dims[3]) if layout == "nchw" else (dims[3], dims[1], dims[2])
        shape = (c, h, w) if min(c, h, w) >= 1 else None
    if shape is None:
        raise ConfigError(
            f"{endpoint.name} does not say what images it takes ({list(dims)}): give --endpoint shape=[C,H,W]"
        )
    c, h, w = shape
    expected = {"nchw": (c, h, w), "nhwc": (h, w, c), "flat": (c * h * w,)}[layout]
    if dims and not (
        len(dims) == len(expected) + 1 and all(a in (-1, b) for a, b in zip(dims[1:], expected, strict=True))
    ):
        raise ConfigError(
            f"{endpoint.name} takes {list(dims)}, which is not [-1, {', '.join(map(str, expected))}]: images "
            f"{list(shape)} as {layout}; give --endpoint shape=[C,H,W] and --endpoint layout=nchw, nhwc or flat"
        )
    return layout, shape


def _layout(endpoint: V2Endpoint, dims: tuple[int, ...]) -> Layout:
    if len(dims) == 2:
        return "flat"
    if len(dims) == 4:
        first, last = dims[1] in _SEVERAL_CHANNELS, dims[3] in _SEVERAL_CHANNELS
        if first != last:
            return "nchw" if first else "nhwc"
        raise ConfigError(
            f"{endpoint.name} takes {list(dims)}: say by --endpoint layout=nchw or nhwc where the channels are"
        )
    if endpoint.shape is None or dims:
        raise ConfigError(
            f"{endpoint.name} takes {list(dims)}: give --endpoint shape=[C,H,W] and --endpoint layout=nchw, nhwc "
            "or flat"
        )
    return "nchw"
