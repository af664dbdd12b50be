"""What CPUs say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controlrt.runtime import cpu


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has the system say this of its CPU."""

    def say(text: str) -> None:
        monkeypatch.setattr(Path, "read_text", lambda _: text)
        cpu.flags.cache_clear()

    yield say
    cpu.flags.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags : avx512f avx512_vnni avx512_bf16\n", True),
        ("flags : avx512f amx_bf16\n", True),
        ("flags : avx512f avx512_vnni\n", False),
        ("", False),
    ],
)
def test_which_cpus_multiply_bfloat16(says: Callable[[str], None], text: str, expected: bool) -> None:
    says(text)
    assert cpu.multiplies_bfloat16() == expected


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
def test_which_cpus_add_in_32_bits(
    monkeypatch: pytest.MonkeyPatch, says: Callable[[str], None], machine: str, text: str, expected: bool
) -> None:
    says(text)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert cpu.adds_in_32_bits() == expected


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    cpu.flags.cache_clear()
    assert cpu.flags() == frozenset()
    cpu.flags.cache_clear()
