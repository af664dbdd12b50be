"""A service that draws coloured noise from seeds, at once or as slowly as a test says."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from controlrt.runtime.errors import (
    CancelledError,
    ControlRTError,
    DeadlineError,
    ParameterError,
    UnavailableError,
    UnknownNameError,
)
from controlrt.runtime.errors import RequestError as Refused
from controlrt.runtime.manifest import SCHEMA_VERSION, Control, Manifest, Model, Provenance
from controlrt.runtime.noise import Draws
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.server.jobs import FINISHED, Job, Pixels, Progress, Request, Result

SIDE = 64
STEPS = 4


def fake_manifest(*controls: str) -> Manifest:
    """Of a bundle without programs that draws at 64x64 and 128x64, up to four pictures."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        key="0" * 64,
        backend="onnxruntime",
        precision="fp32",
        profile=ShapeProfile.parse("64x64,128x64", "1-4"),
        model=Model(source="fake", latent_channels=4, vae_scale_factor=8, time_ids=False, zero_empty_negative=False),
        text_encoders=(),
        controls=tuple(
            Control(name=name, kind="controlnet", part=f"controlnet.{name}", source="fake", layers=13)
            for name in controls
        ),
        fusion=None,
        programs=(),
        checks=(),
        files={},
        provenance=Provenance(created="", command="", sources={}, versions={}),
    )


def fake_pictures(seed: int, count: int, width: int = SIDE, height: int = SIDE) -> tuple[Pixels, ...]:
    """What the fake draws."""
    random = np.random.RandomState(seed & 0xFFFFFFFF)
    return tuple(random.randint(0, 256, (height, width, 3), np.uint8) for _ in range(count))


class FakeService:
    """See ``Service``. Tests set its attributes to say how it behaves."""

    def __init__(self) -> None:
        self.bundles: Mapping[str, Manifest] = {"fake": fake_manifest("canny", "depth"), "plain": fake_manifest()}
        self.state: Literal["starting", "ready", "draining", "failed"] = "ready"
        self.step_seconds = 0.0
        self.held = False
        """Whether steps wait until it is False."""
        self.refusal: ControlRTError | None = None
        """What submitting raises."""
        self.failure: ControlRTError | None = None
        """What drawing raises, after half of the steps."""
        self.requests: list[Request] = []
        self.jobs: dict[str, Job] = {}
        self._holders = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, request: Request, *, going_on: bool = False) -> Job:
        """See ``Service``."""
        if self.refusal is not None:
            raise self.refusal
        if self.state == "draining" and not going_on:
            raise UnavailableError("the server is shutting down; ask another one", "draining", 5)
        name = request.bundle or next(iter(self.bundles))
        if name not in self.bundles:
            raise UnknownNameError("bundle", name, self.bundles)
        try:
            _check(self.bundles[name], request.arguments)
        except Refused as error:
            if request.watched:
                raise
            refused = Job(id=uuid.uuid4().hex, request=request, cancel=lambda: None)
            refused.change(status="failed", error=error)
            return refused
        self.requests.append(request)

        def cancel() -> None:
            if job.status == "queued":  # a task that has not begun hears of nothing
                job.change(status="cancelled", error=CancelledError(f"job {job.id} was cancelled"))
            task.cancel()

        job = Job(id=uuid.uuid4().hex, request=request, cancel=cancel)
        self.jobs[job.id] = job
        task = asyncio.ensure_future(self._draw(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def job(self, name: str) -> Job | None:
        """See ``Service``."""
        return self.jobs.get(name)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """See ``Service``."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1

    async def drain(self) -> None:
        """See ``Service``."""
        self.state = "draining"
        while self._holders or any(job.status not in FINISHED for job in self.jobs.values()):
            await asyncio.sleep(0.01)

    async def _draw(self, job: Job) -> None:
        arguments, started = job.request.arguments, time.monotonic()
        width, height = arguments.get("width") or SIDE, arguments.get("height") or SIDE
        prompts = 1 if isinstance(arguments["prompt"], str) else len(arguments["prompt"])
        count = prompts * arguments.get("num_images_per_prompt", 1)
        seed = arguments.get("seed")
        seeds = [1234 if seed is None else seed] if not isinstance(seed, list) else seed
        steps = arguments.get("num_inference_steps") or STEPS
        pictures = fake_pictures(seeds[0], count, width, height)
        previews = tuple(picture[::8, ::8] for picture in pictures) if job.request.previews else ()
        try:
            async with asyncio.timeout(job.request.timeout):
                for step in range(steps + 1):
                    job.change(status="running", progress=Progress(step=step, steps=steps, previews=previews))
                    await asyncio.sleep(self.step_seconds)
                    while self.held:
                        await asyncio.sleep(0.01)
                    if self.failure is not None and step >= steps // 2:
                        raise self.failure
        except TimeoutError:
            job.change(status="failed", error=DeadlineError(f"job {job.id} was not done in time"))
        except asyncio.CancelledError:
            job.change(status="cancelled", error=CancelledError(f"job {job.id} was cancelled"))
        except ControlRTError as error:
            job.change(status="failed", error=error)
        else:
            seconds = {"queued": 0.0, "steps": 0.0, "decode": 0.0, "total": time.monotonic() - started}
            job.change(status="done", result=Result(pictures=pictures, seeds=tuple(seeds), seconds=seconds))


def _check(manifest: Manifest, arguments: Mapping[str, Any]) -> None:
    """A little of what the pipeline checks."""
    prompts = 1 if isinstance(arguments["prompt"], str) else len(arguments["prompt"])
    count = prompts * arguments.get("num_images_per_prompt", 1)
    try:
        if not prompts:
            raise ParameterError("prompt", arguments["prompt"], "a string or a list of at least one")
        manifest.profile.check(arguments.get("width") or SIDE, arguments.get("height") or SIDE, count)
        Draws(0 if arguments.get("seed") is None else arguments["seed"], count)
    except ControlRTError as error:
        raise Refused(str(error), getattr(error, "parameter", None)) from None
    known = {control.name for control in manifest.controls}
    named = arguments.get("image")
    for name in named if isinstance(named, dict) else ():
        if name not in known:
            raise Refused(f"unknown control {name!r}; known: {', '.join(known)}", "image")
