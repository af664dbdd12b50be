"""Reads pages as a browser does, for tests of what is on them."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

HOSTILE = "\"'><script>alert(1)</script>&amp;"
"""A text that tries to break out of a page."""
_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Counts elements, and fails on one that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
