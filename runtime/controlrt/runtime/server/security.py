"""API keys: who may ask."""

from __future__ import annotations

import base64
import hmac
from pathlib import Path

from starlette.datastructures import Headers

from controlrt.runtime.errors import UserError

OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json")
"""What answers without a key: nothing there says what the server draws, or for whom."""


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and those that begin with # do not count.

    Raises:
        UserError: a file that cannot be read, or has no key.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path} cannot be read: {error}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-key-file {path} has no key; write one a line: openssl rand -hex 32 > {path}")
    return keys


def shows_key(headers: Headers, keys: tuple[str, ...]) -> bool:
    """Whether a request shows one of the keys: as a bearer token, in X-API-Key, or as the password of any user.

    Every key is compared, each in constant time, so that the time says nothing of them.
    """
    scheme, _, token = headers.get("authorization", "").partition(" ")
    match scheme.lower():
        case "bearer":
            shown = token.strip()
        case "basic":
            shown = _password(token)
        case _:
            shown = headers.get("x-api-key", "")
    given = shown.encode("latin-1")  # the header's bytes
    return any([hmac.compare_digest(given, key.encode("utf-8")) for key in keys])  # noqa: C419 - all, not until one fits


def _password(credentials: str) -> str:
    """Of basic authentication (RFC 7617), which is all that clients of the web UI know."""
    try:
        return base64.b64decode(credentials).decode("latin-1").partition(":")[2]
    except ValueError:
        return ""
