"""A process that draws: an engine behind a channel, so that neither clients nor pictures for them hold it up, and so
that one that dies is replaced."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.server.channel import Channel
from controlrt.runtime.server.engine import TELL_SECONDS, Engine
from controlrt.runtime.server.messages import (
    Accepted,
    Advanced,
    Broken,
    Cancel,
    Incoming,
    Outgoing,
    Ready,
    Stepped,
    Submit,
)
from controlrt.runtime.server.policies import Policy

BROKEN = 70
"""Exit status of one whose device or engine failed (EX_SOFTWARE)."""
PATIENCE = 0.001
"""Seconds that a word on where a request is may lie before it is sent: there are often several. Where nobody watches
the request, and for what is only counted, they are ``TELL_SECONDS``."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What a worker draws with. See ``Engine``."""

    bundle: Path
    policy: Policy = "shortest"
    batch: int | None = None
    threads: int | None = None
    device: int | None = None
    verify: bool = True
    """Whether to compare the bundle's files with their hashes first."""


def main(channel: Channel, options: WorkerOptions) -> None:
    """The process's work, until it is told to stop or nobody is at the other end any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt reaches all processes; the service decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    outbox = Outbox(channel)
    try:
        engine = Engine(
            Bundle.open(options.bundle, verify=options.verify),
            outbox.put,
            policy=options.policy,
            batch=options.batch,
            threads=options.threads,
            device=options.device,
        )
        with engine:
            outbox.put(Ready(silent_seconds=engine.silent_seconds))
            _serve(channel, engine)
    except ControlRTError as error:
        outbox.put(Broken(str(error)))
    outbox.close()


def _serve(channel: Channel, engine: Engine) -> None:
    while True:
        try:
            message: Outgoing = channel.receive()
        except (EOFError, OSError):
            return
        if isinstance(message, Submit):
            engine.submit(message)
        elif isinstance(message, Cancel):
            engine.cancel(message.id)
        else:
            return


class Outbox:
    """What a worker says, sent by a thread of its own, several messages at once: whoever wakes up to hear of one takes
    time from the cores that draw.

    Args:
        channel: to the service.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._changed = threading.Condition()
        self._messages: list[Incoming] = []
        self._due = math.inf
        """When to send them, on the monotonic clock."""
        self._closing = False
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()

    def put(self, message: Incoming) -> None:
        """Has a message sent: at once, or within ``PATIENCE`` or ``TELL_SECONDS`` where it says only how far things
        are."""
        due = time.monotonic() + _patience(message)
        with self._changed:
            self._messages.append(message)
            if due < self._due:
                self._due = due
                self._changed.notify()

    def close(self) -> None:
        """Sends what there is, and returns when that is done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._sender.join()

    def _send_all(self) -> None:
        while said := self._next():
            try:
                self._channel.send(said)
            except OSError:  # nobody is there to hear of it
                return
            if any(isinstance(message, Broken) for message in said):
                os._exit(BROKEN)  # threads may hang in the device

    def _next(self) -> list[Incoming]:
        """What is to be sent now; nothing at the end."""
        with self._changed:
            while not self._closing and (left := self._due - time.monotonic()) > 0:
                self._changed.wait(None if left == math.inf else left)
            said, self._messages, self._due = self._messages, [], math.inf
            return said


def _patience(message: Incoming) -> float:
    """Seconds that a message may lie."""
    match message:
        case Accepted(watched=True) | Advanced(watched=True):
            return PATIENCE
        case Accepted() | Advanced() | Stepped():
            return TELL_SECONDS
        case _:
            return 0.0
