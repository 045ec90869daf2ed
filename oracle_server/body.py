"""Reading a request's body: once, into one buffer, within limits of size and time."""

from __future__ import annotations

import asyncio
import zlib

import numpy as np
from starlette.requests import ClientDisconnect, Request

from oracle_server.room import Share
from shared.wire.errors import MalformedRequest, RequestTimeout, TooLarge

Buffer = bytes | bytearray | memoryview
# zlib's window bits: 16 + 15 reads gzip, 15 zlib's own format, which HTTP calls deflate.
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_PIECE_IN, _PIECE_OUT = 64 * 1024, 256 * 1024


async def read_body(request: Request, share: Share, *, limit: int, timeout: float) -> Buffer:
    """The body's bytes as they were sent (perhaps compressed).

    Args:
        request: whose body nobody has read yet.
        share: of the room for bodies; grows by what arrives.
        limit: most bytes to accept.
        timeout: seconds for the whole body to arrive.

    Raises:
        TooLarge: more than `limit` bytes, declared or sent.
        RequestTimeout: the body did not arrive in time.
        MalformedRequest: the body ends before its declared end.
        Unavailable: there is no room for it beside the others.
    """
    declared = content_length(request)
    if declared is not None and declared > limit:
        raise too_large(limit)
    try:
        async with asyncio.timeout(timeout):
            return await (
                _read_chunked(request, share, limit) if declared is None else _read_declared(request, share, declared)
            )
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {timeout:g} seconds") from None
    except ClientDisconnect:
        raise MalformedRequest("the connection ended before the body did") from None  # nobody reads it; the metrics do


def content_length(request: Request) -> int | None:
    """The declared length of the body; None if it comes in chunks. The HTTP parser has refused what is no number."""
    if "transfer-encoding" in request.headers:
        return None
    return int(request.headers.get("content-length", "0"))


def too_large(limit: int) -> TooLarge:
    """The refusal of a body of more than `limit` bytes."""
    return TooLarge(f"the body is larger than {limit} bytes: send fewer images at once", max_body_bytes=limit)


def decompress(body: Buffer, encoding: str, share: Share, *, limit: int) -> Buffer:
    """The body without its Content-Encoding, of at most `limit` bytes however far it would expand.

    Raises:
        MalformedRequest: an encoding that is not known, or a body that is not of it.
        TooLarge: more than `limit` bytes.
        Unavailable: there is no room for it beside the others.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOWS:
        raise MalformedRequest(f"Content-Encoding '{encoding}' is not known: send gzip, deflate or nothing")
    stream = zlib.decompressobj(_WINDOWS[encoding])
    plain, rest = bytearray(), memoryview(body)
    try:
        # Piece by piece on both sides: zlib copies what it has not yet read, and a bomb takes no room it is not given.
        while rest and not stream.eof:
            piece, rest = rest[:_PIECE_IN], rest[_PIECE_IN:]
            while piece:
                inflated = stream.decompress(piece, _PIECE_OUT)
                if len(plain) + len(inflated) > limit:
                    raise too_large(limit)
                share.take(len(inflated))
                plain += inflated
                piece = memoryview(stream.unconsumed_tail)
    except zlib.error as error:
        raise MalformedRequest(f"the body is not {encoding}: {error}") from None
    if not stream.eof:
        raise MalformedRequest(f"the {encoding} body is cut short")
    if stream.unused_data or rest:
        raise MalformedRequest(f"bytes follow the end of the {encoding} body")
    return plain


async def _read_declared(request: Request, share: Share, length: int) -> memoryview:
    # Not a bytearray: that would write every byte twice, once as zero, and hold the event loop meanwhile.
    buffer = np.empty(length, np.uint8).data
    received = 0
    async for chunk in request.stream():
        share.take(len(chunk))
        buffer[received : received + len(chunk)] = chunk
        received += len(chunk)
    if received != length:
        raise MalformedRequest(f"the body has {received} bytes and Content-Length declares {length}")
    return buffer


async def _read_chunked(request: Request, share: Share, limit: int) -> bytearray:
    buffer = bytearray()
    async for chunk in request.stream():
        if len(buffer) + len(chunk) > limit:
            raise too_large(limit)
        share.take(len(chunk))
        buffer += chunk
    return buffer
