"""Messages of the wire: validated when built, deaf to fields they do not know, frozen."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from shared.wire import protocol

MESSAGES = [
    protocol.TensorHeader(name="x", shape=(1, 2), datatype="FP32", parameters={"binary_data_size": 8}),
    protocol.RequestedOutput(name="logits", parameters={"binary_data": True}),
    protocol.InferRequestHeader(id="1", inputs=(protocol.TensorHeader(name="x", shape=(), datatype="INT8", data=[1]),)),
    protocol.InferResponseHeader(model_name="classifier", outputs=()),
    protocol.ModelMetadata(
        name="classifier",
        versions=("1",),
        platform="pytorch",
        inputs=(protocol.TensorMetadata(name="images", datatype="FP32", shape=(-1, 3, 32, 32)),),
        outputs=(protocol.TensorMetadata(name="logits", datatype="FP32", shape=(-1, 10)),),
    ),
    protocol.ServerMetadata(name="oracle", version="1", extensions=(protocol.BINARY_EXTENSION,)),
    protocol.BudgetStatement(client="ann", budget=10, spent=3, remaining=7),
    protocol.ChargePage(
        client="ann",
        entries=(protocol.ChargeEntry(seq=1, at="2030-01-01T00:00:00Z", kind="charge", rows=4),),
        next_after=1,
    ),
]
every_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)


@every_message
def test_json_round_trip(message: protocol.Message) -> None:
    assert type(message).model_validate_json(message.model_dump_json()) == message


@every_message
def test_unknown_fields_are_ignored(message: protocol.Message) -> None:
    assert type(message).model_validate({**message.model_dump(), "brand-new": 1}) == message


@every_message
def test_frozen(message: protocol.Message) -> None:
    field = next(iter(type(message).model_fields))
    with pytest.raises(ValidationError):
        setattr(message, field, getattr(message, field))


# Item sizes by the specification.
SIZES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2,
}  # fmt: skip


def test_datatypes_are_the_specification_s() -> None:
    assert {name: dtype.itemsize for name, dtype in protocol.DATATYPES.items()} == SIZES
    for dtype in protocol.DATATYPES.values():
        assert dtype == dtype.newbyteorder("<"), "values travel little-endian"
    kinds = {"B": "b", "U": "u", "I": "i", "F": "f"}
    assert all(dtype.kind == kinds[name[0]] for name, dtype in protocol.DATATYPES.items() if name != "BF16")
    assert protocol.DATATYPES["BF16"] == np.dtype("<u2")


@pytest.mark.parametrize("dimension", [-1, 2**31, True, 1.0, "1", None])
def test_dimensions_are_whole_numbers_of_31_bits(dimension: object) -> None:
    with pytest.raises(ValidationError):
        protocol.TensorHeader.model_validate({"name": "x", "datatype": "FP32", "shape": [dimension]})


def test_names_of_the_wire() -> None:
    assert protocol.INFER_ROUTE == "/v2/models/classifier/infer"
    assert protocol.METADATA_ROUTE == "/v2/models/classifier"
    assert (protocol.INPUT_NAME, protocol.OUTPUT_NAME) == ("images", "logits")
    assert protocol.JSON_LENGTH_HEADER == "Inference-Header-Content-Length"
    assert protocol.BINARY_EXTENSION == "binary_tensor_data"
    assert protocol.BUDGET_ROUTE == "/v1/budget"
