"""Tables of the page: every number of a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controlrt.perf.page.quantities import readable_seconds
from controlrt.perf.report import AblationReport, VariantResult
from controlrt.perf.results import Ceiling, Contender, Measurement, Scenario, StagePercentiles
from controlrt.perf.statistics import Percentiles, Ratio
from controlrt.runtime.inspection.units import readable_bytes, readable_flops
from controlrt.runtime.page.markup import NOTHING, Cell, table

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8", "fp8": "fp8"}
"""Which measured ceiling a precision is held against."""


def contender_table(scenario: Scenario, ceilings: Sequence[Ceiling]) -> str:
    """A column for each contender, a row for each thing known of it."""
    rows: list[list[Cell]] = [[label, *map(show, scenario.contenders)] for label, show in _KNOWN]
    rows += [
        [label, *(NOTHING if each.measurement is None else show(each.measurement) for each in scenario.contenders)]
        for label, show in _MEASURED
    ]
    rows.append(
        ["FLOP/s of the measured ceiling", *(_share_of_ceiling(each, ceilings) for each in scenario.contenders)]
    )
    return table(f"{scenario.name}: contenders", ["", *(each.name for each in scenario.contenders)], rows)


def stage_table(scenario: Scenario) -> str:
    """A column for each contender, three percentiles of every stage."""
    found = [None if each.measurement is None else each.measurement.percentiles for each in scenario.contenders]
    rows: list[list[Cell]] = [
        [f"{name}, {percent}", *(_stage_percentile(each, stage, percent) for each in found)]
        for stage, name in _STAGES
        for percent in Percentiles.__struct_fields__
    ]
    return table(f"{scenario.name}: stages", ["", *(each.name for each in scenario.contenders)], rows)


def ablation_table(ablation: AblationReport) -> str:
    """A row for each variant."""
    head = ["", "step", "× eager", "× plain export", "peak memory", "load", "nodes", "FLOP", "largest error"]
    rows: list[list[Cell]] = [
        [
            each.name,
            readable_seconds(each.median_seconds),
            _ratio(each.speedup_over_eager),
            _ratio(each.speedup_over_plain),
            readable_bytes(each.peak_memory_bytes),
            readable_seconds(each.load_seconds),
            NOTHING if each.graph is None else str(each.graph.nodes),
            NOTHING if each.graph is None else readable_flops(each.graph.flops),
            _error(each),
        ]
        for each in ablation.variants
    ]
    rows += [[name, (f"not measured: {reason}", "words bad")] for name, reason in ablation.lost.items()]
    return table("variants of one guided step", head, rows)


def setting_facts(scenario: Scenario) -> list[tuple[str, str]]:
    """What was asked of every contender, by name."""
    setting = scenario.setting
    return [
        ("picture", f"{setting.width}×{setting.height}, {setting.batch} per call"),
        ("steps", f"{', '.join(map(str, setting.steps))} of {setting.sampler}, guidance {setting.guidance_scale:g}"),
        ("ControlNets", ", ".join(setting.controls) or "none"),
        ("prompts", " · ".join(setting.prompts)),
        ("negative prompt", setting.negative_prompt or "none"),
        ("control pictures", setting.hints),
        (
            "rounds",
            f"{setting.rounds}, {setting.threads} threads{', each contender loaded anew' * setting.one_at_a_time}",
        ),
    ]


def _ratio(ratio: Ratio | None) -> str:
    return NOTHING if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _optional_bytes(size: int | None) -> str:
    return NOTHING if size is None else readable_bytes(size)


def _status(contender: Contender) -> Cell:
    if contender.status == "ok":
        return "ok"
    return f"{contender.status}: {contender.reason}", "words bad"


def _options(contender: Contender) -> Cell:
    return ", ".join(f"{name}: {value}" for name, value in contender.options.items()) or NOTHING, "words"


def _stage_percentile(found: StagePercentiles | None, stage: str, percent: str) -> str:
    return NOTHING if found is None else readable_seconds(getattr(getattr(found, stage), percent))


def _share_of_ceiling(contender: Contender, ceilings: Sequence[Ceiling]) -> str:
    reached = None if contender.measurement is None else contender.measurement.flops_per_second
    dtype = DTYPES.get(contender.precision, contender.precision)
    ceiling = next((each.flops_per_second for each in ceilings if each.dtype == dtype), None)
    return NOTHING if reached is None or not ceiling else f"{reached / ceiling:.0%}"


def _error(variant: VariantResult) -> Cell:
    accuracy = variant.accuracy
    if accuracy is None:
        return NOTHING
    text = f"{accuracy.max_relative_error:.1e}"
    return text if accuracy.is_met else (f"{text}, at most {accuracy.limit:.0e}", "bad")


def _psnr(found: Measurement) -> Cell:
    if found.parity is None:
        return NOTHING
    text = f"{found.parity.psnr_db:.1f} dB"
    return text if found.parity.is_met else (text, "bad")


_STAGES = (
    ("text", "text"),
    ("hint", "hint"),
    ("timestep_table", "timestep table"),
    ("step", "one step"),
    ("host_step", "host in one step"),
    ("decode", "decode"),
)

_KNOWN: tuple[tuple[str, Callable[[Contender], Cell]], ...] = (
    ("status", _status),
    ("runtime", lambda contender: contender.runtime),
    ("precision", lambda contender: contender.precision),
    ("options", _options),
    ("engine on disk", lambda contender: _optional_bytes(contender.engine_bytes)),
    (
        "build ahead of time",
        lambda contender: NOTHING if contender.build_seconds is None else readable_seconds(contender.build_seconds),
    ),
)

_MEASURED: tuple[tuple[str, Callable[[Measurement], Cell]], ...] = (
    ("call p50", lambda found: readable_seconds(found.percentiles.picture.p50)),
    ("call p90", lambda found: readable_seconds(found.percentiles.picture.p90)),
    ("call p99", lambda found: readable_seconds(found.percentiles.picture.p99)),
    ("call p99/p50", lambda found: f"{found.percentiles.picture.spread:.3f}"),
    ("pictures per second", lambda found: f"{found.pictures_per_second:.3g}"),
    ("times as fast as eager, whole call", lambda found: _ratio(found.speedup_over_eager)),
    ("times as fast as eager, one step", lambda found: _ratio(found.step_speedup_over_eager)),
    ("times as fast as torch.compile, whole call", lambda found: _ratio(found.speedup_over_compiled)),
    ("load", lambda found: readable_seconds(found.load_seconds)),
    ("first request", lambda found: readable_seconds(found.first_request_seconds)),
    ("cold start to first picture", lambda found: readable_seconds(found.cold_start_seconds)),
    ("peak host memory", lambda found: readable_bytes(found.memory.peak_host_bytes)),
    ("of it pages of files, at the end", lambda found: readable_bytes(found.memory.file_backed_bytes)),
    ("peak device memory", lambda found: _optional_bytes(found.memory.peak_device_bytes)),
    (
        "FLOP of a picture",
        lambda found: NOTHING if found.flops_per_picture is None else readable_flops(found.flops_per_picture),
    ),
    (
        "FLOP/s reached",
        lambda found: NOTHING if found.flops_per_second is None else f"{readable_flops(int(found.flops_per_second))}/s",
    ),
    ("PSNR against eager's picture", _psnr),
    ("SSIM", lambda found: NOTHING if found.parity is None else f"{found.parity.ssim:.5f}"),
    (
        "largest error of the latents",
        lambda found: (
            NOTHING
            if found.parity is None or not found.parity.latent_errors
            else f"{max(found.parity.latent_errors):.1e}"
        ),
    ),
)
