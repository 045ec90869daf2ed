"""What one connection may cost before a request exists: bytes, seconds, and a place among the others.

uvicorn's HTTP protocol limits none of these, so a single sender can fill the memory with one endless header, or hold
connections open with heads that never end. This one answers with a problem like every other refusal, lets it arrive,
and closes. Nothing that is refused here reaches the application, so nothing is charged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import httptools
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from oracle_server.problems import problem_response
from oracle_server.settings import Settings
from oracle_server.shedding import Shed, Shedder
from shared.wire.errors import HeadersTooLarge, MalformedRequest, OracleError, RequestTimeout, Unavailable

# Connections beyond the limit that are still told why; those beyond these are closed without a word.
_TOLD = 64
# Requests that one connection may send ahead of their answers.
_PIPELINED = 16
# Seconds in which a refusal may be read. Closing at once would reset the connection under a peer that still sends.
_LINGER_S = 2.0
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections of one server.

    Attributes:
        connections: at once; a request beyond them is answered 503.
        header_bytes: of a request's line and headers together, and of whatever else is no body, such as trailers.
        headers: lines of a head.
        header_timeout: seconds for a head to be complete.
        answer_timeout: seconds for an answer to be read.
    """

    connections: int
    header_bytes: int
    headers: int
    header_timeout: float
    answer_timeout: float

    @staticmethod
    def of(settings: Settings) -> ConnectionLimits:
        """The limits that the settings set. Answers have the time that bodies have."""
        return ConnectionLimits(
            connections=settings.max_connections,
            header_bytes=settings.max_header_bytes,
            headers=settings.max_headers,
            header_timeout=settings.header_timeout,
            answer_timeout=settings.body_timeout,
        )


class _Refused(Exception):
    """Ends the parser's work on a connection that was refused."""


def bounded_protocol(
    limits: ConnectionLimits, on_refusal: Callable[[int], object], shedder: Shedder
) -> type[BoundedProtocol]:
    """A protocol for `uvicorn.Config(http=...)`, which makes its instances itself.

    Args:
        limits: what a connection may cost.
        on_refusal: called with the status of each refusal that no application sees, and that ends its connection.
        shedder: says which queries to refuse because the queue is full.
    """

    class Protocol(BoundedProtocol):
        pass

    Protocol.limits, Protocol.on_refusal, Protocol.shedder = limits, staticmethod(on_refusal), shedder
    return Protocol


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol within `limits`."""

    limits: ClassVar[ConnectionLimits]
    on_refusal: ClassVar[Callable[[int], object]]
    shedder: ClassVar[Shedder]

    # Bytes since the parser last gave something away: a head in the making, a trailer, the frame of a chunk.
    _held = 0
    _in_head = True  # from the end of a message to the end of the next one's head
    _surplus = False
    _refused = False
    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None
    _shed: Shed | None = None  # the refusal of the request whose body is dropped now
    _shed_since = 0.0
    _to_drop = 0  # bytes of that body that are still to come
    _shed_timer: asyncio.TimerHandle | None = None

    # --- the connection ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._surplus = len(self.connections) > self.limits.connections
        if len(self.connections) > self.limits.connections + _TOLD:
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._answer_was_read()
        self._body_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        while rest and not self._refused and not self.transport.is_closing():
            if self._to_drop:
                rest = rest[self._drop(len(rest)) :]
                continue
            # Never more than may be held, so that the last byte that is taken is the same however they arrive.
            rest = rest[self._feed(rest[: self.limits.header_bytes - self._held]) :]

    def _feed(self, piece: memoryview) -> int:
        """Parse a piece of what arrived; the number of bytes taken."""
        taken = len(piece)
        self._held = held = self._held + taken
        try:
            self.parser.feed_data(piece)
            if self._to_drop and self._shed_timer is None:  # of a body that did not come with its head
                self._shed_timer = self.loop.call_later(self.limits.answer_timeout, self._stop_waiting_for_body)
        except httptools.HttpParserUpgrade as upgrade:
            taken = upgrade.args[0]  # there is nothing to upgrade to: what follows is the next request
        except httptools.HttpParserError as error:
            self._refuse(MalformedRequest(f"the request is not well-formed HTTP: {error}"))
        if self._held == held >= self.limits.header_bytes:
            limit = self.limits.header_bytes
            self._refuse(HeadersTooLarge(f"the headers are larger than {limit} bytes", max_header_bytes=limit))
        elif self._held and self._in_head:
            self._expect_head()
        return taken

    # --- the parser's events ---

    def on_message_begin(self) -> None:
        self._expect_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # A trailer comes after the head that was acted on, and must not change it behind the application's back.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._held, self._in_head = 0, False
        self._head_arrived()
        error = self._head_refusal()
        if error is not None:
            self._refuse(error)
            raise _Refused
        self._shed = self._look_for_room()
        if self._shed is None:
            super().on_headers_complete()
        else:
            self._to_drop = self._shed.length

    def on_body(self, body: bytes) -> None:
        self._held = 0
        if self._shed is None:
            super().on_body(body)
        else:
            self._to_drop -= len(body)

    def on_message_complete(self) -> None:
        self._held, self._in_head, self._to_drop = 0, True, 0
        if self._shed is None:
            super().on_message_complete()
        else:
            self._answer_shed(self._shed)

    def on_response_complete(self) -> None:
        if self._refused:  # of a later request on this connection: its sender got the answers it had coming
            self.transport.close()
        super().on_response_complete()
        self._expect_reader()

    # --- shedding ---

    def _look_for_room(self) -> Shed | None:
        """The refusal of the request whose head is complete, if it is refused for want of room in the queue."""
        owing = self.cycle is not None and not self.cycle.response_complete
        # Of an answer that is not read, the application knows to wait until it is.
        if owing or self.pipeline or self.transport.get_write_buffer_size() or not self.parser.should_keep_alive():
            return None
        shed = self.shedder.shed(self.parser.get_method(), self.url, self.headers)
        if shed is not None:
            self._shed_since = self.loop.time()
        return shed

    def _answer_shed(self, shed: Shed) -> None:
        """The body has come to its end, so its sender will read what is said."""
        end = self.loop.time()
        self._shed = None
        self._body_arrived()
        response = problem_response(shed.error)
        self.transport.write(self._encode(response))
        self.server_state.total_requests += 1
        self.shedder.answered(shed, end - self._shed_since, self.loop.time() - end, len(response.body))
        self._expect_reader()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _drop(self, arrived: int) -> int:
        """Take what of `arrived` bytes is body, past the parser, which would copy it; returns how many they are."""
        dropped = min(arrived, self._to_drop)
        self._to_drop -= dropped
        if not self._to_drop:
            self.parser = httptools.HttpRequestParser(self)  # the old one still waits for the body
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.on_message_complete()
        return dropped

    def _body_arrived(self) -> None:
        if self._shed_timer is not None:
            self._shed_timer.cancel()
            self._shed_timer = None

    def _stop_waiting_for_body(self) -> None:
        self._shed_timer = None
        if self._shed is not None:
            self._refuse(self._shed.error)  # whether or not it arrives, as with any answer to an endless body

    # --- limits ---

    def _head_refusal(self) -> OracleError | None:
        """Why the head that is now complete is not acted on; None if it is."""
        limits = self.limits
        if len(self.headers) > limits.headers:
            return HeadersTooLarge(f"there are more than {limits.headers} headers", max_headers=limits.headers)
        if len(self.pipeline) >= _PIPELINED:
            return MalformedRequest(f"more than {_PIPELINED} requests were sent ahead of their answers")
        if self._surplus and len(self.connections) > limits.connections:
            return Unavailable(
                f"there are {limits.connections} connections already: try again soon", retry_after=_RETRY_AFTER_S
            )
        self._surplus = False
        return None

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_timeout, self._stop_waiting_for_head)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_waiting_for_head(self) -> None:
        self._head_timer = None
        if self._held:
            seconds = self.limits.header_timeout
            self._refuse(RequestTimeout(f"the headers did not arrive within {seconds:g} seconds"))
        else:
            self.transport.close()  # nothing was said, so nothing is answered

    def _expect_reader(self) -> None:
        self._answer_was_read()
        if self.transport.get_write_buffer_size():
            self._answer_timer = self.loop.call_later(self.limits.answer_timeout, self._stop_waiting_for_reader)

    def _answer_was_read(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _stop_waiting_for_reader(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    # --- refusing ---

    def _refuse(self, error: OracleError) -> None:
        """Answer with a problem and close, once what was asked before has been answered."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._head_arrived()
        if self._owes_an_answer():
            return  # `on_response_complete` closes
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            type(self).on_refusal(error.status)
        else:  # its body will not come to an end
            cycle.disconnected = True
            cycle.message_event.set()
        response = problem_response(error)
        response.headers["Connection"] = "close"
        self.transport.write(self._encode(response))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _owes_an_answer(self) -> bool:
        """Whether an earlier request waits for its answer, which the refusal must not be taken for."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return bool(self.pipeline) or cycle.response_started or not cycle.more_body

    def _encode(self, response: Response) -> bytes:
        headers = [*self.server_state.default_headers, *response.raw_headers]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        return STATUS_LINE[response.status_code] + lines + b"\r\n" + bytes(response.body)
