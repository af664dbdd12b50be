"""The page of a result of ``controlrt bench server``."""

from __future__ import annotations

import html
from collections.abc import Sequence

from controlrt.perf.page import plots
from controlrt.perf.page.header import load_notice
from controlrt.perf.page.origin import run_facts
from controlrt.perf.page.quantities import readable_seconds, time_unit
from controlrt.perf.server.results import (
    Capacity,
    LatencyPercentiles,
    Mixed,
    Overhead,
    Overload,
    ServerReport,
    Shutdown,
    Soak,
)
from controlrt.perf.statistics import Interval, Ratio
from controlrt.runtime.errors import UserError
from controlrt.runtime.inspection.units import readable_bytes
from controlrt.runtime.page.frame import frame
from controlrt.runtime.page.markup import Cell, Section, fact_list, figure, heading, paragraph, table

_OURS, _THEIRS = "onnxruntime", "pytorch"
"""Colours of the style sheet."""


def server_document(report: ServerReport) -> str:
    """The page. Everything that comes from the result is escaped, and nothing in it points outside.

    Raises:
        UserError: a result without a part.
    """
    parts = [
        None if report.mixed is None else _mixed(report, report.mixed),
        None if report.capacity is None else _capacity(report.capacity),
        None if report.overhead is None else _overhead(report.overhead),
        None if report.overload is None else _overload(report.overload),
        None if report.soak is None else _soak(report.soak),
        None if report.shutdown is None else _shutdown(report.shutdown),
    ]
    found = [part for part in parts if part is not None]
    if not found:
        raise UserError("the result has no part in it: it was interrupted before the first one ended; measure again")
    sections = [*([_targets(report)] if report.targets() else []), *found, _origin(report)]
    title = f"controlrt bench server: {report.setting.bundle}, {report.created[:10]}"
    return frame(title, _header(report), sections)


def _header(report: ServerReport) -> str:
    setting, machine = report.setting, report.machine
    kicker = (
        f"controlrt bench server · {setting.bundle} · {setting.width}×{setting.height}, "
        f"{', '.join(map(str, setting.steps))} steps · {', '.join(machine.gpus) or machine.cpu}, {setting.threads} "
        f"threads · {report.created[:10]}"
    )
    notices = [
        *([] if report.complete else ["The benchmark was interrupted: parts are missing that were asked for."]),
        *([] if (load := load_notice(machine)) is None else [load]),
        *(["The code differed from its commit."] if report.commit is not None and report.commit.dirty else []),
    ]
    notes = "".join(f'<p class="notice" role="note">{html.escape(text)}</p>' for text in notices)
    return f'<header><p class="kicker">{html.escape(kicker)}</p>{_headline(report)}{notes}</header>'


def _headline(report: ServerReport) -> str:
    if report.mixed is None:
        return "<h1>A server under load</h1>"
    shortest = min(report.mixed.by_steps, key=lambda each: each.steps)
    ratio, setting = shortest.p99_ratio, report.setting
    lead = (
        f"The 99th percentile of {shortest.steps}-step requests, policy {setting.policy} against {setting.baseline}: "
        f"{ratio.low:.2f} to {ratio.high:.2f} times with 95% confidence, the same requests at the same moments, at "
        f"{report.mixed.load:.0%} of the capacity; throughput is {report.mixed.throughput_ratio:.2f} times the other's."
    )
    return (
        f"<h1><strong>{ratio.value:.2f}×</strong> shorter waits for short requests</h1>"
        f'<p class="lead">{html.escape(lead)}</p>'
    )


def _targets(report: ServerReport) -> Section:
    rows: list[list[Cell]] = [
        [
            target.name,
            f"{target.found:.4g}",
            f"{'at most' if target.at_most else 'at least'} {target.bound:g}",
            "met" if target.is_met else ("missed", "words bad"),
        ]
        for target in report.targets()
    ]
    return Section(name="targets", heading="Targets", markup=table("Targets", ["", "found", "asked", ""], rows))


def _mixed(report: ServerReport, part: Mixed) -> Section:
    setting = report.setting
    text = (
        f"Requests of a Poisson process, {part.rate:.3f} a second; seconds from the moment at which one was due to the "
        "end of its answer. Every dot is a request. Marks, and numbers on the right: median, 90th and 99th percentile."
    )
    longest = max(request.latency for block in part.blocks for request in block.requests)
    factor, unit = time_unit(longest)
    rows, numbers = [], []
    for each in part.by_steps:
        for policy, kind, found in (
            (setting.policy, _OURS, each.latency),
            (setting.baseline, _THEIRS, each.baseline_latency),
        ):
            rows.append(_strip(part, each.steps, policy, kind, found, factor))
            numbers.append([f"{each.steps} steps, {policy}", *map(_interval, (found.p50, found.p90, found.p99))])
        ratios = (each.p50_ratio, each.p90_ratio, each.p99_ratio)
        numbers.append([f"{each.steps} steps, times better", *map(_interval, ratios)])
    plot = plots.strips("Latency by number of steps", f"latency, {unit} (less is better)", rows)
    caption = f"seconds, 95% intervals; throughput {part.throughput:.3f} and {part.baseline_throughput:.3f} a second"
    return Section(
        name="mixed",
        heading="Latency under a mixed load",
        markup=paragraph(text) + figure(plot) + table(caption, ["", "p50", "p90", "p99"], numbers),
    )


def _strip(part: Mixed, steps: int, policy: str, kind: str, found: LatencyPercentiles, factor: float) -> plots.StripRow:
    samples = [
        request.latency * factor
        for block in part.blocks
        if block.policy == policy
        for request in block.requests
        if request.steps == steps
    ]
    marks = {"p50": found.p50.value, "p90": found.p90.value, "p99": found.p99.value}
    return plots.StripRow(
        label=f"{steps} steps, {policy}",
        kind=kind,
        samples=tuple(samples),
        marks={name: value * factor for name, value in marks.items()},
        text=" / ".join(map(readable_seconds, marks.values())),
    )


def _capacity(part: Capacity) -> Section:
    rows: list[list[Cell]] = [[policy, f"{rate:.3f}"] for policy, rate in part.requests_per_second.items()]
    caption = f"requests per second, {part.clients} clients in a closed loop; ratio {part.ratio:.3f}"
    return Section(name="capacity", heading="Capacity", markup=table(caption, ["", "requests/s"], rows))


def _overhead(part: Overhead) -> Section:
    rows: list[list[Cell]] = []
    for each in part.calls:
        split = (each.split.transport, each.split.before, each.split.steps, each.split.decode)
        whole = each.overhead
        interval = f"{1000 * whole.value:.2f} [{1000 * whole.low:.2f}, {1000 * whole.high:.2f}]"
        rows.append([f"{each.steps} steps, {each.encoding}", interval, *(f"{1000 * seconds:.2f}" for seconds in split)])
    head = ["", "overhead", "transport", "before the first step", "steps", "decoding"]
    text = "What a request takes more than the same call of the pipeline, medians in milliseconds, and where."
    return Section(
        name="overhead",
        heading="What the server costs a request",
        markup=paragraph(text) + table("overhead, ms", head, rows),
    )


def _overload(part: Overload) -> Section:
    rejection = "none" if part.rejection_p99 is None else readable_seconds(part.rejection_p99)
    found = [
        ("arrivals", f"{part.rate:.3f} a second, {part.load:g} times the capacity"),
        ("queue", f"{part.queue} requests, each with a deadline of {part.deadline:.1f} s"),
        ("goodput", f"{part.goodput:.3f} a second, {part.goodput / part.capacity:.2f} of the capacity"),
        ("in steps", f"{part.steps_goodput:.2f} of the capacity"),
        ("answers", f"{part.done} drawn, {part.rejected} rejected, {part.expired} out of time, {part.failed} lost"),
        ("until a rejection, p99", rejection),
    ]
    return Section(name="overload", heading="Overload", markup=fact_list(found))


def _soak(part: Soak) -> Section:
    rows: list[list[Cell]] = [
        [kind, ", ".join(f"{count} {end}" for end, count in ends.items())] for kind, ends in part.outcomes.items()
    ]
    lowest = "none" if part.lowest_psnr_db is None else f"{part.lowest_psnr_db:.1f} dB"
    found = [
        ("requests", f"{part.requests} by {part.clients} clients in {part.seconds:.0f} s"),
        ("lost", f"{len(part.lost)}, and {part.left_over} left over"),
        ("mixed up", f"{len(part.mixed_up)} of {part.compared} pictures; lowest PSNR {lowest}"),
        ("memory", part.memory()),
        *(("lost", line) for line in part.lost),
        *(("mixed up", line) for line in part.mixed_up),
    ]
    return Section(
        name="soak", heading="Soak", markup=fact_list(found) + table("how they ended", ["", ""], rows) + _memory(part)
    )


def _memory(part: Soak) -> str:
    if len(part.resident) < 2:
        return ""
    points = tuple((each.seconds, each.resident_bytes / 2**20) for each in part.resident)
    line = plots.Line(label=readable_bytes(part.resident[-1].resident_bytes), kind=_OURS, points=points)
    return heading("Memory") + figure(plots.lines("Memory", ("seconds", "MiB of server and workers"), [line]))


def _shutdown(part: Shutdown) -> Section:
    found = [
        ("under way at SIGTERM", f"{part.accepted}, of which {part.answered} were answered with pictures"),
        ("exit code", f"{part.exit_code} after {part.seconds:.1f} s"),
        ("later requests", ", ".join(f"{count} times {status}" for status, count in part.later.items())),
    ]
    return Section(name="shutdown", heading="SIGTERM under load", markup=fact_list(found))


def _origin(report: ServerReport) -> Section:
    setting = report.setting
    found: Sequence[tuple[str, str]] = [
        *run_facts(report.command, report.created, report.commit, report.machine, report.versions),
        ("bundle", f"{setting.bundle}, {setting.backend}, {setting.precision}"),
        ("requests", f"{setting.width}×{setting.height}, {setting.control}, seed {setting.seed}"),
        ("pictures at a step", "the server's default" if setting.batch is None else f"at most {setting.batch}"),
    ]
    return Section(name="origin", heading="Machine and command", markup=fact_list(found))


def _interval(found: Interval | Ratio) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
