"""What sections of a page are made of."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

from controlrt.perf.machine import Commit, Machine
from controlrt.runtime.inspection.units import readable_bytes


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    """Its anchor."""
    heading: str
    markup: str


def run_facts(
    command: str, created: str, commit: Commit | None, machine: Machine, versions: dict[str, str]
) -> list[tuple[str, str]]:
    """How a result came about."""
    memory, cores = readable_bytes(machine.memory_bytes), machine.cores
    clock = "" if machine.clock_mhz is None else f", {machine.clock_mhz:.0f} MHz"
    governor = "" if machine.governor is None else f", governor {machine.governor}"
    return [
        ("command", command),
        ("measured", created),
        ("commit", "none" if commit is None else commit.hash + ", with changes" * commit.dirty),
        ("processor", f"{machine.cpu}, {cores} cores{clock}{governor}; {' '.join(machine.isa)}".rstrip("; ")),
        *(("GPU", gpu) for gpu in machine.gpus),
        ("memory", memory),
        ("system", f"{machine.os}, Python {machine.python}, load {machine.load_average} before the start"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def fact_list(facts: Iterable[tuple[str, str]]) -> str:
    """Named texts under each other; a command stands as code."""
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{_code(value) if name == 'command' else html.escape(value)}</dd>"
        for name, value in facts
    )
    return f'<dl class="facts">{rows}</dl>'


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def figure(plot: str) -> str:
    """A plot, which scrolls by itself where it is too wide."""
    return f'<figure tabindex="0">{plot}</figure>'


def heading(text: str) -> str:
    """Of a part of a section."""
    return f"<h3>{html.escape(text)}</h3>"


def paragraph(text: str) -> str:
    """Of text, which is escaped."""
    return f"<p>{html.escape(text)}</p>"
