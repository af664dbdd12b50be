"""``controlrt serve`` on a service that draws coloured noise: the web application is the real one, in a process of its
own.

With ``--seed-offset`` it draws the pictures of other seeds.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses

from controlrt.runtime.errors import UnavailableError
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.jobs import FINISHED, Job, Request
from controlrt.runtime.server.metrics import Metrics
from controlrt.runtime.server.serving import open_socket, serve
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService


class QueuedService(FakeService):
    """Draws everything at once, but takes no more than so many jobs."""

    def __init__(self, queue: int, metrics: Metrics, seed_offset: int) -> None:
        super().__init__()
        self._queue, self._metrics, self._seed_offset = queue, metrics, seed_offset
        self._counting: set[asyncio.Task[None]] = set()

    async def submit(self, request: Request) -> Job:
        if self._unfinished() >= self._queue:
            raise UnavailableError("the queue is full", "queue_full", 1)
        seed = request.arguments["seed"] + self._seed_offset
        job = await super().submit(dataclasses.replace(request, arguments={**request.arguments, "seed": seed}))
        self._metrics.queued("fake", self._unfinished())
        counting = asyncio.ensure_future(self._count(job))
        self._counting.add(counting)
        counting.add_done_callback(self._counting.discard)
        return job

    async def _count(self, job: Job) -> None:
        async for _ in job.watch():
            pass
        self._metrics.queued("fake", self._unfinished())

    def _unfinished(self) -> int:
        return sum(job.status not in FINISHED for job in self.jobs.values())


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    for option in ("--host", "--policy"):
        parser.add_argument(option)
    for option in ("--port", "--queue", "--threads", "--seed-offset"):
        parser.add_argument(option, type=int, default=0)
    parser.add_argument("--step-seconds", type=float, default=0.002)
    arguments = parser.parse_args()
    metrics = Metrics()
    service = QueuedService(arguments.queue, metrics, arguments.seed_offset)
    service.step_seconds = arguments.step_seconds
    with open_socket(arguments.host, arguments.port) as bound:
        await serve(build_app(service, Settings(), metrics), service, bound)


if __name__ == "__main__":
    asyncio.run(main())
