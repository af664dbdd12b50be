"""The web UI's grammar of prompts: weights in brackets, and BREAK for a new chunk.

| written | means |
|---|---|
| ``(text)`` | weight 1.1 |
| ``(text:1.3)`` | weight 1.3 |
| ``[text]`` | weight 1 / 1.1 |
| ``\\(``, ``\\)``, ``\\[``, ``\\]``, ``\\\\`` | the character itself |
| ``BREAK`` | what follows starts a new chunk of tokens |

Weights multiply where brackets are nested. A bracket that is never closed holds to the end, one that was never opened
is text. What changes the prompt from step to step (``[a:b:0.5]``, ``[a|b]``) or combines predictions (``AND``) is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from controlrt.runtime.errors import PromptError

Syntax = Literal["plain", "webui"]
SYNTAXES: tuple[Syntax, ...] = ("plain", "webui")
ROUND, SQUARE = 1.1, 1 / 1.1

_LEXEMES = re.compile(
    r"""
    (?P<escape>\\[()\[\]\\])
    | (?P<weight>:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\))
    | (?P<bracket>[()\[\]])
    | (?P<text>[^\\()\[\]:]+ | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_BREAK = re.compile(r"(?:(?<!\s)\s+)?\bBREAK\b\s*")
_EDITED = re.compile(r":\s*(?:\d+\.?\d*|\.\d+)\s*\]")


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt."""

    text: str
    weight: float = 1.0
    starts_chunk: bool = False


def parse_prompt(prompt: str, syntax: Syntax) -> list[Segment]:
    """The pieces of ``prompt``; the whole of it where the syntax is plain.

    Raises:
        PromptError: prompt editing, alternation or AND.
    """
    if syntax == "plain":
        return [Segment(prompt)]
    if re.search(r"\bAND\b", prompt):
        raise PromptError(
            f"AND in {prompt!r} combines prompts, which is not supported; write and, or take --prompt-syntax plain"
        )
    pieces: list[Segment] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    order: list[str] = []

    def close(bracket: str, weight: float) -> None:
        first = opened[bracket].pop()
        order.reverse()
        order.remove(bracket)
        order.reverse()
        pieces[first:] = [Segment(each.text, each.weight * weight, each.starts_chunk) for each in pieces[first:]]

    for match in _LEXEMES.finditer(prompt):
        kind, lexeme = match.lastgroup, match.group()
        if order and order[-1] == "[" and (lexeme == "|" or "|" in lexeme or _EDITED.match(prompt, match.start())):
            raise PromptError(
                f"[...{prompt[match.start() :][:20]} in {prompt!r} changes the prompt from step to step, which is not "
                r"supported; write \[ for a bracket, or take --prompt-syntax plain"
            )
        if kind == "escape":
            pieces.append(Segment(lexeme[1]))
        elif lexeme in opened:
            opened[lexeme].append(len(pieces))
            order.append(lexeme)
        elif kind == "weight" and opened["("]:
            close("(", float(lexeme[1:-1]))
        elif lexeme == ")" and opened["("]:
            close("(", ROUND)
        elif lexeme == "]" and opened["["]:
            close("[", SQUARE)
        else:
            pieces += _broken(lexeme)
    for bracket, weight in (("(", ROUND), ("[", SQUARE)):
        while opened[bracket]:
            close(bracket, weight)
    return _merged(pieces) or [Segment("")]


def _broken(text: str) -> list[Segment]:
    """``text`` cut at every BREAK."""
    first, *others = _BREAK.split(text)
    return [Segment(first), *(Segment(each, starts_chunk=True) for each in others)]


def _merged(pieces: Iterable[Segment]) -> list[Segment]:
    """Neighbours of one weight as one; empty ones are left out, unless a chunk starts there."""
    found: list[Segment] = []
    for each in pieces:
        if found and each.weight == found[-1].weight and not each.starts_chunk:
            found[-1] = Segment(found[-1].text + each.text, each.weight, found[-1].starts_chunk)
        elif each.text or each.starts_chunk:
            found.append(each)
    return found
