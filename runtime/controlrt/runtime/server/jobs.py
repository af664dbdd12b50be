"""What the interfaces ask of the service, and what it answers with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import CancelledError, ControlRTError
from controlrt.runtime.manifest import Manifest

Status = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED: tuple[Status, ...] = ("done", "failed", "cancelled")
Pixels = NDArray[np.uint8]
"""(height, width, 3)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of a pipeline."""

    arguments: Mapping[str, Any]
    """Those of ``ControlNetPipeline.prepare``, pictures as arrays or PIL pictures. The service draws a missing seed, so
    that a request that is tried again gives the same pictures."""
    bundle: str | None = None
    """Its name; the server's first one where None."""
    timeout: float | None = None
    """Seconds from submission after which nobody waits for it any more."""
    previews: bool = False
    """Whether progress carries a small preview of every picture."""
    watched: bool = True
    """Whether somebody looks at it before it is finished. Progress of others is told late, so that whoever would wake
    up to pass it on takes no time from the cores that draw."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a running job is."""

    step: int
    """Steps done."""
    steps: int
    previews: tuple[Pixels, ...] = ()
    """(height/8, width/8, 3) of each picture."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job has made."""

    pictures: tuple[Pixels, ...]
    seeds: tuple[int, ...]
    """The seed of each picture, or the one seed of all."""
    seconds: Mapping[str, float]
    """``queued`` (until the first step), ``steps``, ``decode``, ``total``."""


@dataclass(eq=False)
class Job:
    """A request on its way. It belongs to the event loop of the service; no other thread may touch it."""

    id: str
    request: Request
    cancel: Callable[[], None]
    """Takes it out of the queue, or stops it at the next step; does nothing once it is finished."""
    status: Status = "queued"
    submitted: float = field(default_factory=time.monotonic)
    progress: Progress = field(default_factory=lambda: Progress(step=0, steps=0))
    result: Result | None = None
    error: ControlRTError | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _finished: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self, **values: Any) -> None:
        """Sets attributes and wakes whoever watches, or waits for its end."""
        for name, value in values.items():
            setattr(self, name, value)
        self._changed.set()
        self._changed = asyncio.Event()
        if self.status in FINISHED:
            self._finished.set()

    async def watch(self) -> AsyncIterator[Progress]:
        """Its progress as it comes, the latest only where a reader is slow, until it is finished."""
        seen: Progress | None = None
        while True:
            changed = self._changed
            if self.progress is not seen:
                seen = self.progress
                yield seen
            elif self.status in FINISHED:
                return
            else:
                await changed.wait()

    async def wait(self) -> Result:
        """What it has made.

        Raises:
            RequestError, UnavailableError: as ``Service.submit``, where nobody watches it.
            DeadlineError: its time was over.
            CancelledError: it was cancelled.
            DrawingError: the engine failed twice.
        """
        await self._finished.wait()
        if self.error is not None:
            raise self.error
        if self.result is None:
            raise CancelledError(f"job {self.id} was cancelled")
        return self.result


class Service(Protocol):
    """What the interfaces stand on. Its methods belong to its event loop."""

    @property
    def bundles(self) -> Mapping[str, Manifest]:
        """The bundles that it draws with, by name; the first is the default."""

    @property
    def state(self) -> Literal["starting", "ready", "draining", "failed"]:
        """Whether it takes requests."""

    async def submit(self, request: Request, *, going_on: bool = False) -> Job:
        """Has a request checked and queued; returns once it is accepted, or at once where nobody watches it: whoever
        waits for its end is told then what speaks against it.

        Args:
            request: what to draw.
            going_on: whether it goes on with what an accepted one has made: it is taken though the queue is full or the
                service drains.

        Raises:
            RequestError: the bundle cannot draw it.
            UnknownNameError: no such bundle.
            UnavailableError: not now.
        """

    def job(self, name: str) -> Job | None:
        """A job by its id, which nobody can guess; the last thousand or so are kept for a while after they are
        finished."""

    def holding(self) -> AbstractContextManager[None]:
        """While this is open the service does not end, though all jobs are finished: one may go on with another."""

    async def drain(self) -> None:
        """Takes no more requests; returns when all that it has taken are finished, and nobody holds it."""
