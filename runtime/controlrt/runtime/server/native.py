"""The native interface: ``POST /v1/generate`` with the arguments of the pipeline, and jobs."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, MutableSet
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from controlrt.runtime.errors import ControlRTError, RequestError
from controlrt.runtime.server.error_answers import answer_to
from controlrt.runtime.server.events import EventStream, event
from controlrt.runtime.server.jobs import FINISHED, Job, Progress, Result, Service
from controlrt.runtime.server.metrics import Metrics
from controlrt.runtime.server.middleware import note, request_id
from controlrt.runtime.server.pictures_io import MEDIA_TYPES, Encoding, encode, encode_base64
from controlrt.runtime.server.request_body import read_generate_request, to_job_request
from controlrt.runtime.server.schemas import (
    BundleDescription,
    ControlDescription,
    ErrorBody,
    ErrorDetail,
    Generated,
    GenerateRequest,
    JobState,
    multipart_schema,
)
from controlrt.runtime.server.settings import Settings
from controlrt.runtime.server.waiting import result_while_connected

_RAW = {
    media_type: {"schema": {"type": "string", "contentMediaType": media_type}} for media_type in MEDIA_TYPES.values()
}
_STREAM = {"schema": {"type": "string", "description": "events job, progress, result and error, with JSON as data"}}
_EVENTS = {"text/event-stream": _STREAM}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "A body that cannot be parsed"},
    409: {"model": ErrorBody, "description": "Somebody else has cancelled the job"},
    413: {"model": ErrorBody, "description": "Too large a body"},
    415: {"model": ErrorBody, "description": "Neither JSON nor a form"},
    422: {"model": ErrorBody, "description": "Something that cannot be drawn; the message says what mends it"},
    429: {"model": ErrorBody, "description": "The queue is full; ask again after Retry-After seconds"},
    500: {"model": ErrorBody, "description": "The engine failed at it twice"},
    503: {"model": ErrorBody, "description": "The server ends (draining), or nothing can draw now (no_worker)"},
    504: {"model": ErrorBody, "description": "It was not done within timeout_ms"},
}
_GENERATED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Generated,
        "description": "The pictures; one picture as it is where Accept names its media type; events with stream",
        "content": {**_RAW, **_EVENTS},
    },
    202: {"model": JobState, "description": "Accepted, with wait false; Location says where it is"},
}
_NO_JOB: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "No such job, or no longer"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": GenerateRequest.model_json_schema()},
            "multipart/form-data": {"schema": multipart_schema()},
        },
    }
}
ResponseQuery = Annotated[Encoding, Query(alias="response", description="the pictures' format")]


def router(service: Service, settings: Settings, uncollected: MutableSet[Job], metrics: Metrics) -> APIRouter:
    """The routes under ``/v1``.

    Args:
        service: what draws.
        settings: the limits.
        uncollected: gets every job that a client means to ask for later, until it has.
        metrics: learns when clients see their first preview.
    """
    routes = APIRouter(prefix="/v1", tags=["native"])
    previewed: weakref.WeakSet[Job] = weakref.WeakSet()

    def found(name: str) -> Job:
        job = service.job(name)
        if job is None:
            raise HTTPException(404, f"no job {name!r}; finished ones are kept for a while only")
        return job

    def model_of(job: Job) -> str:
        return job.request.bundle or next(iter(service.bundles))

    async def generated(job: Job, result: Result, encoding: Encoding) -> Generated:
        files = await asyncio.gather(
            *(asyncio.to_thread(encode_base64, picture, encoding) for picture in result.pictures)
        )
        return Generated(
            id=job.id,
            model=model_of(job),
            images=files,
            media_type=MEDIA_TYPES[encoding],
            seeds=list(result.seeds),
            seconds=dict(result.seconds),
        )

    async def state(request: Request, job: Job, encoding: Encoding) -> JobState:
        status, progress, error = job.status, job.progress, job.error
        result = None if job.result is None else await generated(job, job.result, encoding)
        answer = None if error is None else answer_to(error)
        return JobState(
            id=job.id,
            status=status,
            url=f"/v1/jobs/{job.id}?response={encoding}",
            step=progress.step,
            steps=progress.steps,
            previews=await _previews(progress),
            result=result,
            error=None if answer is None else ErrorDetail(**answer.body(request_id(request))["error"]),
        )

    async def events(request: Request, job: Job, encoding: Encoding) -> AsyncGenerator[str, None]:
        yield event("job", {"id": job.id, "status": job.status})
        async for progress in job.watch():
            previews = await _previews(progress)
            if previews and job not in previewed:
                previewed.add(job)
                metrics.previewed(model_of(job), time.monotonic() - job.submitted)
            yield event("progress", {"step": progress.step, "steps": progress.steps, "previews": previews})
        try:
            result = await generated(job, await job.wait(), encoding)
        except ControlRTError as error:
            yield event("error", answer_to(error).body(request_id(request)))
        else:
            yield event("result", result.model_dump())
        uncollected.discard(job)

    @routes.post("/generate", responses={**_GENERATED, **_ERRORS}, openapi_extra=_BODY, summary="Draw pictures")
    async def generate(request: Request) -> Response:
        """Draws pictures from prompts, control pictures and a seed.

        The body is JSON with pictures in base64, or a form with pictures as files: `image` where the model has one
        control, `image.NAME` for the control NAME, and so for `control_region`. Names, defaults and meaning of the
        fields are those of the pipeline, which has diffusers' names; what is not known is refused.

        The answer is JSON with pictures in base64, or one picture as it is where `Accept` is `image/png`, `image/jpeg`
        or `image/webp`. With `wait` false it is a job, to be fetched later; with `stream` true it is server-sent
        events. A client that waits and goes away cancels what it asked for.
        """
        body = await read_generate_request(request, settings)
        raw = _raw_encoding(request.headers.get("accept", ""))
        _check_answer(body, raw)
        asked = await asyncio.to_thread(to_job_request, body, settings)
        job = await service.submit(asked)
        note(request, job=job.id, model=model_of(job))
        if not body.wait:
            uncollected.add(job)
            accepted = await state(request, job, body.response)
            return JSONResponse(accepted.model_dump(), 202, {"Location": accepted.url})
        if body.stream:
            return EventStream(events(request, job, body.response), on_end=job.cancel)
        result = await result_while_connected(request, job)
        note(request, queued=result.seconds.get("queued"))
        if raw is not None:
            file = await asyncio.to_thread(encode, result.pictures[0], raw)
            headers = {"X-Seed": str(result.seeds[0]), "X-Job-ID": job.id}
            return Response(file, media_type=MEDIA_TYPES[raw], headers=headers)
        answer = await generated(job, result, body.response)
        return Response(answer.model_dump_json(), media_type="application/json")

    @routes.get("/jobs/{job_id}", responses=_NO_JOB, summary="Where a job is")
    async def get_job(request: Request, job_id: str, encoding: ResponseQuery = "png") -> JobState:
        """The job's status and progress, and its pictures once it is done."""
        job = found(job_id)
        finished = job.status in FINISHED
        answer = await state(request, job, encoding)
        if finished:
            uncollected.discard(job)
        return answer

    @routes.delete("/jobs/{job_id}", responses=_NO_JOB, summary="Cancel a job")
    async def cancel_job(request: Request, job_id: str) -> JobState:
        """Takes it out of the queue, or stops it at its next step; a finished job stays as it is."""
        job = found(job_id)
        job.cancel()
        uncollected.discard(job)
        return await state(request, job, "png")

    @routes.get(
        "/jobs/{job_id}/events",
        responses={
            **_NO_JOB,
            200: {"description": "Events until it is finished", "content": _EVENTS},
        },
        response_class=StreamingResponse,
        summary="Watch a job",
    )
    async def watch_job(request: Request, job_id: str, encoding: ResponseQuery = "png") -> Response:
        """Server-sent events: `job` first, then `progress`, then `result` or `error`. Progress comes at every step that
        takes a quarter of a second or has previews, as far as the client keeps up with it, and of quicker ones four
        times a second. Going away does not cancel the job, and coming again begins at where it is."""
        return EventStream(events(request, found(job_id), encoding))

    @routes.get("/bundles", summary="What the server draws with")
    async def bundles() -> list[BundleDescription]:
        """The bundles, the default one first, with their controls and sizes."""
        return [
            BundleDescription(
                name=name,
                controls=[
                    ControlDescription(name=each, kind=control.kind)
                    for control in manifest.controls
                    for each in control.names
                ],
                sizes=[str(size) for size in manifest.profile.sizes],
                default_size="{}x{}".format(*manifest.profile.default_size),
                backend=manifest.backend,
                precision=manifest.precision,
            )
            for name, manifest in service.bundles.items()
        ]

    return routes


async def _previews(progress: Progress) -> list[str]:
    """JPEG files in base64."""
    return [await asyncio.to_thread(encode_base64, preview, "jpeg") for preview in progress.previews]


def _raw_encoding(accept: str) -> Encoding | None:
    """The format of a raw picture where that is the first thing that a client accepts and this server has."""
    for part in accept.split(","):
        kind = part.partition(";")[0].strip().lower()
        for encoding, media_type in MEDIA_TYPES.items():
            if kind == media_type:
                return encoding
        if kind in ("application/json", "application/*", "*/*"):
            return None
    return None


def _check_answer(body: GenerateRequest, raw: Encoding | None) -> None:
    """Refuses a form of answer that what is asked for does not have."""
    if body.stream and not body.wait:
        raise RequestError(
            "stream is true and wait false; with wait false the events are at /v1/jobs/ID/events", "stream"
        )
    if raw is None or body.stream or not body.wait:
        return
    prompts = 1 if isinstance(body.prompt, str) else len(body.prompt)
    pictures = prompts * body.num_images_per_prompt
    if pictures != 1:
        raise RequestError(
            f"Accept asks for one picture as it is, and the request for {pictures}; send Accept: application/json",
            "Accept",
        )
