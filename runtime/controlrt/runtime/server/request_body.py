"""Bodies of the native interface: JSON or a form becomes a request of the service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest

from controlrt.runtime.errors import RequestError
from controlrt.runtime.server import jobs
from controlrt.runtime.server.pictures_io import PictureReader
from controlrt.runtime.server.schemas import PICTURES, SERVERS_OWN, GenerateRequest
from controlrt.runtime.server.settings import Settings

_TEXTS = ("prompt", "negative_prompt")
_MAX_PARTS = 128
_SMALL = 2**18
"""Bytes of JSON that are parsed in less time than it takes to hand them to a thread."""


async def read_generate_request(request: HTTPRequest, settings: Settings) -> GenerateRequest:
    """The body of a request, checked against the schema.

    Raises:
        HTTPException: 400 for a body that cannot be parsed, 413 for too large a one, 415 for another kind.
        ValidationError: fields that are unknown, missing or wrong.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await request.body()
        if len(body) <= _SMALL:
            return GenerateRequest.model_validate_json(body, strict=True)
        return await asyncio.to_thread(GenerateRequest.model_validate_json, body, strict=True)
    if kind == "multipart/form-data":
        limits = {"max_files": _MAX_PARTS, "max_fields": _MAX_PARTS, "max_part_size": settings.max_body_bytes}
        async with request.form(**limits) as form:
            return GenerateRequest.model_validate(await _form_values(form))
    found = f"is {kind!r}" if kind else "is missing"
    raise HTTPException(415, f"Content-Type {found}; send application/json or multipart/form-data")


async def _form_values(form: FormData) -> dict[str, Any]:
    """A form as JSON would say it.

    A field that comes again is a list. ``image.canny`` is the key ``canny`` of the field ``image``. Prompts are text;
    in other fields a list or a mapping is written as JSON.
    """
    listed: dict[str, list[Any]] = {}
    for name, part in form.multi_items():
        value = await part.read() if isinstance(part, UploadFile) else _form_value(name, part)
        listed.setdefault(name, []).append(value)
    values: dict[str, Any] = {}
    for name, parts in listed.items():
        value = parts[0] if len(parts) == 1 else parts
        field, dot, key = name.partition(".")
        if not dot or field not in PICTURES:
            values[name] = value
            continue
        named = values.setdefault(field, {})
        if not isinstance(named, dict) or field in listed:
            raise RequestError(f"the form has both {field} and {name}; name every picture, or none", field)
        named[key] = value
    return values


def _form_value(name: str, text: str) -> Any:
    if name in _TEXTS or not text.startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def to_job_request(body: GenerateRequest, settings: Settings) -> jobs.Request:
    """What the service is asked for. It decodes pictures: work for a thread.

    Raises:
        RequestError: more than this server draws, or a picture that cannot be read.
    """
    arguments = {name: getattr(body, name) for name in body.model_fields_set.difference(SERVERS_OWN)}
    settings.check(arguments)
    timeout = settings.timeout if body.timeout_ms is None else body.timeout_ms / 1000
    if timeout > settings.timeout:
        most = int(1000 * settings.timeout)
        raise RequestError(f"timeout_ms is {body.timeout_ms}, but this server allows at most {most}", "timeout_ms")
    reader = PictureReader(settings.max_pixels)
    for name in PICTURES:
        if name in arguments:
            arguments[name] = _decoded(reader, arguments[name], name)
    return jobs.Request(
        arguments=arguments,
        bundle=body.model,
        timeout=timeout,
        previews=body.previews,
        watched=body.stream or body.previews or not body.wait,
    )


def _decoded(reader: PictureReader, value: Any, parameter: str) -> Any:
    match value:
        case None:
            return None
        case str():
            return reader.decode_text(value, parameter)
        case bytes():
            return reader.decode(value, parameter)
        case Mapping():
            return {name: _decoded(reader, each, f"{parameter}.{name}") for name, each in value.items()}
        case _:
            return [_decoded(reader, each, parameter) for each in value]
