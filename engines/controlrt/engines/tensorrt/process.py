"""Runs native code that may crash in a process of its own, and says in words how it ended."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from controlrt.engines.tensorrt.log import tail
from controlrt.runtime.errors import OutputError
from controlrt.runtime.storage import cache_root

REFUSED = 3
"""Exit code of a child where the library itself said no; the reason is in the log."""
_FULL_DISK = "No space left on device"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A child that is gone."""

    code: int
    """Exit code, negative for a signal."""
    log: str
    """Standard output and error."""

    @property
    def how(self) -> str:
        """In a few words, such as ``crashed (SIGSEGV)``."""
        if self.code == REFUSED:
            return "refuses it"
        if self.code == -signal.SIGKILL:
            return "was killed"
        if self.code < 0:
            return f"crashed ({signal.Signals(-self.code).name})"
        return "ended without an engine" if self.code == 0 else f"failed with exit code {self.code}"

    @property
    def end_of_log(self) -> str:
        """Its last lines."""
        return tail(self.log) or "(it said nothing)"


def run_child(command: Sequence[str], request: msgspec.Struct, scratch: Path) -> Ended:
    """Runs ``command REQUEST.json`` to its end.

    Args:
        command: of the child.
        request: what it reads.
        scratch: an empty directory, which holds the request and the log.
    """
    asked, log = scratch / "request.json", scratch / "log"
    asked.write_bytes(msgspec.json.encode(request))
    code = _call([*command, str(asked)], log)
    return Ended(code=code, log=log.read_text(errors="replace"))


def refuse_full_disk(ended: Ended, doing: str) -> None:
    """Raises OutputError where the child found no space; ``doing`` says at what."""
    if _FULL_DISK in ended.log:
        raise OutputError(f"no space left while {doing}; free some in {cache_root()} or {tempfile.gettempdir()}")


def _call(command: list[str], log: Path) -> int:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            return process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
