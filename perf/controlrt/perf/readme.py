"""Puts measured numbers where people read them: a table of every result that a Markdown file asks for.

    python -m controlrt.perf.readme README.md

fills what stands between ``<!-- bench RESULT.json -->`` and ``<!-- end bench -->`` with a table made of that file,
which is named as seen from the Markdown file. A test checks that README.md is what this makes of it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from controlrt.perf.results import Contender, Report, Scenario, load
from controlrt.runtime.storage import atomic_file

_PLACE = re.compile(r"(<!-- bench (?P<file>\S+) -->\n).*?(<!-- end bench -->)", re.DOTALL)


def main() -> None:
    """Rewrites the files on the command line."""
    for name in sys.argv[1:]:
        file = Path(name)
        filled = fill(file.read_text(), file.parent)
        with atomic_file(file) as partial:
            partial.write_text(filled)


def fill(text: str, directory: Path) -> str:
    """``text`` with its tables made anew.

    Args:
        text: Markdown.
        directory: that results are named from.

    Raises:
        UserError: a result that is missing or none.
    """
    return _PLACE.sub(lambda found: f"{found[1]}{markdown(load(directory / found['file']))}{found[3]}", text)


def markdown(report: Report) -> str:
    """A result as Markdown: how it came about, and one table for every scenario."""
    machine = report.machine
    lines = [f"`{report.command}` on {machine.cpu}, {machine.cores} cores; {_versions(report)}:", ""]
    for scenario in report.scenarios:
        lines += [*_table(scenario), ""]
    return "\n".join(lines)


def _table(scenario: Scenario) -> list[str]:
    setting = scenario.setting
    steps = " and ".join(map(str, setting.steps))
    title = f"{scenario.name}, {setting.width}x{setting.height}, {steps} steps"
    rows = [
        f"| {title} | seconds | step | times as fast as {scenario.eager or 'eager'} | peak memory | PSNR |",
        "|---|---|---|---|---|---|",
    ]
    return rows + [_row(each) for each in scenario.contenders]


def _row(contender: Contender) -> str:
    measured = contender.measurement
    if measured is None or contender.status != "ok":
        return f"| {contender.name} | {contender.status}: {contender.reason} | | | | |"
    ratio, found = measured.speedup_over_eager, measured.parity
    faster = "" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    cells = [
        contender.name,
        f"{measured.percentiles.picture.p50:.2f}",
        f"{measured.percentiles.step.p50:.3f}",
        faster,
        f"{measured.memory.peak_host_bytes / 2**20:.0f} MiB",
        "" if found is None else f"{found.psnr_db:.0f} dB",
    ]
    return f"| {' | '.join(cells)} |"


def _versions(report: Report) -> str:
    shown = {"torch": "PyTorch", "diffusers": "diffusers", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    return ", ".join(f"{title} {report.versions[name]}" for name, title in shown.items() if name in report.versions)


if __name__ == "__main__":
    main()
