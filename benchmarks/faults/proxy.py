"""A proxy between clients and servers: it cuts connections where it is told to, and witnesses every answer.

It stands where nothing else does: it sees an answer that a server gave, and that no client received.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from shared.audit.signatures import Receipt, SignatureInvalid
from shared.wire import protocol

_END = b"\r\n\r\n"


class Place(StrEnum):
    """Where in an exchange a connection is cut."""

    BEFORE_BODY = "before the body"
    DURING_BODY = "during the body"
    AFTER_BODY = "after the body"
    BEFORE_RESPONSE = "before the response"
    DURING_RESPONSE = "during the response"
    AFTER_RESPONSE = "after the response"


@dataclass
class Cut:
    """One cut of the next exchange that reaches its place.

    Attributes:
        share: of the body or response that passes, where it is cut in between; in (0, 1).
        reset: with RST instead of FIN.
        done: set once it has happened.
    """

    place: Place
    share: float
    reset: bool
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _Message:
    head: bytes
    body: bytes
    first: str
    headers: Mapping[str, str]

    @property
    def raw(self) -> bytes:
        return self.head + self.body


class _CutHere(Exception):
    def __init__(self, cut: Cut) -> None:
        self.cut = cut


class Proxy:
    """Relays HTTP/1.1 to any of several servers, an exchange at a time.

    Args:
        ports: of the servers that run now.
        accounts: the client's name by its API key.
        witness: the file that every query's exchange is written to, a JSON object a line.
        stands: looks into the database for a charge by its seq and hash; None where it cannot be asked now.
        rng: chooses among the servers.
    """

    def __init__(
        self,
        ports: Callable[[], list[int]],
        accounts: Mapping[str, str],
        witness: Path,
        stands: Callable[[int, str], bool | None],
        rng: random.Random,
    ) -> None:
        self._ports, self._accounts, self._stands, self._rng = ports, accounts, stands, rng
        self._witness = witness.open("a", encoding="utf-8")
        self._cuts: list[Cut] = []
        self.requests = self.answers = self.waiting = 0
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="proxy")
        self._thread.start()
        started.wait()

    def cut(self, cut: Cut, seconds: float) -> bool:
        """Cut the next exchange that gets to this place; whether one did within `seconds`."""
        self._cuts.append(cut)
        if not cut.done.wait(seconds):
            with suppress(ValueError):  # it may have happened just now
                self._cuts.remove(cut)
        return cut.done.is_set()

    def close(self) -> None:
        """Cut everything that is left and stop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._witness.close()

    # --- the event loop's thread -----------------------------------------------------------------------------------

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0, limit=2**20))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        server.close()
        for task in self._connections:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._connections, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        far: asyncio.StreamWriter | None = None
        try:
            far_reader, far = await self._dial()
            while await self._exchange(reader, writer, far_reader, far):
                pass
        except _CutHere as here:
            for side in (writer, far):
                if here.cut.reset and side is not None:  # with nothing to linger for, closing sends RST
                    side.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
            here.cut.done.set()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # one side is gone: so is the other, below
        finally:
            self._connections.discard(task)
            for side in (writer, far):
                if side is not None:
                    side.close()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ports = self._ports()
        self._rng.shuffle(ports)
        for port in ports:
            with suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        raise ConnectionRefusedError("no server runs")

    async def _exchange(
        self,
        near_reader: asyncio.StreamReader,
        near: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far: asyncio.StreamWriter,
    ) -> bool:
        """Relay one request and its answer; whether the connection stays open."""
        request = await _read(near_reader)
        if not request.first.startswith(f"POST {protocol.INFER_ROUTE} "):
            far.write(request.raw)
            response = await _read(far_reader)
            near.write(response.raw)
            await near.drain()
            return response.headers.get("connection") != "close"
        self.requests += 1
        seen: dict[str, Any] = {
            "account": self._accounts.get(request.headers.get("authorization", "").removeprefix("Bearer ")),
            "key": request.headers.get(protocol.IDEMPOTENCY_KEY_HEADER.lower()),
            "body": hashlib.sha256(request.body).hexdigest(),
            "status": None,
        }
        try:
            return await self._query(request, near, far_reader, far, seen)
        finally:
            self._witness.write(json.dumps(seen) + "\n")

    async def _query(
        self,
        request: _Message,
        near: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far: asyncio.StreamWriter,
        seen: dict[str, Any],
    ) -> bool:
        if cut := self._take(Place.BEFORE_BODY):
            await _send(far, request.head)
            raise _CutHere(cut)
        if cut := self._take(Place.DURING_BODY):
            await _send(far, request.head + _part(request.body, cut.share))
            raise _CutHere(cut)
        await _send(far, request.raw)
        if cut := self._take(Place.AFTER_BODY):
            raise _CutHere(cut)
        self.waiting += 1
        try:
            response = await _read(far_reader)
        finally:
            self.waiting -= 1
        self._note(response, seen)
        if cut := self._take(Place.BEFORE_RESPONSE):
            raise _CutHere(cut)
        if cut := self._take(Place.DURING_RESPONSE):
            await _send(near, _part(response.raw, cut.share))
            raise _CutHere(cut)
        await _send(near, response.raw)
        if cut := self._take(Place.AFTER_RESPONSE):
            raise _CutHere(cut)
        return response.headers.get("connection") != "close"

    def _note(self, response: _Message, seen: dict[str, Any]) -> None:
        seen["status"] = int(response.first.split()[1])
        if seen["status"] != 200:
            problem = json.loads(response.body)
            seen |= {name: problem.get(name) for name in ("code", "requested", "budget", "detail")}
            return
        self.answers += 1
        receipt = response.headers.get(protocol.QUERY_RECEIPT_HEADER.lower(), "")
        seen |= {
            "answer": hashlib.sha256(response.body).hexdigest(),
            "charge": int(response.headers.get(protocol.QUERY_CHARGE_HEADER.lower(), -1)),
            "receipt": receipt,
        }
        with suppress(SignatureInvalid):  # the judge will say so
            parsed = Receipt.parse(receipt)
            seen["stands"] = self._stands(parsed.entry.seq, parsed.hash)

    def _take(self, place: Place) -> Cut | None:
        for cut in self._cuts:
            if cut.place is place:
                with suppress(ValueError):
                    self._cuts.remove(cut)
                    return cut
        return None


async def _read(reader: asyncio.StreamReader) -> _Message:
    head = await reader.readuntil(_END)
    first, *lines = head[: -len(_END)].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return _Message(head, await reader.readexactly(int(headers.get("content-length", 0))), first, headers)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def _part(data: bytes, share: float) -> bytes:
    """Some of it: at least a byte, and not all."""
    return data[: min(len(data) - 1, max(1, round(share * len(data))))]
