"""What every request passes, whichever interface it is for: an id, the log, metrics, the key, the limit of its body."""

from __future__ import annotations

import logging
import re
import time
import uuid
from http import HTTPMethod
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlrt.runtime.server.error_answers import CLIENT_CLOSED_REQUEST, answer_to
from controlrt.runtime.server.error_shapes import error_response
from controlrt.runtime.server.log import log
from controlrt.runtime.server.metrics import Metrics
from controlrt.runtime.server.security import OPEN_PATHS, shows_key
from controlrt.runtime.server.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


def request_id(request: Request) -> str | None:
    """The id of a request."""
    found: str | None = getattr(request.state, "request_id", None)
    return found


def note(request: Request, **fields: Any) -> None:
    """Adds to the line that the log will have of a request."""
    request.state.noted.update(fields)


class RequestRecord:
    """Gives every request an id, or takes the client's own; writes the log and metrics; answers what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection, as ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        noted: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=name, noted=noted)
        started = time.perf_counter()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = name
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            log("unexpected error", logging.ERROR, error=error, request_id=name)
            if status is not None:
                raise  # half an answer is out; the connection must break
            await error_response(answer_to(error), scope["path"], name)(scope, receive, send_with_id)
        finally:
            status = CLIENT_CLOSED_REQUEST if status is None else status
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in HTTPMethod.__members__ else "OTHER"
            self._metrics.answered(method, route, status, seconds)
            client = scope.get("client")
            log(
                "request",
                request_id=name,
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(seconds, 6),
                client=client[0] if client else None,
                **noted,
            )


class Gate:
    """Turns away requests without a key or with too large a body, before anything of them is read."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, open_paths: tuple[str, ...] = OPEN_PATHS
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection, as ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        keys, limit = self._settings.api_keys, self._settings.max_body_bytes
        refusal: HTTPException | None = None
        if keys and not self._is_open(scope["path"]) and not shows_key(headers, keys):
            says = "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
            refusal = HTTPException(401, says, {"WWW-Authenticate": "Bearer"})
        elif (length := headers.get("content-length", "")).isdecimal() and (len(length) > 18 or int(length) > limit):
            refusal = _too_large(limit)
        if refusal is not None:
            answer = answer_to(refusal)
            scope["state"]["noted"]["code"] = answer.code
            self._metrics.rejected(answer.code)
            await error_response(answer, scope["path"], scope["state"]["request_id"])(scope, receive, send)
            return
        size = 0

        async def receive_within_limit() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, receive_within_limit, send)

    def _is_open(self, path: str) -> bool:
        """Whether a path, or what it lies under, answers without a key."""
        return path in self._open_paths or path.startswith(
            tuple(f"{each}/" for each in self._open_paths if each != "/")
        )


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit:,} bytes, the most that this server reads")
