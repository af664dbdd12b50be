"""A result of the server scenario for the terminal."""

from __future__ import annotations

from functools import singledispatch

from controlrt.perf.server.results import (
    Capacity,
    Mixed,
    Overhead,
    Overload,
    ServerReport,
    Shutdown,
    Soak,
)
from controlrt.perf.statistics import Interval, Ratio
from controlrt.perf.text_table import aligned


def header(report: ServerReport) -> str:
    """Bundle and machine in two lines."""
    setting, machine = report.setting, report.machine
    code = "no commit" if report.commit is None else report.commit.hash[:12] + "+dirty" * report.commit.dirty
    return (
        f"{setting.bundle} ({setting.backend}, {setting.precision}): {setting.width}x{setting.height}, "
        f"{'/'.join(map(str, setting.steps))} steps, {setting.control}; policy {setting.policy} beside "
        f"{setting.baseline}, {setting.threads} threads\n"
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, load {machine.load_average}; "
        f"{code}" + "".join(f"\n{gpu}" for gpu in machine.gpus)
    )


@singledispatch
def table(part: object) -> str:
    """One part of a report."""
    raise TypeError(f"no table for {type(part).__name__}")


@table.register
def _capacity(part: Capacity) -> str:
    rates = ", ".join(f"{policy} {rate:.3f}" for policy, rate in part.requests_per_second.items())
    return f"capacity, {part.clients} clients in a closed loop: {rates} requests/s; ratio {part.ratio:.3f}"


@table.register
def _mixed(part: Mixed) -> str:
    rows = [["steps", "requests", "", "p50", "p90", "p99"]]
    for each in part.by_steps:
        ours, theirs = each.latency, each.baseline_latency
        rows.append([str(each.steps), str(each.requests), "policy", *map(_interval, (ours.p50, ours.p90, ours.p99))])
        rows.append(["", "", "baseline", *map(_interval, (theirs.p50, theirs.p90, theirs.p99))])
        rows.append(["", "", "times better", *map(_interval, (each.p50_ratio, each.p90_ratio, each.p99_ratio))])
    return "\n".join(
        [
            f"mixed load, Poisson arrivals at {part.load:.0%} of the capacity ({part.rate:.3f} requests/s):",
            "",
            *aligned(rows, left=(2,)),
            "",
            f"throughput {part.throughput:.3f} requests/s, the baseline's {part.baseline_throughput:.3f}, ratio "
            f"{part.throughput_ratio:.3f}; {part.failed} without a picture; seconds from arrival to answer, 95% "
            "intervals",
        ]
    )


@table.register
def _overhead(part: Overhead) -> str:
    rows = [["steps", "answer", "overhead ms", "transport", "before steps", "steps", "decode"]]
    for each in part.calls:
        split = (each.split.transport, each.split.before, each.split.steps, each.split.decode)
        rows.append(
            [
                str(each.steps),
                each.encoding,
                _interval(each.overhead, 1000),
                *(f"{1000 * value:.2f}" for value in split),
            ]
        )
    return "\n".join(["overhead of a request over a call of the pipeline, medians:", "", *aligned(rows, left=())])


@table.register
def _overload(part: Overload) -> str:
    rejection = "none" if part.rejection_p99 is None else f"{1000 * part.rejection_p99:.1f} ms"
    return (
        f"overload, {part.load:g} times the capacity ({part.rate:.3f} requests/s), queue {part.queue}, deadline "
        f"{part.deadline:.1f} s:\n"
        f"goodput {part.goodput:.3f} requests/s, {part.goodput / part.capacity:.2f} of the capacity, in steps "
        f"{part.steps_goodput:.2f} of it; {part.done} drawn, {part.rejected} rejected (p99 {rejection}), "
        f"{part.expired} out of time, {part.failed} lost"
    )


@table.register
def _soak(part: Soak) -> str:
    lines = [f"soak, {part.requests} requests by {part.clients} clients in {part.seconds:.0f} s:"]
    for kind, ends in part.outcomes.items():
        lines.append(f"  {kind}: {', '.join(f'{count} {end}' for end, count in ends.items())}")
    lowest = "none" if part.lowest_psnr_db is None else f"{part.lowest_psnr_db:.1f} dB"
    lines.append(
        f"{len(part.lost)} lost, {part.left_over} left over, {len(part.mixed_up)} of {part.compared} pictures mixed up "
        f"(lowest PSNR {lowest}, between pictures at most {part.between_psnr_db:.1f} dB); "
        f"memory {part.memory()}"
    )
    return "\n".join([*lines, *part.lost[:_SHOWN], *part.mixed_up[:_SHOWN]])


@table.register
def _shutdown(part: Shutdown) -> str:
    later = ", ".join(f"{count} times {status}" for status, count in part.later.items())
    return (
        f"SIGTERM with {part.accepted} requests under way: {part.answered} answered with pictures, exit code "
        f"{part.exit_code} after {part.seconds:.1f} s; later requests: {later}"
    )


_SHOWN = 10


def _interval(found: Interval | Ratio, unit: float = 1) -> str:
    return f"{unit * found.value:.2f} [{unit * found.low:.2f}, {unit * found.high:.2f}]"
