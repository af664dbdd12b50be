"""How much memory this process has, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> int:
    """The most that was resident so far (VmHWM) in bytes; 0 where the system does not tell."""
    return _status("VmHWM")


def file_backed_memory() -> int:
    """Bytes of files that are resident now (RssFile): libraries and mapped weights, which others may share."""
    return _status("RssFile")


def _status(field: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return 1024 * int(lines.get(field, "0 kB").split()[0])
