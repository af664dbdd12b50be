"""Maps of weights that were packed: their pages go, what is in them does not."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from controlrt.runtime.executors.mapped_weights import released

SIZE = 64 * 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A file of 64 MiB and its map, which has not been read."""
    file = tmp_path / "weights.bin"
    np.arange(SIZE // 4, dtype=np.uint32).tofile(file)
    return file, np.memmap(file, np.uint32, mode="r")


def resident() -> int:
    """Bytes of files in this process's memory (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


def test_pages_are_given_back_and_come_again(mapped: tuple[Path, np.ndarray]) -> None:
    file, array = mapped
    before = resident()
    with released(file.parent):
        expected = int(array.sum(dtype=np.uint64))
    assert resident() - before < SIZE // 8
    assert int(array.sum(dtype=np.uint64)) == expected == (SIZE // 4) * (SIZE // 4 - 1) // 2
    assert resident() - before > SIZE * 7 // 8


def test_pages_go_while_the_block_runs(mapped: tuple[Path, np.ndarray]) -> None:
    file, array = mapped
    before = resident()
    with released(file.parent):
        array.sum()
        deadline = time.monotonic() + 10
        while resident() - before > SIZE // 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident() - before < SIZE // 8


def test_other_files_stay(mapped: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    _, array = mapped
    before = resident()
    (tmp_path / "elsewhere").mkdir()
    with released(tmp_path / "elsewhere"):
        array.sum()
    assert resident() - before > SIZE * 7 // 8


def test_an_error_passes_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="as it is"), released(tmp_path):
        raise RuntimeError("as it is")
