"""Reading a request's body: once, into one buffer, within limits of size and time."""

from __future__ import annotations

import asyncio
import zlib

import numpy as np
from starlette.requests import Request

from shared.wire.errors import MalformedRequest, TooLarge

Buffer = bytes | bytearray | memoryview
# zlib's window bits: 16 + 15 reads gzip, 15 zlib's own format, which HTTP calls deflate.
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


async def read_body(request: Request, *, limit: int, timeout: float) -> Buffer:
    """The body's bytes as they were sent (perhaps compressed).

    Args:
        request: whose body nobody has read yet.
        limit: most bytes to accept.
        timeout: seconds for the whole body to arrive.

    Raises:
        TooLarge: more than `limit` bytes, declared or sent.
        MalformedRequest: the body is shorter than declared, or did not arrive in time.
    """
    declared = content_length(request)
    if declared is not None and declared > limit:
        raise too_large(limit)
    try:
        async with asyncio.timeout(timeout):
            return await (_read_chunked(request, limit) if declared is None else _read_declared(request, declared))
    except TimeoutError:
        raise MalformedRequest(f"the body did not arrive within {timeout:g} seconds") from None


def content_length(request: Request) -> int | None:
    """The declared length of the body; None if it comes in chunks. The HTTP parser has refused what is no number."""
    if "transfer-encoding" in request.headers:
        return None
    return int(request.headers.get("content-length", "0"))


def too_large(limit: int) -> TooLarge:
    """The refusal of a body of more than `limit` bytes."""
    return TooLarge(f"the body is larger than {limit} bytes: send fewer images at once", max_body_bytes=limit)


def decompress(body: Buffer, encoding: str, *, limit: int) -> Buffer:
    """The body without its Content-Encoding, of at most `limit` bytes however far it would expand.

    Raises:
        MalformedRequest: an encoding that is not known, or a body that is not of it.
        TooLarge: more than `limit` bytes.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOWS:
        raise MalformedRequest(f"Content-Encoding '{encoding}' is not known: send gzip, deflate or nothing")
    stream = zlib.decompressobj(_WINDOWS[encoding])
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedRequest(f"the body is not {encoding}: {error}") from None
    if len(plain) > limit:
        raise too_large(limit)
    if not stream.eof:
        raise MalformedRequest(f"the {encoding} body is cut short")
    if stream.unused_data:
        raise MalformedRequest(f"bytes follow the end of the {encoding} body")
    return plain


async def _read_declared(request: Request, length: int) -> memoryview:
    # Not a bytearray: that would write every byte twice, once as zero, and hold the event loop meanwhile.
    buffer = np.empty(length, np.uint8).data
    received = 0
    async for chunk in request.stream():
        buffer[received : received + len(chunk)] = chunk
        received += len(chunk)
    if received != length:
        raise MalformedRequest(f"the body has {received} bytes and Content-Length declares {length}")
    return buffer


async def _read_chunked(request: Request, limit: int) -> bytearray:
    buffer = bytearray()
    async for chunk in request.stream():
        if len(buffer) + len(chunk) > limit:
            raise too_large(limit)
        buffer += chunk
    return buffer
