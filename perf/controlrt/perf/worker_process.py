"""The driver's side of a worker: starts the process, asks, and ends it whatever happens."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from controlrt.perf.worker import Reply, WorkerSpec
from controlrt.runtime.errors import ControlRTError

_GRACE_SECONDS = 10


class WorkerError(ControlRTError):
    """A worker that ended before its time. ``variant`` is whose."""

    def __init__(self, variant: str, exit_code: int, log: str) -> None:
        self.variant, self.exit_code = variant, exit_code
        how = f"exit code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
        hint = "; was there enough memory? --memory says how much may be used" if exit_code == -9 else ""
        super().__init__(f"the worker of {variant} ended with {how}{hint}{': ' + log if log else ''}")


class WorkerProcess:
    """A running worker. A context manager; ``close`` may be called twice.

    Args:
        variant: its name, for messages.
        command: the process to start.
        log: file for what it says on stderr.
    """

    def __init__(self, variant: str, command: Sequence[str], log: Path) -> None:
        self.variant, self._log = variant, log
        self._started = time.monotonic()
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
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
        self._reply()
        self.step()
        self.load_seconds = time.monotonic() - self._started

    def step(self) -> float:
        """Runs one step; returns the seconds it took.

        Raises:
            WorkerError: the worker ended.
        """
        return self._ask("step").seconds

    def save(self, file: Path) -> None:
        """Has the outputs of the last step written to ``file``.

        Raises:
            WorkerError: the worker ended.
        """
        self._ask(f"save {file}")

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None and self._process.stdout is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()
            try:
                self._process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()

    def _ask(self, command: str) -> Reply:
        stdin = self._process.stdin
        if stdin is None:
            raise ValueError(f"the worker of {self.variant} has no stdin")
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading says so
            stdin.write(f"{command}\n")
            stdin.flush()
        return self._reply()

    def _reply(self) -> Reply:
        stdout = self._process.stdout
        line = stdout.readline() if stdout is not None else ""
        if not line:
            exit_code = self._process.wait()
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise WorkerError(self.variant, exit_code, said[-1] if said else "")
        reply = msgspec.json.decode(line, type=Reply)
        self.peak_bytes = max(self.peak_bytes, reply.peak_bytes)
        return reply
