"""The shapes that errors have for clients of other interfaces: those of OpenAI's API and of the web UI's."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from controlrt.runtime.server.error_answers import ErrorAnswer

OPENAI_PATHS = ("/v1/images/", "/v1/models")
WEBUI_PATHS = ("/sdapi/", "/controlnet/")
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_response(answer: ErrorAnswer, path: str, request_id: str | None) -> JSONResponse:
    """An error in the shape that clients of ``path`` know."""
    if path.startswith(OPENAI_PATHS):
        return openai_response(answer)
    if path.startswith(WEBUI_PATHS):
        return webui_response(answer)
    return answer.response(request_id)


def openai_body(answer: ErrorAnswer) -> dict[str, Any]:
    """The JSON of an error, as OpenAI's clients read it."""
    kind = _TYPES.get(answer.status, "server_error" if answer.status >= 500 else "invalid_request_error")
    parts = {"message": answer.message, "type": kind, "param": answer.parameter, "code": answer.code}
    return {"error": parts}


def openai_response(answer: ErrorAnswer) -> JSONResponse:
    """An error of OpenAI's API, where what the request says wrong is a 400."""
    headers = dict(answer.headers)
    if answer.status == 409:
        headers["x-should-retry"] = "false"  # its clients would, and draw anew what somebody has cancelled
    return JSONResponse(openai_body(answer), 400 if answer.status == 422 else answer.status, headers)


def webui_response(answer: ErrorAnswer) -> JSONResponse:
    """An error of the web UI."""
    body = {"error": answer.code, "detail": answer.message, "body": "", "errors": answer.message}
    return JSONResponse(body, answer.status, dict(answer.headers))
