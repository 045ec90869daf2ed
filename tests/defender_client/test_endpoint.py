"""What describes an endpoint, and how a model is asked by what its metadata says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle_support import digits

from defender_client.endpoint import JsonEndpoint, PythonEndpoint, V2Endpoint, described
from defender_client.errors import ConfigError
from defender_client.oracle_client.foreign_json import filled, read_scores
from defender_client.oracle_client.foreign_v2 import _Metadata, settle
from defender_client.presenting import as_bytes, as_scores, laid_out
from shared.wire.errors import UnexpectedAnswer

URL = "http://127.0.0.1:9/v2/models/m"


def v2(**changes: Any) -> V2Endpoint:
    endpoint = described(URL, changes)
    assert isinstance(endpoint, V2Endpoint)
    return endpoint


def metadata(shape: list[int], datatype: str = "FP32", answer: list[int] | None = None) -> _Metadata:
    inputs = [{"name": "x", "datatype": datatype, "shape": shape}]
    outputs = [{"name": "y", "datatype": "FP32", "shape": answer or [-1, 10]}]
    return _Metadata.model_validate({"inputs": inputs, "outputs": outputs})


# --- which endpoint it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "model", "version"),
    [(URL, "m", None), (f"{URL}/versions/2/", "m", "2"), (f"{URL}/infer", "m", None)],
)
def test_an_address_names_a_model(address: str, model: str, version: str | None) -> None:
    endpoint = described(address, {})
    assert isinstance(endpoint, V2Endpoint)
    assert (endpoint.url, endpoint.model, endpoint.version) == ("http://127.0.0.1:9", model, version)


def test_an_address_of_a_server_says_nothing_yet() -> None:
    assert described("http://127.0.0.1:9", {}) is None
    assert isinstance(described("http://127.0.0.1:9", {"model": "m"}), V2Endpoint)


def test_options_come_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.toml"
    path.write_text('protocol = "python"\ncallable = "a.b:c"\nshape = [3, 4, 5]\nclasses = 7\n')
    endpoint = described(str(path), {"classes": 8})
    assert isinstance(endpoint, PythonEndpoint)
    assert (endpoint.shape, endpoint.classes, endpoint.name) == ((3, 4, 5), 8, "python:a.b:c")


@pytest.mark.parametrize(
    ("oracle", "changes", "said"),
    [
        ("nowhere.toml", {}, "cannot be read"),
        ("ftp://h/v2/models/m", {}, "is not an address"),
        ("http://user:secret@h/v2/models/m", {}, "no user, password or query"),
        ("http://h/v2/models/m?key=secret", {}, "no user, password or query"),
        ("python:nothing", {}, "callable"),
        (URL, {"std": 0}, "greater than 0"),
        (URL, {"std": [1, 1], "shape": [3, 2, 2]}, "one for each channel"),
        (URL, {"nonsense": 1}, "nonsense"),
    ],
)
def test_what_describes_no_endpoint_is_refused(oracle: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        described(oracle, changes)
    assert "secret" not in str(refused.value)


def test_what_may_change_within_a_run() -> None:
    assert v2().identity == v2(url="http://elsewhere:1", model="m", rows=7, binary=True, header_env={"K": "V"}).identity
    assert len({v2(**change).identity for change in ({}, {"mean": 0.5}, {"output": "y"}, {"scores": "label"})}) == 4


# --- what the metadata says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "changes", "layout", "shape"),
    [
        ([-1, 3, 32, 40], {}, "nchw", (3, 32, 40)),
        ([-1, 32, 40, 3], {}, "nhwc", (3, 32, 40)),
        ([-1, 3, 1, 3], {"layout": "nchw"}, "nchw", (3, 1, 3)),
        ([-1, -1, -1, 3], {"shape": [3, 32, 40]}, "nhwc", (3, 32, 40)),
        ([-1, 64], {"shape": [1, 8, 8]}, "flat", (1, 8, 8)),
    ],
)
def test_layout_and_shape(dims: list[int], changes: dict[str, Any], layout: str, shape: tuple[int, ...]) -> None:
    how = settle(v2(**changes), metadata(dims), ())
    assert (how.layout, how.info.image_shape, how.info.classes, how.info.max_rows) == (layout, shape, 10, 256)


@pytest.mark.parametrize(
    ("found", "changes", "said"),
    [
        (metadata([-1, 3, 3, 3]), {}, "where the channels are"),
        (metadata([-1, 7, 8, 9]), {}, "where the channels are"),
        (metadata([-1, 64]), {}, "shape="),
        (metadata([-1, -1, 8, 3]), {}, "shape="),
        (metadata([-1, 1, 8, 8]), {"shape": [1, 9, 9]}, "which is not"),
        (metadata([8, 8]), {"layout": "nchw", "shape": [1, 8, 8]}, "which is not"),
        (metadata([-1, 1, 8, 8], "INT64"), {}, "INT64"),
        (metadata([-1, 1, 8, 8], "UINT8"), {"mean": 0.5}, "leave mean and std out"),
        (metadata([-1, 1, 8, 8], answer=[-1, -1]), {}, "classes=N"),
        (metadata([-1, 1, 8, 8]), {"input": "z"}, "has no input 'z': it has x"),
        (_Metadata(), {"shape": [1, 8, 8], "classes": 10}, "--input NAME"),
    ],
)
def test_what_is_not_said_is_asked_for(found: _Metadata, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settle(v2(**changes), found, ())


def test_a_server_that_says_nothing_can_be_described() -> None:
    how = settle(v2(input="a", shape=[1, 8, 8], classes=10), _Metadata(), ("binary_tensor_data",))
    assert (how.input, how.output, how.datatype, how.layout, how.binary) == ("a", None, "FP32", "nchw", True)
    assert not settle(v2(binary=False), metadata([4, 1, 8, 8]), ("binary_tensor_data",)).binary
    assert settle(v2(), metadata([4, 1, 8, 8]), ()).info.max_rows == 4


# --- images and scores ------------------------------------------------------------------------------------------------


def test_images_as_they_are_taken() -> None:
    images = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    sent = laid_out(images, "nhwc", "FP32", mean, std)
    assert (sent.dtype, sent.shape, sent.flags.c_contiguous) == (np.float32, (2, 4, 5, 3), True)
    np.testing.assert_allclose(sent[1, 2, 3, 2], (float(images[1, 2, 2, 3]) - 0.3) / 0.7, rtol=1e-6)
    np.testing.assert_array_equal(laid_out(images, "flat", "FP64", 0.0, 1.0), images.reshape(2, 60).astype(np.float64))
    assert laid_out(images, "nchw", "FP16", 0.0, 1.0).dtype == np.float16
    assert as_bytes(np.array([0.0, 0.49 / 255, 0.51 / 255, 1.0], np.float32)).tolist() == [0, 0, 1, 255]


def test_answers_as_scores() -> None:
    np.testing.assert_array_equal(as_scores(np.array([2, 0]), 2, 3, "label"), [[0, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(as_scores(np.array([[1.0]]), 1, 2, "label"), [[0, 1]])
    for answer, kind in (
        (np.array([3]), "label"),
        (np.array([0.5]), "label"),
        (np.array([[1.0, np.nan, 0.0]]), "logits"),
        (np.array([[1.0, 2.0]]), "logits"),
        (np.array([[-1.0, 2.0, 0.0]]), "probabilities"),
    ):
        with pytest.raises(UnexpectedAnswer):
            as_scores(answer, 1, 3, kind)  # type: ignore[arg-type]


def json_endpoint(**changes: Any) -> JsonEndpoint:
    values = {
        "protocol": "json",
        "shape": [1, 8, 8],
        "classes": 3,
        "request": {"images": "a.b", "fields": {"a": {"c": 1}}},
    }
    endpoint = JsonEndpoint.model_validate({"url": "http://h/p", **values, **changes})
    return endpoint


def test_json_bodies() -> None:
    images = digits(2)
    body = filled(json_endpoint(), images)
    assert body["a"]["c"] == 1
    np.testing.assert_array_equal(np.array(body["a"]["b"], np.float32), images)
    one = filled(json_endpoint(request={"images": "x", "single": True}, layout="flat"), images[:1])
    assert np.shape(one["x"]) == (64,)


@pytest.mark.parametrize(
    ("answer", "where", "kind", "expected"),
    [
        ([[1, 2, 3], [4, 5, 6]], {}, "logits", [[1, 2, 3], [4, 5, 6]]),
        ({"a": [{"s": [1, 2, 3]}, {"s": [4, 5, 6]}]}, {"scores": "a.*.s"}, "logits", [[1, 2, 3], [4, 5, 6]]),
        ({"a": [[[1, 2, 3]], [[4, 5, 6]]]}, {"scores": "a.*.0"}, "logits", [[1, 2, 3], [4, 5, 6]]),
        ([{"u": 1, "v": 2, "w": 3}] * 2, {"labels": ("w", "v", "u")}, "logits", [[3, 2, 1]] * 2),
        (["v", "w"], {"labels": ("w", "v", "u")}, "label", [1, 0]),
    ],
)
def test_json_answers(answer: Any, where: dict[str, Any], kind: Any, expected: list[Any]) -> None:
    found = read_scores(answer, json_endpoint(answer=where).answer, kind, 2)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("answer", "where", "kind"),
    [
        ([[1, 2, 3]], {}, "logits"),
        ({"b": 1}, {"scores": "a"}, "logits"),
        ([[1, 2], [1, 2, 3]], {}, "logits"),
        ([["x"], ["y"]], {}, "logits"),
        ([{"u": 1}] * 2, {"labels": ("u", "v", "w")}, "logits"),
        ([[{"label": "u"}]] * 2, {"labels": ("u", "v", "w")}, "logits"),
        (["z", "u"], {"labels": ("u", "v", "w")}, "label"),
        (7, {}, "logits"),
    ],
)
def test_json_answers_that_are_none(answer: Any, where: dict[str, Any], kind: Any) -> None:
    with pytest.raises(UnexpectedAnswer):
        read_scores(answer, json_endpoint(answer=where).answer, kind, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": None}, "shape"),
        ({"classes": None}, "classes"),
        ({"answer": {"labels": ["a"]}}, "names 1"),
        ({"request": {"images": "x", "encoding": "png"}, "mean": 0.5}, "PNG"),
    ],
)
def test_a_json_endpoint_says_all_that_is_needed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        json_endpoint(**changes)
