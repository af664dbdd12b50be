"""The builder's log condensed: what a person must know of it, once."""

from __future__ import annotations

import re

TAIL_LINES = 8
_LINE = re.compile(r"^(?:\[[^\]]*\] )*\[(?P<severity>[A-Z])\] ?(?P<text>.*)")
_HARMLESS = (
    "Int64 binding",  # token ids, rows: the runtime binds them so
    "TF32 is disabled",
    "weights are affected by this issue",
    "subnormal",
    "timing cache",
    "Multi stream is disabled",
    "'colored' module",
)


def warnings_of(log: str) -> list[str]:
    """Warnings that matter, each once, in order; errors of a build that ended well are among them."""
    found = []
    for line in log.splitlines():
        match = _LINE.match(_plain(line))
        if match and match["severity"] in "WE" and not any(known in match["text"] for known in _HARMLESS):
            found.append(match["text"].strip())
    return list(dict.fromkeys(filter(None, found)))


def tail(log: str) -> str:
    """The last lines, without what was said before in the same words."""
    lines = [_plain(line).rstrip() for line in log.splitlines()]
    return "\n".join(list(dict.fromkeys(filter(None, lines)))[-TAIL_LINES:])


def _plain(line: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line)
