"""The codec against fixed bytes, against tritonclient, and against bodies nobody would send in earnest."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.http._utils import _get_inference_request

from shared.wire import codec, protocol
from shared.wire.errors import MalformedRequest

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
NUMERIC = {name: dtype for name, dtype in protocol.DATATYPES.items() if name != "BF16"}
every_datatype = pytest.mark.parametrize("datatype", NUMERIC)
# Reproducible in the suite; raise max_examples and drop derandomize to hunt.
hunt = settings(deadline=None, max_examples=150, derandomize=True, database=None)


def same(read: np.ndarray, sent: np.ndarray) -> None:
    """Equal in dtype (but for byte order), shape and every bit of every value, NaN included."""
    assert read.dtype == sent.dtype.newbyteorder("<")
    assert read.shape == sent.shape
    assert read.tobytes() == sent.astype(read.dtype).tobytes()


def samples(datatype: str) -> np.ndarray:
    """A [2, 3] array with the extremes of `datatype`."""
    dtype = protocol.DATATYPES[datatype]
    if dtype.kind == "b":
        return np.array([[True, False, True], [False, False, True]])
    info: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([[info.min, 0, 1], [info.max, 7, 100]], dtype)


# --- fixed bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_bytes_both_ways(case: dict[str, Any]) -> None:
    body = (GOLDEN / f"{case['name']}.bin").read_bytes()
    tensors = {
        name: np.array(t["values"], protocol.DATATYPES[t["datatype"]]).reshape(t["shape"])
        for name, t in case["tensors"].items()
    }
    binary = {name: t["binary"] for name, t in case["tensors"].items()}

    if case["kind"] == "request":
        all_binary = all(binary.values())
        encoded = codec.encode_request(tensors, outputs=case["outputs"], request_id=case["id"], binary=all_binary)
        request = codec.decode_request(body, case["json_length"])
        read, read_id = request.inputs, request.id
        assert request.outputs == tuple(case["outputs"])
        assert request.wants_binary("logits") is all_binary
        assert dict(request.datatypes) == {name: t["datatype"] for name, t in case["tensors"].items()}
    else:
        encoded = codec.encode_response(tensors, binary=binary, request_id=case["id"])
        response = codec.decode_response(body, case["json_length"])
        read, read_id = response.outputs, response.id
        assert (response.model_name, response.model_version) == ("classifier", "1")

    assert encoded.body() == body
    assert encoded.json_length == case["json_length"]
    assert encoded.size == len(body)
    assert read_id == case["id"]
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        same(read[name], tensor)


# --- tritonclient ------------------------------------------------------------------------------------------------


def triton_input(name: str, array: np.ndarray, datatype: str, binary: bool) -> InferInput:
    return InferInput(name, list(array.shape), datatype).set_data_from_numpy(array, binary_data=binary)


@every_datatype
@pytest.mark.parametrize("binary", [True, False])
def test_what_tritonclient_sends_is_read(datatype: str, binary: bool) -> None:
    array = samples(datatype)
    body, length = InferenceServerClient.generate_request_body([triton_input("images", array, datatype, binary)])
    request = codec.decode_request(body, length)
    assert (length is not None) is binary
    assert request.datatypes["images"] == datatype
    same(request.inputs["images"], array)
    # Without named outputs the client asks for all of them as bytes.
    assert request.wants_binary("logits")


def test_what_tritonclient_asks_for_is_read() -> None:
    first, second = samples("FP32"), samples("INT8")
    body, length = _get_inference_request(
        [triton_input("first", first, "FP32", False), triton_input("second", second, "INT8", True)],
        "id-9",
        [InferRequestedOutput("logits", binary_data=True), InferRequestedOutput("labels", binary_data=False)],
        sequence_id=5,
        sequence_start=True,
        sequence_end=False,
        priority=1,
        timeout=10,
        custom_parameters={"mine": "yes"},
    )
    request = codec.decode_request(body, length)
    assert (request.id, request.outputs) == ("id-9", ("logits", "labels"))
    assert [request.wants_binary(name) for name in ("logits", "labels", "other")] == [True, False, False]
    same(request.inputs["first"], first)
    same(request.inputs["second"], second)


def test_bf16_of_tritonclient_is_widened() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([[0.0, -1.5, 3.140625], [np.inf, 1e38, -1e-38]], ml_dtypes.bfloat16)
    body, length = InferenceServerClient.generate_request_body([triton_input("images", array, "BF16", True)])
    same(codec.decode_request(body, length).inputs["images"], array.astype(np.float32))


@every_datatype
@pytest.mark.parametrize("binary", [True, False])
def test_what_we_answer_is_read_by_tritonclient(datatype: str, binary: bool) -> None:
    array = samples(datatype)
    encoded = codec.encode_response({"logits": array}, binary={"logits": binary}, request_id="id-9")
    result = InferenceServerClient.parse_response_body(encoded.body(), header_length=encoded.json_length)
    same(result.as_numpy("logits"), array)
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("classifier", "1", "id-9")


def test_mixed_answer_is_read_by_tritonclient() -> None:
    sent = {name: samples(name) for name in NUMERIC}
    encoded = codec.encode_response(sent, binary={name: i % 2 == 0 for i, name in enumerate(sent)})
    result = InferenceServerClient.parse_response_body(encoded.body(), header_length=encoded.json_length)
    for name, array in sent.items():
        same(result.as_numpy(name), array)


# --- memory and layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("what", ["request", "response"])
def test_reading_copies_no_tensor(kind: Any, what: str) -> None:
    tensors = {"a": samples("FP32"), "b": samples("UINT8"), "c": np.zeros((1, 2), np.float64)}
    if what == "request":
        encoded = codec.encode_request(tensors)
        body = kind(encoded.body())
        read = codec.decode_request(body, encoded.json_length).inputs
    else:
        encoded = codec.encode_response(tensors, binary=dict.fromkeys(tensors, True))
        body = kind(encoded.body())
        read = codec.decode_response(body, encoded.json_length).outputs
    whole = np.frombuffer(body, np.uint8)
    for name in tensors:
        assert np.shares_memory(read[name], whole)


def test_writing_copies_no_contiguous_tensor() -> None:
    array = samples("FP32")
    encoded = codec.encode_request({"images": array})
    assert np.shares_memory(np.frombuffer(encoded.chunks[1], np.uint8), array)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(3, 2).T,
        np.arange(12, dtype=np.int16)[::2],
        np.array(3.5, np.float32),
        np.empty((0, 3, 2), np.float32),
    ],
    ids=["big-endian", "transposed", "strided", "scalar", "empty"],
)
@pytest.mark.parametrize("binary", [True, False])
def test_layouts(array: np.ndarray, binary: bool) -> None:
    encoded = codec.encode_request({"x": array}, binary=binary)
    same(codec.decode_request(encoded.body(), encoded.json_length).inputs["x"], array)


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "S3", "U3", "O"])
def test_dtypes_without_a_name_are_refused_when_written(dtype: str) -> None:
    with pytest.raises(ValueError, match="no Open Inference Protocol datatype"):
        codec.encode_request({"x": np.empty(2, dtype)})


# --- any shape, any dtype ----------------------------------------------------------------------------------------

shapes = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
arrays = st.sampled_from(sorted(NUMERIC)).flatmap(lambda name: hnp.arrays(NUMERIC[name], shapes))
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
finite_arrays = st.sampled_from(sorted(NUMERIC)).flatmap(
    lambda name: hnp.arrays(
        NUMERIC[name],
        shapes,
        elements=hnp.from_dtype(NUMERIC[name], allow_nan=False, allow_infinity=False) if name[0] == "F" else None,
    )
)


@hunt
@given(tensors=st.dictionaries(names, arrays, min_size=1, max_size=3), request_id=st.none() | names)
def test_binary_round_trip(tensors: dict[str, np.ndarray], request_id: str | None) -> None:
    encoded = codec.encode_request(tensors, request_id=request_id)
    request = codec.decode_request(encoded.body(), encoded.json_length)
    answer = codec.encode_response(tensors, binary=dict.fromkeys(tensors, True), request_id=request_id)
    response = codec.decode_response(answer.body(), answer.json_length)
    assert request.id == response.id == request_id
    assert list(request.inputs) == list(response.outputs) == list(tensors)
    for name, array in tensors.items():
        same(request.inputs[name], array)
        same(response.outputs[name], array)


@hunt
@given(tensors=st.dictionaries(names, finite_arrays, min_size=1, max_size=3), data=st.data())
def test_mixed_round_trip(tensors: dict[str, np.ndarray], data: st.DataObject) -> None:
    encoded = codec.encode_response(tensors, binary={name: data.draw(st.booleans()) for name in tensors})
    response = codec.decode_response(encoded.body(), encoded.json_length)
    for name, array in tensors.items():
        same(response.outputs[name], array)


@pytest.mark.parametrize(
    "data", [[[1, 2], [3, 4]], [1, 2, 3, 4], [[[1], [2], [3], [4]]]], ids=["nested", "flat", "odd"]
)
def test_json_data_nested_or_flat(data: Any) -> None:
    body = tensor_body(shape=[2, 2], data=data)
    same(codec.decode_request(body, None).inputs["x"], np.array([[1, 2], [3, 4]], np.float32))


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT64", [1, 2**63, 2**64 - 1]),
        ("UINT64", [2**64 - 1, 0, 2**53 + 1]),
        ("INT64", [-(2**63), 2**63 - 1, 2**53 + 1]),
    ],
)
def test_json_whole_numbers_are_exact(datatype: str, data: list[int]) -> None:
    read = codec.decode_request(tensor_body(shape=[3], datatype=datatype, data=data), None).inputs["x"]
    assert read.tolist() == data


def test_binary_output_flags() -> None:
    body = json.dumps(
        {
            "parameters": {"binary_data_output": True},
            "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}],
            "outputs": [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}],
        }
    ).encode()
    request = codec.decode_request(body, None)
    assert [request.wants_binary(name) for name in "abc"] == [True, False, True]


def test_unknown_fields_are_ignored() -> None:
    request = codec.decode_request(tensor_body(data=[1, 2], surprise={"deep": [1]}), None)
    assert request.inputs["x"].tolist() == [1, 2]


# --- what nobody would send in earnest ---------------------------------------------------------------------------


def tensor_body(**fields: Any) -> bytes:
    tensor = {"name": "x", "shape": [2], "datatype": "FP32", **fields}
    return json.dumps({"inputs": [tensor]}).encode()


def binary_body(tail: bytes, **fields: Any) -> tuple[bytes, int]:
    head = tensor_body(**{"parameters": {"binary_data_size": 8}, **fields})
    return head + tail, len(head)


GOOD = binary_body(bytes(8))
HUGE = 2**31 - 1
MALFORMED: dict[str, tuple[bytes, int | None]] = {
    "empty": (b"", None),
    "no json": (b"images, please", None),
    "not utf-8": (b'{"inputs": "\xff"}', None),
    "lone surrogate": (b'{"id": "\\ud800", "inputs": []}', None),
    "not an object": (b"[]", None),
    "no inputs": (b"{}", None),
    "empty inputs": (b'{"inputs": []}', None),
    "inputs is null": (b'{"inputs": null}', None),
    "id is a number": (b'{"id": 3, "inputs": []}', None),
    "deep list": (b"[" * 100_000, None),
    "deep object": (b'{"a":' * 100_000, None),
    "deep data": (tensor_body(data=0).replace(b'"data": 0', b'"data": ' + b"[" * 150 + b"]" * 150), None),
    "deep parameters": (tensor_body(parameters={"p": 0}).replace(b"0", b"[" * 9000 + b"]" * 9000), None),
    "shape missing": (b'{"inputs": [{"name": "x", "datatype": "FP32", "data": [1]}]}', None),
    "name missing": (b'{"inputs": [{"shape": [1], "datatype": "FP32", "data": [1]}]}', None),
    "shape is a number": (tensor_body(shape=2, data=[1, 2]), None),
    "negative dimension": (tensor_body(shape=[-2], data=[1, 2]), None),
    "two negative dimensions": (tensor_body(shape=[-1, -2], data=[1, 2]), None),
    "minus one": (tensor_body(shape=[-1], data=[1, 2]), None),
    "bool dimension": (tensor_body(shape=[True, 2], data=[1, 2]), None),
    "float dimension": (tensor_body(shape=[2.0], data=[1, 2]), None),
    "string dimension": (tensor_body(shape=["2"], data=[1, 2]), None),
    "null dimension": (tensor_body(shape=[None], data=[1, 2]), None),
    "dimension over 31 bits": (tensor_body(shape=[2**31], data=[1, 2]), None),
    "dimension of 300 digits": (tensor_body(shape=[10**300], data=[1, 2]), None),
    "dimension of 5000 digits": (tensor_body(shape=[7]).replace(b"7", b"7" * 5000), None),
    "17 dimensions": (tensor_body(shape=[1] * 17, data=[1]), None),
    "huge shape, json": (tensor_body(shape=[HUGE] * 16, data=[1, 2]), None),
    "huge shape, binary": binary_body(bytes(8), shape=[HUGE] * 16),
    "huge empty shape, json": (tensor_body(shape=[0] + [HUGE] * 15, data=[]), None),
    "huge empty shape, binary": binary_body(b"", shape=[0] + [HUGE] * 15, parameters={"binary_data_size": 0}),
    "unknown datatype": (tensor_body(datatype="FP8", data=[1, 2]), None),
    "lower-case datatype": (tensor_body(datatype="fp32", data=[1, 2]), None),
    "BYTES": (tensor_body(datatype="BYTES", data=["a", "b"]), None),
    "BF16 in json": (tensor_body(datatype="BF16", data=[1, 2]), None),
    "datatype is null": (tensor_body(datatype=None, data=[1, 2]), None),
    "no data at all": (tensor_body(), None),
    "data is null": (tensor_body(data=None), None),
    "data is an object": (tensor_body(data={"0": 1}), None),
    "data is a string": (tensor_body(data="12"), None),
    "ragged": (tensor_body(data=[[1], [2, 3]]), None),
    "ragged depth": (tensor_body(data=[1, [2]]), None),
    "strings as numbers": (tensor_body(data=["1", "2"]), None),
    "one string": (tensor_body(data=[1, "2"]), None),
    "null among numbers": (tensor_body(data=[1, None]), None),
    "too few values": (tensor_body(data=[1]), None),
    "too many values": (tensor_body(data=[1, 2, 3]), None),
    "fractions for INT8": (tensor_body(datatype="INT8", data=[1.5, 2]), None),
    "NaN for INT8": (tensor_body(datatype="INT8", data=[float("nan"), 2]), None),
    "out of INT8": (tensor_body(datatype="INT8", data=[128, 0]), None),
    "negative for UINT8": (tensor_body(datatype="UINT8", data=[-1, 0]), None),
    "out of INT64": (tensor_body(datatype="INT64", data=[2**63, 0]), None),
    "negative for UINT64": (tensor_body(datatype="UINT64", data=[-1, 2**63]), None),
    "out of UINT64": (tensor_body(datatype="UINT64", data=[2**64, 0]), None),
    "number of 5000 digits": (tensor_body(data=[7]).replace(b"[7]", b"[" + b"7" * 5000 + b"]"), None),
    "numbers for BOOL": (tensor_body(datatype="BOOL", data=[0, 1]), None),
    "bools for FP32": (tensor_body(data=[True, False]), None),
    "twice the same name": (
        b'{"inputs": [' + b",".join([b'{"name":"x","shape":[1],"datatype":"FP32","data":[1]}'] * 2) + b"]}",
        None,
    ),
    "binary_data_output is a string": (
        b'{"parameters":{"binary_data_output":"yes"},"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}',
        None,
    ),
    "binary_data is a number": (
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}],'
        b'"outputs":[{"name":"y","parameters":{"binary_data":1}}]}',
        None,
    ),
    "size too small": binary_body(bytes(8), parameters={"binary_data_size": 4}),
    "size too large": binary_body(bytes(8), parameters={"binary_data_size": 16}),
    "size negative": binary_body(bytes(8), parameters={"binary_data_size": -8}),
    "size is true": binary_body(b"\0", shape=[1], datatype="UINT8", parameters={"binary_data_size": True}),
    "size is a string": binary_body(bytes(8), parameters={"binary_data_size": "8"}),
    "size is a float": binary_body(bytes(8), parameters={"binary_data_size": 8.0}),
    "size of 300 digits": binary_body(bytes(8), parameters={"binary_data_size": 10**300}),
    "cut short": binary_body(bytes(7)),
    "no tail": binary_body(b""),
    "trailing bytes": binary_body(bytes(9)),
    "trailing bytes after json tensor": (tensor_body(data=[1, 2]) + bytes(4), len(tensor_body(data=[1, 2]))),
    "binary without the header": (GOOD[0], None),
    "size without tail or header": (tensor_body(parameters={"binary_data_size": 8}), None),
    "header length 0": (GOOD[0], 0),
    "header length negative": (GOOD[0], -1),
    "header length too small": (GOOD[0], GOOD[1] - 1),
    "header length too large": (GOOD[0], GOOD[1] + 1),
    "header length beyond the body": (GOOD[0], len(GOOD[0]) + 1),
    "header length huge": (GOOD[0], 10**30),
}


def test_the_good_body_is_good() -> None:
    assert codec.decode_request(*GOOD).inputs["x"].tolist() == [0, 0]


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_request(case: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        codec.decode_request(*MALFORMED[case])
    assert 0 < len(caught.value.detail) < 1000


@pytest.mark.parametrize("case", [c for c, (body, _) in MALFORMED.items() if b'"inputs": [{' in body])
def test_malformed_response(case: str) -> None:
    body, length = MALFORMED[case]
    swapped = body.replace(b'"inputs"', b'"outputs"', 1)
    with pytest.raises(MalformedRequest):
        codec.decode_response(swapped, None if length is None else length + 1)


@pytest.mark.parametrize(
    ("literal", "check"), [("NaN", np.isnan), ("Infinity", np.isposinf), ("-Infinity", np.isneginf)]
)
def test_literals_that_are_not_json_are_read_or_refused(literal: str, check: Any) -> None:
    # The receiver refuses what is not finite by its place; the codec must only not mistake it for a number.
    body = tensor_body(data=[0, 7]).replace(b"7", literal.encode())
    try:
        read = codec.decode_request(body, None).inputs["x"]
    except MalformedRequest:
        return
    assert check(read[1])


def test_numbers_too_large_for_the_datatype_become_infinite() -> None:
    body = tensor_body(datatype="FP16", data=[1e300, -1e300])
    assert np.isinf(codec.decode_request(body, None).inputs["x"]).all()


def decode_both(body: bytes, length: int | None) -> None:
    """Decode as request and as response; anything but MalformedRequest is a failure of the test."""
    for decode in (codec.decode_request, codec.decode_response):
        with contextlib.suppress(MalformedRequest):
            decode(body, length)


@hunt
@given(body=st.binary(max_size=200), length=st.none() | st.integers(-2, 210))
def test_arbitrary_bytes(body: bytes, length: int | None) -> None:
    decode_both(body, length)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
tensor_like = st.fixed_dictionaries(
    {"name": st.sampled_from(["x", "y", ""]), "shape": st.lists(st.integers(-1, 4) | st.just(HUGE), max_size=4)},
    optional={
        "datatype": st.sampled_from([*protocol.DATATYPES, "BYTES"]) | json_values,
        "data": json_values | st.lists(st.integers() | st.floats() | st.booleans(), max_size=6),
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 70) | json_values}),
    },
)


@hunt
@given(tensors=st.lists(tensor_like | json_values, max_size=3), tail=st.binary(max_size=64), data=st.data())
def test_messages_of_nearly_the_right_form(tensors: list[Any], tail: bytes, data: st.DataObject) -> None:
    message = {
        "inputs": tensors,
        "outputs": tensors,
        **data.draw(st.just({}) | st.fixed_dictionaries({"id": json_values})),
    }
    head = json.dumps(message).encode("utf-8", "replace")
    decode_both(head + tail, data.draw(st.sampled_from([len(head), None, len(head) + 1])))


@hunt
@given(data=st.data())
def test_mutated_bodies(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    body = bytearray((GOLDEN / f"{case['name']}.bin").read_bytes())
    length = case["json_length"]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(body) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "digit", "length"]))
        if kind == "flip" and body:
            body[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del body[at : at + data.draw(st.integers(1, 20))]
        elif kind == "insert":
            body[at:at] = data.draw(
                st.binary(max_size=4) | st.sampled_from([b"[", b"{", b"9" * 30, b"-", b"null", b"NaN"])
            )
        elif kind == "digit":
            digits = [i for i, byte in enumerate(body) if 0x30 <= byte <= 0x39]
            if digits:
                body[data.draw(st.sampled_from(digits))] = data.draw(st.sampled_from(b"0123456789-."))
        elif length is not None:
            length += data.draw(st.integers(-5, 5))
    decode_both(bytes(body), length)
