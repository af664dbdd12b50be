"""Results as plots."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from controlrt.perf.page import plots
from controlrt.perf.page.quantities import readable_seconds, time_unit
from controlrt.perf.ratios import Measured
from controlrt.perf.report import AblationReport, VariantResult
from controlrt.perf.results import Contender, Measurement, Scenario

STAGES = ("text", "hint", "timestep table", "steps", "decode", "other")
KINDS = {
    "pytorch": "pytorch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "cuda": "cuda",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt",
}
"""Colours of the style sheet by runtime; others share one."""
WRONG = " (wrong picture)"
LONGEST_LABEL = 30
"""Characters that a plot has room for; tables show names and reasons whole."""
LONGEST_REASON = 80
AXES = {
    "resolution": "width × height of the picture, pixels",
    "batch": "pictures per call",
    "steps": "denoising steps",
    "controls": "ControlNets",
}


def measured(scenario: Scenario) -> list[tuple[Contender, Measurement]]:
    """Contenders that ran, the fastest first; those whose picture is wrong after all others."""
    found = [(each, each.measurement) for each in scenario.contenders if each.measurement is not None]
    return sorted(found, key=lambda pair: (pair[0].status != "ok", pair[1].percentiles.picture.p50))


def speedups(scenario: Scenario) -> str:
    """How many times faster than eager each contender is, and why some are not there."""
    rows = []
    for contender, found in measured(scenario):
        ratio = found.speedup_over_eager
        if ratio is None:
            continue
        wrong = "" if contender.status == "ok" else WRONG
        interval = "" if wrong or contender.name == scenario.eager else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
        rows.append(
            plots.IntervalRow(
                label=_short(contender.name, LONGEST_LABEL),
                kind=_kind(contender),
                value=ratio.value,
                low=ratio.low,
                high=ratio.high,
                text=f"{ratio.value:.2f}×{wrong}{interval}",
                is_hollow=bool(wrong),
            )
        )
    rows += [
        plots.IntervalRow(
            label=_short(each.name, LONGEST_LABEL),
            kind=_kind(each),
            text=f"failed: {_short(each.reason, LONGEST_REASON)}",
        )
        for each in scenario.contenders
        if each.measurement is None
    ]
    return plots.intervals(
        f"Speed against {scenario.eager}, {scenario.name}",
        f"pictures in the time {scenario.eager} takes for one (more is better; 95% confidence)",
        rows,
        reference=1,
    )


def latencies(scenario: Scenario) -> str:
    """Every measured call of every contender."""
    pairs = measured(scenario)
    factor, unit = time_unit(max(max(found.samples.picture) for _, found in pairs))
    rows = []
    for contender, found in pairs:
        of = found.percentiles.picture
        marks = {name: getattr(of, name) * factor for name in ("p50", "p90", "p99")}
        samples = tuple(seconds * factor for seconds in found.samples.picture)
        text = " / ".join(map(readable_seconds, (of.p50, of.p90, of.p99)))
        rows.append(
            plots.StripRow(label=_label(contender), kind=_kind(contender), samples=samples, marks=marks, text=text)
        )
    return plots.strips(f"Latency of a call, {scenario.name}", f"time of a call, {unit} (less is better)", rows)


def stages(scenario: Scenario) -> str:
    """What a call's time goes into: means, because they add up."""
    pairs = measured(scenario)
    factor, unit = time_unit(max(sum(stage_means(found)) for _, found in pairs))
    rows = [
        plots.StackRow(
            label=_label(contender),
            parts=tuple(seconds * factor for seconds in stage_means(found)),
            text=readable_seconds(sum(stage_means(found))),
        )
        for contender, found in pairs
    ]
    return plots.stacks(f"Stages of a call, {scenario.name}", f"mean time of a call, {unit}", STAGES, rows)


def stage_means(found: Measurement) -> tuple[float, ...]:
    """Mean seconds of a call in each of :data:`STAGES`; the last is what is in none of the others."""
    samples, calls = found.samples, len(found.samples.picture)
    stages = (samples.text, samples.hint, samples.timestep_table, samples.step, samples.decode)
    parts = [sum(stage) / calls for stage in stages]
    return (*parts, max(0.0, sum(samples.picture) / calls - sum(parts)))


def parity(scenario: Scenario) -> str | None:
    """Likeness to eager's picture against speed; None where nothing was compared."""
    points = []
    asked: dict[float, list[str]] = {}
    for contender, found in measured(scenario):
        if found.parity is None or found.speedup_over_eager is None:
            continue
        precisions = asked.setdefault(found.parity.min_psnr_db, [])
        if contender.precision not in precisions:
            precisions.append(contender.precision)
        points.append(
            plots.Point(
                label=_label(contender),
                kind=_kind(contender),
                x=found.speedup_over_eager.value,
                y=found.parity.psnr_db,
                is_hollow=contender.status != "ok",
            )
        )
    if not points:
        return None
    return plots.scatter(
        f"Likeness of the picture against speed, {scenario.name}",
        (f"pictures in the time {scenario.eager} takes for one", "PSNR against eager's picture, dB"),
        points,
        {f"asked of {' and '.join(names)}: {least:g} dB": least for least, names in asked.items()},
        reference=(str(scenario.eager), 1),
    )


def latent_errors(scenario: Scenario) -> str | None:
    """How far the latents are from eager's after each step; None where nothing was compared."""
    lines: list[plots.Line] = []
    for contender, found in measured(scenario):
        errors = () if found.parity is None else found.parity.latent_errors
        points = tuple((float(step), error) for step, error in enumerate(errors, 1) if error > 0)
        if points:
            lines.append(_line(contender, points, lines))
    if not lines:
        return None
    axes = ("denoising step", "largest error of the latents / largest value")
    return plots.lines(f"Error of the latents, {scenario.name}", axes, lines, log_y=True)


def offline(scenarios: Sequence[Scenario]) -> str | None:
    """Throughput by batch; None for fewer than two batches."""
    if len({scenario.setting.batch for scenario in scenarios}) < 2:
        return None
    at = {float(scenario.setting.batch): scenario for scenario in scenarios}
    lines = _lines(at, lambda found: found.pictures_per_second)
    ticks = {batch: f"{batch:g}" for batch in at}
    return plots.lines("Throughput by batch", (AXES["batch"], "pictures per second"), lines, ticks=ticks)


def sweep(axis: str, scenarios: Sequence[Scenario]) -> str | None:
    """Time of a call along one axis; None for fewer than two points."""
    at = {scenario.value: scenario for scenario in scenarios if scenario.value is not None}
    if len(at) < 2:
        return None
    slowest = max(found.percentiles.picture.p50 for scenario in at.values() for _, found in measured(scenario))
    factor, unit = time_unit(slowest)
    lines = _lines(at, lambda found: found.percentiles.picture.p50 * factor)
    ticks = {
        value: f"{each.setting.width}×{each.setting.height}" if axis == "resolution" else f"{value:g}"
        for value, each in at.items()
    }
    return plots.lines(f"Time of a call by {axis}", (AXES[axis], f"median time of a call, {unit}"), lines, ticks=ticks)


def waterfalls(ablation: AblationReport) -> dict[str, str]:
    """What each pass takes off a step, by runtime; none for a runtime of which the plain export alone was measured.

    Variants may come from groups measured at different times, so their seconds are the reference's, divided by how many
    times faster each was beside it.
    """
    base = next(each.median_seconds for each in ablation.variants if each.name == ablation.reference)
    seconds = {each.name: base / each.speedup_over_plain.value for each in ablation.variants}
    return {
        runtime: _waterfall(runtime, chain, ablation, seconds)
        for runtime in dict.fromkeys(each.runtime for each in ablation.variants)
        if runtime != "pytorch" and len(chain := [each for each in ablation.variants if each.runtime == runtime]) > 1
    }


def _waterfall(
    runtime: str, chain: Sequence[VariantResult], ablation: AblationReport, seconds: dict[str, float]
) -> str:
    factor, unit = time_unit(max(seconds.values()))
    measured = _ablation_rounds(ablation)
    bars = []
    if ablation.eager is not None:
        bars.append(_whole(ablation.eager, seconds[ablation.eager], factor))
    bars.append(_whole(chain[0].name, seconds[chain[0].name], factor))
    for before, after in itertools.pairwise(chain):
        start, end = seconds[before.name], seconds[after.name]
        is_certain = measured.speedup(after.name, before.name).is_certain
        added = len([each for each in after.passes if each not in before.passes])
        wrong = "" if after.accuracy is None or after.accuracy.is_met else ", wrong output"
        bars.append(
            plots.Fall(
                label=after.name.removeprefix(f"{runtime}+") if added < 2 else f"{added} passes",
                kind="unsure" if not is_certain else "gain" if end <= start else "loss",
                start=start * factor,
                end=end * factor,
                text=f"{100 * (end / start - 1):+.1f}%".replace("-", "−") + " (noise)" * (not is_certain) + wrong,
            )
        )
    bars.append(_whole("all together", seconds[chain[-1].name], factor))
    title = f"What each pass takes off a step in {runtime}"
    return plots.waterfall(title, f"time of a guided step with one ControlNet, {unit} (less is better)", bars)


def _ablation_rounds(ablation: AblationReport) -> Measured:
    samples = {each.name: each.samples_seconds for each in ablation.variants}
    groups = [
        {name: samples[name] for name in group.variants if name in samples}
        | {ablation.reference: group.reference_samples_seconds}
        for group in ablation.groups
    ]
    return Measured(groups, ablation.reference)


def _whole(label: str, seconds: float, factor: float) -> plots.Fall:
    return plots.Fall(label=label, kind="whole", start=0, end=seconds * factor, text=readable_seconds(seconds))


def _lines(at: Mapping[float, Scenario], height: Callable[[Measurement], float]) -> list[plots.Line]:
    """One for each contender that drew right pictures somewhere, from the places where it did."""
    points: dict[str, list[tuple[float, float]]] = {}
    named: dict[str, Contender] = {}
    for value, scenario in sorted(at.items()):
        for contender, found in measured(scenario):
            if contender.status == "ok":
                named.setdefault(contender.name, contender)
                points.setdefault(contender.name, []).append((value, height(found)))
    lines: list[plots.Line] = []
    for name, contender in named.items():
        lines.append(_line(contender, tuple(points[name]), lines))
    return lines


def _line(contender: Contender, points: tuple[tuple[float, float], ...], before: Sequence[plots.Line]) -> plots.Line:
    kind = _kind(contender)
    dash = sum(line.kind == kind for line in before)
    return plots.Line(label=_label(contender), kind=kind, points=points, dash=dash)


def _kind(contender: Contender) -> str:
    return KINDS.get(contender.runtime, "other")


def _label(contender: Contender) -> str:
    name = _short(contender.name, LONGEST_LABEL)
    return name if contender.status == "ok" else name + WRONG


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"
