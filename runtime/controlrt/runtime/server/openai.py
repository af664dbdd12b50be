"""The interface of OpenAI's images API, for clients that speak it.

What the API has no field for is named as in the native interface, through the client's ``extra_body``; control pictures
are ``control_image``, since ``image`` is what an edit starts from.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from controlrt.runtime.errors import ControlRTError, ParameterError, RequestError, UnknownNameError
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.server import jobs
from controlrt.runtime.server.error_answers import ErrorAnswer, answer_to
from controlrt.runtime.server.error_shapes import openai_body, openai_response
from controlrt.runtime.server.events import EventStream, event
from controlrt.runtime.server.jobs import Job, Pixels, Progress, Result, Service
from controlrt.runtime.server.middleware import note
from controlrt.runtime.server.pictures_io import ENCODINGS, Encoding, encode_base64
from controlrt.runtime.server.refusals import refuse_all, renamed
from controlrt.runtime.server.request_body import to_job_request
from controlrt.runtime.server.schemas import SERVERS_OWN, GenerateRequest
from controlrt.runtime.server.settings import Settings
from controlrt.runtime.server.waiting import result_while_connected

OURS: Mapping[str, str] = {
    "num_images_per_prompt": "n",
    "width": "size",
    "height": "size",
    "image": "control_image",
    "init_image": "image",
    "mask_image": "mask",
    "previews": "partial_images",
}
"""Our fields that have another name here."""
EXTENSIONS = frozenset(GenerateRequest.model_fields) - {"prompt", *OURS, *SERVERS_OWN} | {"control_image", "timeout_ms"}
"""Fields that OpenAI's API does not have."""
OFF: Mapping[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "style": ("natural",),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "input_fidelity": ("low",),
    "output_compression": (100,),
    "complexity": (),
    "frame_count": (1,),
    "frame_duration_ms": (),
    "svg": (),
    "markup": (),
}
"""What is not supported, and the values that change nothing; null never does."""
IDLE = ("user", "safety_identifier")
"""Who asks, which is nobody's business here."""
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
_BRACKETED = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")
_NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


class ImagesRequest(BaseModel):
    """A request of OpenAI's images API. What else comes with it are our own fields."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(description="what to draw")
    model: str | None = Field(None, description="a bundle of GET /v1/models; the first where not given")
    n: int | None = Field(None, ge=1, description="pictures; 1 where not given")
    size: str | None = Field(None, description="WIDTHxHEIGHT, or auto: the bundle's own, or that of the picture")
    response_format: str | None = Field(None, description="b64_json; url is refused")
    output_format: str | None = Field(None, description="png, jpeg or webp")
    stream: bool | None = Field(None, description="server-sent events")
    partial_images: int | None = Field(None, ge=0, le=3, description="previews of each picture, with stream")

    @property
    def encoding(self) -> Encoding:
        """The pictures' format.

        Raises:
            RequestError: another one.
        """
        wanted = self.output_format or "png"
        for encoding in ENCODINGS:
            if wanted == encoding:
                return encoding
        raise RequestError(str(ParameterError("output_format", wanted, "png, jpeg or webp")), "output_format")


def router(service: Service, settings: Settings) -> APIRouter:
    """The routes ``/v1/images/...`` and ``/v1/models``.

    Args:
        service: draws.
        settings: the server's limits.
    """
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/images/generations")
    async def generations(request: Request, body: ImagesRequest) -> Response:
        """Draws pictures from a prompt and, with ``control_image``, control pictures."""
        return await draw(request, body, {}, "image_generation")

    @routes.post(
        "/images/edits",
        openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": {"type": "object"}}}}},
    )
    async def edits(request: Request) -> Response:
        """Draws a picture anew, all of it, or where the mask (or the picture itself) is transparent."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise HTTPException(415, f"Content-Type is {kind!r}; send multipart/form-data")
        async with request.form(max_files=8, max_fields=64, max_part_size=settings.max_body_bytes) as form:
            values = await form_values(form)
        files = {name: values.pop(name) for name in ("image", "mask") if values.get(name) is not None}
        for name, value in files.items():
            if not isinstance(value, bytes):
                found = f"{len(value)} pictures" if isinstance(value, list) else "no file"
                raise RequestError(str(ParameterError(name, found, "one file")), name)
        if "image" not in files:
            raise RequestError("image is missing; send the picture to start from", "image")
        return await draw(request, ImagesRequest.model_validate(values), files, "image_edit")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The bundles."""
        return {"object": "list", "data": [_model(name, each) for name, each in service.bundles.items()]}

    @routes.get("/models/{name}")
    async def model(name: str) -> Response:
        """One bundle."""
        if name not in service.bundles:
            return _no_model(name, service)
        return JSONResponse(_model(name, service.bundles[name]))

    async def draw(
        request: Request,
        body: ImagesRequest,
        files: Mapping[str, bytes],
        kind: Literal["image_generation", "image_edit"],
    ) -> Response:
        if body.model is not None and body.model not in service.bundles:
            return _no_model(body.model, service)
        drawn = await asyncio.to_thread(to_request, body, files, settings)
        with renamed(OURS):
            job = await service.submit(drawn)
        note(request, job=job.id, model=body.model or next(iter(service.bundles)))
        if body.stream:
            return EventStream(_events(job, body, kind), on_end=job.cancel)
        with renamed(OURS):
            result = await result_while_connected(request, job)
        return JSONResponse(await asyncio.to_thread(_images, result, body.encoding))

    return routes


def to_request(body: ImagesRequest, files: Mapping[str, bytes], settings: Settings) -> jobs.Request:
    """What the service is asked for. It decodes pictures: work for a thread.

    Args:
        body: the fields.
        files: ``image`` and ``mask`` of an edit.
        settings: the server's limits.

    Raises:
        RequestError, ValidationError: a field that is not supported, or a value out of its range.
    """
    given = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    refuse_all({name: value for name, value in given.items() if name not in EXTENSIONS}, OFF, IDLE)
    if body.response_format not in (None, "b64_json"):
        raise RequestError(
            f"response_format is {body.response_format!r}, but must be b64_json: this server keeps no pictures",
            "response_format",
        )
    if body.partial_images and not body.stream:
        raise RequestError("partial_images come with stream", "partial_images")
    _ = body.encoding  # refused before anything is drawn
    native = {name: value for name, value in given.items() if name in EXTENSIONS and name != "control_image"}
    native |= {"prompt": body.prompt, "num_images_per_prompt": body.n or 1, "previews": bool(body.partial_images)}
    native |= {"stream": bool(body.stream)}
    native |= _sized(body.size)
    for name, value in (("model", body.model), ("image", given.get("control_image"))):
        if value is not None:
            native[name] = value
    for ours, name in (("init_image", "image"), ("mask_image", "mask")):
        if name in files:
            native[ours] = files[name]
    with renamed(OURS):
        request = to_job_request(GenerateRequest.model_validate(native), settings)
    if "init_image" not in request.arguments:
        return request
    return replace(request, arguments=edit_arguments(request.arguments))


def edit_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of an edit: the mask as ours, white where transparent, and the size that of the picture where none is asked for.

    Raises:
        RequestError: a mask that is not transparent anywhere.
    """
    edited = dict(arguments)
    picture: Image.Image = edited["init_image"]
    if "width" not in edited:
        edited["width"], edited["height"] = picture.size
    if "mask_image" in edited:
        mask = transparent(edited["mask_image"])
        if mask is None:
            raise RequestError("mask is opaque; make transparent what is to be drawn anew", "mask")
        edited["mask_image"] = mask
    elif (mask := transparent(picture)) is not None:
        edited["mask_image"] = mask
    return edited


def transparent(picture: Image.Image) -> Image.Image | None:
    """Where a picture is transparent, white on black; None where it nowhere is."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    return ImageOps.invert(alpha) if alpha.getextrema() != (255, 255) else None


async def form_values(form: FormData) -> dict[str, Any]:
    """A form as JSON would say it: ``name[]``, or a name that comes again, is a list, ``name[key]`` a mapping."""
    values: dict[str, Any] = {}
    for field, part in form.multi_items():
        value: Any = await part.read() if isinstance(part, UploadFile) else part
        match = _BRACKETED.fullmatch(field)
        name, key = (match[1], match[2]) if match else (field, None)
        if key:
            mapping = values.setdefault(name, {})
            if not isinstance(mapping, dict):
                raise RequestError(f"the form has both {name} and {field}", name)
            mapping[key] = value
        elif name not in values:
            values[name] = value if key is None or name == "image" else [value]
        elif isinstance(values[name], dict):
            raise RequestError(f"the form has both {name}[...] and {field}", name)
        else:
            values[name] = [*_listed(values[name]), value]
    for name in ("controlnet_conditioning_scale", "scheduler", "control_layer_weights"):
        if isinstance(values.get(name), str) and values[name][:1] in ("[", "{"):
            values[name] = _json(values[name], name)
    return values


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"{name} is not JSON", name) from None


def _sized(size: str | None) -> dict[str, int]:
    if size in (None, "auto"):
        return {}
    match = _SIZE.fullmatch(size or "")
    if match is None:
        raise RequestError(str(ParameterError("size", size, "auto, or WIDTHxHEIGHT such as 512x512")), "size")
    return {"width": int(match[1]), "height": int(match[2])}


def _no_model(name: str, service: Service) -> Response:
    message = str(UnknownNameError("model", name, service.bundles))
    answer = ErrorAnswer(status=404, code="model_not_found", message=message, parameter="model")
    return openai_response(answer)


def _model(name: str, manifest: Manifest) -> dict[str, Any]:
    try:
        created = int(datetime.datetime.fromisoformat(manifest.provenance.created).timestamp())
    except ValueError:
        created = 0
    return {"id": name, "object": "model", "created": created, "owned_by": "controlrt"}


def _images(result: Result, encoding: Encoding) -> dict[str, Any]:
    return {
        "created": int(time.time()),
        "data": [{"b64_json": encode_base64(picture, encoding)} for picture in result.pictures],
        "background": "opaque",
        "output_format": encoding,
        "size": _size(result.pictures[0]),
        "seeds": list(result.seeds),
    }


async def _events(job: Job, body: ImagesRequest, kind: str) -> AsyncGenerator[str, None]:
    """Previews as they are due, then the pictures, or what went wrong."""
    wanted, sent = body.partial_images or 0, 0
    try:
        async for progress in job.watch():
            if sent < wanted and _due(progress, sent, wanted):
                for preview in progress.previews:
                    fields = await asyncio.to_thread(_picture, _enlarged(preview), body.encoding)
                    yield event(
                        f"{kind}.partial_image",
                        {**fields, "type": f"{kind}.partial_image", "partial_image_index": sent},
                    )
                sent += 1
        result = await job.wait()
        for picture in result.pictures:
            fields = await asyncio.to_thread(_picture, picture, body.encoding)
            ended = {"usage": _NO_USAGE, "seeds": list(result.seeds)}
            yield event(f"{kind}.completed", {**fields, **ended, "type": f"{kind}.completed"})
    except ControlRTError as error:
        yield event("error", {"type": "error", **openai_body(answer_to(error))})


def _due(progress: Progress, sent: int, wanted: int) -> bool:
    """Whether the next of ``wanted`` previews, evenly over the steps, should be shown."""
    return bool(progress.previews) and progress.step * (wanted + 1) >= (sent + 1) * progress.steps


def _enlarged(preview: Pixels) -> Image.Image:
    """A preview at the size of the picture."""
    small = Image.fromarray(preview)
    return small.resize((8 * small.width, 8 * small.height), Image.Resampling.BICUBIC)


def _picture(picture: Pixels | Image.Image, encoding: Encoding) -> dict[str, Any]:
    """What events say of a picture."""
    return {
        "b64_json": encode_base64(picture, encoding),
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": encoding,
        "quality": "auto",
        "size": _size(picture),
    }


def _size(picture: Pixels | Image.Image) -> str:
    width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
    return f"{width}x{height}"
