"""Requests made to break the server: each is refused by name, quickly, and costs nothing."""

from __future__ import annotations

import gzip
import json
import socket
import tracemalloc
import zlib

import httpx
import pytest
from oracle_support import Caller, Running, digits, refused

from oracle_server.body import decompress
from oracle_server.room import BodyRoom, Share
from shared.wire import codec, protocol
from shared.wire.errors import TooLarge

MIB = 2**20
INFER = protocol.INFER_ROUTE
VALID = codec.encode_request({"images": digits(1)}, binary=False).body()


def raw(server: Running, sent: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to exactly these bytes, which ask for the connection's end."""
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def test_the_valid_request_that_the_others_are_made_of(caller: Caller) -> None:
    assert caller.post(codec.Encoded((VALID,), None)).status_code == 200


# --- JSON ----------------------------------------------------------------------------------------------------------


def tensor(**changes: object) -> bytes:
    """A request of one JSON tensor, with these fields changed; a value in bytes stands as it is."""
    fields: dict[str, object] = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64}
    texts = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in (fields | changes).items()
    }
    return b'{"inputs":[{' + b",".join(b'"%s":%s' % (name.encode(), text) for name, text in texts.items()) + b"}]}"


def values(first: bytes) -> bytes:
    return tensor(data=b"[" + first + b",0" * 63 + b"]")


BIG = 2**31 - 1
JSON_BODIES = {
    "depth of arrays": tensor(data=b"[" * 100_000 + b"]" * 100_000),
    "depth of objects": b'{"parameters":' * 100_000,
    "depth of what is ignored": b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b',"inputs":[]}',
    "1e999": values(b"1e999"),
    "-1e999": values(b"-1e999"),
    "NaN": values(b"NaN"),
    "Infinity": values(b"-Infinity"),
    "an int of 5,000 digits": values(b"9" * 5000),
    "an int of 500,000 digits": values(b"9" * 500_000),
    "a float of 500,000 digits": values(b"1." + b"1" * 400_000 + b"e99999999999"),
    "true": tensor(data=[True] * 64),
    "null": values(b"null"),
    "text": values(b'"1"'),
    "object": values(b"{}"),
    "ragged": tensor(data=[[0.5], [0.5, 0.5]]),
    "data is a number": tensor(data=0.5),
    "data is text": tensor(data="x" * 64),
    "data is an object": tensor(data={"0": 1}),
    "no data": tensor(data=None),
    "values beyond the shape": tensor(data=[0.5] * 65),
    "all dimensions huge": tensor(shape=[BIG] * 16),
    "a product that wraps to the right size": tensor(shape=[2**16, 2**16, 2**16, 2**16 + 1]),
    "too many dimensions": tensor(shape=[1] * 10_000),
    "beyond 32 bits": tensor(shape=[2**31, 1, 8, 8]),
    "beyond 64 bits": tensor(shape=[2**64, 1, 8, 8]),
    "negative": tensor(shape=[-1, 1, 8, 8]),
    "two negatives": tensor(shape=[-1, -1, 8, 8]),
    "zero": tensor(shape=[0, 1, 8, 8], data=[]),
    "zero among huge": tensor(shape=[0, BIG, BIG, BIG], data=[]),
    "huge rows of nothing": tensor(shape=[BIG, 0, 8, 8], data=[]),
    "no dimension": tensor(shape=[], data=[0.5]),
    "fractional": tensor(shape=[1.5, 1, 8, 8]),
    "true as a dimension": tensor(shape=[True, 1, 8, 8]),
    "a dimension in text": tensor(shape=["1", 1, 8, 8]),
    "shape is text": tensor(shape="1188"),
    "an unknown datatype": tensor(datatype="FP128"),
    "bytes": tensor(datatype="BYTES", data=["x"] * 64),
    "a datatype with a null character": tensor(datatype="FP32\0"),
    "lone surrogate in the name": tensor(name=b'"\\ud800"'),
    "lone surrogate in the id": b'{"id":"\\ud800",' + tensor()[1:],
    "invalid UTF-8": tensor(name=b'"\xff\xfe"'),
    "overlong UTF-8": tensor(name=b'"\xc0\xaf"'),
    "a byte order mark": b"\xef\xbb\xbf" + VALID,
    "UTF-16": VALID.decode().encode("utf-16"),
    "a null character": VALID + b"\0",
    "two messages": VALID + VALID,
    "a comment": VALID + b"//",
    "not an object": b"[1]",
    "a name of a megabyte": tensor(name="x" * 900_000),
    "many inputs": b'{"inputs":[' + b",".join([tensor(data=[])[11:-2]] * 5000) + b"]}",
    "twice the same input": b'{"inputs":[' + b",".join([tensor()[11:-2]] * 2) + b"]}",
    "a size that lies": tensor(parameters={"binary_data_size": 256}, data=None),
    "a negative size": tensor(parameters={"binary_data_size": -1}, data=None),
    "a size beyond 64 bits": tensor(parameters={"binary_data_size": 2**70}, data=None),
    "a size that is true": tensor(parameters={"binary_data_size": True}, data=None),
    "parameters are no object": tensor(parameters=[1]),
    "a flag that is no flag": b'{"parameters":{"binary_data_output":"yes"},' + tensor()[1:],
    "an output nobody has": b'{"outputs":[{"name":"gradient"}],' + tensor()[1:],
}


@pytest.mark.parametrize("body", JSON_BODIES.values(), ids=JSON_BODIES)
def test_json_that_is_not_a_query(caller: Caller, body: bytes) -> None:
    answer = caller.post(codec.Encoded((body,), None))
    assert answer.status_code in (400, 413, 422), answer.text[:300]
    refused(answer, answer.status_code, answer.json()["code"])
    assert len(answer.content) < 8192  # not a mirror
    assert caller.budget()["spent"] == 0


def test_of_two_fields_of_a_name_the_last_counts_for_check_and_charge_alike(caller: Caller) -> None:
    # JSON leaves it open which one counts; what matters is that one request is read one way.
    one, two = tensor(shape=[1, 1, 8, 8]), b'"shape":[2,1,8,8],"data":[' + b"0," * 127 + b"0]"
    answer = caller.post(codec.Encoded((one.replace(b"}]}", b"," + two + b"}]}"),), None))
    assert answer.headers["Query-Charge"] == "2"
    assert answer.json()["outputs"][0]["shape"][0] == 2


def binary(**changes: object) -> tuple[bytes, int]:
    """A binary request and the length of its JSON, with these fields of its tensor changed."""
    fields = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": 256}}
    head = json.dumps({"inputs": [fields | changes]}).encode()
    return head + bytes(256), len(head)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"binary_data_size": 255}},
        {"parameters": {"binary_data_size": 2**62}},
        {"shape": [2, 1, 8, 8], "parameters": {"binary_data_size": 512}},
        {"shape": [BIG] * 16, "parameters": {"binary_data_size": 4 * BIG**16}},
        {"shape": [0, 1, 8, 8], "parameters": {"binary_data_size": 0}},
        {"shape": [1, 1, 8, 7], "parameters": {"binary_data_size": 224}},
        {"datatype": "UINT8", "shape": [4, 1, 8, 8]},
        {"datatype": "BF16", "shape": [2, 1, 8, 8]},
        {"datatype": "FP64", "shape": [1, 1, 8, 4]},
    ],
)
def test_tensors_that_lie_about_their_size(caller: Caller, changes: dict[str, object]) -> None:
    body, length = binary(**changes)
    refused(caller.post(codec.Encoded((body,), length)), 400, "malformed-request")
    assert caller.budget()["spent"] == 0


@pytest.mark.parametrize("length", ["", "0", "-0", "+5", "0x10", "1e3", "١٢", "9" * 12, "9" * 13, "9" * 5000, "5,5"])
def test_lengths_that_lie(caller: Caller, length: str) -> None:
    headers = [
        (b"Authorization", caller.headers["Authorization"].encode()),
        (protocol.JSON_LENGTH_HEADER.encode(), length.encode()),
    ]
    refused(caller.http.post(INFER, content=binary()[0], headers=headers), 400, "malformed-request")
    assert caller.budget()["spent"] == 0


# --- compression ---------------------------------------------------------------------------------------------------


def test_a_bomb_is_inflated_to_the_limit_and_no_further() -> None:
    compress, zeros = zlib.compressobj(1, wbits=31), bytes(4 * MIB)
    bomb = b"".join(compress.compress(zeros) for _ in range(64)) + compress.flush()
    assert len(bomb) < 2 * MIB
    tracemalloc.start()
    with pytest.raises(TooLarge):
        decompress(bomb, "gzip", Share(BodyRoom(2**60)), limit=MIB)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MIB  # with what zlib keeps of its input


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_within_a_bomb_is_opened_once(caller: Caller, encoding: str) -> None:
    compress = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    twice = compress(compress(VALID))
    answer = caller.http.post(INFER, content=twice, headers=caller.headers | {"Content-Encoding": encoding})
    refused(answer, 400, "malformed-request")
    for name in (f"{encoding}, {encoding}", f"{encoding},identity"):
        answer = caller.http.post(INFER, content=twice, headers=caller.headers | {"Content-Encoding": name})
        refused(answer, 400, "malformed-request")
    assert caller.budget()["spent"] == 0


# --- headers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Authorization", ("{key}", "Bearer other")),
        ("Authorization", ("{key}", "{key}")),
        ("Idempotency-Key", ("a", "b")),
        ("Content-Encoding", ("identity", "gzip")),
        (protocol.JSON_LENGTH_HEADER, ("10", "20")),
    ],
)
def test_a_header_that_decides_is_sent_once(caller: Caller, name: str, values: tuple[str, ...]) -> None:
    headers = [] if name == "Authorization" else list(caller.headers.items())
    headers += [(name, value.format(key=f"Bearer {caller.key}")) for value in values]
    problem = refused(caller.http.post(INFER, content=VALID, headers=headers), 400, "malformed-request")
    assert "2 times" in str(problem["detail"])
    assert caller.budget()["spent"] == 0


@pytest.mark.parametrize("key", [b"", b"a b", b"a\tb", b"\xff", "ключ".encode(), b"x" * 256, b"x" * 10_000])
def test_idempotency_keys_that_are_none(caller: Caller, key: bytes) -> None:
    headers = [(b"Authorization", caller.headers["Authorization"].encode()), (b"Idempotency-Key", key)]
    refused(caller.http.post(INFER, content=VALID, headers=headers), 400, "malformed-request")
    assert caller.budget()["spent"] == 0


def test_an_idempotency_key_with_a_null_character(caller: Caller, server: Running) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {caller.key}\r\nConnection: close\r\n"
    sent = f"{head}Content-Length: {len(VALID)}\r\nIdempotency-Key: a\0b\r\n\r\n".encode() + VALID
    status, body = raw(server, sent)
    assert (status, json.loads(body)["code"]) == (400, "malformed-request")
    assert caller.budget()["spent"] == 0


AUTHORIZATIONS = {
    "no scheme": "{key}",
    "another scheme": "Basic {key}",
    "two keys": "Bearer {key} {key}",
    "two keys, a comma": "Bearer {key}, Bearer {key}",
    "quoted": 'Bearer "{key}"',
    "a prefix of it": "Bearer {cut}",
    "more than it": "Bearer {key}x",
    "in capitals": "Bearer {upper}",
    "a wildcard": "Bearer *",
    "SQL": "Bearer zo_0123456789abcdef_' OR 1=1 --",
    "a path": "Bearer ../../etc/passwd",
    "long": "Bearer " + "x" * 60_000,
    "a full stop": "Bearer {key}.",
}


@pytest.mark.parametrize("header", AUTHORIZATIONS.values(), ids=AUTHORIZATIONS)
def test_authorizations_that_are_none(caller: Caller, header: str) -> None:
    sent = header.format(key=caller.key, cut=caller.key[:-1], upper=caller.key.upper())
    answer = caller.http.post(INFER, content=VALID, headers={"Authorization": sent})
    refused(answer, 401, "unauthorized")
    assert caller.client.key_id not in answer.text
    assert caller.budget()["spent"] == 0


@pytest.mark.parametrize("name", ["api_key", "key", "access_token", "Authorization", "token"])
def test_a_key_in_the_address_is_no_key(caller: Caller, name: str) -> None:
    for path in (INFER, f"{INFER}?{name}={caller.key}", f"{INFER}?{name}=Bearer%20{caller.key}"):
        refused(caller.http.post(path, content=VALID), 401, "unauthorized")
    refused(caller.http.get(f"{protocol.BUDGET_ROUTE}?{name}={caller.key}"), 401, "unauthorized")
    answer = caller.http.post(INFER, content=VALID, headers={"Cookie": f"{name}={caller.key}", "X-API-Key": caller.key})
    refused(answer, 401, "unauthorized")
    assert caller.budget()["spent"] == 0


# --- routes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"])
def test_a_query_is_posted_and_nothing_else(caller: Caller, method: str) -> None:
    answer = caller.http.request(method, INFER, content=VALID, headers=caller.headers)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert caller.budget()["spent"] == 0


NAMES = {
    "another": b"resnet",
    "capitals": b"Classifier",
    "a full stop": b"classifier.",
    "dots": b"%2e%2e",
    "dots twice": b"%252e%252e",
    "a way up": b"..%2f..%2fetc%2fpasswd",
    "a way up, plain": b"../../../etc/passwd",
    "a way around": b"x/../classifier",
    "an encoded slash": b"classifier%2f",
    "a backslash": b"..\\..\\x",
    "semicolon": b"..;/classifier",
    "a parameter": b"classifier;v=1",
    "a null character": b"classifier%00",
    "a line's end": b"classifier%0d%0aX:%20y",
    "a full-width name": "classifier".translate({i: i + 0xFEE0 for i in range(97, 123)}).encode().hex("%", 1).encode(),
    "bytes that are no text": b"%ff%fe",
    "a broken escape": b"%zz",
    "empty": b"",
    "a slash more": b"/classifier",
    "long": b"a" * 50_000,
}
NAMES["a full-width name"] = b"%" + NAMES["a full-width name"]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_model_names_and_versions_are_names(caller: Caller, server: Running, name: bytes) -> None:
    for path in (b"/v2/models/" + name + b"/infer", b"/v2/models/classifier/versions/" + name + b"/infer"):
        head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
        sent = head + caller.key.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(VALID) + VALID
        status, body = raw(server, sent)
        problem = json.loads(body)
        assert (status, problem["status"]) in ((404, 404), (400, 400)), problem
    assert caller.budget()["spent"] == 0


@pytest.mark.parametrize(
    "target",
    [
        b"/v2/models/classifier/infer/",
        b"//v2/models/classifier/infer",
        b"/v2//models/classifier/infer",
        b"/./v2/models/classifier/infer",
        b"/v2/models/classifier/versions/1/../../infer",
        b"http://elsewhere/nothing",
        b"http://user:password@elsewhere:99999/v2/models/classifier/infer",
        b"elsewhere:80",
        b"*",
        b"v2/models/classifier/infer",
        b"?",
        b"#",
        b"/#/../v2",
    ],
)
def test_targets_that_lead_nowhere(caller: Caller, server: Running, target: bytes) -> None:
    head = b"POST " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
    status, body = raw(server, head + caller.key.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(VALID) + VALID)
    assert status in (400, 404, 405), body
    assert json.loads(body)["status"] == status
    assert caller.budget()["spent"] == 0


def test_an_absolute_target_is_the_same_request(caller: Caller, server: Running) -> None:
    # RFC 9112, 3.2.2: a server accepts this form; what it names beside the path decides nothing here.
    head = (
        f"POST http://elsewhere{INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {caller.key}"
    )
    status, _ = raw(server, f"{head}\r\nContent-Length: {len(VALID)}\r\n\r\n".encode() + VALID)
    assert status == 200
    assert caller.budget()["spent"] == 1


def test_a_path_that_climbs_is_not_followed_by_clients_either(caller: Caller) -> None:
    answer = caller.http.get(httpx.URL("/static/..%2f..%2f..%2fetc%2fpasswd"))
    refused(answer, 404, "not-found")
