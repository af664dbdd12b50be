"""Calls on their way: drawing them, and what the web UI's progress, skip and interrupt say and do."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest

from controlrt.runtime.errors import CancelledError
from controlrt.runtime.server.automatic1111.drawings import Drawing
from controlrt.runtime.server.automatic1111.fields import PARAMETERS
from controlrt.runtime.server.jobs import FINISHED, Job, Pixels, Request, Result, Service
from controlrt.runtime.server.middleware import note
from controlrt.runtime.server.pictures_io import encode_base64
from controlrt.runtime.server.refusals import renamed
from controlrt.runtime.server.waiting import result_while_connected


@dataclass(eq=False)
class RunningCall:
    """One call of ``txt2img`` or ``img2img`` on its way."""

    name: str
    """``force_task_id``."""
    expected: int
    """How many jobs it takes."""
    steps: int
    started: float = field(default_factory=time.monotonic)
    jobs: list[Job] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    """Ids of jobs that somebody has skipped or interrupted."""
    interrupted: bool = False

    @property
    def current(self) -> Job | None:
        """The first job that is not finished."""
        return next((job for job in self.jobs if job.status not in FINISHED), None)

    def skip(self) -> None:
        """Cancels the iteration that is drawn now."""
        if self.current is not None:
            self.skipped.add(self.current.id)
            self.current.cancel()

    def interrupt(self) -> None:
        """Cancels all that is not drawn yet."""
        self.interrupted = True
        self.skipped.update(job.id for job in self.jobs if job.status not in FINISHED)
        self.cancel()

    def cancel(self) -> None:
        """Cancels what is not finished."""
        for job in self.jobs:
            job.cancel()


class Calls:
    """The calls of a server, in the order in which they came. It belongs to the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._running: list[RunningCall] = []

    @property
    def current(self) -> RunningCall | None:
        """The oldest one: the web UI draws one call at a time, and its clients ask for that one."""
        return self._running[0] if self._running else None

    async def draw(self, request: HttpRequest, drawing: Drawing, name: str) -> list[tuple[int, tuple[Pixels, ...]]]:
        """Draws all iterations; returns the pictures of each that was not skipped.

        All are cancelled where the client goes away or one fails.
        """
        first = drawing.iterations[0]
        call = RunningCall(
            name=name,
            expected=len(drawing.iterations) * (1 if first.second is None else 2),
            steps=first.first.arguments["num_inference_steps"],
        )
        self._running.append(call)
        try:
            return await self._draw(request, call, drawing)
        finally:
            self._running.remove(call)
            call.cancel()

    async def _draw(
        self, request: HttpRequest, call: RunningCall, drawing: Drawing
    ) -> list[tuple[int, tuple[Pixels, ...]]]:
        drawn: list[tuple[int, tuple[Pixels, ...]]] = []
        following: list[tuple[int, Job]] = []
        with self._service.holding():
            jobs: list[tuple[int, Job]] = []
            for index, each in enumerate(drawing.iterations):
                jobs.append((index, await self._submit(call, each.first, going_on=index > 0 and self._drains())))
            note(request, jobs=[job.id for _, job in jobs], model=drawing.bundle)
            for index, job in jobs:
                result = await _result(request, call, job)
                second = drawing.iterations[index].second
                if result is None:
                    continue
                if second is None or call.interrupted:
                    drawn.append((index, result.pictures))
                else:
                    start = await asyncio.to_thread(second.starting_from, result.pictures)
                    following.append((index, await self._submit(call, start, going_on=True)))
            for index, job in following:
                result = await _result(request, call, job)
                if result is not None:
                    drawn.append((index, result.pictures))
        return drawn

    def _drains(self) -> bool:
        return self._service.state == "draining"

    async def _submit(self, call: RunningCall, request: Request, *, going_on: bool = False) -> Job:
        with renamed(PARAMETERS):
            job = await self._service.submit(request, going_on=going_on)
        call.jobs.append(job)
        if call.interrupted:  # while the service checked it
            call.interrupt()
        return job


async def _result(request: HttpRequest, call: RunningCall, job: Job) -> Result | None:
    """What a job has made; None where it was skipped."""
    try:
        return await result_while_connected(request, job)
    except CancelledError:
        if job.id in call.skipped:
            return None
        raise


async def progress(call: RunningCall | None, *, with_picture: bool) -> dict[str, Any]:
    """The body of ``progress``."""
    if call is None:
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": _state(None, None),
            "current_image": None,
            "textinfo": None,
        }
    job = call.current
    finished = sum(each.status in FINISHED for each in call.jobs)
    within = job.progress.step / job.progress.steps if job is not None and job.progress.steps else 0.0
    done = min(0.01 + (finished + within) / call.expected, 1.0)
    elapsed = time.monotonic() - call.started
    picture = None
    if with_picture and job is not None and job.progress.previews:
        beside = np.concatenate(job.progress.previews, axis=1)
        picture = await asyncio.to_thread(encode_base64, beside)
    return {
        "progress": done,
        "eta_relative": elapsed / done - elapsed,
        "state": _state(call, job),
        "current_image": picture,
        "textinfo": None,
    }


def _state(call: RunningCall | None, job: Job | None) -> dict[str, Any]:
    finished = sum(each.status in FINISHED for each in call.jobs) if call else 0
    return {
        "skipped": bool(call and call.skipped and not call.interrupted),
        "interrupted": bool(call and call.interrupted),
        "stopping_generation": False,
        "job": call.name if call else "",
        "job_count": call.expected if call else 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "job_no": finished,
        "sampling_step": job.progress.step if job else 0,
        "sampling_steps": (job.progress.steps if job and job.progress.steps else call.steps) if call else 0,
    }
