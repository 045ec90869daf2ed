"""The routes: Open Inference Protocol v2, and beside it the caller's own account and the metrics.

What a route may tell of the model is the shape of its inputs and outputs, and of a reconstructor how its images are
measured, which is public; nothing else.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from oracle_server.auth import authenticate
from oracle_server.body import read_body
from oracle_server.docs_page import docs_page
from oracle_server.documentation import INFER, OF_A_KEY, OF_A_MODEL
from oracle_server.inference import answer, prepare
from oracle_server.ledger import Client
from oracle_server.refusals import CALLER
from oracle_server.service import Service
from oracle_server.shedding import is_length
from shared.audit.charges import shown
from shared.version import VERSION
from shared.wire import protocol
from shared.wire.errors import MalformedRequest, NotFound

router = APIRouter()
# For the OpenAPI document only: `authenticate` reads the header, and says what is wrong with it.
bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer KEY`")


async def get_service(request: Request) -> Service:
    """The parts that `create_app` wired."""
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(get_service)]


async def find_caller(service: Service, request: Request) -> Client:
    """The client whose key the request carries."""
    client = await service.on_ledger(authenticate, only(request, "Authorization"), service.ledger)
    setattr(request.state, CALLER, client.name)
    return client


async def get_caller(
    service: Parts, request: Request, _documented: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> Client:
    """`find_caller`, for routes that are always the caller's own."""
    return await find_caller(service, request)


async def get_visible_client(service: Parts, request: Request) -> str | None:
    """Whose metrics the sender may see: a client's name, or None for everybody's."""
    if service.settings.metrics_access == "open":
        return None
    caller = await find_caller(service, request)
    return None if caller.is_admin else caller.name


Caller = Annotated[Client, Depends(get_caller)]


async def check_model(model: Annotated[str, Path(json_schema_extra={"enum": [protocol.MODEL_NAME]})]) -> None:
    """Refuse a model that is not served."""
    if model != protocol.MODEL_NAME:
        raise NotFound(f"there is no model '{model}': this server has one, '{protocol.MODEL_NAME}'")


async def check_version(version: Annotated[str, Path()]) -> None:
    """Refuse a version that is not served."""
    if version != protocol.MODEL_VERSION:
        raise NotFound(f"there is no version '{version}': this server has one, '{protocol.MODEL_VERSION}'")


# Every route of a model stands twice, without and with a version.
unversioned = APIRouter(prefix="/v2/models/{model}", dependencies=[Depends(check_model)], responses=OF_A_MODEL)
versioned = APIRouter(
    prefix="/v2/models/{model}/versions/{version}", dependencies=[Depends(check_model), Depends(check_version)]
)


@router.get("/v2", summary="The server and its protocol extensions", tags=["health"])
async def server_metadata() -> protocol.ServerMetadata:
    return protocol.ServerMetadata(name="zo-defense-oracle", version=VERSION, extensions=(protocol.BINARY_EXTENSION,))


@router.get("/v2/health/live", summary="Whether the process is alive", tags=["health"])
async def live() -> dict[str, bool]:
    return {"live": True}


@router.get("/v2/health/ready", summary="Whether queries are answered; 503 while draining or down", tags=["health"])
async def ready(service: Parts) -> dict[str, bool]:
    service.gate.check()
    service.policy.check_ready()
    return {"ready": True}


@router.post("/v2/repository/index", summary="The models: one", tags=["model"])
async def repository_index(service: Parts) -> list[dict[str, str]]:
    state = "UNAVAILABLE" if service.gate.draining or service.policy.down_for else "READY"
    return [{"name": protocol.MODEL_NAME, "version": protocol.MODEL_VERSION, "state": state, "reason": ""}]


@versioned.get("", include_in_schema=False)
@unversioned.get("", summary="Names and shapes of the model's input and output", tags=["model"])
async def model_metadata(service: Parts) -> protocol.ModelMetadata:
    oracle, settings = service.oracle, service.settings
    return protocol.ModelMetadata(
        name=protocol.MODEL_NAME,
        versions=(protocol.MODEL_VERSION,),
        platform="opaque",
        inputs=(protocol.TensorMetadata(name=protocol.INPUT_NAME, datatype="FP32", shape=(-1, *oracle.image_shape)),),
        outputs=(protocol.TensorMetadata(name=oracle.output_name, datatype="FP32", shape=(-1, *oracle.output_shape)),),
        parameters={
            **service.policy.announced(),
            **service.decoders.announced(),
            **oracle.announced(),
            "max_body_bytes": settings.max_body_bytes,
            protocol.FACTORED_PARAMETER: True,
            protocol.COUNTS_PARAMETER: True,
        },
    )


@versioned.get("/ready", include_in_schema=False)
@unversioned.get("/ready", summary="Whether the model is ready; 503 while draining or down", tags=["model"])
async def model_ready(service: Parts) -> dict[str, bool]:
    service.gate.check()
    service.policy.check_ready()
    return {"ready": True}


@versioned.post("/infer", include_in_schema=False)
@unversioned.post("/infer", **INFER)
async def infer(
    request: Request, service: Parts, _documented: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> Response:
    with service.shedder.enter(request.headers.raw) as place:
        caller = await find_caller(service, request)
        place.claim(caller.id)
        service.admission.remember(request.headers["Authorization"].encode("latin-1"), caller.id, caller.name)
        with service.policy.visit(caller.id) as visit, service.gate.enter(), service.room.share() as share:
            settings = service.settings
            idempotency_key = _idempotency_key(only(request, protocol.IDEMPOTENCY_KEY_HEADER))
            json_length = _json_length(only(request, protocol.JSON_LENGTH_HEADER))
            encoding = only(request, "Content-Encoding") or ""
            body = await read_body(request, share, limit=settings.max_body_bytes, timeout=settings.body_timeout)
            prepared = await service.on_bodies(prepare, service, caller.id, body, encoding, json_length, share)
            place.resize(len(prepared.rows))
            await visit.admit(len(prepared.rows))
            answered = await answer(service, caller, idempotency_key, prepared)
    encoded, payment = answered.encoded, answered.payment
    answer_headers = {
        protocol.QUERY_CHARGE_HEADER: str(payment.charged),
        protocol.QUERY_REMAINING_HEADER: str(payment.remaining),
        protocol.QUERY_RECEIPT_HEADER: service.ledger.receipt(payment),
        **visit.headers,
    }
    if encoded.json_length is None:
        return Response(encoded.body(), headers=answer_headers, media_type="application/json")
    answer_headers[protocol.JSON_LENGTH_HEADER] = str(encoded.json_length)
    return Response(encoded.body(), headers=answer_headers, media_type="application/octet-stream")


@router.get(protocol.BUDGET_ROUTE, summary="The caller's own account, in queries", tags=["account"], responses=OF_A_KEY)
async def budget(caller: Caller) -> protocol.BudgetStatement:
    account = caller.account
    return protocol.BudgetStatement(
        client=account.client,
        budget=account.budget,
        spent=account.spent,
        held=account.held,
        remaining=account.remaining,
    )


@router.get(
    protocol.LEDGER_ROUTE,
    summary="The ledger's id, its public key, and the signed end of its hash chain",
    tags=["account"],
    responses=OF_A_KEY,
)
async def ledger_head(service: Parts, caller: Caller) -> protocol.LedgerStatement:
    signed = await service.on_ledger(service.ledger.head)
    return protocol.LedgerStatement(
        ledger=signed.head.ledger,
        public_key=service.ledger.identity.public_key,
        seq=signed.head.seq,
        hash=signed.head.hash,
        at=signed.head.at,
        signature=signed.signature,
    )


@router.get(
    protocol.CHARGES_ROUTE,
    summary="The caller's own charges and refunds, oldest first, a page at a time",
    tags=["account"],
    responses=OF_A_KEY,
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
        entries=tuple(shown(entry) for entry in page),
        next_after=page[-1].seq if len(found) > limit else None,
    )


@router.get(protocol.METRICS_ROUTE, summary="Metrics for Prometheus", tags=["health"], response_class=Response)
async def metrics(
    request: Request, service: Parts, client: Annotated[str | None, Depends(get_visible_client)]
) -> Response:
    accept = request.headers.get("accept", "")
    content, content_type = await service.on_ledger(service.metrics.render, accept, client)
    return Response(content, headers={"Content-Type": content_type})


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    return docs_page(request.app.openapi())


def only(request: Request, name: str) -> str | None:
    """A header that may be sent once, so that nobody between here and the sender reads another one than we do."""
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise MalformedRequest(f"the header {name} was sent {len(values)} times: send it once")
    return values[0] if values else None


def _idempotency_key(header: str | None) -> str | None:
    if header is not None and not (
        1 <= len(header) <= protocol.MAX_IDEMPOTENCY_KEY and all("!" <= character <= "~" for character in header)
    ):
        raise MalformedRequest(
            f"{protocol.IDEMPOTENCY_KEY_HEADER} must be 1 to {protocol.MAX_IDEMPOTENCY_KEY} visible ASCII characters"
        )
    return header


def _json_length(header: str | None) -> int | None:
    if header is not None and not is_length(header.encode("latin-1")):
        raise MalformedRequest(f"{protocol.JSON_LENGTH_HEADER} must be a number of bytes")
    return None if header is None else int(header)


router.include_router(unversioned)
router.include_router(versioned)
