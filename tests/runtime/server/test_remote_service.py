"""A service on replicas that answer as the prompt says, and end when it says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest

from controlrt.runtime.errors import (
    CancelledError,
    DeadlineError,
    DrawingError,
    RequestError,
    UnavailableError,
    UnknownNameError,
)
from controlrt.runtime.server.jobs import Job, Request
from controlrt.runtime.server.messages import Accepted, Advanced, Failed, Finished, Refused, Submit
from controlrt.runtime.server.remote_service import LostError, NoReplicaError, RemoteService
from controlrt.runtime.server.replica import Answer
from controlrt.runtime.server.service import Silent
from fake_service import fake_manifest

pytest.importorskip("anyio", reason="it runs the coroutines; it comes with the extra [serve]")
pytestmark = pytest.mark.anyio


class Replicas:
    """See ``remote_service.Replicas``; keeps what it was asked, and what was closed before its end."""

    def __init__(self) -> None:
        self.asked: list[tuple[Submit, float | None]] = []
        self.closed: list[str] = []

    async def draw(self, submit: Submit, seconds: float | None) -> AsyncGenerator[Answer, None]:
        self.asked.append((submit, seconds))
        name, prompt, seed = submit.id, submit.arguments["prompt"], submit.arguments["seed"]
        picture = np.full((8, 8, 3), seed % 256, np.uint8)
        if prompt == "nobody":
            raise NoReplicaError("it failed to deploy")
        if prompt == "lost early":
            raise LostError("killed")
        if prompt == "refuse":
            yield Refused(id=name, message="steps is 0, but must be from 1", parameter="steps")
            return
        ended = False
        try:
            yield Accepted(id=name, steps=3)
            yield Advanced(id=name, step=1, previews=(picture[:1, :1],))
            if prompt == "hold":
                await asyncio.Event().wait()
            if prompt == "defect":
                raise ZeroDivisionError("by zero")
            if prompt == "lost" or (prompt == "lost once" and not submit.alone):
                raise LostError("killed")
            if prompt == "no end":
                return
            if prompt == "poison" or (prompt == "fail once" and not submit.alone):
                yield Failed(id=name, reason="engine", message="a kernel failed")
            elif prompt == "late":
                yield Failed(id=name, reason="deadline", message="out of time at step 1 of 3")
            else:
                seconds_of = {"queued": 0.0, "steps": 0.1, "decode": 0.0, "total": 0.1}
                yield Finished(id=name, pictures=(picture,), seeds=(seed,), seconds=seconds_of)
            ended = True
            if prompt == "lost late":
                raise LostError("killed")
        finally:
            if not ended:
                self.closed.append(name)


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
async def service(replicas: Replicas) -> RemoteService:
    manifests = {"one": fake_manifest(), "two": fake_manifest()}
    limits = {"one": 4, "two": 4}
    return RemoteService(manifests, {"one": replicas, "two": replicas}, limits=limits, observer=Silent())


def request(prompt: str, **options: Any) -> Request:
    return Request(arguments={"prompt": prompt, "seed": 7}, **options)


async def drawn(service: RemoteService, prompt: str, **options: Any) -> Job:
    job = await service.submit(request(prompt, **options))
    result = await job.wait()
    assert result.seeds == (7,)
    np.testing.assert_array_equal(result.pictures[0], np.full((8, 8, 3), 7))
    return job


async def test_a_job_from_submission_to_picture(service: RemoteService, replicas: Replicas) -> None:
    job = await service.submit(request("draw", previews=True, timeout=5.0))
    assert service.job(job.id) is job
    seen = [progress async for progress in job.watch()]
    assert (seen[-1].step, seen[-1].steps) == (3, 3)
    assert [each.step for each in seen] == sorted(each.step for each in seen)
    assert job.status == "done"
    ((asked, seconds),) = replicas.asked
    assert asked.previews
    assert not asked.alone
    assert seconds is not None
    assert 4 < seconds <= 5
    assert replicas.closed == []


async def test_whom_nobody_watches_is_refused_where_its_end_is_awaited(
    service: RemoteService, replicas: Replicas
) -> None:
    job = await service.submit(request("refuse", watched=False))
    with pytest.raises(RequestError, match="must be from 1") as refused:
        await job.wait()
    assert refused.value.parameter == "steps"
    assert service.job(job.id) is None
    await drawn(service, "draw", watched=False)
    assert [submit.watched for submit, _ in replicas.asked] == [False, False]


async def test_a_seed_is_drawn_once(service: RemoteService, replicas: Replicas) -> None:
    job = await service.submit(Request(arguments={"prompt": "lost once"}))
    seeds = {submit.arguments["seed"] for submit, _ in replicas.asked}
    assert (await job.wait()).seeds == tuple(seeds | {submit.arguments["seed"] for submit, _ in replicas.asked})


@pytest.mark.parametrize("prompt", ["lost once", "fail once"])
async def test_a_second_try_is_made_alone(service: RemoteService, replicas: Replicas, prompt: str) -> None:
    await drawn(service, prompt)
    first, second = (submit for submit, _ in replicas.asked)
    assert (first.alone, second.alone) == (False, True)
    assert first.id != second.id  # the first may still be on its way out where the second comes in


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("lost", "its replica has ended"), ("no end", "its replica has ended"), ("poison", "a kernel failed")],
)
async def test_there_is_no_third(service: RemoteService, replicas: Replicas, prompt: str, message: str) -> None:
    job = await service.submit(request(prompt))
    with pytest.raises(DrawingError, match=f"failed again when it was tried alone: {message}"):
        await job.wait()
    assert len(replicas.asked) == 2
    assert job.status == "failed"


async def test_one_lost_before_it_is_accepted(service: RemoteService) -> None:
    with pytest.raises(DrawingError, match="its replica has ended"):
        await service.submit(request("lost early"))


async def test_one_lost_after_its_picture_is_drawn(service: RemoteService, replicas: Replicas) -> None:
    await drawn(service, "lost late")
    assert len(replicas.asked) == 1


async def test_refusals(service: RemoteService) -> None:
    with pytest.raises(RequestError, match="must be from 1") as refused:
        await service.submit(request("refuse"))
    assert refused.value.parameter == "steps"
    with pytest.raises(UnknownNameError, match=r"unknown bundle 'tow'; known: one, two .*'two'"):
        await service.submit(request("draw", bundle="tow"))
    with pytest.raises(UnavailableError, match="no replica draws with bundle one: it failed to deploy") as none:
        await service.submit(request("nobody"))
    assert none.value.reason == "no_worker"


async def test_a_full_queue(service: RemoteService) -> None:
    held = [await service.submit(request("hold")) for _ in range(4)]
    with pytest.raises(UnavailableError, match="queue of bundle one is full") as full:
        await service.submit(request("draw"))
    assert full.value.reason == "queue_full"
    assert full.value.retry_after >= 1
    await drawn(service, "draw", bundle="two")  # another bundle has its own
    service.limits = {"one": 5, "two": 1}
    await drawn(service, "draw")
    for job in held:
        job.cancel()
    await service.drain()


async def test_cancelling_closes_the_stream(service: RemoteService, replicas: Replicas) -> None:
    job = await service.submit(request("hold"))
    job.cancel()
    with pytest.raises(CancelledError):
        await job.wait()
    assert job.status == "cancelled"
    assert replicas.closed == [f"{job.id}.1"]
    job.cancel()  # nothing
    done = await drawn(service, "draw")
    done.cancel()
    assert done.status == "done"


async def test_a_client_that_goes_while_it_is_queued(
    service: RemoteService, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = asyncio.Event()

    async def never(submit: Submit, seconds: float | None) -> AsyncGenerator[Answer, None]:
        del seconds
        try:
            await held.wait()
            yield Accepted(id=submit.id, steps=1)
        finally:
            replicas.closed.append(submit.id)

    monkeypatch.setattr(replicas, "draw", never)
    submitting = asyncio.create_task(service.submit(request("draw")))
    await asyncio.sleep(0.01)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    await service.drain()
    assert len(replicas.closed) == 1


async def test_deadlines(service: RemoteService, replicas: Replicas) -> None:
    job = await service.submit(request("hold", timeout=1))
    with pytest.raises(DeadlineError, match="ran out of time after step 1 of 3"):
        await job.wait()
    assert replicas.closed == [f"{job.id}.1"]
    late = await service.submit(request("late"))
    with pytest.raises(DeadlineError, match="out of time at step 1"):
        await late.wait()


async def test_a_defect_fails_its_job_alone(service: RemoteService) -> None:
    job = await service.submit(request("defect"))
    with pytest.raises(DrawingError, match="ZeroDivisionError: by zero"):
        await job.wait()
    await drawn(service, "draw")


async def test_draining(service: RemoteService) -> None:
    assert service.state == "starting"
    service.condition = "ready"
    assert service.state == "ready"
    held = await service.submit(request("hold"))
    drain = asyncio.create_task(service.drain())
    await asyncio.sleep(0)
    assert service.state == "draining"
    with pytest.raises(UnavailableError, match="shutting down") as refused:
        await service.submit(request("draw"))
    assert refused.value.reason == "draining"
    assert not drain.done()
    held.cancel()
    await asyncio.wait_for(drain, 5)
