"""SIGTERM while requests are drawn and wait: what was accepted is drawn to its end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

from controlrt.perf.server.client import Answer, Client
from controlrt.perf.server.results import Shutdown
from controlrt.perf.server.serving import Served
from controlrt.perf.server.site import Site, bodies, drawn
from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.progress import Progress

FIRST = 500_000
"""Number of the first request."""
LATER = 5
"""Requests that come after the signal."""
_ACCEPT_SECONDS = 60.0


def measure_shutdown(site: Site, *, requests: int) -> Shutdown:
    """One burst of requests, and the signal as soon as all of them are accepted.

    Raises:
        ControlRTError: the server did not take them, or did not end.
    """
    with site.serve("shutdown", site.policy) as server, Progress("shutdown", 1) as progress:
        progress.start(f"SIGTERM at {requests} requests")
        return asyncio.run(_run(site, server, requests))


async def _run(site: Site, server: Served, requests: int) -> Shutdown:
    asked = bodies([site.workload.one(FIRST + number, 20) for number in range(requests + LATER)])
    async with Client(server.url) as client:
        sending = [asyncio.ensure_future(client.generate(body)) for body in asked[:requests]]
        await _until_accepted(client, sending)
        server.terminate()
        told = time.monotonic()
        await asyncio.sleep(0.2)
        ended = asyncio.ensure_future(asyncio.to_thread(server.wait))
        later = await asyncio.gather(*(client.generate(body) for body in asked[requests:]))
        answers = await asyncio.gather(*sending)
        exit_code = await ended
    return Shutdown(
        accepted=requests,
        answered=drawn(answers),
        later=dict(Counter(str(answer.status) for answer in later)),
        exit_code=exit_code,
        seconds=time.monotonic() - told,
    )


async def _until_accepted(client: Client, sending: Sequence[asyncio.Future[Answer]]) -> None:
    until = time.monotonic() + _ACCEPT_SECONDS
    while time.monotonic() < until:
        finished = sum(each.done() for each in sending)
        if finished + await held(client) >= len(sending):
            return
        await asyncio.sleep(0.01)
    raise ControlRTError(f"the server did not take {len(sending)} requests within {_ACCEPT_SECONDS:.0f} s")


async def held(client: Client) -> int:
    """Requests that the server has and has not answered, by its own account."""
    answer = await client.send("GET", "/metrics")
    lines = answer.body.decode().splitlines()
    return round(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("controlrt_queue_length{")))
