"""The routes: Open Inference Protocol v2, and beside it the caller's own account and the metrics.

What a route may tell of the classifier is the shape of its inputs and outputs, and nothing else.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response, Security
from fastapi.responses import RedirectResponse
from fastapi.security import APIKeyHeader

from oracle_server.auth import authenticate
from oracle_server.body import read_body
from oracle_server.documentation import INFER, REFUSALS
from oracle_server.inference import answer, prepare
from oracle_server.ledger import Client
from oracle_server.service import Service
from shared.version import VERSION
from shared.wire import protocol
from shared.wire.errors import MalformedRequest, NotFound

router = APIRouter()
authorization = APIKeyHeader(name="Authorization", auto_error=False, description="`Bearer KEY`")


async def get_service(request: Request) -> Service:
    """The parts that `create_app` wired."""
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(get_service)]


async def get_caller(service: Parts, header: Annotated[str | None, Security(authorization)]) -> Client:
    """The client whose key the request carries."""
    return await service.on_ledger(authenticate, header, service.ledger)


Caller = Annotated[Client, Depends(get_caller)]


async def check_model(model: Annotated[str, Path()]) -> None:
    """Refuse a model that is not served."""
    if model != protocol.MODEL_NAME:
        raise NotFound(f"there is no model '{model}': this server has one, '{protocol.MODEL_NAME}'")


async def check_version(version: Annotated[str, Path()]) -> None:
    """Refuse a version that is not served."""
    if version != protocol.MODEL_VERSION:
        raise NotFound(f"there is no version '{version}': this server has one, '{protocol.MODEL_VERSION}'")


# Every route of a model stands twice, without and with a version.
unversioned = APIRouter(prefix="/v2/models/{model}", dependencies=[Depends(check_model)])
versioned = APIRouter(
    prefix="/v2/models/{model}/versions/{version}", dependencies=[Depends(check_model), Depends(check_version)]
)


@router.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/docs")


@router.get("/v2", summary="The server and its protocol extensions", tags=["health"])
async def server_metadata() -> protocol.ServerMetadata:
    return protocol.ServerMetadata(name="zo-defense-oracle", version=VERSION, extensions=(protocol.BINARY_EXTENSION,))


@router.get("/v2/health/live", summary="Whether the process is alive", tags=["health"])
async def live() -> dict[str, bool]:
    return {"live": True}


@router.get("/v2/health/ready", summary="Whether queries are answered; 503 while draining", tags=["health"])
async def ready(service: Parts) -> dict[str, bool]:
    service.gate.check()
    return {"ready": True}


@router.post("/v2/repository/index", summary="The models: one", tags=["model"])
async def repository_index(service: Parts) -> list[dict[str, str]]:
    state = "UNAVAILABLE" if service.gate.draining else "READY"
    return [{"name": protocol.MODEL_NAME, "version": protocol.MODEL_VERSION, "state": state, "reason": ""}]


@versioned.get("", include_in_schema=False)
@unversioned.get("", summary="Names and shapes of the classifier's input and output", tags=["model"])
async def model_metadata(service: Parts) -> protocol.ModelMetadata:
    oracle, settings = service.oracle, service.settings
    return protocol.ModelMetadata(
        name=protocol.MODEL_NAME,
        versions=(protocol.MODEL_VERSION,),
        platform="opaque",
        inputs=(protocol.TensorMetadata(name=protocol.INPUT_NAME, datatype="FP32", shape=(-1, *oracle.image_shape)),),
        outputs=(protocol.TensorMetadata(name=protocol.OUTPUT_NAME, datatype="FP32", shape=(-1, oracle.classes)),),
        parameters={"max_batch_rows": settings.max_batch_rows, "max_body_bytes": settings.max_body_bytes},
    )


@versioned.get("/ready", include_in_schema=False)
@unversioned.get("/ready", summary="Whether the classifier is ready; 503 while draining", tags=["model"])
async def model_ready(service: Parts) -> dict[str, bool]:
    service.gate.check()
    return {"ready": True}


@versioned.post("/infer", include_in_schema=False)
@unversioned.post("/infer", **INFER)
async def infer(request: Request, service: Parts, caller: Caller) -> Response:
    with service.gate.enter():
        settings, headers = service.settings, request.headers
        idempotency_key = _idempotency_key(headers.get(protocol.IDEMPOTENCY_KEY_HEADER))
        json_length = _json_length(headers.get(protocol.JSON_LENGTH_HEADER))
        body = await read_body(request, limit=settings.max_body_bytes, timeout=settings.body_timeout)
        prepared = await asyncio.to_thread(prepare, service, body, headers.get("content-encoding", ""), json_length)
        answered = await answer(service, caller, idempotency_key, prepared)
    encoded, receipt = answered.encoded, answered.receipt
    answer_headers = {
        protocol.QUERY_CHARGE_HEADER: str(receipt.charged),
        protocol.QUERY_REMAINING_HEADER: str(receipt.remaining),
        protocol.QUERY_RECEIPT_HEADER: str(receipt.seq),
    }
    if encoded.json_length is None:
        return Response(encoded.body(), headers=answer_headers, media_type="application/json")
    answer_headers[protocol.JSON_LENGTH_HEADER] = str(encoded.json_length)
    return Response(encoded.body(), headers=answer_headers, media_type="application/octet-stream")


@router.get(protocol.BUDGET_ROUTE, summary="The caller's own account, in queries", tags=["account"], responses=REFUSALS)
async def budget(caller: Caller) -> protocol.BudgetStatement:
    account = caller.account
    return protocol.BudgetStatement(
        client=account.client, budget=account.budget, spent=account.spent, remaining=account.remaining
    )


@router.get(
    protocol.CHARGES_ROUTE,
    summary="The caller's own charges and refunds, oldest first, a page at a time",
    tags=["account"],
    responses=REFUSALS,
)
async def charges(
    service: Parts,
    caller: Caller,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="`next_after` of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=protocol.CHARGES_PAGE)] = protocol.CHARGES_PAGE,
) -> protocol.ChargePage:
    # One more than asked for tells whether this page is the last.
    found = await service.on_ledger(
        service.ledger.entries, caller.id, after=after, limit=limit + 1, kinds=("charge", "refund")
    )
    page = found[:limit]
    return protocol.ChargePage(
        client=caller.name,
        entries=tuple(
            protocol.ChargeEntry(
                seq=entry.seq,
                at=entry.at,
                kind=entry.kind,
                rows=entry.rows,
                idempotency_key=entry.idempotency_key,
                body_sha256=entry.body_sha256,
            )
            for entry in page
        ),
        next_after=page[-1].seq if len(found) > limit else None,
    )


@router.get(protocol.METRICS_ROUTE, summary="Metrics for Prometheus", tags=["health"], response_class=Response)
async def metrics(request: Request, service: Parts) -> Response:
    content, content_type = await service.on_ledger(service.metrics.render, request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})


def _idempotency_key(header: str | None) -> str | None:
    if header is not None and not (
        1 <= len(header) <= protocol.MAX_IDEMPOTENCY_KEY and all("!" <= character <= "~" for character in header)
    ):
        raise MalformedRequest(
            f"{protocol.IDEMPOTENCY_KEY_HEADER} must be 1 to {protocol.MAX_IDEMPOTENCY_KEY} visible ASCII characters"
        )
    return header


def _json_length(header: str | None) -> int | None:
    # isdecimal alone would take the digits of every script, and int() an underscore.
    if header is not None and not (header.isascii() and header.isdecimal() and len(header) <= 12):
        raise MalformedRequest(f"{protocol.JSON_LENGTH_HEADER} must be a number of bytes")
    return None if header is None else int(header)


router.include_router(unversioned)
router.include_router(versioned)
