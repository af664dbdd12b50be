"""Judge a result of controlrt bench against an older one: what became faster, slower or wrong."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from controlrt.perf.comparison import THRESHOLD, Change, Comparison, compare_reports
from controlrt.perf.results import load
from controlrt.perf.statistics import CONFIDENCE
from controlrt.perf.text_table import aligned
from controlrt.runtime.errors import ParameterError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("old", type=Path, metavar="OLD.json", help="the result to compare with")
    parser.add_argument("new", type=Path, metavar="NEW.json", help="the result to judge")
    parser.add_argument(
        "--threshold",
        default=f"{THRESHOLD:.0%}",
        metavar="PERCENT",
        help=f"changes up to this count for nothing ({THRESHOLD:.0%})".replace("%", "%%"),
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the table and returns 1 where something became slower or does not run rightly any more."""
    threshold = parse_threshold(arguments.threshold)
    comparison = compare_reports(load(arguments.old), load(arguments.new), threshold)
    for warning in comparison.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(table(comparison))
    for change in comparison.regressions:
        print(f"error: {_complaint(change)}", file=sys.stderr)
    return 1 if comparison.regressions else 0


def parse_threshold(text: str) -> float:
    """``3%`` as 0.03.

    Raises:
        ParameterError: anything but a percentage from 0 to 100.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if found is None or float(found[1]) > 100:
        raise ParameterError("--threshold", text, "a percentage from 0% to 100%, such as 3%")
    return float(found[1]) / 100


def table(comparison: Comparison) -> str:
    """The comparison as text."""
    rows = [["scenario", "contender", "old s", "new s", "new/old", "interval", "verdict", ""]]
    for change in comparison.changes:
        ratio = change.ratio
        rows.append(
            [
                change.scenario,
                change.contender,
                _seconds(change.old_seconds),
                _seconds(change.new_seconds),
                "-" if ratio is None else f"{ratio.value:.3f}",
                "-" if ratio is None else f"[{ratio.low:.3f}, {ratio.high:.3f}]",
                change.outcome,
                change.note,
            ]
        )
    units = {change.scenario: change.yardstick for change in comparison.changes if change.yardstick is not None}
    return "\n".join(
        [
            *aligned(rows, left=(0, 1, 6, 7)),
            "",
            *(f"{name}: new/old is in units of {unit} beside it, not seconds" for name, unit in units.items()),
            f"seconds of a call, medians; a change of up to {100 * comparison.threshold:.3g}% counts for nothing; each "
            f"interval holds with {100 * comparison.confidence:.4g}%, all of them at once with {100 * CONFIDENCE:.0f}%",
        ]
    )


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.4g}"


def _complaint(change: Change) -> str:
    where = f"{change.scenario}: {change.contender}"
    if change.ratio is None:
        return f"{where} ran rightly before and does no more: {change.note}"
    units = "" if change.yardstick is None else f", in units of {change.yardstick}"
    return f"{where} takes {change.ratio.value:.3f} times as long as before{units}"
