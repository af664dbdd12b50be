"""How requests are sent: at their own moments whatever the server does, or as fast as it answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from controlrt.perf.server.client import Answer

Send = Callable[[dict[str, Any]], Awaitable[Answer]]


async def open_loop(send: Send, bodies: Sequence[dict[str, Any]], due: Sequence[float]) -> tuple[float, list[Answer]]:
    """Sends every request when it is due, as independent clients would, however late the answers are.

    Args:
        send: sends one and waits for its answer.
        bodies: of the requests.
        due: seconds after the start, in order; one for each.

    Returns:
        The start on ``time.perf_counter``, and the answers in the order of the requests. Latency counts from the moment
        that was due, so that a generator that lags behind makes no server look faster (Tene, "coordinated omission").
    """
    started = time.perf_counter()
    sending = []
    for body, moment in zip(bodies, due, strict=True):
        await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
        sending.append(asyncio.ensure_future(send(body)))
    return started, list(await asyncio.gather(*sending))


async def closed_loop(send: Send, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answer]:
    """Sends every request by one of so many clients, each of which waits for its answer before it sends the next.

    Returns:
        The answers in the order of the requests.
    """
    answers: list[Answer | None] = [None] * len(bodies)
    left = iter(enumerate(bodies))

    async def client() -> None:
        for number, body in left:
            answers[number] = await send(body)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [answer for answer in answers if answer is not None]
