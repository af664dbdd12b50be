"""An engine in this process whose answers to each request are a stream: what a replica of a bundle is."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.server.engine import Engine
from controlrt.runtime.server.messages import (
    Accepted,
    Advanced,
    Broken,
    Failed,
    Finished,
    Incoming,
    Ready,
    Refused,
    Stepped,
    Submit,
)
from controlrt.runtime.server.worker import BROKEN, WorkerOptions

Answer = Accepted | Refused | Advanced | Finished | Failed
"""What a stream is made of; it begins with an acceptance or is a refusal, and ends with what ends the request."""
LAST = (Refused, Finished, Failed)

_log = logging.getLogger(__name__)


class Replica:
    """One bundle on this process's device. It is made, and its methods run, in one event loop.

    The process ends, with exit status ``worker.BROKEN``, where the engine is broken: whoever watches over it starts
    another one, and whoever reads its streams asks that one.

    Args:
        options: as a worker's.

    Raises:
        BundleError: it is missing, damaged or of another schema version.
        DeviceError: there is no device for it.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self._streams: dict[str, asyncio.Queue[Answer]] = {}
        self._loop = asyncio.get_running_loop()
        self._heard = time.monotonic()
        self._submitting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="submit")
        self._engine = Engine(
            Bundle.open(options.bundle, verify=options.verify),
            self._hear,
            policy=options.policy,
            batch=options.batch,
            threads=options.threads,
            device=options.device,
        )
        self._engine.start()

    async def draw(self, submit: Submit, seconds: float | None) -> AsyncGenerator[Answer, None]:
        """What the engine says of a request, to its end. The request is cancelled where the stream is closed earlier.

        Args:
            submit: with an id that is nobody else's; its deadline is not looked at.
            seconds: which the request still has; clocks of other machines are not compared with this one's.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        if not self._streams:
            self._heard = time.monotonic()
        self._streams[submit.id] = answers
        try:
            asked = dataclasses.replace(submit, deadline=deadline)
            await self._loop.run_in_executor(self._submitting, self._engine.submit, asked)
            while True:
                answer = await answers.get()
                yield answer
                if isinstance(answer, LAST):
                    return
        finally:
            del self._streams[submit.id]
            self._submitting.submit(self._engine.cancel, submit.id)  # after it was submitted

    def check_health(self) -> None:
        """Returns where the engine works.

        Raises:
            TimeoutError: it has requests, and has said nothing for long.
        """
        silent = time.monotonic() - self._heard
        if self._streams and silent > self._engine.silent_seconds:
            raise TimeoutError(f"the engine has {len(self._streams)} requests and said nothing for {silent:.0f} s")

    def close(self) -> None:
        """Ends the engine; streams that are left end nowhere."""
        self._submitting.shutdown()
        self._engine.close()

    def _hear(self, message: Incoming) -> None:
        """What any thread of the engine says."""
        if isinstance(message, Broken):
            _log.error("the engine is broken: %s", message.message)
            os._exit(BROKEN)  # threads may hang in the device
        else:
            self._loop.call_soon_threadsafe(self._pass_on, message)

    def _pass_on(self, message: Accepted | Refused | Advanced | Finished | Failed | Stepped | Ready) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Stepped | Ready):
            return
        stream = self._streams.get(message.id)
        if stream is not None:
            stream.put_nowait(message)
