"""A scenario as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from controlrt.perf.results import Contender, Measurement, Report, Scenario, StagePercentiles
from controlrt.perf.statistics import Ratio
from controlrt.perf.text_table import aligned

COMPILED = "x compile"


def header(report: Report) -> str:
    """Model and machine in two lines."""
    machine = report.machine
    commit = "no commit" if report.commit is None else report.commit.hash[:12] + "+dirty" * report.commit.dirty
    ceilings = ", ".join(f"{each.dtype} {each.flops_per_second / 1e9:.0f} GFLOP/s" for each in report.ceilings)
    return (
        f"{report.model.name}, profile {report.model.profile}\n"
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, load {machine.load_average}; "
        f"matrix products: {ceilings}; {commit}" + "".join(f"\n{gpu}" for gpu in machine.gpus)
    )


def table(scenario: Scenario) -> str:
    """Every contender, those that failed with their reasons below."""
    setting = scenario.setting
    steps = "+".join(map(str, setting.steps))
    run = f"{setting.rounds} rounds, {setting.threads} threads"
    if setting.one_at_a_time:
        run += ", each loaded anew in every round"
    columns = [column for column in _COLUMNS if scenario.compiled is not None or column[0] != COMPILED]
    rows = [[title for title, _ in columns]]
    rows += [[show(each) for _, show in columns] for each in scenario.contenders]
    lines = [
        f"{scenario.name}: {setting.width}x{setting.height}, batch {setting.batch}, {steps} steps of "
        f"{setting.sampler}, {', '.join(setting.controls)}; {run}",
        "",
        *aligned(rows),
        *(f"{each.status}: {each.name}: {each.reason}" for each in scenario.failed),
        "",
        f"seconds of whole calls; x eager: how many times faster than {scenario.eager or 'eager, which did not run'}, "
        "medians with 95% intervals; PSNR against eager in float32",
        *([] if scenario.compiled is None else [f"{COMPILED}: how many times faster than {scenario.compiled}"]),
    ]
    return "\n".join(lines)


def _of(show: Callable[[Measurement], str]) -> Callable[[Contender], str]:
    return lambda contender: "-" if contender.measurement is None else show(contender.measurement)


def _interval(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _seconds(seconds: float) -> str:
    """Milliseconds to a digit, and less where that is most of it."""
    return f"{seconds:.3f}" if seconds >= 0.1 or seconds == 0 else f"{seconds:.5f}"


def _host(found: StagePercentiles) -> str:
    """Milliseconds of a whole call."""
    return "-" if found.host is None else f"{1000 * found.host.p50:.2f}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def _rate(measured: Measurement) -> str:
    return "-" if measured.flops_per_second is None else f"{measured.flops_per_second / 1e9:.0f}"


_COLUMNS: tuple[tuple[str, Callable[[Contender], str]], ...] = (
    ("contender", lambda contender: contender.name),
    ("status", lambda contender: contender.status),
    ("p50", _of(lambda found: _seconds(found.percentiles.picture.p50))),
    ("p90", _of(lambda found: _seconds(found.percentiles.picture.p90))),
    ("p99", _of(lambda found: _seconds(found.percentiles.picture.p99))),
    ("p99/p50", _of(lambda found: f"{found.percentiles.picture.spread:.3f}")),
    ("x eager", _of(lambda found: _interval(found.speedup_over_eager))),
    (COMPILED, _of(lambda found: _interval(found.speedup_over_compiled))),
    ("pictures/s", _of(lambda found: f"{found.pictures_per_second:.3f}")),
    ("text", _of(lambda found: _seconds(found.percentiles.text.p50))),
    ("hint", _of(lambda found: _seconds(found.percentiles.hint.p50))),
    ("step", _of(lambda found: _seconds(found.percentiles.step.p50))),
    ("host ms", _of(lambda found: _host(found.percentiles))),
    ("decode", _of(lambda found: _seconds(found.percentiles.decode.p50))),
    ("first", _of(lambda found: f"{found.first_request_seconds:.2f}")),
    ("cold", _of(lambda found: f"{found.cold_start_seconds:.1f}")),
    ("peak MiB", _of(lambda found: f"{found.memory.peak_host_bytes / 2**20:.0f}")),
    ("GPU MiB", _of(lambda found: _mebibytes(found.memory.peak_device_bytes))),
    ("GFLOP/s", _of(_rate)),
    ("PSNR dB", _of(lambda found: "-" if found.parity is None else f"{found.parity.psnr_db:.1f}")),
)
