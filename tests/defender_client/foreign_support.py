"""Endpoints that are not ours, on loopback ports: written with the standard library, and counting for themselves."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from oracle_server.oracle import Oracle, build_oracle
from oracle_server.rows import DenseRows
from oracle_server.settings import Settings

Answer = tuple[int, dict[str, str], bytes]


@functools.cache
def _oracle() -> Oracle:
    return build_oracle(Settings())


def classify(images: np.ndarray) -> np.ndarray:
    """Logits [n, 10] of images float32 [n, 1, 8, 8] in [0, 1], as our own server computes them: to the bit."""
    with _one_at_a_time:
        return _oracle()(DenseRows(np.ascontiguousarray(images)))


_one_at_a_time = threading.Lock()
classify.shape, classify.classes = (1, 8, 8), 10  # type: ignore[attr-defined]


@dataclass
class Foreign:
    """A server under way.

    Attributes:
        url: its address.
        rows: of every request that it has read, by itself.
        requests: bodies as they came, with their headers.
        act: told the number of each inference request, from 1; what it returns is answered instead, and "hang up"
            closes the connection with nothing said.
    """

    url: str = ""
    rows: int = 0
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    act: Callable[[int], Answer | str | None] = lambda _: None
    stop: Callable[[], None] = lambda: None  # no more connections


@contextlib.contextmanager
def serving(
    get: Mapping[str, Any], post: Callable[[Mapping[str, str], bytes], tuple[int, Answer]]
) -> Iterator[Foreign]:
    """Serve JSON objects by their paths, and answers to POST, each with the rows that it took."""
    foreign, lock = Foreign(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.close_connection = True
            found = get.get(self.path)
            self._send(
                (404, {}, b'{"error": "no such route"}') if found is None else (200, {}, json.dumps(found).encode())
            )

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            rows, answer = post(headers, body)
            with lock:
                foreign.requests.append((headers, body))
                number = len(foreign.requests)
            instead = foreign.act(number)
            if isinstance(instead, tuple):
                self._send(instead)
                return
            with lock:
                foreign.rows += rows
            if instead == "hang up":
                self.close_connection = True
                return
            self._send(answer)

        def _send(self, answer: Answer) -> None:
            status, headers, body = answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def stop() -> None:
        server.shutdown()
        thread.join(10)
        server.server_close()

    foreign.stop = stop
    foreign.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield foreign
    finally:
        stop()


MEAN, STD = 0.5, 0.25


@contextlib.contextmanager
def json_v2() -> Iterator[Foreign]:
    """Open Inference Protocol, tensors in JSON only, other names, NCHW float32; null where KServe sends it."""

    def post(headers: Mapping[str, str], body: bytes) -> tuple[int, Answer]:
        assert "inference-header-content-length" not in headers
        (tensor,) = json.loads(body)["inputs"]
        assert (tensor["name"], tensor["datatype"]) == ("pixels", "FP32")
        images = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        logits = classify(images)
        output = {"name": "z", "shape": list(logits.shape), "datatype": "FP32", "parameters": None}
        output["data"] = logits.reshape(-1).tolist()
        return len(images), (200, {}, json.dumps({"parameters": None, "outputs": [output]}).encode())

    tensors = {
        "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [{"name": "z", "datatype": "FP32", "shape": [-1, 10]}],
    }
    metadata = {"name": "m", "versions": None, "platform": "", **tensors}
    with serving({"/v2": {"name": "s", "version": "1"}, "/v2/models/m": metadata}, post) as foreign:
        yield foreign


@contextlib.contextmanager
def binary_v2(datatype: str = "FP64") -> Iterator[Foreign]:
    """Open Inference Protocol with binary tensors, NHWC, version 3; FP64 is normalised by MEAN and STD, UINT8 is not.
    Another output and input beside those that matter."""
    dtype = {"FP64": "<f8", "UINT8": "u1"}[datatype]

    def post(headers: Mapping[str, str], body: bytes) -> tuple[int, Answer]:
        length = int(headers["inference-header-content-length"])
        head = json.loads(body[:length])
        (tensor,) = head["inputs"]
        assert (tensor["name"], tensor["datatype"]) == ("image", datatype)
        values = np.frombuffer(body[length:], dtype).reshape(tensor["shape"])
        pixels = values / 255.0 if datatype == "UINT8" else values * STD + MEAN
        logits = classify(pixels.transpose(0, 3, 1, 2).astype(np.float32)).astype("<f4")
        output = {"name": "scores", "shape": list(logits.shape), "datatype": "FP32"}
        output["parameters"] = {"binary_data_size": logits.nbytes}
        answer = json.dumps({"outputs": [output]}).encode()
        return len(values), (200, {"Inference-Header-Content-Length": str(len(answer))}, answer + logits.tobytes())

    metadata = {
        "name": "m",
        "inputs": [
            {"name": "image", "datatype": datatype, "shape": [-1, 8, 8, 1]},
            {"name": "more", "datatype": "BOOL", "shape": [1]},
        ],
        "outputs": [
            {"name": "embedding", "datatype": "FP32", "shape": [-1, 7]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, 10]},
        ],
    }
    server = {"name": "s", "version": "1", "extensions": ["classification", "binary_tensor_data"]}
    with serving({"/v2": server, "/v2/models/m/versions/3": metadata}, post) as foreign:
        yield foreign


LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@contextlib.contextmanager
def json_of_its_own(*, png: bool = False) -> Iterator[Foreign]:
    """JSON of another kind: images under data.x, as numbers or as PNG files; probabilities by their labels, the
    largest first. It asks for a key."""

    def post(headers: Mapping[str, str], body: bytes) -> tuple[int, Answer]:
        if headers.get("x-api-key") != "s3cret":
            return 0, (401, {}, b'{"detail": "who are you?"}')
        sent = json.loads(body)
        assert sent["model"] == "digits"
        if png:
            files = [Image.open(io.BytesIO(base64.b64decode(each))) for each in sent["data"]["x"]]
            images = np.stack([np.asarray(each)[None] for each in files]).astype(np.float32) / np.float32(255)
        else:
            images = np.array(sent["data"]["x"], np.float32).transpose(0, 3, 1, 2)
        logits = torch.from_numpy(classify(images))
        rows = [
            {"best": [{"label": LABELS[i], "score": float(row[i])} for i in torch.argsort(row, descending=True)]}
            for row in torch.softmax(logits.double(), 1)
        ]
        return len(images), (200, {}, json.dumps({"results": rows}).encode())

    with serving({}, post) as foreign:
        yield foreign


def write_mapping(folder: Path, url: str, *, png: bool = False) -> Path:
    """The description of `json_of_its_own`, as a file."""
    path = folder / "endpoint.toml"
    path.write_text(
        f"""\
protocol = "json"
url = "{url}/predict"
shape = [1, 8, 8]
scores = "probabilities"
layout = "nhwc"
rows = 100
[header_env]
"X-API-Key" = "THEIR_KEY"
[request]
images = "data.x"
encoding = "{"png" if png else "numbers"}"
fields = {{ model = "digits" }}
[answer]
scores = "results.*.best"
labels = {json.dumps(LABELS)}
""",
        encoding="utf-8",
    )
    return path
