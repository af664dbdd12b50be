"""From the first connection to the last answer: uvicorn, and how it ends.

The first SIGTERM or SIGINT drains: the server goes on listening and answers new requests with 503, so that a load
balancer learns of it at ``/readyz``, until all that it has accepted is drawn and answered. A second SIGINT ends it at
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Collection, Iterator
from functools import partial

import uvicorn
from fastapi import FastAPI

from controlrt.runtime.errors import ParameterError, UserError
from controlrt.runtime.server.jobs import FINISHED, Job, Service
from controlrt.runtime.server.log import log

LAST_ANSWER_SECONDS = 30
"""How long an answer may still take to be sent once everything is drawn."""
COLLECT_SECONDS = 10.0
"""How long jobs that were done while the server drained can still be asked for."""


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, which listens only once it is served; port 0 takes any.

    Raises:
        UserError: the address is taken, or no address of this machine.
    """
    if not 0 <= port < 2**16:
        raise ParameterError("port", port, "from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error}; try another --port or --host") from None
    return bound


class _Server(uvicorn.Server):
    """Leaves signals to ``serve``, whose loop they would otherwise stop before its jobs are done."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


async def serve(app: FastAPI, service: Service, bound: socket.socket) -> None:
    """Answers requests until a signal says to end, and all that were accepted are answered.

    Args:
        app: as ``build_app`` makes it.
        service: what it stands on.
        bound: as ``open_socket`` gives it; closed at the end.

    Raises:
        asyncio.CancelledError: a second SIGINT came.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=LAST_ANSWER_SECONDS
    )
    server = _Server(config)
    loop, serving = asyncio.get_running_loop(), asyncio.current_task()
    draining: asyncio.Task[None] | None = None

    async def drain_and_exit() -> None:
        try:
            await drain(app, service)
        finally:
            for end in app.state.before_exit:
                end()
            server.should_exit = True

    def hear(number: signal.Signals) -> None:
        nonlocal draining
        if draining is None:
            log("draining", signal=number.name)
            draining = loop.create_task(drain_and_exit())
        elif number == signal.SIGINT and serving is not None:
            log("ending at once", signal=number.name)
            serving.cancel()

    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, partial(hear, number))
    try:
        await server.serve(sockets=[bound])
        if draining is not None:
            await draining  # its errors are ours
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
        bound.close()


async def drain(app: FastAPI, service: Service) -> None:
    """Takes no more requests; returns when all are finished, and those collected that were to be fetched later."""
    awaited = [job for job in app.state.uncollected if job.status not in FINISHED]
    await service.drain()
    await _collected(awaited, app.state.uncollected)


async def _collected(awaited: Collection[Job], uncollected: Collection[Job]) -> None:
    """Returns when clients have asked for the jobs that they were told to ask for later, or had the time to."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(COLLECT_SECONDS):
            while any(job in uncollected for job in awaited):
                await asyncio.sleep(0.05)
