"""What this machine has, and what its CPU can do."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

from controlrt.runtime.errors import ParameterError

MOST_THREADS = 1024
"""More would be a slip of the hand, and libraries that are asked for them make as many."""
_EXACT = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Extensions of x86 with int8 products that are added in 32 bits, as Linux names them."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int | None) -> None:
    """Raises ParameterError unless ``threads``, None for all cores, is a number that a CPU can have."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ParameterError("threads", threads, f"from 1 to {MOST_THREADS}, or left out for all cores")


def available_memory() -> int:
    """Bytes that new processes can have without swapping, within a container's limit where there is one (cgroup v2); 0
    where the system does not tell.
    """
    left = _left_to_container()
    return memory("MemAvailable") if left is None else min(memory("MemAvailable"), left)


def _left_to_container() -> int | None:
    """Bytes that are left of this process's control group's limit; None where it has none."""
    try:
        group = next(
            line.removeprefix("0::/")
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::/")
        )
        folder = Path("/sys/fs/cgroup") / group
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(kept["inactive_file"]))  # pages of files go when others are wanted
    except (OSError, ValueError, StopIteration, KeyError):  # no group, or "max"
        return None


def memory(field: str) -> int:
    """Bytes that Linux gives under the name ``field``, such as ``MemTotal``; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(sizes.get(field, "0 kB").split()[0])


@functools.cache
def flags() -> frozenset[str]:
    """Extensions of an x86 CPU, as Linux names them; none where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def adds_in_32_bits() -> bool:
    """Whether products of int8 are added in 32 bits.

    Other CPUs of x86 add two of them in 16 bits first, where they overflow unless weights take 7 bits only.
    """
    return platform.machine() in ("aarch64", "arm64") or not flags().isdisjoint(_EXACT)
