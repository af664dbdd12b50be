"""Draws requests together, step by step: one thread encodes what comes before the first step, one owns the device."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.drawing import Drawing
from controlrt.runtime.errors import DeviceError, DeviceMemoryError, UserError
from controlrt.runtime.executors import open_executor
from controlrt.runtime.pictures import to_pixels
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.server.jobs import Pixels
from controlrt.runtime.server.messages import (
    Accepted,
    Advanced,
    Broken,
    Failed,
    Finished,
    Incoming,
    Refused,
    Stepped,
    Submit,
)
from controlrt.runtime.server.policies import Policy, Standing, order
from controlrt.runtime.server.previews import fit_preview, preview
from controlrt.runtime.stepping import Staged, Stepper

_log = logging.getLogger(__name__)

AHEAD = 8
"""How many requests are encoded before the device asks for them; each takes memory."""
SILENT_SECONDS = 300.0
"""After so long without a word while it has requests, an engine is stuck, unless it is a slow one."""
TELL_SECONDS = 0.25
"""Between two words on how far a request is, where steps are quicker and it has no previews: whoever wakes up to pass
one on, or to hear it, takes time from the cores that draw."""
_LAUNCHES_IN_SILENCE = 20
"""How many of its slowest launches an engine may take without a word."""
_SMOOTHING = 0.1
"""Weight of the last step in the mean of what a step takes."""


@dataclass(eq=False)
class Task:
    """A request in the engine."""

    submit: Submit
    drawing: Drawing
    arrived: float
    staged: Staged | None = None
    started: float | None = None
    """When its first step began."""
    told: float = -math.inf
    """When it was last said how far it is."""
    cancelled: bool = False

    @property
    def remaining(self) -> int:
        """Picture steps that it still takes."""
        done = 0 if self.staged is None else self.staged.step
        return (len(self.drawing.layout.steps) - done) * self.drawing.layout.batch

    @property
    def alone(self) -> bool:
        """Whether it takes its steps in no company."""
        return self.submit.alone


class Engine:
    """One bundle on one device.

    Args:
        bundle: an opened bundle.
        emit: called with whatever happens, by the engine's own threads and by ``submit`` and ``cancel``.
        policy: who goes next.
        batch: how many pictures take a step together, at most; by default as many as the bundle allows on a GPU, and
            one on a CPU, where a step of two takes twice as long.
        threads, device: as ``ControlNetPipeline.load``'s.
    """

    def __init__(
        self,
        bundle: Bundle,
        emit: Callable[[Incoming], None],
        *,
        policy: Policy = "shortest",
        batch: int | None = None,
        threads: int | None = None,
        device: int | None = None,
    ) -> None:
        self._bundle, self._emit, self._order = bundle, emit, order(policy)
        self._whole_requests = policy == "batch"
        on_gpu = bundle.manifest.on_gpu
        most = bundle.manifest.profile.batch.high
        self._least = bundle.manifest.profile.batch.low
        self.batch = (most if on_gpu else 1) if batch is None else min(batch, most)
        self._pipeline = ControlNetPipeline(bundle, threads=threads, device=device)
        self._executor = open_executor(bundle, threads, device)
        self._stepper = Stepper(bundle, self._executor)
        self._lock = threading.RLock()
        self._to_encode, self._to_step = threading.Condition(self._lock), threading.Condition(self._lock)
        """What the two threads wait for, each by itself: one that wakes up in vain takes time from the other."""
        self._tasks: dict[str, Task] = {}
        self._waiting: list[Task] = []
        self._ready: list[Task] = []
        self._closing = False
        self._undisturbed = False
        """Whether nothing has come or changed since the device was given a request that there is no other beside."""
        self._picture_seconds = 0.0
        """Of one step of one picture, a running mean."""
        self._least_picture_seconds = math.inf
        self._untold: list[tuple[int, float]] = []
        """Pictures and seconds of the steps that nobody was told of."""
        self.silent_seconds = SILENT_SECONDS
        """After so long without a word while it has requests, it is stuck; known once it is started."""
        self._colours: NDArray[np.float32] | None = None
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            for name, work in (("encode", self._encode_all), ("device", self._step_all))
        ]

    def start(self) -> None:
        """Draws a picture without control and one with each, so that programs are open and plans bound that first
        requests need; then takes requests."""
        slowest = 0.0
        for control in (None, *(control.names[0] for control in self._bundle.manifest.controls)):
            warm = self._staged(self._pipeline.prepare("", **self._blank_call(control)))
            while not warm.done:
                started = time.perf_counter()
                self._stepper.step([warm])
                self._picture_seconds = (time.perf_counter() - started) / warm.batch
                self._least_picture_seconds = min(self._least_picture_seconds, self._picture_seconds)
                slowest = max(slowest, self._picture_seconds)
        started = time.perf_counter()
        self._stepper.decode(warm.latents[:1])
        slowest = max(slowest, time.perf_counter() - started) * self._bundle.manifest.profile.batch.high
        self.silent_seconds = max(SILENT_SECONDS, _LAUNCHES_IN_SILENCE * slowest)
        self._executor.release_scratch()
        for thread in self._threads:
            thread.start()

    def _blank_call(self, control: str | None) -> dict[str, Any]:
        """Arguments of a call that draws nothing in particular."""
        width, height = self._bundle.manifest.profile.default_size
        blank = np.zeros((height, width, 3), np.uint8)
        call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "num_images_per_prompt": self._least}
        call["vae_tiling"] = self._bundle.manifest.profile.vae_tile is not None
        if control is not None:
            call["image"] = {control: blank}
        if self._pipeline.sees_mask:
            call |= {"init_image": blank, "mask_image": blank}
        return call

    def submit(self, submit: Submit) -> None:
        """Checks a request and queues it; it is accepted or refused before this returns."""
        try:
            drawing = self._pipeline.prepare(**submit.arguments)
        except UserError as error:
            self._emit(Refused(id=submit.id, message=str(error), parameter=error.parameter))
            return
        except Exception as error:  # nothing has run: whatever it is, the arguments are at fault
            _log.exception("checking request %s", submit.id)
            said = f"the arguments cannot be read: {type(error).__name__}: {error}"
            self._emit(Refused(id=submit.id, message=said, parameter=None))
            return
        task = Task(submit, drawing, time.monotonic())
        with self._lock:
            self._tasks[submit.id] = task
            self._waiting.append(task)
            self._emit(Accepted(id=submit.id, steps=len(drawing.layout.steps), watched=submit.watched))
            self._undisturbed = False
            self._to_encode.notify()

    def cancel(self, name: str) -> None:
        """Drops a request, at the next step where it runs; one that is not there is finished."""
        with self._lock:
            task = self._tasks.get(name)
            if task is not None:
                task.cancelled = True
                self._wake()

    def close(self) -> None:
        """Stops at the next step and releases everything; requests that are left are dropped without a word."""
        with self._lock:
            self._closing = True
            self._wake()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._stepper.close()
        self._pipeline.close()
        self._executor.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guard(self, work: Callable[[], None]) -> None:
        """Runs a thread's work; where that fails, nothing here can be relied on any more."""
        try:
            work()
        except BaseException as error:
            _log.exception("the engine is broken")
            self._emit(Broken(f"{type(error).__name__}: {error}"))

    # what the encoding thread does

    def _encode_all(self) -> None:
        while (task := self._next_to_encode()) is not None:
            try:
                staged = self._staged(task.drawing)
                if task.submit.previews:
                    staged.keep_predictions()
                    if self._colours is None:
                        self._colours = self._fit_colours()
            except Exception as error:
                if _is_lost(error):
                    raise
                _log.exception("encoding request %s", task.submit.id)
                self._drop(task, Failed(id=task.submit.id, reason="engine", message=str(error)))
                continue
            with self._lock:
                task.staged = staged
                self._ready.append(task)
                self._undisturbed = False
                self._to_step.notify()

    def _next_to_encode(self) -> Task | None:
        """The first by the policy that is not encoded yet, once there is room; None at the end."""
        with self._lock:
            while not self._closing:
                self._expire(self._waiting)
                now = time.monotonic()
                best = min(self._waiting, key=lambda task: self._rank(task, now), default=None)
                unstarted = [task for task in self._ready if task.started is None]
                if best is not None and (
                    len(unstarted) < AHEAD or all(self._rank(best, now) < self._rank(task, now) for task in unstarted)
                ):
                    self._waiting.remove(best)
                    best.told = now
                    self._emit(Advanced(id=best.submit.id, step=0, previews=(), watched=best.submit.watched))
                    return best
                self._to_encode.wait()
            return None

    def _staged(self, drawing: Drawing) -> Staged:
        staged = Staged(self._pipeline.plan(drawing.layout), drawing)
        self._pipeline.fill(drawing, staged.plan, staged.buffers)
        return staged

    def _fit_colours(self) -> NDArray[np.float32]:
        width, height = self._bundle.manifest.profile.default_size
        return fit_preview(self._pipeline.encode, width, height)

    # what the device's thread does

    def _step_all(self) -> None:
        while group := self._next_group():
            try:
                self._take_steps(group)
            except Exception as error:
                if _is_lost(error):
                    raise
                _log.exception("step of requests %s", ", ".join(task.submit.id for task in group))
                self._stepper.close()  # whatever the plans hold
                for task in group:
                    self._drop(task, Failed(id=task.submit.id, reason="engine", message=str(error)))

    def _take_steps(self, group: Sequence[Task]) -> None:
        """The next step of a group, and those after it as long as there is nothing to decide between them."""
        staged = [task.staged for task in group if task.staged is not None]
        pictures = sum(each.batch for each in staged)
        while True:
            started = time.perf_counter()
            self._stepper.step(staged)
            self._count(pictures, time.perf_counter() - started)
            for task in group:
                self._look_at(task)
            if not self._undisturbed or any(each.done for each in staged) or not all(map(self._has_time, group)):
                return

    def _count(self, pictures: int, took: float) -> None:
        """Notes what a step of some pictures took, in seconds."""
        self._picture_seconds += _SMOOTHING * (took / pictures - self._picture_seconds)
        self._least_picture_seconds = min(self._least_picture_seconds, took / pictures)
        self._untold.append((pictures, took))

    def _next_group(self) -> list[Task]:
        """The first by the policy, and those that can take their step together with it; empty at the end."""
        with self._lock:
            while not self._closing:
                self._expire(self._ready)
                if self._waiting:
                    self._to_encode.notify()  # there may be room, or no time left
                now = time.monotonic()
                begun = [task for task in self._ready if task.started is not None] if self._whole_requests else []
                queue = self._ready[:]
                if len(queue) > 1:
                    queue.sort(key=lambda task: self._rank(task, now))
                if queue:
                    group = begun or self._fitting(queue)
                    self._undisturbed = not self._waiting and len(queue) == 1
                    for task in group:
                        task.started = task.started or now
                    return group
                self._tell_of_steps()  # of requests that were not finished
                self._to_step.wait()
            return []

    def _fitting(self, queue: list[Task]) -> list[Task]:
        first, *others = queue
        group, pictures = [first], first.drawing.layout.batch
        for task in () if first.alone else others:
            more = task.drawing.layout.batch
            if not task.alone and pictures + more <= self.batch and self._go_together(task, first):
                group.append(task)
                pictures += more
        return group

    def _go_together(self, one: Task, other: Task) -> bool:
        """Whether two can take their next step together, or all of them where whole requests are batched."""
        if self._whole_requests:
            return _single(one) == _single(other)
        return _kind(one) == _kind(other)

    def _look_at(self, task: Task) -> None:
        """Finishes a request that has taken its last step, and tells of others now and then."""
        staged, now = task.staged, time.monotonic()
        assert staged is not None
        if staged.done:
            self._finish(task, staged)
        elif task.submit.previews or now - task.told >= TELL_SECONDS:
            task.told = now
            self._tell_of_steps()
            previews = self._previews(task, staged)
            self._emit(Advanced(id=task.submit.id, step=staged.step, previews=previews, watched=task.submit.watched))

    def _tell_of_steps(self) -> None:
        if self._untold:
            told, self._untold = tuple(self._untold), []
            self._emit(Stepped(steps=told))

    def _finish(self, task: Task, staged: Staged) -> None:
        assert task.started is not None
        stepped = time.monotonic()
        pictures = to_pixels(self._stepper.decode(staged.latents))
        done = time.monotonic()
        seconds = {
            "queued": task.started - task.arrived,
            "steps": stepped - task.started,
            "decode": done - stepped,
            "total": done - task.arrived,
        }
        seed = task.drawing.seed
        seeds = tuple(seed) if not isinstance(seed, int | None) else (seed or 0,) * len(pictures)
        self._tell_of_steps()
        self._drop(task, Finished(id=task.submit.id, pictures=tuple(pictures), seeds=seeds, seconds=seconds))

    def _previews(self, task: Task, staged: Staged) -> tuple[Pixels, ...]:
        if not task.submit.previews or self._colours is None:
            return ()
        return tuple(preview(latents, self._colours) for latents in staged.predicted())

    # what both do

    def _wake(self) -> None:
        """Has both threads look at what is new. The lock is held."""
        self._undisturbed = False
        self._to_encode.notify()
        self._to_step.notify()

    def _rank(self, task: Task, now: float) -> tuple[float, float]:
        remaining = task.remaining * self._picture_seconds
        return self._order(Standing(arrived=task.arrived, remaining=remaining, deadline=task.submit.deadline), now)

    def _expire(self, tasks: Sequence[Task]) -> None:
        """Drops those that nobody waits for any more. The lock is held; each thread looks at its own, so that none goes
        while a step of it is taken."""
        for task in list(tasks):
            name = task.submit.id
            if task.cancelled:
                self._drop(task, Failed(id=name, reason="cancelled", message=f"request {name} was cancelled"))
            elif not self._has_time(task):
                done = 0 if task.staged is None else task.staged.step
                said = f"request {name} has no time left for its steps, at {done} of {len(task.drawing.layout.steps)}"
                self._drop(task, Failed(id=name, reason="deadline", message=said))

    def _has_time(self, task: Task) -> bool:
        """Whether there is time for what its steps take at least, by the quickest step there was: a request that cannot
        be done in its time is dropped before it takes any from others."""
        deadline = task.submit.deadline
        return deadline is None or time.monotonic() + task.remaining * self._least_picture_seconds < deadline

    def _drop(self, task: Task, last: Finished | Failed) -> None:
        """The last word on a task; there is none after it."""
        with self._lock:
            if self._tasks.get(task.submit.id) is not task:
                return
            for tasks in (self._waiting, self._ready):
                if task in tasks:
                    tasks.remove(task)
            del self._tasks[task.submit.id]
            self._emit(last)


def _kind(task: Task) -> object:
    return None if task.staged is None else task.staged.kind


def _single(task: Task) -> object:
    """Its layout, whatever number of pictures it is of."""
    return dataclasses.replace(task.drawing.layout, batch=1)


def _is_lost(error: Exception) -> bool:
    """Whether nothing of the device can be relied on any more; where its memory is full, others go on."""
    return isinstance(error, DeviceError) and not isinstance(error, DeviceMemoryError)
