"""The driver's side of a contender's process."""

from __future__ import annotations

import sys
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

    def begin(self, first: Call, record: Path) -> None:
        """Has it draw its first pictures as soon as it is loaded, and does not wait for it.

        Args:
            first: what to draw.
            record: file for the pictures and the latents of every step.
        """
        self.send(_line(first, record))

    def load(self) -> None:
        """Waits for the first pictures, after ``begin``.

        Raises:
            WorkerError: it cannot load, or cannot draw.
        """
        self.load_seconds = _decoded(self.answer()).moment - self.started
        self.last = _decoded(self.answer())
        self.first_request_seconds = self._seconds().total
        self.cold_start_seconds = self.last.moment - self.started

    def draw(self, call: Call, record: Path | None = None) -> CallSeconds:
        """Has it draw; returns the seconds of each stage.

        Raises:
            WorkerError: it ended.
        """
        self.last = _decoded(self.ask(_line(call, record)))
        return self._seconds()

    def _seconds(self) -> CallSeconds:
        if self.last is None or self.last.seconds is None:
            raise ValueError(f"the worker of {self.variant} answered a call without its seconds")
        return self.last.seconds


def _line(call: Call, record: Path | None) -> str:
    return msgspec.json.encode(Request(call=call, record="" if record is None else str(record))).decode()


def _decoded(line: str) -> Answer:
    return msgspec.json.decode(line, type=Answer)
