"""The page as a whole."""

from __future__ import annotations

from controlrt.perf.page.header import header
from controlrt.perf.page.sections import sections
from controlrt.perf.report import AblationReport
from controlrt.perf.results import Report
from controlrt.runtime.errors import UserError
from controlrt.runtime.page.frame import frame


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
