"""What is at the HTTP port, and what it says."""

from __future__ import annotations

from typing import Protocol

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from engram_service.observability.health import Health
from engram_service.protocols.http.body import BodyLimit
from engram_service.protocols.http.limits import Limits

_FRESH = {"Cache-Control": "no-store"}
_LINE_MAX = 300


class Exposition(Protocol):
    """The metrics as text."""

    async def text(self) -> bytes: ...


def routes(exposition: Exposition, health: Health, limits: Limits) -> Starlette:
    """/metrics, /healthz (it lives) and /readyz (it can do its work)."""

    async def scrape(request: Request) -> Response:
        return Response(await exposition.text(), media_type=CONTENT_TYPE_LATEST)

    async def alive(request: Request) -> Response:
        return PlainTextResponse("ok\n", headers=_FRESH)

    async def ready(request: Request) -> Response:
        failures = health.failures()
        lines = ["not ready" if failures else "ready", *failures]
        lines += [f"warning: {warning}" for warning in health.warnings()]
        text = "".join(" ".join(line.split())[:_LINE_MAX] + "\n" for line in lines)
        return PlainTextResponse(text, status_code=503 if failures else 200, headers=_FRESH)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = "only /metrics, /healthz and /readyz are here" if error.status_code == 404 else error.detail
        return PlainTextResponse(text + "\n", status_code=error.status_code, headers=error.headers)

    app = Starlette(
        routes=[Route("/metrics", scrape), Route("/healthz", alive), Route("/readyz", ready)],
        middleware=[Middleware(BodyLimit, bytes_max=limits.body_bytes_max)],
        exception_handlers={HTTPException: refused},
    )
    app.router.redirect_slashes = False
    return app
