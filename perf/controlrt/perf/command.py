"""Measure what the compiler gives, beside eager diffusers and the plain export."""

from __future__ import annotations

import argparse
from types import ModuleType

from controlrt.perf import ablation, compare
from controlrt.perf.page import command as page

BENCHMARKS: dict[str, ModuleType] = {"ablation": ablation, "compare": compare, "page": page}
"""Benchmarks by name. Each module is like a command's: a docstring, ``add_arguments(parser)``, ``run(arguments)``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares one subcommand per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        benchmark = benchmarks.add_parser(name, help=summary, description=summary)
        # given before or after the benchmark's name; not given there, it must not undo what was given before
        benchmark.add_argument(
            "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
        module.add_arguments(benchmark)


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmark that was named."""
    return int(BENCHMARKS[arguments.benchmark].run(arguments))
