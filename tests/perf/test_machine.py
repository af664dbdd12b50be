"""Where a measurement was made."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from controlrt.perf.machine import ISA, commit, installed_versions, this_machine
from controlrt.runtime.machine import available_memory


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_commit_is_dirty_as_soon_as_anything_differs(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    clean = commit(tmp_path)
    assert clean is not None
    assert (clean.hash, clean.dirty) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("two")
    edited = commit(tmp_path)
    assert edited is not None
    assert edited.dirty


def test_versions_leave_out_what_is_not_installed() -> None:
    found = installed_versions(["numpy", "no-such-package"])
    assert found == {"numpy": importlib.metadata.version("numpy")}


def test_the_machine_has_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes >= available_memory() > 0
    assert machine.cpu


def test_what_kernels_choose_by_is_told() -> None:
    machine = this_machine()
    assert set(machine.isa) <= set(ISA)
    assert machine.clock_mhz is None or machine.clock_mhz > 100
