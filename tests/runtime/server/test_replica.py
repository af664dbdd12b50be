"""A replica's streams, from an engine on the demo bundle."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controlled_calls import PROMPT, square
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.server.messages import Accepted, Advanced, Broken, Failed, Finished, Refused, Submit
from controlrt.runtime.server.replica import Answer, Replica
from controlrt.runtime.server.worker import BROKEN, WorkerOptions

pytestmark = pytest.mark.bundle


def submit(name: str, **changes: Any) -> Submit:
    arguments = {"prompt": PROMPT, "image": {"mask": square()}, "num_inference_steps": 2, "seed": 3, **changes}
    return Submit(id=name, arguments=arguments, deadline=None, previews=False, alone=False)


@pytest.fixture(scope="module")
def run(demo_bundle: Path) -> Any:
    """Runs a coroutine function on one replica, in one event loop for all tests."""
    with asyncio.Runner() as runner:

        async def opened() -> Replica:
            return Replica(WorkerOptions(bundle=demo_bundle, verify=False))

        made = runner.run(opened())

        def run(test: Callable[[Replica], Awaitable[None]]) -> None:
            async def main() -> None:
                await asyncio.wait_for(test(made), 120)

            runner.run(main())

        yield run
        made.close()


async def answers(made: Replica, asked: Submit, seconds: float | None = None) -> list[Answer]:
    return [answer async for answer in made.draw(asked, seconds)]


def test_streams_of_requests(run: Any, demo: ControlNetPipeline) -> None:
    async def test(made: Replica) -> None:
        drawn, refused, late = await asyncio.gather(
            answers(made, submit("drawn")),
            answers(made, submit("refused", num_inference_steps=0)),
            answers(made, submit("late"), 0.0),
        )
        assert [type(each) for each in drawn[:2]] == [Accepted, Advanced]  # it has begun
        finished = drawn[-1]
        assert isinstance(finished, Finished)
        expected = demo(PROMPT, {"mask": square()}, num_inference_steps=2, seed=3).images[0]
        np.testing.assert_array_equal(finished.pictures[0], np.asarray(expected))
        assert [type(each) for each in refused] == [Refused]
        assert isinstance(late[-1], Failed)
        assert late[-1].reason == "deadline"

    run(test)


def test_closing_a_stream_cancels_its_request(run: Any) -> None:
    async def test(made: Replica) -> None:
        async with aclosing(made.draw(submit("unwanted", num_inference_steps=500), None)) as stream:
            assert isinstance(await anext(stream), Accepted)
        reading = asyncio.create_task(answers(made, submit("too", num_inference_steps=500)))
        await asyncio.sleep(0.1)
        reading.cancel()
        await asyncio.wait({reading})
        assert isinstance((await answers(made, submit("next")))[-1], Finished)

    run(test)


def test_a_stuck_engine_is_unhealthy(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(made: Replica) -> None:
        monkeypatch.setattr(made._engine, "silent_seconds", 0.0)
        made.check_health()  # it has nothing to say
        async with aclosing(made.draw(submit("slow"), None)) as stream:
            await anext(stream)
            await asyncio.sleep(0.001)
            with pytest.raises(TimeoutError, match="has 1 requests and said nothing for"):
                made.check_health()

    run(test)


def test_a_broken_engine_ends_the_process(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(made: Replica) -> None:
        statuses: list[int] = []
        monkeypatch.setattr(os, "_exit", statuses.append)
        made._hear(Broken("the GPU has fallen off the bus"))
        assert statuses == [BROKEN]

    run(test)
