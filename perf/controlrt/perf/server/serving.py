"""A running server: ``controlrt serve`` in a process of its own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from controlrt.runtime.errors import ControlRTError

COMMAND = (sys.executable, "-m", "controlrt.runtime.commands", "serve")
HOST = "127.0.0.1"
_START_SECONDS = 300.0
_END_SECONDS = 120.0
_DRAIN_SECONDS = 600.0
"""For what it has accepted: as long as it gives a request."""


class Served:
    """A server with one bundle. A context manager: it is ready within, and gone afterwards.

    Args:
        bundle: what it draws with.
        log: file for what it says.
        options: further ones of ``controlrt serve``.
        command: what is run in place of that, for tests.
    """

    def __init__(
        self, bundle: Path, log: Path, options: Sequence[str] = (), *, command: Sequence[str] = COMMAND
    ) -> None:
        self._bundle, self._log, self._options, self._command = bundle, log, options, command

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self._port}"

    def __enter__(self) -> Self:
        self._port = _free_port()
        command = [*self._command, str(self._bundle), "--host", HOST, "--port", str(self._port), *self._options]
        with self._log.open("w") as said:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Waits for its end; the exit code.

        Raises:
            ControlRTError: it does not end.
        """
        try:
            return self._process.wait(_DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            raise ControlRTError(f"the server did not end within {_DRAIN_SECONDS:.0f} s; see {self._log}") from None

    def resident_bytes(self) -> int:
        """What it and its workers have resident (VmRSS), without pages of files, which they share and the system may
        drop; 0 where the system does not tell."""
        return sum(_anonymous_bytes(pid) for pid in _family(self._process.pid))

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                said = self._log.read_text(errors="replace").strip().splitlines()
                why = said[-1] if said else "it said nothing"
                raise ControlRTError(f"the server ended with exit code {self._process.returncode}: {why}")
            if _is_ready(self._port):
                return
            time.sleep(0.05)
        raise ControlRTError(f"the server was not ready within {_START_SECONDS:.0f} s; see {self._log}")

    def _end(self) -> None:
        if self._process.poll() is None:
            self.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def _family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        found += [each for child in children for each in _family(int(child))]
    return found


def _anonymous_bytes(pid: int) -> int:
    try:
        resident, shared = (int(field) for field in Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
