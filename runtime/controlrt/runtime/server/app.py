"""The web application: interfaces upon a service, and what they have in common."""

from __future__ import annotations

import importlib.metadata
import logging
import weakref
from collections.abc import Callable

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.params import Depends
from fastapi.responses import JSONResponse, Response
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.server import automatic1111, native, openai
from controlrt.runtime.server.error_answers import answer_to
from controlrt.runtime.server.error_shapes import error_response
from controlrt.runtime.server.jobs import Job, Service
from controlrt.runtime.server.log import log
from controlrt.runtime.server.metrics import CONTENT_TYPE, Metrics
from controlrt.runtime.server.middleware import Gate, RequestRecord, note, request_id
from controlrt.runtime.server.security import OPEN_PATHS
from controlrt.runtime.server.settings import Settings

_DESCRIPTION = """Draws controlled pictures from bundles of controlrt.

Every answer has an `X-Request-ID`, the client's own where it sends one. Every error has one shape:
`{"error": {"code", "message", "parameter", "request_id"}}`.
"""


def build_app(service: Service, settings: Settings, metrics: Metrics | None = None, *, ui: bool = False) -> FastAPI:
    """The application of a server.

    Args:
        service: what draws; it is opened and closed by the caller.
        settings: the limits, and the keys.
        metrics: what the service records too; its own where None.
        ui: with the web page, which needs the extra ``controlrt[ui]``.

    ``app.state.before_exit`` is called when everything is answered, to end connections that are open all the time.
    ``app.state.uncollected`` is the set of jobs whose clients have yet to ask for what they made.
    """
    metrics = metrics or Metrics()
    app = FastAPI(
        title="controlrt",
        version=importlib.metadata.version("controlrt"),
        description=_DESCRIPTION,
        redoc_url=None,
    )
    uncollected: weakref.WeakSet[Job] = weakref.WeakSet()
    app.state.uncollected = uncollected
    app.state.before_exit = list[Callable[[], object]]()
    _add_errors(app, metrics)
    _add_probes(app, service, metrics)
    asks_for_keys = _documented_keys() if settings.api_keys else []
    app.include_router(native.router(service, settings, uncollected, metrics), dependencies=asks_for_keys)
    for interface in (openai, automatic1111):  # whose documents are their own
        app.include_router(interface.router(service, settings), include_in_schema=False)
    open_paths: tuple[str, ...] = OPEN_PATHS
    if ui:
        from controlrt.runtime.server.ui.mount import PATH, mount_page

        mount_page(app, service, settings)
        open_paths += ("/", PATH)  # the page asks for a key itself
    app.add_middleware(Gate, settings=settings, metrics=metrics, open_paths=open_paths)
    app.add_middleware(RequestRecord, metrics=metrics)
    return app


def _documented_keys() -> list[Depends]:
    """What the OpenAPI document says of keys; the gate is what asks for them."""
    bearer, header = HTTPBearer(auto_error=False), APIKeyHeader(name="X-API-Key", auto_error=False)
    return [Security(bearer), Security(header)]


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    async def answer_error(request: Request, error: Exception) -> JSONResponse:
        answer = answer_to(error)
        if answer.status >= 500 and answer.code in ("internal", "drawing_failed"):
            log("failed", logging.ERROR, error=error, request_id=request_id(request))
        if answer.status not in (404, 405):
            metrics.rejected(answer.code)
        note(request, code=answer.code)
        return error_response(answer, request.url.path, request_id(request))

    for kind in (ControlRTError, ValidationError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)


def _add_probes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["probes"], summary="Whether the process lives")
    async def healthz() -> JSONResponse:
        """503 once it cannot draw any more and must be started anew."""
        state = service.state
        return JSONResponse({"status": state}, 503 if state == "failed" else 200)

    @app.get("/readyz", tags=["probes"], summary="Whether it takes requests")
    async def readyz() -> JSONResponse:
        """503 while it starts, and once it ends."""
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", tags=["probes"], summary="Measurements, for Prometheus", response_class=Response)
    async def measurements() -> Response:
        """Prometheus' text format."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)
