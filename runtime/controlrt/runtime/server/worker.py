"""A process that draws: an engine behind a pipe, so that neither clients nor pictures for them hold it up, and so that
one that dies is replaced."""

from __future__ import annotations

import os
import queue
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.server.engine import Engine
from controlrt.runtime.server.messages import Broken, Cancel, Incoming, Outgoing, Ready, Submit
from controlrt.runtime.server.policies import Policy

BROKEN = 70
"""Exit status of one whose device or engine failed (EX_SOFTWARE)."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What a worker draws with. See ``Engine``."""

    bundle: Path
    policy: Policy = "shortest"
    batch: int | None = None
    threads: int | None = None
    device: int = 0
    verify: bool = True
    """Whether to compare the bundle's files with their hashes first."""


def main(connection: Connection, options: WorkerOptions) -> None:
    """The process's work, until it is told to stop or nobody is at the other end any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt reaches all processes; the service decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    outgoing: queue.SimpleQueue[Incoming | None] = queue.SimpleQueue()
    sender = threading.Thread(target=_send_all, args=(connection, outgoing), daemon=True)
    sender.start()
    try:
        engine = Engine(
            Bundle.open(options.bundle, verify=options.verify),
            outgoing.put,
            policy=options.policy,
            batch=options.batch,
            threads=options.threads,
            device=options.device,
        )
        with engine:
            outgoing.put(Ready())
            _serve(connection, engine)
    except ControlRTError as error:
        outgoing.put(Broken(str(error)))
    outgoing.put(None)
    sender.join()


def _serve(connection: Connection, engine: Engine) -> None:
    while True:
        try:
            message: Outgoing = connection.recv()
        except (EOFError, OSError):
            return
        if isinstance(message, Submit):
            engine.submit(message)
        elif isinstance(message, Cancel):
            engine.cancel(message.id)
        else:
            return


def _send_all(connection: Connection, outgoing: queue.SimpleQueue[Incoming | None]) -> None:
    """Sends what there is at once: whoever wakes up to hear of it takes time from the cores that draw."""
    while True:
        messages = [outgoing.get()]
        while not outgoing.empty():
            messages.append(outgoing.get())
        said = [message for message in messages if message is not None]
        try:
            connection.send(said)
        except OSError:  # nobody is there to hear of it
            return
        if any(isinstance(message, Broken) for message in said):
            os._exit(BROKEN)  # threads may hang in the device
        if len(said) < len(messages):
            return
