"""The page as a whole."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Sequence

from controlrt.perf.page.header import header
from controlrt.perf.page.markup import Section
from controlrt.perf.page.sections import sections
from controlrt.perf.report import AblationReport
from controlrt.perf.results import Report
from controlrt.runtime.errors import UserError

STYLE = "style.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Browsers that open the page fetch nothing for it."""


def document(report: Report, ablation: AblationReport | None = None) -> str:
    """The page. Everything that comes from the results is escaped, and nothing in it points outside.

    Raises:
        UserError: a result without a scenario.
    """
    if not report.scenarios:
        raise UserError(
            "the result has no scenario in it: it was interrupted before the first one ended; measure again"
        )
    title = f"controlrt bench: {report.model.name}, {report.created[:10]}"
    return frame(title, header(report), sections(report, ablation))


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
