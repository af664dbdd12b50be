"""What CPUs say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlrt.runtime import cpu


@pytest.mark.parametrize(
    ("machine", "text", "expected"),
    [
        ("x86_64", "processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
        ("x86_64", "flags : fpu avx2 avx_vnni\n", True),
        ("x86_64", "flags : fpu avx2 avx512f\nflags : avx512_vnni\n", False),
        ("x86_64", "", False),
        ("aarch64", "Features : fp asimd\n", True),
    ],
)
def test_which_cpus_add_in_32_bits(monkeypatch: pytest.MonkeyPatch, machine: str, text: str, expected: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    monkeypatch.setattr("platform.machine", lambda: machine)
    cpu.flags.cache_clear()
    try:
        assert cpu.adds_in_32_bits() == expected
    finally:
        cpu.flags.cache_clear()


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    cpu.flags.cache_clear()
    assert cpu.flags() == frozenset()
    cpu.flags.cache_clear()
