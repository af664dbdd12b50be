"""What every page stands in."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Sequence

from controlrt.runtime.page.markup import Section

STYLE = "style.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Browsers that open the page fetch nothing for it."""


def frame(title: str, top: str, parts: Sequence[Section]) -> str:
    """A page of sections.

    Args:
        title: text.
        top: markup of its header.
        parts: of it.
    """
    style = (importlib.resources.files(__package__) / STYLE).read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{each.name}">{html.escape(each.heading)}</a></li>' for each in parts)
    body = "\n".join(
        f'<section id="{each.name}" aria-labelledby="{each.name}-heading">'
        f'<h2 id="{each.name}-heading">{html.escape(each.heading)}</h2>{each.markup}</section>'
        for each in parts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the plots</a>
{top}
<main id="content">
<nav aria-label="Sections"><ul>{links}</ul></nav>
{body}
</main>
</body>
</html>
"""
