"""The service: bundles on worker processes, and the jobs that they draw."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import multiprocessing
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import (
    CancelledError,
    ControlRTError,
    DrawingError,
    ParameterError,
    ServiceError,
    UnavailableError,
    UnknownNameError,
)
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.server import worker
from controlrt.runtime.server.channel import Channel, channel
from controlrt.runtime.server.jobs import Job, Request
from controlrt.runtime.server.messages import (
    Accepted,
    Advanced,
    Broken,
    Cancel,
    Failed,
    Finished,
    Incoming,
    Outgoing,
    Ready,
    Refused,
    Stepped,
    Stop,
    Submit,
)
from controlrt.runtime.server.policies import Policy
from controlrt.runtime.server.register import Register, error_of, hear, with_seed

_log = logging.getLogger(__name__)

_DEATHS = 5
"""After how many deaths of its worker a job that only waited is taken to be to blame."""
_LOOK_SECONDS = 30.0
"""How often the service looks for workers that are stuck."""
_START_SECONDS = 1800.0
"""How long a worker may take to start once more."""
_RESTARTS = 3
"""How often in a row a worker may fail to start before the service gives it up."""
_CONTEXT = multiprocessing.get_context("spawn")


class Observer(Protocol):
    """Hears what the service does; metrics are one."""

    def stepped(self, bundle: str, pictures: int, seconds: float) -> None:
        """A launch of one step for several pictures."""

    def queued(self, bundle: str, jobs: int) -> None:
        """How many jobs wait or run."""

    def restarted(self, bundle: str) -> None:
        """A worker has died, and another one takes its place."""


class Silent:
    """An observer that keeps it to itself."""

    def stepped(self, bundle: str, pictures: int, seconds: float) -> None:
        """See ``Observer``."""

    def queued(self, bundle: str, jobs: int) -> None:
        """See ``Observer``."""

    def restarted(self, bundle: str) -> None:
        """See ``Observer``."""


@dataclass(eq=False)
class _Assigned:
    """A job that a worker has."""

    job: Job
    submit: Submit
    accepted: asyncio.Future[None]
    tries: int = 1
    begun: bool = False
    """Whether the worker has more than queued it."""
    deaths: int = 0
    """Of workers that had it in their queue."""
    cancelled: bool = False
    """A worker that dies may not have heard of it."""


class _Worker:
    """One worker process, and those that follow where it dies. It belongs to the event loop."""

    def __init__(
        self,
        bundle: str,
        options: worker.WorkerOptions,
        observer: Observer,
        register: Register,
        count: Callable[[str], None],
    ) -> None:
        self.bundle, self._options, self._observer = bundle, options, observer
        self._register, self._count = register, count
        self.assigned: dict[str, _Assigned] = {}
        self.ready = asyncio.Event()
        self.failure: str | None = None
        """Why it was given up."""
        self._failures = 0
        self._silent_seconds = math.inf
        self._was_ready = False
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._start()

    def _start(self) -> None:
        self._heard = time.monotonic()
        here, there = channel()
        self._process = _CONTEXT.Process(
            target=worker.main, args=(there, self._options), name=f"controlrt {self.bundle}", daemon=True
        )
        self._process.start()
        there.close()
        self._outgoing: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        for work, of in ((self._send_all, self._outgoing), (self._receive_all, self._process)):
            threading.Thread(target=work, args=(here, of), daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    def send(self, message: Outgoing) -> None:
        """Queues a message to the process."""
        self._outgoing.put(message)

    def submit(self, assigned: _Assigned) -> None:
        """Gives the process a job."""
        if not self.assigned:
            self._heard = time.monotonic()
        self.assigned[assigned.job.id] = assigned
        self.send(assigned.submit)
        self._count(self.bundle)

    def cancel(self, name: str) -> None:
        """Drops a job; one that is not there is finished."""
        if (assigned := self.assigned.get(name)) is not None:
            assigned.cancelled = True
            self.send(Cancel(name))

    def kill_if_stuck(self) -> None:
        """Ends a process that has jobs and has said nothing for long, or not that it has started; another one takes its
        place."""
        silent = time.monotonic() - self._heard
        limit = self._silent_seconds if self.ready.is_set() else _START_SECONDS
        if self.assigned and silent > limit:
            _log.error("worker of %s has %d jobs and said nothing for %.0f s", self.bundle, len(self.assigned), silent)
            self._process.kill()

    async def close(self) -> None:
        """Ends the process."""
        self._closing = True
        self.send(Stop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), 10)
        if self._process.is_alive():
            self._process.kill()
            await self._ended.wait()

    def _send_all(self, end: Channel, outgoing: queue.SimpleQueue[Outgoing | None]) -> None:
        """A thread's work: messages to a process, which may be slow to take pictures."""
        while (message := outgoing.get()) is not None:
            try:
                end.send(message)
            except OSError:  # it has ended; the receiving thread says so
                return
            except Exception as error:  # it cannot be pickled
                _log.exception("a message to the worker of %s", self.bundle)
                if isinstance(message, Submit):
                    said = f"the arguments cannot be handed to a worker: {error}"
                    self._told(self._hear_all, [Refused(id=message.id, message=said, parameter=None)])

    def _receive_all(self, end: Channel, process: multiprocessing.process.BaseProcess) -> None:
        """A thread's work: what the process says, and that it has ended."""
        while True:
            try:
                messages: list[Incoming] = end.receive()
            except (EOFError, OSError):
                break
            except Exception:  # what it says cannot be understood
                _log.exception("a message from the worker of %s", self.bundle)
                process.kill()
                break
            if not self._told(self._hear_all, messages):
                return
        process.join()
        end.close()
        self._told(self._die)

    def _told(self, call: Callable[..., None], *arguments: object) -> bool:
        """Has the event loop call; False where it is closed."""
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            return False
        return True

    def _hear_all(self, messages: Sequence[Incoming]) -> None:
        self._heard = time.monotonic()
        for message in messages:
            self._hear(message)

    def _hear(self, message: Incoming) -> None:
        if isinstance(message, Ready):
            self._failures, self._was_ready = 0, True
            self._silent_seconds = message.silent_seconds
            self.ready.set()
        elif isinstance(message, Broken):
            _log.error("worker of %s: %s", self.bundle, message.message)
            self.failure = message.message
        elif isinstance(message, Stepped):
            for pictures, seconds in message.steps:
                self._observer.stepped(self.bundle, pictures, seconds)
        elif (assigned := self.assigned.get(message.id)) is not None:
            self._hear_of(assigned, message)

    def _hear_of(self, assigned: _Assigned, message: Accepted | Refused | Advanced | Finished | Failed) -> None:
        job = assigned.job
        if isinstance(message, Accepted):
            hear(job, message)
            if not assigned.accepted.done():
                assigned.accepted.set_result(None)
        elif isinstance(message, Advanced):
            assigned.begun = True
            hear(job, message)
        elif isinstance(message, Finished):
            hear(job, message)
            self._end(assigned, "done", None)
        elif isinstance(message, Failed) and message.reason == "engine":
            self._try_again(assigned, message.message)
        else:
            cancelled = isinstance(message, Failed) and message.reason == "cancelled"
            self._end(assigned, "cancelled" if cancelled else "failed", error_of(message))

    def _try_again(self, assigned: _Assigned, why: str) -> None:
        """Once more, in no company: its seed makes the same picture of it."""
        if assigned.cancelled:
            self._end(assigned, "cancelled", CancelledError(f"request {assigned.job.id} was cancelled"))
            return
        if assigned.tries > 1 or self._closing:
            said = f"the engine failed at request {assigned.job.id}, and failed again when it was tried alone: {why}"
            self._end(assigned, "failed", DrawingError(said))
            return
        assigned.tries += 1
        assigned.begun = False
        assigned.submit = dataclasses.replace(assigned.submit, alone=True, watched=True)
        self.send(assigned.submit)

    def _end(
        self, assigned: _Assigned, status: Literal["done", "failed", "cancelled"], error: ControlRTError | None
    ) -> None:
        del self.assigned[assigned.job.id]
        if not assigned.accepted.done():
            if error is None:
                assigned.accepted.set_result(None)
            else:
                assigned.accepted.set_exception(error)
        self._register.end(assigned.job, status, error)
        self._count(self.bundle)

    def _die(self) -> None:
        """The process has ended: another one takes over what it had, unless it was told to."""
        self._outgoing.put(None)
        had_started = self.ready.is_set()
        self._failures = 0 if had_started else self._failures + 1
        self.ready.clear()
        if self._closing or not self._was_ready or self._failures >= _RESTARTS:
            why = self.failure or f"the worker of {self.bundle} has ended"
            self.failure = why
            for assigned in list(self.assigned.values()):
                self._end(assigned, "failed", DrawingError(why))
            self._ended.set()
            self.ready.set()  # whoever waits finds the failure
            return
        _log.error("worker of %s has ended (exit status %s); starting another", self.bundle, self._process.exitcode)
        self._observer.restarted(self.bundle)
        self.failure = None
        self._options = dataclasses.replace(self._options, verify=False)  # that was done when the service started
        self._start()
        alone = had_started and len(self.assigned) == 1  # words that it has begun may come late
        for assigned in list(self.assigned.values()):
            assigned.deaths += 1
            if assigned.begun or alone or assigned.cancelled or assigned.deaths > _DEATHS:
                self._try_again(assigned, "its worker has ended")
            else:  # it only waited beside the one at which the worker died, or for a worker
                assigned.submit = dataclasses.replace(assigned.submit, watched=True)
                self.send(assigned.submit)


class LocalService:
    """Bundles on worker processes of this machine. See ``Service``.

    Args:
        bundles: opened bundles by name.
        workers: options of one worker or more for each, by bundle name.
        queue_size: jobs of one bundle that may wait or run at once.
        observer: hears what happens.
    """

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        workers: Mapping[str, Sequence[worker.WorkerOptions]],
        *,
        queue_size: int,
        observer: Observer,
    ) -> None:
        self._manifests = {name: bundle.manifest for name, bundle in bundles.items()}
        self._queue_size, self._observer = queue_size, observer
        self._register = Register()
        self._draining = False
        self._watching: asyncio.Task[None] | None = None
        self.workers = {
            name: [_Worker(name, options, observer, self._register, self._count) for options in workers[name]]
            for name in bundles
        }

    @property
    def bundles(self) -> Mapping[str, Manifest]:
        """See ``Service``."""
        return self._manifests

    @property
    def state(self) -> Literal["starting", "ready", "draining", "failed"]:
        """See ``Service``."""
        if self._draining:
            return "draining"
        workers = [each for group in self.workers.values() for each in group]
        if any(each.failure for each in workers):
            return "failed"
        return "ready" if all(each.ready.is_set() for each in workers) else "starting"

    async def start(self) -> None:
        """Waits until every worker takes requests.

        Raises:
            ServiceError: one does not.
        """
        for group in self.workers.values():
            for each in group:
                await each.ready.wait()
                if each.failure:
                    raise ServiceError(f"bundle {each.bundle}: {each.failure}")
        self._watching = asyncio.create_task(self._watch())

    async def submit(self, request: Request, *, going_on: bool = False) -> Job:
        """See ``Service``."""
        name = request.bundle or next(iter(self._manifests))
        if name not in self.workers:
            raise UnknownNameError("bundle", name, self._manifests)
        if self._draining and not going_on:
            raise UnavailableError("the server is shutting down; ask another one", "draining", 5)
        able = [each for each in self.workers[name] if not each.failure]
        if not able:
            raise UnavailableError(f"no worker draws with bundle {name}: see the server's log", "no_worker", 30)
        jobs = sum(len(each.assigned) for each in able)
        if jobs >= self._queue_size and not going_on:
            wait = max(1.0, self._register.mean_seconds)
            said = f"the queue of bundle {name} is full ({jobs} requests); try again in {wait:.0f} s"
            raise UnavailableError(said, "queue_full", wait)
        chosen = min(able, key=lambda each: len(each.assigned))
        job = self._register.new(request, chosen.cancel)
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        submit = Submit(
            id=job.id,
            arguments=with_seed(request.arguments),
            deadline=deadline,
            previews=request.previews,
            alone=False,
            watched=request.watched or bool(chosen.assigned),  # which of several a worker died at is to be known
        )
        assigned = _Assigned(job, submit, asyncio.get_running_loop().create_future())
        chosen.submit(assigned)
        await self._register.accepted(job, assigned.accepted)
        return job

    def job(self, name: str) -> Job | None:
        """See ``Service``."""
        return self._register.get(name)

    def holding(self) -> contextlib.AbstractContextManager[None]:
        """See ``Service``."""
        return self._register.holding()

    async def drain(self) -> None:
        """See ``Service``."""
        self._draining = True
        await self._register.all_finished()

    async def close(self) -> None:
        """Ends the workers; jobs that are left fail."""
        self._draining = True
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.gather(*(each.close() for group in self.workers.values() for each in group))

    async def _watch(self) -> None:
        """Has workers replaced that are stuck."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for group in self.workers.values():
                for each in group:
                    each.kill_if_stuck()

    def _count(self, name: str) -> None:
        """Tells how many jobs of a bundle there are, whichever worker has them."""
        self._observer.queued(name, sum(len(each.assigned) for each in self.workers[name]))


def open_bundles(paths: Sequence[Path]) -> dict[str, Bundle]:
    """The bundles of some directories, by the directories' names. Their files' hashes are left to who draws.

    Raises:
        BundleError: one is missing, damaged or of another schema version.
        ParameterError: two bundles of one name.
    """
    opened: dict[str, Bundle] = {}
    for path in paths:
        name = path.resolve().name
        if name in opened:
            raise ParameterError("bundle", str(path), f"of another name than {opened[name].path}")
        opened[name] = Bundle.open(path, verify=False)
    return opened


@contextlib.asynccontextmanager
async def open_service(
    bundles: Sequence[Path],
    *,
    queue: int = 64,
    policy: Policy = "shortest",
    devices: Sequence[int] | None = None,
    threads: int | None = None,
    batch: int | None = None,
    observer: Observer | None = None,
) -> AsyncIterator[LocalService]:
    """Starts a worker for each bundle, on a GPU one for each of ``devices``, and ends them when the context is left.

    Args:
        bundles: their directories, whose names are the bundles' names; the first is the default.
        queue: jobs of one bundle that may wait or run at once.
        policy, batch: as ``Engine``'s.
        devices: GPUs, as CUDA counts them; the first where not given.
        threads: CPU threads of each worker; all cores by default.
        observer: hears what happens.

    Raises:
        BundleError: one is missing, damaged or of another schema version.
        ServiceError: a worker does not start.
        ParameterError: two bundles of one name, a queue that nothing fits into, or GPUs where nothing runs on one.
    """
    if queue < 1:
        raise ParameterError("queue", queue, "at least 1")
    opened = open_bundles(bundles)
    if devices is not None and not any(bundle.manifest.on_gpu for bundle in opened.values()):
        raise ParameterError("device", ", ".join(map(str, devices)), "left out: all of these bundles run on the CPU")
    workers = {
        name: [
            worker.WorkerOptions(bundle=bundle.path, policy=policy, batch=batch, threads=threads, device=device)
            for device in ((devices or (0,)) if bundle.manifest.on_gpu else (None,))
        ]
        for name, bundle in opened.items()
    }
    service = LocalService(opened, workers, queue_size=queue, observer=observer or Silent())
    try:
        await service.start()
        yield service
    finally:
        await service.close()


__all__ = ["LocalService", "Observer", "Silent", "open_bundles", "open_service"]
