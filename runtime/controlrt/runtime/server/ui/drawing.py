"""Draws what a page asks for: one job or two beside each other, watched together."""

from __future__ import annotations

import asyncio
import contextlib
import html
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlrt.runtime.server.jobs import FINISHED, Job, Service
from controlrt.runtime.server.jobs import Request as JobRequest
from controlrt.runtime.server.settings import Settings

SHORTEST = 0.08
"""Seconds between two updates of a page, at least."""


async def submit_all(
    service: Service, settings: Settings, calls: Sequence[tuple[str, Mapping[str, Any]]]
) -> Sequence[Job]:
    """Submits calls, by bundle and arguments; none is left behind where one is refused.

    Raises:
        ControlRTError: as ``Service.submit`` and ``Settings.check``.
    """
    jobs: list[Job] = []
    try:
        for bundle, arguments in calls:
            settings.check(arguments)
            request = JobRequest(arguments=arguments, bundle=bundle, timeout=settings.timeout, previews=True)
            jobs.append(await service.submit(request))
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    return jobs


async def watch_all(jobs: Sequence[Job]) -> AsyncIterator[None]:
    """Says when any of some jobs has got on, not too often, until all are finished."""
    changed = asyncio.Event()

    async def watch(job: Job) -> None:
        async for _ in job.watch():
            changed.set()

    watching = asyncio.gather(*(watch(job) for job in jobs))
    watching.add_done_callback(lambda _: changed.set())
    try:
        while not watching.done():
            await changed.wait()
            changed.clear()
            yield
            await asyncio.sleep(SHORTEST)
        await watching
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def preview_of(job: Job, width: int, height: int) -> Image.Image | None:
    """The picture that a job's step predicts, at the size of the picture to come; None before there is one."""
    if not job.progress.previews:
        return None
    preview: NDArray[np.uint8] = job.progress.previews[0]
    return Image.fromarray(preview).resize((width, height), Image.Resampling.BICUBIC)


def progress_line(jobs: Sequence[Job]) -> str:
    """HTML: how far some jobs are."""
    if all(job.status == "queued" for job in jobs):
        return message("Waiting for its turn.", done=0.0)
    done, steps = sum(job.progress.step for job in jobs), sum(job.progress.steps for job in jobs)
    last = done == steps and any(job.status not in FINISHED for job in jobs)
    return message("Decoding." if last else f"Step {done} of {steps}.", done=done / max(steps, 1))


def result_line(jobs: Sequence[Job]) -> str:
    """HTML: what came of finished jobs."""
    failed = [job.error for job in jobs if job.error is not None]
    if any(job.status == "cancelled" for job in jobs):
        return message("Cancelled.")
    if failed:
        return error_line(failed[0])
    seconds = " and ".join(f"{job.result.seconds['total']:.1f} s" for job in jobs if job.result is not None)
    return message(f"Drawn in {seconds}.")


def error_line(error: Exception) -> str:
    """HTML: one line that says what is wrong."""
    text = " ".join(str(error).split())
    return f'<div class="message wrong" role="alert">{html.escape(text)}</div>'


def message(text: str, *, done: float | None = None) -> str:
    """HTML: a line, and a bar that is filled as far as ``done``, from 0 to 1."""
    bar = "" if done is None else f'<div class="bar"><div style="width:{100 * done:.0f}%"></div></div>'
    return f'<div class="message" role="status">{html.escape(text)}{bar}</div>'
