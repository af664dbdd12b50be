"""Where a benchmark keeps graphs and outputs while it runs, one benchmark at a time."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from controlrt.perf.models import bench_directory
from controlrt.runtime.storage import lock


@contextlib.contextmanager
def scratch_directory(name: str) -> Iterator[Path]:
    """An empty directory on the disk of the cache; gone afterwards, and leftovers of killed runs too.

    Its lock keeps a second benchmark waiting: two at once would measure each other.
    """
    directory = bench_directory() / name
    with lock(bench_directory() / "measuring"):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
