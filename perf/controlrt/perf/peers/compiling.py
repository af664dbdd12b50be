"""torch.compile's kernels are tuned ahead of time, as engines are built, and kept where its own cache lies.

Autotuning tries kernels for minutes and asks little of the host, so it runs in a process of its own beside the builds
of the other contenders. What is measured starts from the warm cache, which is how it is deployed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from controlrt.perf.child_process import WorkerError
from controlrt.perf.machine import Machine, installed_versions
from controlrt.perf.models import bench_directory
from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.process import PeerProcess
from controlrt.perf.peers.specs import EagerSpec
from controlrt.runtime.storage import atomic_file

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FEW_STEPS = 2
"""Enough for every shape."""


def inductor_cache() -> Path:
    """Where torch.compile keeps its kernels: as the environment says, else with the rest of the benchmark's cache."""
    return Path(os.environ.get(CACHE_VARIABLE) or bench_directory() / "inductor")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What became of it."""

    seconds: Mapping[str, float]
    """By contender, as it took when it was done."""
    failed: Mapping[str, str]
    """Why, by contender."""


class Tuning:
    """Contenders of torch.compile that fill its cache in the background. A context manager; leaving it ends them.

    Args:
        machine: whose GPUs kernels are tuned for.
        logs: folder for what they say.
        timeout: seconds that each may take.
    """

    def __init__(self, machine: Machine, logs: Path, timeout: float) -> None:
        self._machine, self._logs, self._timeout = machine, logs, timeout
        self._running = contextlib.ExitStack()
        self._workers: dict[str, tuple[PeerProcess, Path]] = {}
        self._seconds: dict[str, float] = {}

    def start(self, name: str, spec: EagerSpec, first: Call) -> None:
        """Starts what was not tuned before for this model, call, GPU and PyTorch."""
        note = inductor_cache() / f"controlrt-{self._digest(spec, first)}.seconds"
        if note.is_file():
            self._seconds[name] = float(note.read_text())
            return
        worker = self._running.enter_context(
            PeerProcess.start(name, spec, self._logs / f"{name}-tuning.log", self._timeout)
        )
        few = msgspec.structs.replace(first, steps=min(FEW_STEPS, first.steps))
        worker.begin(few, self._logs / f"{name}-tuning.npz")
        self._workers[name] = worker, note

    def wait(self) -> Tuned:
        """Waits for all that were started."""
        failed: dict[str, str] = {}
        for name, (worker, note) in self._workers.items():
            try:
                worker.load()
            except WorkerError as error:
                failed[name] = str(error)
                continue
            finally:
                worker.close()
            self._seconds[name] = worker.cold_start_seconds
            note.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(note) as partial:
                partial.write_text(f"{worker.cold_start_seconds:.2f}\n")
        self._workers.clear()
        return Tuned(seconds=self._seconds, failed=failed)

    def __enter__(self) -> Tuning:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _digest(self, spec: EagerSpec, first: Call) -> str:
        shapes = [first.width, first.height, first.batch]
        decisive = [msgspec.to_builtins(spec), shapes, self._machine.gpus, installed_versions(("torch", "diffusers"))]
        return hashlib.sha256(msgspec.json.encode(decisive, order="sorted")).hexdigest()[:16]
