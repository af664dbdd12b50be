"""A result of ``controlrt bench changes`` for the terminal."""

from __future__ import annotations

import statistics

from controlrt.perf.changes.meter import STAGES
from controlrt.perf.changes.results import Change, ChangesReport, SecondControl
from controlrt.perf.statistics import Ratio
from controlrt.perf.text_table import aligned


def table(report: ChangesReport) -> str:
    """All of it, but for the verdicts."""
    setting, machine = report.setting, report.machine
    code = "no commit" if report.commit is None else report.commit.hash[:12] + "+dirty" * report.commit.dirty
    rows = [["changed", "host", "adds", *STAGES, "networks", "step"], *map(_row, report.changes)]
    return "\n".join(
        [
            f"{setting.bundle} ({setting.backend}, {setting.precision}): {setting.width}x{setting.height}, "
            f"{setting.steps} steps, {setting.rounds} rounds, {setting.threads} threads",
            f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, load "
            f"{machine.load_average}; {code}" + "".join(f"\n{gpu}" for gpu in machine.gpus),
            "",
            *aligned(rows),
            "",
            "milliseconds, medians; host: the call but for its networks, in parts from check to noise;",
            "adds: over the calls of its round with nothing changed, 95% intervals; networks: programs before the loop",
            "",
            "one ControlNet: there is no second one to measure" if report.second is None else _second(report.second),
        ]
    )


def _row(change: Change) -> list[str]:
    added = change.added
    return [
        change.name,
        _ms(statistics.median(change.host_seconds)),
        "" if added is None else f"{_ms(added.value)} [{_ms(added.low)}, {_ms(added.high)}]",
        *(_ms(change.stages[stage]) for stage in STAGES),
        _ms(change.network_seconds),
        _ms(change.step_seconds),
    ]


def _second(part: SecondControl) -> str:
    names = {"none": "none", "first": part.first, "second": part.second, "both": "both"}
    steps = ", ".join(f"{name} {_ms(statistics.median(part.step_seconds[kind]))}" for kind, name in names.items())
    lines = [
        f"a step with ControlNets, ms: {steps}",
        f"both add {_ratio(part.ratio)} of what {part.first} and {part.second} add alone",
    ]
    if part.own_seconds is not None and part.over_own is not None:
        own = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in part.own_seconds.items())
        lines.append(f"and {_ratio(part.over_own)} of what their programs take themselves: {own} ms")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def _ratio(found: Ratio) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
