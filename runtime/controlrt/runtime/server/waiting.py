"""Waiting for a job as long as its client does."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from controlrt.runtime.server.jobs import Job, Result


async def result_while_connected(request: Request, job: Job) -> Result:
    """What a job has made; it is cancelled if its client goes away, or the server gives up on the request.

    Args:
        request: whose body has been read.
        job: which nobody else waits for.

    Raises:
        ClientDisconnect: the client went away.
        ControlRTError: as ``Job.wait``.
    """
    result = asyncio.ensure_future(job.wait())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        result.cancel()
        job.cancel()  # nothing, once it is finished


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
