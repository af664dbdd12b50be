"""A service whose engines are elsewhere: every request is a stream of answers from a replica of its bundle."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Literal, Protocol

from controlrt.runtime.errors import (
    CancelledError,
    ControlRTError,
    DeadlineError,
    DrawingError,
    UnavailableError,
    UnknownNameError,
)
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.server.jobs import Job, Request
from controlrt.runtime.server.messages import Accepted, Advanced, Failed, Finished, Refused, Submit
from controlrt.runtime.server.register import Register, error_of, hear, with_seed
from controlrt.runtime.server.replica import LAST, Answer
from controlrt.runtime.server.service import Observer

_TRIES = 2

_log = logging.getLogger(__name__)


class LostError(Exception):
    """A replica has ended before its stream has."""


class NoReplicaError(Exception):
    """There is none, and will be none."""


class Replicas(Protocol):
    """Those that draw one bundle."""

    def draw(self, submit: Submit, seconds: float | None) -> AsyncGenerator[Answer, None]:
        """The stream of one of them, as ``Replica.draw``'s; closing it before its end cancels the request.

        Reading it raises:
            LostError: the replica has ended.
            NoReplicaError: none will ever come.
        """


class RemoteService:
    """Bundles on replicas that others start and replace. See ``Service``.

    A job belongs to this process from its submission to its end, so that its id is known here whichever replica draws
    it. One whose replica ends, or whose engine fails at it, is drawn once more, alone and with the same seed.

    Args:
        bundles: manifests by name; the first is the default.
        replicas: of each.
        limits: jobs of each that may wait or run at once.
        observer: hears how many jobs there are.
    """

    def __init__(
        self,
        bundles: Mapping[str, Manifest],
        replicas: Mapping[str, Replicas],
        *,
        limits: Mapping[str, int],
        observer: Observer,
    ) -> None:
        self._manifests, self._replicas, self._observer = bundles, replicas, observer
        self.limits = limits
        """Whoever watches over the replicas changes them with their number."""
        self._register = Register()
        self._tasks: dict[str, dict[str, asyncio.Task[None]]] = {name: {} for name in bundles}
        self._draining = False
        self.condition: Literal["starting", "ready", "failed"] = "starting"
        """Of the replicas; whoever watches over them says so."""

    @property
    def bundles(self) -> Mapping[str, Manifest]:
        """See ``Service``."""
        return self._manifests

    @property
    def state(self) -> Literal["starting", "ready", "draining", "failed"]:
        """See ``Service``."""
        return "draining" if self._draining else self.condition

    async def submit(self, request: Request, *, going_on: bool = False) -> Job:
        """See ``Service``. Where somebody watches the request, that takes until a replica has room for it."""
        name = request.bundle or next(iter(self._manifests))
        if name not in self._manifests:
            raise UnknownNameError("bundle", name, self._manifests)
        if self._draining and not going_on:
            raise UnavailableError("the server is shutting down; ask another one", "draining", 5)
        tasks = self._tasks[name]
        if len(tasks) >= self.limits[name] and not going_on:
            wait = max(1.0, self._register.mean_seconds)
            said = f"the queue of bundle {name} is full ({len(tasks)} requests); try again in {wait:.0f} s"
            raise UnavailableError(said, "queue_full", wait)

        def cancel(identity: str) -> None:
            if identity in tasks:
                tasks[identity].cancel()

        job = self._register.new(request, cancel)
        submit = Submit(
            id=job.id,
            arguments=with_seed(request.arguments),
            deadline=None,
            previews=request.previews,
            alone=False,
            watched=request.watched,
        )
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._draw(job, name, submit, accepted))
        tasks[job.id] = task
        task.add_done_callback(partial(self._end, job, name, accepted))
        self._observer.queued(name, len(tasks))
        await self._register.accepted(job, accepted)
        return job

    def job(self, name: str) -> Job | None:
        """See ``Service``."""
        return self._register.get(name)

    def holding(self) -> AbstractContextManager[None]:
        """See ``Service``."""
        return self._register.holding()

    async def drain(self) -> None:
        """See ``Service``."""
        self._draining = True
        await self._register.all_finished()

    async def _draw(self, job: Job, name: str, submit: Submit, accepted: asyncio.Future[None]) -> None:
        """A job's task.

        Raises:
            ControlRTError: why it is not drawn.
        """
        timeout = job.request.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout):
                await self._try_twice(job, name, submit, deadline, accepted)
        except TimeoutError:
            progress = job.progress
            where = f"after step {progress.step} of {progress.steps}" if progress.steps else "before a replica had room"
            raise DeadlineError(f"request {job.id} ran out of time {where}") from None

    async def _try_twice(
        self, job: Job, name: str, submit: Submit, deadline: float | None, accepted: asyncio.Future[None]
    ) -> None:
        why = ""
        for tries in range(1, _TRIES + 1):
            once = dataclasses.replace(submit, id=f"{submit.id}.{tries}", alone=tries > 1)
            try:
                last = await self._try(job, name, once, deadline, accepted)
            except LostError as lost:
                _log.error("request %s has lost its replica: %s", job.id, lost)
                why = "its replica has ended"
                continue
            if isinstance(last, Finished):
                return
            if isinstance(last, Refused) or last.reason != "engine":
                raise error_of(last)
            why = last.message
        raise DrawingError(f"the engine failed at request {job.id}, and failed again when it was tried alone: {why}")

    async def _try(
        self, job: Job, name: str, submit: Submit, deadline: float | None, accepted: asyncio.Future[None]
    ) -> Finished | Refused | Failed:
        """What one replica says at last."""
        seconds = None if deadline is None else deadline - time.monotonic()
        last: Finished | Refused | Failed | None = None
        try:
            async with aclosing(self._replicas[name].draw(submit, seconds)) as answers:
                async for answer in answers:
                    if isinstance(answer, Accepted | Advanced | Finished):
                        hear(job, answer)
                    if isinstance(answer, LAST):
                        last = answer
                    elif not accepted.done():
                        accepted.set_result(None)
            if last is None:
                raise LostError("its stream has no end")
        except LostError:
            if last is None:
                raise
        except NoReplicaError as error:
            raise UnavailableError(f"no replica draws with bundle {name}: {error}", "no_worker", 30) from None
        return last

    def _end(self, job: Job, name: str, accepted: asyncio.Future[None], task: asyncio.Task[None]) -> None:
        """A job's task is done."""
        del self._tasks[name][job.id]
        self._observer.queued(name, len(self._tasks[name]))
        error = self._error_of(job, task)
        if not accepted.done():
            if error is None:
                accepted.set_result(None)
            else:
                accepted.set_exception(error)
        cancelled = isinstance(error, CancelledError)
        self._register.end(job, "done" if error is None else "cancelled" if cancelled else "failed", error)

    @staticmethod
    def _error_of(job: Job, task: asyncio.Task[None]) -> ControlRTError | None:
        if task.cancelled():
            return CancelledError(f"request {job.id} was cancelled")
        error = task.exception()
        if error is None or isinstance(error, ControlRTError):
            return error
        _log.error("request %s", job.id, exc_info=error)
        return DrawingError(f"request {job.id} failed: {type(error).__name__}: {error}")
