"""The service on worker processes that answer at once, and once on real ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime.server import stub_worker

from controlled_calls import PROMPT, square
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import (
    CancelledError,
    DeadlineError,
    DrawingError,
    ParameterError,
    RequestError,
    ServiceError,
    UnavailableError,
    UnknownNameError,
)
from controlrt.runtime.server import service as service_module
from controlrt.runtime.server import worker
from controlrt.runtime.server.jobs import Request, Result
from controlrt.runtime.server.service import LocalService, Silent, open_service
from controlrt.runtime.server.worker import WorkerOptions

pytestmark = pytest.mark.bundle


class Notes(Silent):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.jobs: list[int] = []
        self.restarts = 0

    def queued(self, bundle: str, jobs: int) -> None:
        del bundle
        self.jobs.append(jobs)

    def restarted(self, bundle: str) -> None:
        del bundle
        self.restarts += 1


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def serve(
    demo_bundle: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[LocalService], Awaitable[None]]], None]:
    """Runs a coroutine function on a service of three bundles, one with two workers, whose queues take four jobs."""
    monkeypatch.setattr(worker, "main", stub_worker.main)

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[LocalService]:
        bundle = Bundle.open(demo_bundle, verify=False)
        one = WorkerOptions(bundle=demo_bundle)
        service = LocalService(
            {"one": bundle, "two": bundle, "hasty": bundle},
            {"one": [one], "two": [one, one], "hasty": [WorkerOptions(bundle=demo_bundle, threads=1)]},
            queue_size=4,
            observer=notes,
        )
        try:
            await service.start()
            yield service
        finally:
            await service.close()

    def run(test: Callable[[LocalService], Awaitable[None]]) -> None:
        async def main() -> None:
            async with opened() as service:
                await asyncio.wait_for(test(service), 30)

        asyncio.run(main())

    return run


def request(prompt: str, **options: Any) -> Request:
    return Request(arguments={"prompt": prompt, "seed": 7}, **options)


async def drawn(service: LocalService, asked: Request) -> Result:
    return await (await service.submit(asked)).wait()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def test_a_job_from_queue_to_picture(serve: Any, notes: Notes) -> None:
    async def test(service: LocalService) -> None:
        assert service.state == "ready"
        job = await service.submit(request("draw"))
        assert service.job(job.id) is job
        seen = [progress async for progress in job.watch()]
        assert (seen[-1].step, seen[-1].steps) == (3, 3)
        assert [each.step for each in seen] == sorted(each.step for each in seen)
        result = await job.wait()
        assert result.seeds == (7,)
        np.testing.assert_array_equal(result.pictures[0], np.full((8, 8, 3), 7))
        assert job.status == "done"

    serve(test)
    assert notes.jobs == [1, 0]


def test_every_request_has_a_seed(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        seeds = [
            (await drawn(service, Request(arguments=arguments))).seeds[0]
            for arguments in ({"prompt": "draw"}, {"prompt": "draw", "seed": None})
        ]
        assert seeds[0] != seeds[1]

    serve(test)


def test_refusals(serve: Any, notes: Notes) -> None:
    async def test(service: LocalService) -> None:
        with pytest.raises(RequestError, match="must be from 1") as refused:
            await service.submit(request("refuse"))
        assert refused.value.parameter == "steps"
        with pytest.raises(UnknownNameError, match=r"unknown bundle 'tow'; known: one, two, hasty .*'two'"):
            await service.submit(request("draw", bundle="tow"))
        with pytest.raises(DeadlineError, match="out of time"):
            await drawn(service, request("late", timeout=1))

    serve(test)
    assert notes.jobs[-1] == 0


def test_a_full_queue(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        held = [await service.submit(request("hold")) for _ in range(4)]
        with pytest.raises(UnavailableError, match="queue of bundle one is full") as full:
            await service.submit(request("draw"))
        assert full.value.reason == "queue_full"
        assert full.value.retry_after >= 1
        assert (await drawn(service, request("draw", bundle="two"))).seeds == (7,)  # another bundle has its own
        held[0].cancel()
        with pytest.raises(CancelledError):
            await held[0].wait()
        assert held[0].status == "cancelled"
        assert (await drawn(service, request("draw"))).seeds == (7,)

    serve(test)


def test_a_full_queue_says_when_it_will_be_drawn(serve: Any) -> None:
    """What a job took from its submission is what all that wait before the next one take."""

    async def test(service: LocalService) -> None:
        service._register.mean_seconds = 20.0
        held = [await service.submit(request("hold")) for _ in range(4)]
        held[0].cancel()
        with pytest.raises(CancelledError):
            await held[0].wait()
        await service.submit(request("hold"))
        with pytest.raises(UnavailableError, match="try again in 20 s") as full:
            await service.submit(request("draw"))
        assert full.value.retry_after == 20.0

    serve(test)


def test_what_only_waits_as_its_worker_dies_is_not_to_blame(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        held = await service.submit(request("hold"))
        with pytest.raises(DrawingError):
            await drawn(service, request("kill"))  # which takes two workers with it
        assigned = service.workers["one"][0].assigned[held.id]
        assert (assigned.tries, assigned.submit.alone, assigned.deaths) == (1, False, 2)

    serve(test)


def test_words_on_whom_nobody_watches_have_time(serve: Any) -> None:
    """Unless he has company: at which of several a worker has died is to be known."""

    async def test(service: LocalService) -> None:
        first = await service.submit(request("hold", watched=False))
        second = await service.submit(request("hold", watched=False))
        third = await service.submit(request("hold", bundle="two"))
        (only,), (chosen, _) = service.workers["one"], service.workers["two"]
        assert [only.assigned[job.id].submit.watched for job in (first, second)] == [False, True]
        assert chosen.assigned[third.id].submit.watched

    serve(test)


def test_whom_nobody_watches_is_refused_where_its_end_is_awaited(serve: Any, notes: Notes) -> None:
    async def test(service: LocalService) -> None:
        job = await service.submit(request("refuse", watched=False))
        with pytest.raises(RequestError, match="must be from 1") as refused:
            await job.wait()
        assert refused.value.parameter == "steps"
        assert service.job(job.id) is None  # as one that was refused at once
        assert (await drawn(service, request("draw", watched=False))).seeds == (7,)
        await service.drain()

    serve(test)
    assert notes.jobs[-1] == 0


def test_a_worker_dies_at_the_only_request_though_it_has_not_said_so(serve: Any, notes: Notes) -> None:
    async def test(service: LocalService) -> None:
        with pytest.raises(DrawingError, match="its worker has ended"):
            await drawn(service, request("die unheard", watched=False))
        assert (await drawn(service, request("draw"))).seeds == (7,)

    serve(test)
    assert notes.restarts == 2  # the second time it was alone


def test_a_worker_that_cannot_be_understood_is_replaced(serve: Any, notes: Notes) -> None:
    async def test(service: LocalService) -> None:
        assert (await drawn(service, request("garble once"))).seeds == (7,)

    serve(test)
    assert notes.restarts == 1


@pytest.mark.parametrize("prompt", ["draw", "kill once"])
def test_a_worker_that_starts_late_counts_against_nobody(serve: Any, notes: Notes, prompt: str) -> None:
    """What came meanwhile, or had to be drawn once more, is drawn by the one that starts at last."""

    async def test(service: LocalService) -> None:
        (only,) = service.workers["one"]
        started = only._options
        only._options = dataclasses.replace(started, batch=1)  # the next one is broken from the start
        if prompt == "draw":
            assert only.pid is not None
            os.kill(only.pid, signal.SIGKILL)
            await until(lambda: notes.restarts == 1)
        job = await service.submit(request(prompt, watched=False))
        await until(lambda: notes.restarts == 1)
        only._options = dataclasses.replace(started, verify=False)
        assert (await job.wait()).seeds == (7,)

    serve(test)
    assert notes.restarts == 2


def test_arguments_that_no_process_takes(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        asked = Request(arguments={"prompt": "draw", "seed": 7, "controlnet_conditioning_scale": lambda done: done})
        with pytest.raises(RequestError, match="cannot be handed to a worker"):
            await service.submit(asked)
        assert (await drawn(service, request("draw"))).seeds == (7,)

    serve(test)


def test_a_finished_job_keeps_no_pictures_of_its_request(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        job = await service.submit(request("draw"))
        await job.wait()
        assert not job.request.arguments

    serve(test)


def test_jobs_spread_over_workers(serve: Any, notes: Notes) -> None:
    async def test(service: LocalService) -> None:
        for _ in range(4):
            await service.submit(request("hold", bundle="two"))
        assert [len(each.assigned) for each in service.workers["two"]] == [2, 2]
        assert notes.jobs == [1, 2, 3, 4]

    serve(test)


def test_a_failure_is_tried_again_alone(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        assert (await drawn(service, request("fail once"))).seeds == (7,)
        with pytest.raises(DrawingError, match="failed again when it was tried alone: a kernel failed"):
            await drawn(service, request("poison"))
        assert (await drawn(service, request("draw"))).seeds == (7,)

    serve(test)


def test_a_worker_that_dies_is_replaced_and_its_jobs_are_drawn(serve: Any, notes: Notes) -> None:
    async def test(service: LocalService) -> None:
        held = await service.submit(request("hold"))
        assert (await drawn(service, request("kill once"))).seeds == (7,)
        held.cancel()  # the new worker has it too
        with pytest.raises(CancelledError):
            await held.wait()
        with pytest.raises(DrawingError, match="its worker has ended"):
            await drawn(service, request("kill"))
        assert (await drawn(service, request("draw"))).seeds == (7,)

    serve(test)
    assert notes.restarts == 3


def test_a_worker_that_hangs_is_replaced(serve: Any, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_LOOK_SECONDS", 0.1)

    async def test(service: LocalService) -> None:
        await asyncio.sleep(1.2)  # nothing is asked of it, and nothing is wrong
        assert notes.restarts == 0
        assert (await drawn(service, request("hang once", bundle="hasty"))).seeds == (7,)

    serve(test)
    assert notes.restarts == 1


def test_what_a_dying_worker_has_not_heard_of_is_cancelled_all_the_same(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        held = await service.submit(request("hold"))
        (only,) = service.workers["one"]
        assert only.pid is not None
        os.kill(only.pid, signal.SIGKILL)
        held.cancel()
        with pytest.raises(CancelledError):
            await held.wait()
        assert held.status == "cancelled"

    serve(test)


def test_one_that_cannot_start_again_is_given_up(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        (only,) = service.workers["one"]
        only._options = WorkerOptions(bundle=only._options.bundle, batch=1)
        with pytest.raises(DrawingError):
            await drawn(service, request("kill"))
        while not only.failure or not only.ready.is_set():
            await asyncio.sleep(0.02)
        assert service.state == "failed"
        with pytest.raises(UnavailableError, match="no worker draws with bundle one") as none:
            await service.submit(request("draw"))
        assert none.value.reason == "no_worker"
        assert (await drawn(service, request("draw", bundle="two"))).seeds == (7,)

    serve(test)


def test_draining(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        running = [await service.submit(request("slow")) for _ in range(2)]
        drain = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        assert service.state == "draining"
        with pytest.raises(UnavailableError, match="shutting down") as refused:
            await service.submit(request("draw"))
        assert refused.value.reason == "draining"
        await drain
        assert [job.status for job in running] == ["done", "done"]

    serve(test)


def test_draining_waits_for_who_goes_on(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        with service.holding():
            await drawn(service, request("draw"))
            drain = asyncio.create_task(service.drain())
            await asyncio.sleep(0.05)
            assert not drain.done()
            with pytest.raises(UnavailableError, match="shutting down"):
                await service.submit(request("draw"))
            second = await service.submit(request("hold"), going_on=True)
        await asyncio.sleep(0.05)
        assert not drain.done()
        second.cancel()
        await drain
        assert second.status == "cancelled"

    serve(test)


def test_who_goes_on_finds_the_queue_full(serve: Any) -> None:
    async def test(service: LocalService) -> None:
        held = [await service.submit(request("hold")) for _ in range(4)]
        with pytest.raises(UnavailableError, match="is full"):
            await service.submit(request("draw"))
        second = await service.submit(request("draw"), going_on=True)
        for job in held:
            job.cancel()
        assert (await second.wait()).seeds == (7,)

    serve(test)


def test_bundles_that_cannot_be_served(tmp_path: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_all(*bundles: Path, **options: Any) -> None:
        async with open_service(bundles, **options):
            pytest.fail("it started")

    other = tmp_path / demo_bundle.name
    other.symlink_to(demo_bundle)
    with pytest.raises(ParameterError, match="of another name than"):
        asyncio.run(open_all(demo_bundle, tmp_path / "." / demo_bundle.name / ".." / demo_bundle.name))
    monkeypatch.setattr(worker, "main", stub_worker.main)
    with pytest.raises(ServiceError, match="cannot start"):
        asyncio.run(open_all(demo_bundle, batch=1))


def test_a_real_worker_draws_what_the_pipeline_draws(demo: ControlNetPipeline, demo_bundle: Path) -> None:
    """Also when it is killed at it."""
    arguments = {"prompt": PROMPT, "image": {"mask": square()}, "num_inference_steps": 2, "seed": 3}
    expected = np.asarray(demo(**arguments).images[0])

    async def main() -> tuple[Result, Result]:
        async with open_service([demo_bundle]) as service:
            first = await drawn(service, Request(arguments=arguments))
            job = await service.submit(Request(arguments=arguments))
            (only,) = service.workers[demo_bundle.name]
            assert only.pid is not None
            os.kill(only.pid, signal.SIGKILL)
            return first, await job.wait()

    for result in asyncio.run(asyncio.wait_for(main(), 120)):
        np.testing.assert_array_equal(result.pictures[0], expected)
