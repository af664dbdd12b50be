"""What sections of a page are made of."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NOTHING = "–"
"""In a cell."""
Cell = str | tuple[str, str]
"""Text, or text and the class of its cell."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    """Its anchor."""
    heading: str
    markup: str


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


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], links: Sequence[str] = ()) -> str:
    """A table that scrolls by itself where it is too wide, also with the keyboard.

    Args:
        caption: over it.
        head: of its columns.
        rows: of cells; the first of a row names it.
        links: anchors that the names lead to, if any.
    """
    top = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    body = "".join(
        f'<tr><th scope="row">{_name(row[0], link)}</th>{"".join(_cell(cell) for cell in row[1:])}</tr>'
        for row, link in zip(rows, links or [""] * len(rows), strict=True)
    )
    name = html.escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _name(cell: Cell, link: str) -> str:
    text = html.escape(cell if isinstance(cell, str) else cell[0])
    return f'<a href="#{html.escape(link)}">{text}</a>' if link else text


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    return f'<td class="{html.escape(cell[1])}">{html.escape(cell[0])}</td>'
