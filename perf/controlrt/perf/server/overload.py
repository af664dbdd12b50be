"""What is still done where more requests arrive than can be drawn."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

from controlrt.perf.server.client import Client
from controlrt.perf.server.mixed import run_open_loop
from controlrt.perf.server.results import Overload, Request
from controlrt.perf.server.site import Site
from controlrt.perf.server.workload import STEPS
from controlrt.perf.statistics import percentile
from controlrt.runtime.progress import Progress

LOAD = 3.0
QUEUE = 16
FIRST = 400_000
"""Number of the first request."""


def measure_overload(site: Site, *, capacity: float, requests: int) -> Overload:
    """One open loop at ``LOAD`` times the capacity. Every request gives the server as long as a queue that is full
    takes to be drawn.

    Args:
        site: where.
        capacity: requests per second, of the policy's server.
        requests: that arrive.
    """
    rate, deadline = LOAD * capacity, QUEUE / capacity
    with site.serve("overload", site.policy, queue=QUEUE) as server, Progress("overload", 1) as progress:
        progress.start(f"{LOAD:g} times the capacity")
        found = asyncio.run(_run(site, server.url, requests, rate, deadline))
    return summarized(found, rate=rate, capacity=capacity, deadline=deadline)


def summarized(found: Sequence[Request], *, rate: float, capacity: float, deadline: float) -> Overload:
    """What the requests come to."""
    seconds = max(each.due + each.latency for each in found) - min(each.due for each in found)
    good = [each for each in found if each.status == 200 and each.latency <= deadline]
    rejections = [each.latency for each in found if each.status == 429]
    counted = {200, 429, 504}
    return Overload(
        rate=rate,
        load=LOAD,
        capacity=capacity,
        queue=QUEUE,
        deadline=deadline,
        requests=tuple(found),
        seconds=seconds,
        goodput=len(good) / seconds,
        steps_goodput=sum(each.steps for each in good) / seconds / (capacity * statistics.mean(STEPS)),
        done=sum(each.status == 200 for each in found),
        rejected=len(rejections),
        expired=sum(each.status == 504 for each in found),
        failed=sum(each.status not in counted for each in found),
        rejection_p99=percentile(rejections, 99) if rejections else None,
    )


async def _run(site: Site, url: str, requests: int, rate: float, deadline: float) -> list[Request]:
    async with Client(url) as client:
        await site.warm_up(client)
    return await run_open_loop(site, url, FIRST, requests, rate, timeout_ms=round(1000 * deadline))
