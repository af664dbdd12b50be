"""Measure what each compiler pass gives: one guided step with one ControlNet, one pass more at a time.

Every variant lives in a process of its own, and the processes take turns, one step each, so a machine that gets slower
slows all of them down. Where not all fit into memory at once they are measured in groups, and the reference, the plain
export in ONNX Runtime, runs beside every group.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlrt.engines.backends import BACKENDS
from controlrt.engines.build import export_programs
from controlrt.perf.accuracy import compare
from controlrt.perf.graphs import PARTS, GraphCounts, prepare_graphs
from controlrt.perf.inputs import GUIDANCE_SCALE, SAMPLER, STEP, STEPS, step_inputs
from controlrt.perf.machine import commit, installed_versions, this_machine
from controlrt.perf.models import CONTROL, MODELS, BenchModel, prepare_model
from controlrt.perf.ratios import Measured
from controlrt.perf.report import (
    SCHEMA_VERSION,
    AblationReport,
    Group,
    Setting,
    VariantResult,
    save_ablation,
    table,
)
from controlrt.perf.rounds import Footprint, excess, grouped
from controlrt.perf.runs import Runs
from controlrt.perf.scratch import scratch_directory
from controlrt.perf.variants import CUT, EAGER, FUSE, REFERENCE, Variant, all_variants, choose_variants
from controlrt.perf.worker import WorkerSpec
from controlrt.perf.worker_process import WorkerProcess
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import ParameterError, UserError
from controlrt.runtime.machine import available_memory, usable_cores
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.storage import check_writable

PROFILE = "512x512"
REPEATS = 10
WORKER_BYTES = 512 * 2**20
WEIGHT_COPIES = 1.4
"""An estimate of a worker's memory: interpreter and libraries; weights, packed once more or less, and activations."""
USABLE_MEMORY = 0.9
"""Of what is available, where --memory does not say."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """What to measure."""

    model: str = "demo"
    repeats: int = REPEATS
    threads: int
    only: tuple[str, ...] = ()
    """Names or patterns of variants; all where empty."""
    memory_bytes: int | None = None
    """What all workers together may take; None for most of what is available."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ParameterError("--repeats", self.repeats, "at least 1")
        if self.threads < 1:
            raise ParameterError("--threads", self.threads, "at least 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--model", choices=list(MODELS), default="demo", help="sd15, sd21, sdxl: random weights of that size"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"measured rounds ({REPEATS})")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads of each variant (all cores)")
    parser.add_argument(
        "--only", default="", metavar="NAME,...", help="variants to measure beside the reference; openvino* works too"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="what the workers may take together (what is free)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and writes the file; 1 where a variant's outputs are wrong or its worker ended."""
    options = AblationOptions(
        model=arguments.model,
        repeats=arguments.repeats,
        threads=arguments.threads,
        only=tuple(filter(None, arguments.only.split(","))),
        memory_bytes=None if arguments.memory is None else int(arguments.memory * GIB),
    )
    if arguments.output is not None:
        check_writable(arguments.output)
    report = measure(options, shlex.join(["controlrt", *sys.argv[1:]]))
    if arguments.output is not None:
        save_ablation(report, arguments.output)
    print(table(report))
    for variant in report.failed:
        if variant.accuracy is not None:
            accuracy = variant.accuracy
            print(
                f"error: {variant.name} differs from {accuracy.compared_with} by {accuracy.max_relative_error:.1e} of "
                f"the largest value; at most {accuracy.limit:.0e} is allowed",
                file=sys.stderr,
            )
    return 1 if report.failed or report.lost else 0


def measure(options: AblationOptions, command: str) -> AblationReport:
    """Prepares and measures the variants.

    Raises:
        UserError: an unknown variant, or less memory than two workers take.
        BuildError: a pass that cannot handle a graph.
        WorkerError: the worker of the reference ended.
    """
    variants = choose_variants(options.only, all_variants())
    machine, code = this_machine(), commit(Path(__file__).parent)
    if machine.is_busy:
        print(
            f"warning: load {machine.load_average} on {machine.cores} cores: others run here, which slows down PyTorch "
            "most, whose threads wait for each other; measure again when the machine is idle",
            file=sys.stderr,
        )
    model = prepare_model(options.model)
    memory = _memory_groups(options, model, variants)
    exported = Bundle.open(
        export_programs(str(model.model), {CONTROL: str(model.controlnet)}, ShapeProfile.parse(PROFILE)), verify=False
    )
    with scratch_directory("ablation") as scratch:
        specs, counts = _prepare(options, model, exported, variants, scratch)
        runs = Runs(
            start=lambda name: WorkerProcess.start(name, specs[name], scratch / f"{name}.log"),
            repeats=options.repeats,
            directory=scratch,
        )
        runs.measure(REFERENCE, memory)
        variants = [variant for variant in variants if variant.name not in runs.lost]
        width, height = exported.manifest.profile.default_size
        return AblationReport(
            benchmark="ablation",
            schema_version=SCHEMA_VERSION,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            command=command,
            commit=code,
            machine=machine,
            versions=installed_versions(),
            setting=Setting(
                model=options.model,
                controlnet=CONTROL,
                width=width,
                height=height,
                batch=1,
                rows=2,
                sampler=SAMPLER,
                step=STEP,
                steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                threads=options.threads,
                repeats=options.repeats,
            ),
            reference=REFERENCE,
            eager=_fastest_eager(Measured(runs.samples, REFERENCE), variants),
            groups=tuple(
                Group(variants=tuple(group), reference_samples_seconds=tuple(group[REFERENCE]))
                for group in runs.samples
            ),
            variants=tuple(_results(variants, runs, counts)),
            lost=runs.lost,
        )


def _memory_groups(options: AblationOptions, model: BenchModel, variants: Sequence[Variant]) -> list[list[str]]:
    """Which variants are measured beside the reference at one time."""
    budget = options.memory_bytes or int(available_memory() * USABLE_MEMORY)
    each = int(WORKER_BYTES + WEIGHT_COPIES * model.weight_bytes)
    reference = Footprint(name=REFERENCE, memory_bytes=each)
    others = [Footprint(name=v.name, memory_bytes=each) for v in variants if v.name != REFERENCE]
    lacking = excess(others, reference, budget)
    if lacking > 0:
        raise UserError(
            f"two workers of {model.name} take about {(budget + lacking) / GIB:.1f} GiB, and {budget / GIB:.1f} GiB "
            "may be used; free some memory, or say with --memory GIB how much there is"
        )
    return grouped(others, reference, budget) or [[]]


def _prepare(
    options: AblationOptions, model: BenchModel, exported: Bundle, variants: Sequence[Variant], scratch: Path
) -> tuple[dict[str, WorkerSpec], dict[str, GraphCounts]]:
    """What each worker is told, and the sizes of the graphs, by variant."""
    inputs = scratch / "inputs.npz"
    step_inputs(exported, PARTS[0]).save(inputs)
    prepared = prepare_graphs(exported, variants, scratch / "graphs")
    specs = {}
    for variant in variants:
        if variant.backend is None:
            specs[variant.name] = WorkerSpec(
                kind="eager",
                inputs=str(inputs),
                threads=options.threads,
                model=str(model.model),
                controlnet=str(model.controlnet),
                channels_last=variant.channels_last,
            )
        else:
            graph = prepared[variant.name]
            specs[variant.name] = WorkerSpec(
                kind="compiled",
                inputs=str(inputs),
                threads=options.threads,
                directory=str(graph.directory),
                manifest=str(graph.manifest),
            )
    return specs, {name: each.counts for name, each in prepared.items()}


def _results(variants: Sequence[Variant], runs: Runs, counts: Mapping[str, GraphCounts]) -> Iterator[VariantResult]:
    measured = Measured(runs.samples, REFERENCE)
    eager = _fastest_eager(measured, variants)
    for variant in variants:
        samples = [seconds for group in runs.samples for seconds in group.get(variant.name, ())]
        yield VariantResult(
            name=variant.name,
            runtime=variant.runtime,
            passes=_pass_names(variant),
            samples_seconds=tuple(samples),
            median_seconds=statistics.median(samples),
            load_seconds=round(runs.load_seconds[variant.name], 3),
            peak_memory_bytes=runs.peak_bytes[variant.name],
            speedup_over_eager=None if eager is None else measured.speedup(variant.name, eager),
            speedup_over_plain=measured.speedup(variant.name, REFERENCE),
            graph=counts.get(variant.name),
            accuracy=compare(variant, runs.outputs),
        )


def _fastest_eager(measured: Measured, variants: Sequence[Variant]) -> str | None:
    found = [variant.name for variant in variants if variant.name in EAGER]
    return measured.fastest(found) if found else None


def _pass_names(variant: Variant) -> tuple[str, ...]:
    if variant.backend is None:
        return ()
    names = [type(each).__name__ for each in BACKENDS[variant.backend].passes[: variant.passes]]
    return (*([FUSE] if variant.fused else []), *names, *([CUT] if variant.cut else []))
