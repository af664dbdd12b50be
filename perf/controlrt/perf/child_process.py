"""A process that answers lines with lines: started, asked, and ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from controlrt.runtime.errors import ControlRTError

_GRACE_SECONDS = 10


class WorkerError(ControlRTError):
    """A worker that ended before its time. ``variant`` is whose."""

    def __init__(self, variant: str, exit_code: int, log: str) -> None:
        self.variant, self.exit_code = variant, exit_code
        how = f"exit code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
        hint = "; was there enough memory? --memory says how much may be used" if exit_code == -9 else ""
        super().__init__(f"the worker of {variant} ended with {how}{hint}{': ' + log if log else ''}")


class WorkerTimeoutError(WorkerError):
    """A worker that did not answer in time, and was ended."""

    def __init__(self, variant: str, seconds: float) -> None:
        self.variant, self.exit_code = variant, -9
        message = f"the worker of {variant} did not answer within {seconds:.0f} s; --timeout gives it longer"
        ControlRTError.__init__(self, message)


class ChildProcess:
    """A running worker. A context manager; ``close`` may be called twice.

    Args:
        variant: its name, for messages.
        command: the process to start.
        log: file for what it says on stderr.
        timeout: seconds that an answer may take; any number where None.
    """

    def __init__(self, variant: str, command: Sequence[str], log: Path, timeout: float | None = None) -> None:
        self.variant, self._log, self._timeout = variant, log, timeout
        self._unread = b""
        self.started = time.monotonic()
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

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

    def ask(self, line: str) -> str:
        """Sends a line and waits for the answer.

        Raises:
            WorkerError: the worker ended, or did not answer in time.
        """
        self.send(line)
        return self.answer()

    def send(self, line: str) -> None:
        """Sends a line, and waits for nothing."""
        stdin = self._process.stdin
        if stdin is None:
            raise ValueError(f"the worker of {self.variant} has no stdin")
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading says so
            stdin.write(f"{line}\n")
            stdin.flush()

    def answer(self) -> str:
        """Waits for the next line.

        Raises:
            WorkerError: the worker ended, or did not answer in time.
        """
        stdout = self._process.stdout
        if stdout is None:
            raise ValueError(f"the worker of {self.variant} has no stdout")
        until = None if self._timeout is None else time.monotonic() + self._timeout
        while b"\n" not in self._unread:  # not readline: what it has read ahead, a selector does not see
            left = None if until is None else max(0.0, until - time.monotonic())
            if self._timeout is not None and not _is_readable(stdout, left):
                self._process.kill()
                raise WorkerTimeoutError(self.variant, self._timeout)
            read = os.read(stdout.fileno(), 65536)
            if not read:
                exit_code = self._process.wait()
                said = self._log.read_text(errors="replace").strip().splitlines()
                raise WorkerError(self.variant, exit_code, said[-1] if said else "")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()


def _is_readable(stream: IO[str], seconds: float | None) -> bool:
    """Whether there is something to read within so many seconds. ``select`` would refuse where many files are open."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(seconds))
