"""The load generator, on a server that is a function."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from controlrt.perf.server.client import Answer
from controlrt.perf.server.load import closed_loop, open_loop


class Server:
    """Answers each request after the seconds that it says."""

    def __init__(self) -> None:
        self.waiting = self.most = 0

    async def __call__(self, body: dict[str, Any]) -> Answer:
        sent = time.perf_counter()
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await asyncio.sleep(body["seconds"])
        self.waiting -= 1
        return Answer(status=body["number"], sent=sent, received=time.perf_counter(), body=b"")


def bodies(count: int, seconds: float) -> list[dict[str, Any]]:
    return [{"number": number, "seconds": seconds} for number in range(count)]


def test_an_open_loop_waits_for_nobody() -> None:
    """Ten requests within 50 ms, none of which is answered before 2 s."""
    server, due = Server(), [0.005 * number for number in range(10)]
    started, answers = asyncio.run(open_loop(server, bodies(10, 2.0), due))
    assert server.most == 10
    assert [answer.status for answer in answers] == list(range(10))
    late = [answer.sent - started - moment for answer, moment in zip(answers, due, strict=True)]
    assert min(late) > -1e-3
    assert sorted(late)[5] < 0.1


def test_latency_counts_from_the_moment_that_was_due() -> None:
    """A generator that is kept busy sends late; what was late is latency."""

    async def blocked() -> tuple[float, list[Answer]]:
        asyncio.get_running_loop().call_later(0.01, time.sleep, 0.3)
        return await open_loop(Server(), bodies(3, 0.0), [0.0, 0.05, 0.06])

    started, answers = asyncio.run(blocked())
    assert answers[1].received - started - 0.05 > 0.2
    assert answers[1].seconds < answers[1].received - started - 0.05 - 0.1  # from when it was sent


@pytest.mark.parametrize("clients", [1, 3])
def test_a_closed_loop_has_so_many_under_way(clients: int) -> None:
    server = Server()
    answers = asyncio.run(closed_loop(server, bodies(7, 0.01), clients))
    assert server.most == clients
    assert [answer.status for answer in answers] == list(range(7))
