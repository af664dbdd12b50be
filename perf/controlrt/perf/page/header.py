"""The top of the page: how much faster, and what to be careful about."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass

from controlrt.perf.machine import Machine
from controlrt.perf.page.figures import measured
from controlrt.perf.page.quantities import readable_seconds
from controlrt.perf.results import Contender, Measurement, Report, Scenario
from controlrt.perf.statistics import Ratio
from controlrt.runtime.inspection.units import readable_bytes


def header(report: Report) -> str:
    """The headline is of the first scenario."""
    scenario = report.scenarios[0]
    setting, machine = scenario.setting, report.machine
    kicker = (
        f"controlrt bench · {report.model.name} · {setting.width}×{setting.height}, "
        f"{', '.join(map(str, setting.steps))} steps · {', '.join(machine.gpus) or machine.cpu}, "
        f"{setting.threads} threads · {report.created[:10]}"
    )
    headline = find_headline(scenario)
    title = "<h1>Nothing could be compared with eager PyTorch</h1>" if headline is None else _markup(headline)
    notes = "".join(f'<p class="notice" role="note">{html.escape(text)}</p>' for text in notices(report))
    return f'<header><p class="kicker">{html.escape(kicker)}</p>{title}{notes}</header>'


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The contender that the page is about."""

    scenario: Scenario
    contender: Contender
    found: Measurement
    ratio: Ratio


def find_headline(scenario: Scenario) -> Headline | None:
    """The fastest contender that draws the right picture and is not PyTorch; PyTorch's fastest where no other ran."""
    sound = [
        Headline(scenario=scenario, contender=contender, found=found, ratio=found.speedup_over_eager)
        for contender, found in measured(scenario)
        if contender.status == "ok" and found.speedup_over_eager is not None
    ]
    compiled = [each for each in sound if each.contender.runtime != "pytorch"]
    return next(iter(compiled or sound), None)


def notices(report: Report) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    if not report.complete:
        found.append("The benchmark was interrupted: scenarios are missing that were asked for.")
    if (load := load_notice(report.machine)) is not None:
        found.append(load)
    if report.commit is not None and report.commit.dirty:
        found.append("The code differed from its commit.")
    failed: dict[str, str] = {}
    for scenario in report.scenarios:
        for contender in scenario.failed:
            failed.setdefault(contender.name, f"{contender.name} ({contender.status}: {contender.reason})")
    if failed:
        found.append(f"Did not run, or drew another picture: {'; '.join(failed.values())}.")
    return found


def load_notice(machine: Machine) -> str | None:
    """That others used the machine; None where they did not."""
    if not machine.is_busy:
        return None
    return (
        f"Others used the machine when this was measured (load {machine.load_average} on {machine.cores} cores before "
        "the start): seconds are too long, and intervals wide."
    )


def _markup(headline: Headline) -> str:
    scenario, found, ratio = headline.scenario, headline.found, headline.ratio
    lead = (
        f"{headline.contender.name} ({headline.contender.precision}) beside {scenario.eager}, {scenario.name}: "
        f"{ratio.low:.2f} to {ratio.high:.2f} times with 95% confidence, same weights, prompts, control pictures, "
        "seeds and steps."
    )
    eager = next((each.measurement for each in scenario.contenders if each.name == scenario.eager), None)

    def beside(show: Callable[[Measurement], str]) -> str:
        return "" if eager is None else f"{scenario.eager}: {show(eager)}"

    tiles = [(name, show(found), beside(show)) for name, show in _TILES]
    if found.parity is not None:
        likeness = f"{found.parity.psnr_db:.0f} dB"
        tiles.append(("Likeness to eager", likeness, f"PSNR; SSIM {found.parity.ssim:.5f}"))
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd><dd>{html.escape(note)}</dd></div>"
        for name, value, note in tiles
    )
    return (
        f"<h1><strong>{ratio.value:.2f}×</strong> as fast as eager PyTorch</h1>"
        f'<p class="lead">{html.escape(lead)}</p><dl class="tiles">{cells}</dl>'
    )


_TILES: tuple[tuple[str, Callable[[Measurement], str]], ...] = (
    ("Whole call, median", lambda found: readable_seconds(found.percentiles.picture.p50)),
    ("Start to first picture", lambda found: readable_seconds(found.cold_start_seconds)),
    ("Peak host memory", lambda found: readable_bytes(found.memory.peak_host_bytes)),
)
