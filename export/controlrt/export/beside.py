"""Traces programs in processes beside each other: tracing is Python, and keeps one core busy however many there are."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from controlrt.export import checkpoint as checkpoints
from controlrt.export.checkpoint import Checkpoint
from controlrt.export.exporter import ExportOptions, Sources
from controlrt.export.programs import (
    ProgramSpec,
    adapter_program,
    controlnet_program,
    ip_adapter_program,
    text_encoder_program,
    unet_program,
    vae_programs,
)
from controlrt.export.trace import export_program
from controlrt.runtime.errors import BuildError
from controlrt.runtime.manifest import Program
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import Progress

CORES_PER_PROCESS = 4
"""What the checks in between can use."""
COPIES = 3
"""Of the checkpoint in float32: what one process takes, about."""


def load_checkpoint(options: ExportOptions, sources: Sources) -> Checkpoint:
    """The checkpoint with its ControlNets and adapters, LoRAs merged.

    Raises:
        SourceError: it cannot be loaded or is not supported.
    """
    return checkpoints.load(
        sources.model,
        sources.controlnets,
        sources.loras,
        adapters=sources.adapters,
        ip_adapters=sources.ip_adapters,
        config=sources.config,
        prediction_type=options.prediction_type,
    )


def program_specs(loaded: Checkpoint, profile: ShapeProfile) -> list[ProgramSpec]:
    """Everything that is traced of a checkpoint, in the order of the manifest."""
    return [
        *(text_encoder_program(parts) for parts in loaded.text_encoders),
        *(controlnet_program(loaded, name, controlnet) for name, controlnet in loaded.controlnets.items()),
        *(adapter_program(loaded, name, adapter) for name, adapter in loaded.adapters.items()),
        *(ip_adapter_program(parts) for parts in loaded.ip_adapters),
        unet_program(loaded),
        *vae_programs(loaded, tiles=profile.vae_tile is not None),
    ]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that nothing uses, not even for files."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def processes_for(specs: Sequence[ProgramSpec], cores: int, memory_bytes: int) -> int:
    """How many processes pay: 1 where there are few cores, or memory for one checkpoint only.

    Args:
        specs: what is to be traced.
        cores: that there are.
        memory_bytes: that is available.
    """
    checkpoint = sum(4 * _parameters(spec) for spec in specs)
    return max(1, min(len(specs), cores // CORES_PER_PROCESS, memory_bytes // max(1, COPIES * checkpoint)))


def trace_beside(
    options: ExportOptions,
    sources: Sources,
    specs: Sequence[ProgramSpec],
    directory: Path,
    processes: int,
    progress: Progress,
) -> dict[str, Program]:
    """Traces ``specs``, those that take longest first, each in a process that loads the checkpoint anew.

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
    left = [spec.name for spec in sorted(specs, key=_parameters, reverse=True)]
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(threads,)
    )
    try:
        waiting = {pool.submit(_trace, options, sources, name, directory): name for name in left}
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


def _trace(options: ExportOptions, sources: Sources, name: str, directory: Path) -> Program:
    loaded = load_checkpoint(options, sources)
    spec = next(spec for spec in program_specs(loaded, options.profile) if spec.name == name)
    return export_program(spec, options.profile.of(name), directory)


def _parameters(spec: ProgramSpec) -> int:
    return sum(parameter.numel() for parameter in spec.module.parameters())
