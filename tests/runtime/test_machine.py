"""What machines and their CPUs say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlrt.runtime import machine


@pytest.mark.parametrize(
    ("architecture", "text", "expected"),
    [
        ("x86_64", "processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
        ("x86_64", "flags : fpu avx2 avx_vnni\n", True),
        ("x86_64", "flags : fpu avx2 avx512f\nflags : avx512_vnni\n", False),
        ("x86_64", "", False),
        ("aarch64", "Features : fp asimd\n", True),
    ],
)
def test_which_cpus_add_in_32_bits(
    monkeypatch: pytest.MonkeyPatch, architecture: str, text: str, expected: bool
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    monkeypatch.setattr("platform.machine", lambda: architecture)
    machine.flags.cache_clear()
    try:
        assert machine.adds_in_32_bits() == expected
    finally:
        machine.flags.cache_clear()


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    machine.flags.cache_clear()
    assert machine.flags() == frozenset()
    machine.flags.cache_clear()
    assert machine.available_memory() == 0


def test_memory_is_what_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal:       24650948 kB\nMemFree: 12 kB\nMemAvailable:   19 kB\nHugePages_Total:       0\n"
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert machine.available_memory() == 19 * 1024
    assert machine.memory("MemTotal") == 24650948 * 1024
    assert machine.memory("SwapFree") == 0
    assert machine.usable_cores() >= 1


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("6000000", 6_000_000 - 4_000_000 + 500_000), ("100000000", 19_000 * 1024), ("max", 19_000 * 1024)],
)
def test_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, limit: str, expected: int) -> None:
    files = {
        "/proc/meminfo": "MemAvailable:   19000 kB\n",
        "/proc/self/cgroup": "1:name=systemd:/old\n0::/build.slice\n",
        "/sys/fs/cgroup/build.slice/memory.max": f"{limit}\n",
        "/sys/fs/cgroup/build.slice/memory.current": "4000000\n",
        "/sys/fs/cgroup/build.slice/memory.stat": "anon 3000000\ninactive_file 500000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert machine.available_memory() == expected
