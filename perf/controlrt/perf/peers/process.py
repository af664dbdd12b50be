"""The driver's side of a contender's process."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import msgspec

from controlrt.perf.child_process import ChildProcess
from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.drawer import CallSeconds
from controlrt.perf.peers.specs import Answer, PeerSpec, Request


class PeerProcess(ChildProcess):
    """A running contender.

    Args:
        name: its name, for messages.
        command: the process to start.
        log: file for what it says on stderr.
        timeout: seconds that loading, or one call, may take.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, timeout: float | None = None) -> None:
        super().__init__(name, command, log, timeout)
        self.load_seconds = 0.0
        """From the start of the process until it takes requests."""
        self.first_request_seconds = 0.0
        self.cold_start_seconds = 0.0
        """From the start of the process to its first pictures."""
        self.last: Answer | None = None

    @classmethod
    def start(cls, name: str, spec: PeerSpec, log: Path, timeout: float | None = None) -> Self:
        """Starts the process of ``spec``."""
        text = msgspec.json.encode(spec).decode()
        return cls(name, [sys.executable, "-m", "controlrt.perf.peers.worker", text], log, timeout)

    def load(self, first: Call, record: Path) -> None:
        """Waits until it is loaded and has it draw its first pictures.

        Args:
            first: what to draw.
            record: file for the pictures and the latents of every step.

        Raises:
            WorkerError: it cannot load, or cannot draw.
        """
        self.last = _decoded(self.answer())
        self.load_seconds = time.monotonic() - self.started
        self.first_request_seconds = self.draw(first, record).total
        self.cold_start_seconds = time.monotonic() - self.started

    def draw(self, call: Call, record: Path | None = None) -> CallSeconds:
        """Has it draw; returns the seconds of each stage.

        Raises:
            WorkerError: it ended.
        """
        request = Request(call=call, record="" if record is None else str(record))
        self.last = _decoded(self.ask(msgspec.json.encode(request).decode()))
        if self.last.seconds is None:
            raise ValueError(f"the worker of {self.variant} answered a call without its seconds")
        return self.last.seconds


def _decoded(line: str) -> Answer:
    return msgspec.json.decode(line, type=Answer)
