"""The caller's own decoders: register, list, delete. None of it costs a query."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from oracle_server.body import Buffer, decompress, read_body
from oracle_server.decoders import Decoder
from oracle_server.documentation import OF_DECODERS, REGISTER
from oracle_server.room import Share
from oracle_server.routes import Caller, Parts, only
from oracle_server.service import Service
from shared.wire import protocol
from shared.wire.errors import TooLarge

router = APIRouter()


@router.post(protocol.DECODERS_ROUTE, status_code=201, **REGISTER)
async def register(request: Request, response: Response, service: Parts, caller: Caller) -> protocol.DecoderStatement:
    service.decoders.check_allowed()
    settings = service.settings
    with service.gate.enter(), service.room.share() as share:
        encoding = only(request, "Content-Encoding") or ""
        try:
            body = await read_body(request, share, limit=settings.max_decoder_bytes, timeout=settings.body_timeout)
            decoder, new = await service.on_decoders(_register, service, caller.id, body, encoding, share)
        except TooLarge as error:
            if "limit" in error.extensions:
                raise
            most = settings.max_decoder_bytes
            raise TooLarge(
                f"the body is larger than {most} bytes: register a smaller decoder",
                limit="max_decoder_bytes",
                max_decoder_bytes=most,
            ) from None
    response.status_code = 201 if new else 200
    return _statement(decoder)


@router.get(protocol.DECODERS_ROUTE, summary="The caller's own decoders", tags=["decoders"], responses=OF_DECODERS)
async def decoders(service: Parts, caller: Caller) -> protocol.DecoderList:
    own = await service.on_decoders(service.decoders.of, caller.id)
    return protocol.DecoderList(client=caller.name, decoders=tuple(_statement(decoder) for decoder in own))


@router.delete(
    f"{protocol.DECODERS_ROUTE}/{{decoder}}",
    status_code=204,
    summary="Forget a decoder of the caller's; queries in flight still use it",
    tags=["decoders"],
    responses=OF_DECODERS,
)
async def delete(service: Parts, caller: Caller, decoder: Annotated[str, Path()]) -> None:
    await service.on_decoders(service.decoders.delete, caller.id, decoder)


def _register(service: Service, client_id: int, body: Buffer, encoding: str, share: Share) -> tuple[Decoder, bool]:
    content = decompress(body, encoding, share, limit=service.settings.max_decoder_bytes)
    return service.decoders.register(client_id, content)


def _statement(decoder: Decoder) -> protocol.DecoderStatement:
    return protocol.DecoderStatement(
        decoder=decoder.id, latent=decoder.latent, image_shape=decoder.image_shape, bytes=decoder.bytes
    )
