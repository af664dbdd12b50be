"""The driver's side of an ablation's worker."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import msgspec

from controlrt.perf.child_process import ChildProcess
from controlrt.perf.worker import Reply, WorkerSpec


class WorkerProcess(ChildProcess):
    """A running worker of one variant.

    Args:
        variant: its name, for messages.
        command: the process to start.
        log: file for what it says on stderr.
    """

    def __init__(self, variant: str, command: Sequence[str], log: Path) -> None:
        super().__init__(variant, command, log)
        self.load_seconds = 0.0
        """From the start of the process to the end of its first step."""
        self.peak_bytes = 0
        """The most memory it has had, as of the last answer."""

    @classmethod
    def start(cls, variant: str, spec: WorkerSpec, log: Path) -> Self:
        """Starts a worker for ``spec``."""
        text = msgspec.json.encode(spec).decode()
        return cls(variant, [sys.executable, "-m", "controlrt.perf.worker", text], log)

    def load(self) -> None:
        """Waits until the variant is loaded and runs its first step.

        Raises:
            WorkerError: the worker cannot load it.
        """
        self._read(self.answer())
        self.step()
        self.load_seconds = time.monotonic() - self.started

    def step(self) -> float:
        """Runs one step; returns the seconds it took.

        Raises:
            WorkerError: the worker ended.
        """
        return self._read(self.ask("step")).seconds

    def save(self, file: Path) -> None:
        """Has the outputs of the last step written to ``file``.

        Raises:
            WorkerError: the worker ended.
        """
        self._read(self.ask(f"save {file}"))

    def _read(self, line: str) -> Reply:
        reply = msgspec.json.decode(line, type=Reply)
        self.peak_bytes = max(self.peak_bytes, reply.peak_bytes)
        return reply
