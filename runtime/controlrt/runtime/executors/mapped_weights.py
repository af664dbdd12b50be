"""Lets go of mapped weights that a backend has packed into memory of its own.

OpenVINO maps the file of weights, reads each tensor once to pack it for its kernels, and keeps the map. Without this,
the process holds every weight twice, once in pages that nothing reads again.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_INTERVAL_SECONDS = 0.05


@contextlib.contextmanager
def released(directory: Path) -> Iterator[None]:
    """Gives back the resident pages of maps of files in ``directory``, now and then in the block and once at its end.

    The maps stay valid: a page that is read again comes from the file. Does nothing where the system is not Linux.
    """
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()

    def now_and_then() -> None:
        while not done.wait(_INTERVAL_SECONDS):
            _release(directory)

    helper = threading.Thread(target=now_and_then, name="release mapped weights", daemon=True)
    helper.start()
    try:
        yield
    finally:
        done.set()
        helper.join()
        _release(directory)


def _release(directory: Path) -> None:
    """Drops every shared, read-only map of its files from this process's resident memory."""
    parent = str(directory.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if permissions == "r--s" and path and os.path.dirname(path[0]) == parent:
            start, end = (int(address, 16) for address in addresses.split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
