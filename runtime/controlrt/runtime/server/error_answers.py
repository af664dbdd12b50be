"""What a client is told of an error: a status, a code to branch on, a sentence to read; one shape for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from controlrt.runtime.errors import (
    CancelledError,
    DeadlineError,
    DrawingError,
    UnavailableError,
    UnknownNameError,
    UserError,
)

CLIENT_CLOSED_REQUEST = 499
"""What logs and metrics say of a client that went away, after nginx; no client ever reads it."""
_SHOULD_BE = "Input should be "
_CODES = {
    400: "malformed",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
}


@dataclass(frozen=True, kw_only=True)
class ErrorAnswer:
    """An error as a client sees it."""

    status: int
    code: str
    message: str
    parameter: str | None = None
    """What in the request is wrong, where one thing is."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, request_id: str | None) -> dict[str, Any]:
        """The JSON of it."""
        parts = {"code": self.code, "message": self.message, "parameter": self.parameter, "request_id": request_id}
        return {"error": parts}

    def response(self, request_id: str | None) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(request_id), self.status, dict(self.headers))


def answer_to(error: Exception) -> ErrorAnswer:
    """The answer to an error of any kind.

    A cancelled request is a conflict, 409: whoever still waits for it is not who cancelled it. What nobody raised on
    purpose says nothing of itself; the log has it, by the request's id.
    """
    match error:
        case UnavailableError():
            status = 429 if error.reason == "queue_full" else 503
            retry_after = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ErrorAnswer(status=status, code=error.reason, message=str(error), headers=retry_after)
        case DeadlineError():
            return ErrorAnswer(status=504, code="deadline", message=str(error))
        case CancelledError():
            return ErrorAnswer(status=409, code="cancelled", message=str(error))
        case DrawingError():
            return ErrorAnswer(status=500, code="drawing_failed", message=str(error))
        case UserError():
            return ErrorAnswer(status=422, code=_CODES[422], message=str(error), parameter=_parameter(error))
        case RequestValidationError() | ValidationError():
            return _invalid(error.errors())
        case HTTPException():
            code = _CODES.get(error.status_code, "error")
            headers = error.headers or {}
            return ErrorAnswer(status=error.status_code, code=code, message=str(error.detail), headers=headers)
        case _:
            return ErrorAnswer(status=500, code="internal", message="an unexpected error; the server's log says more")


def _parameter(error: UserError) -> str | None:
    return "model" if isinstance(error, UnknownNameError) and error.kind == "bundle" else error.parameter


def _invalid(errors: Sequence[Any]) -> ErrorAnswer:
    """Of what pydantic says: the first field that is wrong, or all that are unknown."""
    for error in errors:
        if error["type"] == "json_invalid":
            return ErrorAnswer(status=400, code=_CODES[400], message=f"the body is not JSON: {error['msg']}")
    unknown = [_place(error) for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        message = f"unknown {'fields' if len(unknown) > 1 else 'field'}: {', '.join(unknown)}"
        return ErrorAnswer(status=422, code=_CODES[422], message=message, parameter=unknown[0])
    place = _place(errors[0])
    said = [error["msg"] for error in errors if _place(error) == place and error["type"] != "bytes_type"]
    allowed = dict.fromkeys(text.removeprefix(_SHOULD_BE) for text in said)
    verb = " must be" if said[0].startswith(_SHOULD_BE) else ":"
    message = f"{place or 'the body'}{verb} {' or '.join(allowed)}"
    return ErrorAnswer(status=422, code=_CODES[422], message=message, parameter=place or None)


def _place(error: Mapping[str, Any]) -> str:
    """The field that an error of pydantic is about; what comes after are its types, which are nobody's words."""
    places = [str(part) for part in error["loc"] if part not in ("body", "query", "path", "header")]
    return places[0] if places else ""
