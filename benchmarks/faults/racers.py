"""Raw clients that ask at the same moment, each a process of its own, and ask again until they are told."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import httpx
import numpy as np

from shared.wire import codec, protocol

RACERS = 8
_UNDECIDED = frozenset({409, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Order:
    """One racer's request.

    Attributes:
        images: the seed of its images, so of its body.
        at: when it starts, monotonic.
        seconds: how long it asks.
    """

    api_key: str
    key: str
    images: int
    rows: int
    at: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a racer was told in the end; status None where it was told nothing."""

    key: str
    images: int
    rows: int
    body: str
    status: int | None
    code: str | None = None
    answer: str | None = None
    receipt: str | None = None


def race(url: str, orders: Connection, seed: int) -> None:
    """Carry out orders until None comes."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=15) as http:
        while (order := orders.recv()) is not None:
            orders.send(_ask(http, order, rng))


class Racers:
    """The processes, for one race at a time."""

    def __init__(self, context: ForkServerContext, url: str, seed: int) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(RACERS):
            near, far = context.Pipe()
            process = context.Process(target=race, args=(url, far, seed + number), daemon=True)
            process.start()
            far.close()
            self._pipes.append(near)
            self._processes.append(process)

    def run(self, orders: list[Order]) -> list[Outcome]:
        """One order for each racer; what each was told."""
        for pipe, order in zip(self._pipes, orders, strict=True):
            pipe.send(order)
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()
            process.close()
            pipe.close()


def _ask(http: httpx.Client, order: Order, rng: random.Random) -> Outcome:
    images = np.random.default_rng(order.images).random((order.rows, 1, 8, 8), dtype=np.float32)
    encoded = codec.encode_request({protocol.INPUT_NAME: images}, outputs=(protocol.OUTPUT_NAME,))
    body = encoded.body()
    asked: dict[str, Any] = {"key": order.key, "images": order.images, "rows": order.rows}
    asked["body"] = hashlib.sha256(body).hexdigest()
    headers = {
        "Authorization": f"Bearer {order.api_key}",
        protocol.IDEMPOTENCY_KEY_HEADER: order.key,
        protocol.JSON_LENGTH_HEADER: str(encoded.json_length),
    }
    time.sleep(max(0.0, order.at - time.monotonic()))
    while time.monotonic() < order.at + order.seconds:
        try:
            response = http.post(protocol.INFER_ROUTE, content=body, headers=headers)
        except httpx.TransportError:
            response = None
        if response is not None and response.status_code == 200:
            digest, receipt = hashlib.sha256(response.content).hexdigest(), response.headers.get("query-receipt")
            return Outcome(**asked, status=200, answer=digest, receipt=receipt)
        if response is not None and response.status_code not in _UNDECIDED:
            return Outcome(**asked, status=response.status_code, code=response.json().get("code"))
        time.sleep(rng.uniform(0.02, 0.3))
    return Outcome(**asked, status=None)
