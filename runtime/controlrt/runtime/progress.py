"""Progress of long work: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm


def note(line: str) -> None:
    """Writes a line about the work, beside the progress of it."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """Counts named pieces of work. Use it as a context manager and call ``start`` before each piece."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self.total = title, total
        self._done = 0
        self._current = ""
        self._started = time.monotonic()
        self._bar = tqdm(total=total, desc=title, unit="", leave=False) if sys.stderr.isatty() else None

    def start(self, what: str) -> None:
        """Ends the piece before, if any, and names the next one."""
        self._finish()
        self._current, self._started = what, time.monotonic()
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(what)

    def _finish(self) -> None:
        if not self._current:
            return
        self._done += 1
        line = f"{self._title}: {self._current} ({time.monotonic() - self._started:.1f} s)"
        if self._bar is None:
            print(f"[{self._done}/{self.total}] {line}", file=sys.stderr, flush=True)
        else:
            self._bar.update()
            tqdm.write(line, file=sys.stderr)
        self._current = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        if self._bar is not None:
            self._bar.close()
