"""Measure a model beside its peers: eager diffusers, torch.compile, the plain export, every backend and precision.

Every contender lives in a process of its own, and the processes take turns, so a machine that gets slower slows all of
them down. Where not all fit into memory at once they are measured in groups beside the same reference, and where no two
fit, one at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import time
from pathlib import Path

import msgspec

from controlrt.perf.bench_table import header, table
from controlrt.perf.benchmark import GIB, Benchmark
from controlrt.perf.ceiling import measure_ceilings
from controlrt.perf.machine import (
    Machine,
    commit,
    installed_versions,
    this_machine,
)
from controlrt.perf.models import MODELS, BenchModel
from controlrt.perf.question import WARM_UPS, Question, ask
from controlrt.perf.results import SCHEMA_VERSION, ModelSetting, Report, save
from controlrt.perf.scratch import scratch_directory
from controlrt.runtime.errors import UserError
from controlrt.runtime.machine import usable_cores
from controlrt.runtime.progress import Progress
from controlrt.runtime.storage import check_writable

ROUNDS = 10
TIMEOUT = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="built in the cache where not given")
    parser.add_argument(
        "--model",
        metavar="NAME|SOURCE",
        help=f"{', '.join(MODELS)} (all but demo with random weights), or a checkpoint; the bundle's own, or demo",
    )
    parser.add_argument(
        "--controlnet", action="append", default=[], metavar="NAME=SOURCE", help="of a checkpoint; may be repeated"
    )
    parser.add_argument("--control", default="", metavar="NAME,...", help="ControlNets that are on (the first)")
    parser.add_argument("--profile", metavar="WIDTHxHEIGHT", help="size of the pictures (the bundle's, or 512x512)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    parser.add_argument("--sampler", default="DDIM", help="by any name that controlrt samplers lists (DDIM)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"measured rounds ({ROUNDS})")
    parser.add_argument(
        "--warm-ups",
        type=int,
        help=f"rounds before them ({WARM_UPS['cpu']}; with a GPU {WARM_UPS['cuda']})",
    )
    parser.add_argument("--batches", default="", metavar="N,...", help="offline scenarios with these batches: 1,2,4,8")
    parser.add_argument("--steps-mix", default="", metavar="N,...", help="a scenario of mixed steps: 10,20,50")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="AXIS=VALUE,...",
        help="resolution=256x256,512x512, batch=1,2, steps=5,10,20 or controls=1,2; may be repeated",
    )
    parser.add_argument("--only", default="", metavar="NAME,...", help="contenders beside eager; openvino* works too")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads of each (all cores)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="PyTorch's (a GPU if any)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="what contenders may take together (what is free)")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help=f"of one call of a contender ({TIMEOUT})"
    )
    parser.add_argument("--build-only", action="store_true", help="build what is missing, and measure nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON, after every scenario")


def run(arguments: argparse.Namespace) -> int:
    """Measures every scenario, prints its table and writes the file; 1 where a contender failed or drew wrongly."""
    machine = this_machine()
    question = ask(arguments, machine)
    if importlib.util.find_spec("skimage") is None:
        raise UserError("pictures are compared by scikit-image, which is missing: pip install 'controlrt[bench]'")
    if arguments.output is not None:
        check_writable(arguments.output)
    if machine.is_busy:
        print(
            f"warning: load {machine.load_average} on {machine.cores} cores: others run here, which slows down PyTorch "
            "most, whose threads wait for each other; measure again when the machine is idle",
            file=sys.stderr,
        )
    budget = None if arguments.memory is None else int(arguments.memory * GIB)
    benchmark = Benchmark(question, question.model(), machine, budget)
    with scratch_directory("pipeline") as scratch:
        if arguments.build_only:
            return _build(benchmark, question, scratch)
        report = _empty_report(question, benchmark.model, machine)
        print(header(report), flush=True)
        for task in question.tasks:
            scenario = benchmark.measure(task, scratch)
            scenarios = (*report.scenarios, scenario)
            report = msgspec.structs.replace(
                report, scenarios=scenarios, complete=len(scenarios) == len(question.tasks)
            )
            if arguments.output is not None:
                save(report, arguments.output)
            print(f"\n{table(scenario)}", flush=True)
    failed = [f"{each.name} ({scenario.name})" for scenario in report.scenarios for each in scenario.failed]
    if failed:
        print(f"error: failed, for the reasons above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _build(benchmark: Benchmark, question: Question, scratch: Path) -> int:
    """Builds for every scenario and measures none; 1 where a contender cannot be built."""
    missing = {name: why for task in question.tasks for name, why in benchmark.build(task, scratch)[1].items()}
    for name, why in missing.items():
        print(f"error: {name} cannot be built: {why}", file=sys.stderr)
    return 1 if missing else 0


def _empty_report(question: Question, model: BenchModel, machine: Machine) -> Report:
    with Progress("measure", 1) as progress:
        progress.start("matrix products")
        ceilings = measure_ceilings(question.threads, question.device)
    first = question.tasks[0]
    ours = question.source is None  # where this installation keeps it says nothing
    return Report(
        benchmark="pipeline",
        schema_version=SCHEMA_VERSION,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=shlex.join(["controlrt", *sys.argv[1:]]),
        commit=commit(Path(__file__).parent),
        machine=machine,
        ceilings=ceilings,
        versions=installed_versions(),
        model=ModelSetting(
            name=model.name,
            source=model.name if ours else model.source,
            controls={name: name for name in model.controls} if ours else dict(model.controls),
            bundle=None if question.named is None else str(question.named.path),
            profile=str(question.profile or first.size),
            batch=question.batch if question.profile is None else str(question.profile.batch),
        ),
        complete=False,
        scenarios=(),
    )
