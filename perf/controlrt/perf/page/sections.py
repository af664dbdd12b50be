"""What stands below the header, section by section."""

from __future__ import annotations

import html
from collections.abc import Sequence

from controlrt.perf.page import figures
from controlrt.perf.page.header import load_notice
from controlrt.perf.page.origin import run_facts
from controlrt.perf.page.tables import ablation_table, contender_table, setting_facts, stage_table
from controlrt.perf.report import AblationReport
from controlrt.perf.results import Report, Scenario
from controlrt.runtime.inspection.units import readable_flops
from controlrt.runtime.page.markup import Section, fact_list, figure, heading, paragraph


def sections(report: Report, ablation: AblationReport | None) -> list[Section]:
    """Those for which there is something to show."""
    found = [
        _speed(report.scenarios),
        _latency(report.scenarios[0]),
        _stages(report.scenarios[0]),
        _parity(report.scenarios[0]),
        _growth(report.scenarios),
        None if ablation is None else _passes(ablation),
        _numbers(report),
        _origin(report, ablation),
    ]
    return [section for section in found if section is not None]


def _speed(scenarios: Sequence[Scenario]) -> Section:
    """The first scenario, and those that are not a point of some curve."""
    shown = [scenarios[0], *(each for each in scenarios[1:] if each.kind in ("single-stream", "mixed-steps"))]
    parts = [
        paragraph(
            "Contenders took turns, call by call, each in a process of its own; ratios are taken within a round, so "
            "that what slows the machine down slows both sides. A picture that differs from eager's is no picture: its "
            "mark is hollow and its speed counts for nothing."
        )
    ]
    for scenario in shown:
        parts += [heading(scenario.name) * (len(shown) > 1), figure(figures.speedups(scenario))]
    return Section(name="speed", heading="Speed against eager PyTorch", markup="".join(parts))


def _latency(scenario: Scenario) -> Section | None:
    if not figures.measured(scenario):
        return None
    text = "Every dot is a call after warm-up. Marks, and numbers on the right: median, 90th and 99th percentile."
    return Section(name="latency", heading="Latency", markup=paragraph(text) + figure(figures.latencies(scenario)))


def _stages(scenario: Scenario) -> Section | None:
    if not figures.measured(scenario):
        return None
    text = (
        "Means, because they add up. Eager PyTorch encodes control picture and timestep at every step, so those are in "
        "its steps."
    )
    return Section(
        name="stages", heading="Where the time goes", markup=paragraph(text) + figure(figures.stages(scenario))
    )


def _parity(scenario: Scenario) -> Section | None:
    scatter, errors = figures.parity(scenario), figures.latent_errors(scenario)
    if scatter is None:
        return None
    text = "The same weights, prompt, control picture, seed and steps: how near is the picture to eager's?"
    markup = paragraph(text) + figure(scatter)
    if errors is not None:
        markup += heading("From step to step") + figure(errors)
    return Section(name="parity", heading="Right pictures", markup=markup)


def _growth(scenarios: Sequence[Scenario]) -> Section | None:
    plots = {"batch, offline": figures.offline([each for each in scenarios if each.kind == "offline"])}
    for axis in dict.fromkeys(each.axis for each in scenarios if each.axis is not None):
        plots[axis] = figures.sweep(axis, [each for each in scenarios if each.axis == axis])
    markup = "".join(heading(f"By {name}") + figure(plot) for name, plot in plots.items() if plot is not None)
    return Section(name="growth", heading="How cost grows", markup=markup) if markup else None


def _passes(ablation: AblationReport) -> Section:
    setting = ablation.setting
    text = (
        f"One guided step of {setting.model} at {setting.width}×{setting.height}, one compiler pass more at a time; "
        "green takes time off, red adds some, pale may be noise. By controlrt bench ablation, in a run of its own."
    )
    busy = f'<p class="notice" role="note">{html.escape(load)}</p>' if (load := load_notice(ablation.machine)) else ""
    plots = "".join(heading(runtime) + figure(plot) for runtime, plot in figures.waterfalls(ablation).items())
    return Section(
        name="passes", heading="What each pass gives", markup=paragraph(text) + busy + plots + ablation_table(ablation)
    )


def _numbers(report: Report) -> Section:
    parts = []
    for number, scenario in enumerate(report.scenarios):
        asked = "; ".join(f"{name}: {value}" for name, value in setting_facts(scenario))
        parts.append(
            f"<details{' open' * (number == 0)}><summary>{html.escape(scenario.name)}</summary>{paragraph(asked)}"
            f"{contender_table(scenario, report.ceilings)}{stage_table(scenario)}</details>"
        )
    return Section(name="numbers", heading="Every number", markup="".join(parts))


def _origin(report: Report, ablation: AblationReport | None) -> Section:
    model = report.model
    facts = [
        *run_facts(report.command, report.created, report.commit, report.machine, report.versions),
        *(
            (
                f"matrix products, {each.dtype}",
                f"{readable_flops(int(each.flops_per_second))}/s at {each.size}×{each.size}, {each.threads} threads "
                f"({each.library})",
            )
            for each in report.ceilings
        ),
        ("model", f"{model.name}, {model.source}"),
        *((f"ControlNet {name}", source) for name, source in model.controls.items()),
        ("bundle", model.bundle or "built for the benchmark"),
        ("profile", f"{model.profile}, batch {model.batch}"),
    ]
    markup = fact_list(facts)
    if ablation is not None:
        run = run_facts(ablation.command, ablation.created, ablation.commit, ablation.machine, ablation.versions)
        markup += heading("The run of the passes") + fact_list(run)
    return Section(name="origin", heading="Machine and command", markup=markup)
