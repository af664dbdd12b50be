"""Measure a bundle beside its peers, a server, changes between calls, compiler passes, and what a commit did.

``controlrt bench BUNDLE`` is short for ``controlrt bench pipeline BUNDLE``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType

from controlrt.perf import ablation, bench, compare
from controlrt.perf.changes import command as changes
from controlrt.perf.page import command as page
from controlrt.perf.server import command as server

DEFAULT = "pipeline"
BENCHMARKS: dict[str, ModuleType] = {
    DEFAULT: bench,
    "server": server,
    "changes": changes,
    "ablation": ablation,
    "compare": compare,
    "page": page,
}
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


def expand(argv: Sequence[str]) -> list[str]:
    """Puts in the benchmark that is meant where none is named: whatever else comes first is a bundle or an option."""
    flags = ("-v", "--verbose")
    first = next((number for number, word in enumerate(argv) if word not in flags), None)
    if first is None or argv[first] in (*BENCHMARKS, "-h", "--help"):
        return list(argv)
    return [*argv[:first], DEFAULT, *argv[first:]]


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmark that was named."""
    return int(BENCHMARKS[arguments.benchmark].run(arguments))
