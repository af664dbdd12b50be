"""Directories that are whole or absent: atomic writes, digests, locks and the content-keyed cache."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from controlrt.runtime.errors import OutputError

PARTIAL = ".partial-"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(root: Path, pattern: str) -> str:
    """Hex SHA-256 over the relative names and contents of the files below ``root`` that match ``pattern``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob(pattern) if path.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def cache_root() -> Path:
    """``$CONTROLRT_CACHE``, else ``$XDG_CACHE_HOME/controlrt``, else ``~/.cache/controlrt``."""
    if explicit := os.environ.get("CONTROLRT_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "controlrt"


@contextlib.contextmanager
def lock(target: Path) -> Iterator[None]:
    """Holds the lock of ``target`` against other processes; waits for it, saying so.

    The lock file lies in the cache, so that nothing is left beside the target.
    """
    directory = cache_root() / "locks"
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:32]
    held = FileLock(directory / f"{name}.lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        print(f"another process is building {target}; waiting for it", file=sys.stderr, flush=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``target`` that takes its place when the block ends well.

    On any error, Ctrl-C included, the directory is removed and ``target`` stays as it was. Call it under ``lock``:
    leftovers of killed processes are cleared first.

    Raises:
        OutputError: the place cannot be written.
    """
    target = target.resolve()
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{glob.escape(target.name)}{PARTIAL}*"):
            shutil.rmtree(stale)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}{PARTIAL}", dir=target.parent))
        partial.chmod(0o777 & ~_umask())
    replaced = partial.with_name(f"{partial.name}-replaced")
    try:
        with _writing(target):
            yield partial
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)  # interrupted between the two renames
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a path beside ``target``, of the same ending, that takes its place when the block ends well."""
    with _writing(target):
        handle, name = tempfile.mkstemp(prefix=PARTIAL, suffix=target.suffix, dir=target.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o666 & ~_umask())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns what the file system refuses into an OutputError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"no space left while writing {target}; free some or choose another place") from error
        raise OutputError(f"cannot write {target}: {error.strerror or error}; choose another place") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_foreign_directory(target: Path, marker: str) -> None:
    """Raises OutputError unless ``target`` is absent, empty, or was written by controlrt (holds ``marker``)."""
    with _writing(target):
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target} is a file; name a directory")
        if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
            raise OutputError(f"{target} exists and holds other files (no {marker}); name another directory")


def check_writable(target: Path) -> None:
    """Raises OutputError where ``target`` could not be made, before any work is done for it."""
    with _writing(target):
        existing = target.absolute().parent
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise OutputError(f"cannot write {target}: {existing} is a file; choose another place")
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=existing):
            pass  # permissions do not tell all: read-only and special file systems refuse only when asked
