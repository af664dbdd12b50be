"""The ablation's result: the schema of its JSON file, and the table for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from controlrt.perf.accuracy import Accuracy
from controlrt.perf.graphs import GraphCounts
from controlrt.perf.machine import Commit, Machine
from controlrt.perf.result_file import load_result, save_result
from controlrt.perf.statistics import Ratio
from controlrt.perf.text_table import aligned
from controlrt.runtime.errors import UserError

SCHEMA_VERSION = 1


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the schema: immutable, unknown keys are refused."""


class Setting(_Record, frozen=True, kw_only=True):
    """What was run."""

    model: str
    controlnet: str
    width: int
    height: int
    batch: int
    rows: int
    sampler: str
    step: int
    """Number of the step that is repeated."""
    steps: int
    guidance_scale: float
    threads: int
    repeats: int
    """Measured rounds; one more came before them as a warm-up."""


class VariantResult(_Record, frozen=True, kw_only=True):
    """One variant's measurements."""

    name: str
    runtime: str
    passes: tuple[str, ...]
    """The compiler passes that were run, in order; ``fuse`` before them, ``binding-times`` after them."""
    samples_seconds: tuple[float, ...]
    """One per measured round, in order; the reference has those of all groups."""
    median_seconds: float
    load_seconds: float
    """From the start of its process to the end of its first step."""
    peak_memory_bytes: int
    """The most that its process had resident (VmHWM): libraries, weights mapped from files and loading included."""
    speedup_over_eager: Ratio | None
    """Over the faster of the eager variants; None where none was measured."""
    speedup_over_plain: Ratio
    """Over the plain export in ONNX Runtime."""
    graph: GraphCounts | None
    """None for PyTorch."""
    accuracy: Accuracy | None
    """None for what the others are compared with."""


class Group(_Record, frozen=True, kw_only=True):
    """Variants that were measured side by side, one step of each in turn."""

    variants: tuple[str, ...]
    reference_samples_seconds: tuple[float, ...]


class AblationReport(_Record, frozen=True, kw_only=True):
    """The whole result."""

    benchmark: Literal["ablation"]
    schema_version: int
    created: str
    command: str
    commit: Commit | None
    machine: Machine
    versions: dict[str, str]
    setting: Setting
    reference: str
    """The variant that was measured in every group."""
    eager: str | None
    """The faster of the eager variants."""
    groups: tuple[Group, ...]
    variants: tuple[VariantResult, ...]
    lost: dict[str, str]
    """Variants that were not measured, with what a worker of their group said when it ended."""

    @property
    def failed(self) -> list[VariantResult]:
        """Variants whose outputs are too far off."""
        return [variant for variant in self.variants if variant.accuracy is not None and not variant.accuracy.is_met]


def save_ablation(report: AblationReport, file: Path) -> None:
    """Writes the report as indented JSON, whole or not at all."""
    save_result(report, file)


def load_ablation(file: Path) -> AblationReport:
    """Reads what ``save_ablation`` wrote.

    Raises:
        UserError: no such file, or it holds something else.
    """
    report = load_result(file, AblationReport, SCHEMA_VERSION, "controlrt bench ablation")
    grouped = {report.reference}.union(*(group.variants for group in report.groups))
    lonely = {report.reference} - {each.name for each in report.variants} | {
        each.name for each in report.variants if each.name not in grouped
    }
    if lonely:
        raise UserError(f"{file} has no rounds of {', '.join(sorted(lonely))}; the file was edited, measure again")
    return report


def table(report: AblationReport) -> str:
    """The report as text."""
    setting, machine = report.setting, report.machine
    commit = "no commit" if report.commit is None else report.commit.hash[:12] + "+dirty" * report.commit.dirty
    lines = [
        f"{setting.model}: one guided step, {setting.width}x{setting.height}, batch {setting.batch}, one ControlNet; "
        f"{setting.repeats} rounds, {setting.threads} threads",
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, load {machine.load_average}; "
        f"{commit}",
        "",
        *aligned([[title for title, _ in _COLUMNS], *([cell(v) for _, cell in _COLUMNS] for v in report.variants)]),
        *(f"not measured: {name}: {reason}" for name, reason in report.lost.items()),
        "",
        f"x eager: how many times faster than {report.eager or 'eager, which was not measured'}; "
        f"x plain: than {report.reference}; medians over rounds with 95% intervals",
    ]
    return "\n".join(lines)


def _interval(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _graph(show: Callable[[GraphCounts], str]) -> Callable[[VariantResult], str]:
    return lambda variant: "-" if variant.graph is None else show(variant.graph)


def _error(variant: VariantResult) -> str:
    if variant.accuracy is None:
        return "-"
    return f"{variant.accuracy.max_relative_error:.1e}{'' if variant.accuracy.is_met else ' TOO FAR'}"


_COLUMNS: tuple[tuple[str, Callable[[VariantResult], str]], ...] = (
    ("variant", lambda variant: variant.name),
    ("step s", lambda variant: f"{variant.median_seconds:.3f}"),
    ("x eager", lambda variant: _interval(variant.speedup_over_eager)),
    ("x plain", lambda variant: _interval(variant.speedup_over_plain)),
    ("peak MiB", lambda variant: f"{variant.peak_memory_bytes / 2**20:.0f}"),
    ("load s", lambda variant: f"{variant.load_seconds:.1f}"),
    ("nodes", _graph(lambda graph: str(graph.nodes))),
    ("matmuls", _graph(lambda graph: str(graph.matmuls))),
    ("GFLOP", _graph(lambda graph: f"{graph.flops / 1e9:.2f}")),
    ("error", _error),
)
