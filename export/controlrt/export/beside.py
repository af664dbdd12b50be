"""Traces programs in processes beside each other: tracing is Python, and keeps one core busy however many there are."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from controlrt.export.checkpoint_programs import programs_of_part, tracing_bytes, weight_bytes
from controlrt.export.exporter import ExportOptions, Sources
from controlrt.export.programs import ProgramSpec
from controlrt.export.trace import export_program
from controlrt.runtime.errors import BuildError
from controlrt.runtime.machine import usable_cores
from controlrt.runtime.manifest import Program
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import Progress

CORES_PER_PROCESS = 4
"""What the checks in between can use."""


def processes_for(specs: Sequence[ProgramSpec], profile: ShapeProfile, cores: int, memory_bytes: int) -> int:
    """How many processes pay: 1 where there are few cores, or memory for one part only.

    Args:
        specs: what is to be traced.
        profile: sizes that it is traced for.
        cores: that there are.
        memory_bytes: that is available.
    """
    each = sorted((tracing_bytes(weight_bytes([spec]), profile) for spec in specs), reverse=True)
    fitting = sum(taken <= memory_bytes for taken in itertools.accumulate(each))
    return max(1, min(cores // CORES_PER_PROCESS, fitting))


def trace_beside(
    options: ExportOptions,
    sources: Sources,
    specs: Sequence[ProgramSpec],
    directory: Path,
    processes: int,
    progress: Progress,
) -> dict[str, Program]:
    """Traces ``specs``, those that take longest first, each in a process that loads its part anew.

    Args:
        options, sources: of the checkpoint.
        specs: what is to be traced.
        directory: where the programs go.
        processes: at most so many at once.
        progress: counts those that are there.

    Returns:
        Their manifest entries by name.

    Raises:
        BuildError: one cannot be traced, or its process was killed.
    """
    threads = max(1, usable_cores() // processes)
    found: dict[str, Program] = {}
    left = [spec.name for spec in sorted(specs, key=lambda spec: weight_bytes([spec]), reverse=True)]
    parts = {spec.name: spec.part for spec in specs}
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(threads,)
    )
    try:
        waiting = {pool.submit(_trace, options, sources, name, parts[name], directory): name for name in left}
        progress.start(f"trace {', '.join(left)}, {processes} at a time")
        for future in concurrent.futures.as_completed(waiting):
            name = waiting[future]
            try:
                found[name] = future.result()
            except BrokenProcessPool as error:
                raise BuildError(f"a process that traces {name} was killed; was there enough memory?") from error
            left.remove(name)
            if left:
                progress.start(f"{name} is traced; left: {', '.join(left)}")
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _prepare(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends its children
    torch.set_num_threads(threads)


def _trace(options: ExportOptions, sources: Sources, name: str, part: str, directory: Path) -> Program:
    spec = next(spec for spec in programs_of_part(options, sources, part) if spec.name == name)
    return export_program(spec, options.profile.of(name), directory)
