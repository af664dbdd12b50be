"""The jobs that a service has, and for a while those that it had."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from controlrt.runtime.errors import (
    CancelledError,
    ControlRTError,
    DeadlineError,
    DrawingError,
    RequestError,
    UnavailableError,
)
from controlrt.runtime.server.jobs import FINISHED, Job, Progress, Request, Result, Status
from controlrt.runtime.server.messages import Accepted, Advanced, Failed, Finished, Refused

_KEPT_JOBS = 1000
"""Finished jobs that can still be asked for."""
_KEPT_SECONDS = 600.0
_SMOOTHING = 0.1
"""Weight of the last job in the mean of what a job takes."""


class Register:
    """Jobs by their ids. It belongs to the event loop of its service."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._finished: OrderedDict[str, float] = OrderedDict()
        self._numbers = itertools.count(1)
        self._changed = asyncio.Event()
        self._holders = 0
        self.mean_seconds = 1.0
        """From submission to picture, a running mean: by Little's law, as long as all that wait take to be drawn."""

    def new(self, request: Request, cancel: Callable[[str], None]) -> Job:
        """A job with an id that nobody can guess; ``cancel`` is told the id."""
        identity = f"{next(self._numbers):x}-{secrets.token_hex(8)}"
        job = Job(id=identity, request=request, cancel=lambda: cancel(identity))
        self._jobs[identity] = job
        return job

    def get(self, name: str) -> Job | None:
        """A job, unless it is long finished."""
        return self._jobs.get(name)

    async def accepted(self, job: Job, answer: asyncio.Future[None]) -> None:
        """Waits for the answer where somebody watches the job. One that is not accepted is forgotten, and one whose
        client leaves is cancelled."""
        answer.add_done_callback(partial(self._forget_refused, job))
        if not job.request.watched:
            return
        try:
            await asyncio.shield(answer)
        except asyncio.CancelledError:
            job.cancel()
            raise

    def _forget_refused(self, job: Job, answer: asyncio.Future[None]) -> None:
        """Whoever asked for it is told that it cannot be."""
        if not answer.cancelled() and isinstance(answer.exception(), RequestError | UnavailableError):
            self._jobs.pop(job.id, None)
            self._finished.pop(job.id, None)
            self._changed.set()

    def end(self, job: Job, status: Status, error: ControlRTError | None) -> None:
        """The last change of a job; old ones are forgotten."""
        job.request = dataclasses.replace(job.request, arguments={})  # its pictures may be large
        job.change(status=status, error=error)
        now = time.monotonic()
        if status == "done":
            self.mean_seconds += _SMOOTHING * (now - job.submitted - self.mean_seconds)
        self._finished[job.id] = now
        while self._finished:
            oldest, when = next(iter(self._finished.items()))
            if len(self._finished) <= _KEPT_JOBS and now - when <= _KEPT_SECONDS:
                break
            del self._finished[oldest]
            self._jobs.pop(oldest, None)
        self._changed.set()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """See ``Service``."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._changed.set()

    async def all_finished(self) -> None:
        """Returns when every job is finished, and nobody holds the service."""
        while self._holders or any(job.status not in FINISHED for job in self._jobs.values()):
            self._changed.clear()
            await self._changed.wait()


def hear(job: Job, message: Accepted | Advanced | Finished) -> None:
    """Notes in a job what its engine says; ``Register.end`` has the last word."""
    if isinstance(message, Accepted):
        job.change(progress=Progress(step=0, steps=message.steps))
    elif isinstance(message, Advanced):
        progress = Progress(step=message.step, steps=job.progress.steps, previews=message.previews)
        job.change(status="running", progress=progress)
    else:
        steps = job.progress.steps
        job.change(progress=Progress(step=steps, steps=steps))
        job.result = Result(pictures=message.pictures, seeds=message.seeds, seconds=message.seconds)


def error_of(message: Refused | Failed) -> ControlRTError:
    """What the client of a request is told that was refused or not drawn."""
    if isinstance(message, Refused):
        return RequestError(message.message, message.parameter)
    kinds = {"deadline": DeadlineError, "cancelled": CancelledError, "engine": DrawingError}
    return kinds[message.reason](message.message)


def with_seed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline with a seed, drawn where there is none: a request that is tried again has the same."""
    seed = arguments.get("seed")
    return {**arguments, "seed": secrets.randbits(32) if seed is None else seed}
