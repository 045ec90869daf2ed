"""Real parts for the oracle's tests: a live server in a thread or in a process, and requests as a client makes them."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import torch
from fastapi import FastAPI

from oracle_server.app import create_app
from oracle_server.book import Payment
from oracle_server.ledger import Client, Ledger
from oracle_server.oracle import Oracle
from oracle_server.server import listen, make_server
from oracle_server.service import Service
from oracle_server.settings import Settings
from shared.wire import codec, protocol

_names = (f"client-{n}" for n in itertools.count())


def digits(rows: int, seed: int = 0) -> np.ndarray:
    """Random images [rows, 1, 8, 8] in [0, 1]."""
    return np.random.default_rng(seed).random((rows, 1, 8, 8), dtype=np.float32)


def pay(ledger: Ledger, client_id: int, rows: int, key: str | None = None, sha: str = "sha") -> Payment:
    """Both steps of a request that is answered; or what was paid for it before."""
    reservation = ledger.reserve(client_id, rows, key, sha)
    return reservation.paid or ledger.charge(reservation)


@dataclass(frozen=True)
class Caller:
    """A client of a running server, with a budget of its own."""

    client: Client
    key: str
    http: httpx.Client

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def infer(self, images: np.ndarray, *, binary: bool = True, **headers: str) -> httpx.Response:
        """Ask for logits; keyword `Idempotency_Key` becomes the header Idempotency-Key."""
        return self.post(codec.encode_request({"images": images}, binary=binary), **headers)

    def post(self, encoded: codec.Encoded, **headers: str) -> httpx.Response:
        sent = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        if encoded.json_length is not None:
            sent[protocol.JSON_LENGTH_HEADER] = str(encoded.json_length)
        return self.http.post(protocol.INFER_ROUTE, content=encoded.body(), headers=sent)

    def budget(self) -> dict[str, int]:
        answer: dict[str, int] = self.http.get(protocol.BUDGET_ROUTE, headers=self.headers).json()
        return answer


def logits_of(response: httpx.Response, output: str = protocol.OUTPUT_NAME) -> np.ndarray:
    """The answer, which a reconstructor calls otherwise."""
    assert response.status_code == 200, response.text
    length = response.headers.get(protocol.JSON_LENGTH_HEADER)
    return codec.decode_response(response.content, int(length) if length else None).outputs[output]


def refused(response: httpx.Response, status: int, code: str) -> dict[str, object]:
    """Check that an answer is the problem it should be; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, object] = response.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert problem["error"] == problem["detail"]
    assert isinstance(problem["error"], str)
    assert problem["error"]
    return problem


@dataclass(frozen=True)
class Running:
    """A live server in this process."""

    url: str
    http: httpx.Client
    app: FastAPI

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    @property
    def ledger(self) -> Ledger:
        return self.service.ledger

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.url.removeprefix("http://")

    def caller(self, budget: int = 10_000) -> Caller:
        client, key = self.ledger.add_client(next(_names), budget)
        return Caller(client, key.reveal(), self.http)


class Held:
    """An engine that waits until it is let go."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.go.wait(30)
        return torch.zeros(len(images), 3)


@contextlib.contextmanager
def running(settings: Settings, oracle: Oracle | None = None, *, port: int = 0) -> Iterator[Running]:
    """Serve on a loopback port, any free one by default, from a thread, until the block ends."""
    bound, url = listen("127.0.0.1", port)
    app = create_app(settings, oracle)
    started = threading.Event()
    server = make_server(app, settings, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert started.wait(30)
        with httpx.Client(base_url=url, timeout=30) as http:
            yield Running(url, http, app)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()


@contextlib.contextmanager
def process(ledger: Path | str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`oracle-server serve` as a process of its own; yields it and its URL, and kills it at the end."""
    command = [sys.executable, "-m", "oracle_server", "serve", "--port", "0", "--ledger", str(ledger), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [lines.put(line) for line in child.stdout or ()], daemon=True).start()
        try:
            line = lines.get(timeout=60)
            assert line.startswith(("listening on http://127.0.0.1:", "listening on https://127.0.0.1:")), line
            yield child, line.removeprefix("listening on ").strip()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
