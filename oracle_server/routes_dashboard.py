"""The page: three files and the data they show."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from oracle_server import page_headers
from oracle_server.dashboard_view import DashboardView, Window, view
from oracle_server.documentation import OF_A_KEY
from oracle_server.routes import Caller, Parts
from shared.wire.errors import NotFound

DASHBOARD_ROUTE: Final = "/v1/dashboard"
STATIC_ROUTE: Final = "/static"
_PAGE = "dashboard.html"
_TYPES = {_PAGE: "text/html", "dashboard.css": "text/css", "dashboard.js": "text/javascript"}

router = APIRouter()


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def _load(name: str) -> _File:
    content = files("oracle_server").joinpath("static", name).read_bytes()
    return _File(content, _TYPES[name], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


_FILES = {name: _load(name) for name in _TYPES}


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    return _answer(request, _FILES[_PAGE])


@router.get(f"{STATIC_ROUTE}/{{name}}", include_in_schema=False)
async def static(request: Request, name: str) -> Response:
    if name not in _FILES:
        raise NotFound(f"there is no {request.url.path} here")
    return _answer(request, _FILES[name])


@router.get(
    DASHBOARD_ROUTE,
    summary="What the page shows: the caller's own account, or all of them for an admin",
    tags=["account"],
    response_model=DashboardView,
    responses=OF_A_KEY,
)
async def dashboard(
    service: Parts, caller: Caller, window: Annotated[Window, Query(description="How far back the plots reach")] = "1h"
) -> Response:
    shown = await service.on_dashboard(
        view,
        service.ledger,
        caller,
        window,
        verdict=service.watch.verdict,
        refusals=service.metrics.refusals_by_client(),
        counting_since=service.started_at,
        kept=service.spending,
    )
    return JSONResponse(shown.model_dump(mode="json"), headers=page_headers.DATA)


def _answer(request: Request, file: _File) -> Response:
    headers = page_headers.PAGE | {"ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
