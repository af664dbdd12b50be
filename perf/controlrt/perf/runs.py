"""A measurement's workers: started group by group, the reference once, stepped in turns; and what they said."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controlrt.perf.child_process import WorkerError
from controlrt.perf.rounds import interleaved
from controlrt.perf.worker_process import WorkerProcess
from controlrt.runtime.progress import Progress


@dataclass
class Runs:
    """What is known of the workers. ``measure`` fills it."""

    start: Callable[[str], WorkerProcess]
    """Starts the worker of a variant."""
    repeats: int
    directory: Path
    """Where outputs are kept."""
    samples: list[dict[str, list[float]]] = field(default_factory=list)
    """Seconds by variant of each group, the reference first."""
    load_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    """Variants that were not measured, because a worker of their group ended, and its message."""

    def measure(self, reference: str, groups: Sequence[Sequence[str]]) -> None:
        """Measures ``groups`` one after the other, each beside the reference. A group that fails costs no other.

        Raises:
            WorkerError: the reference's worker ended, or one of every group did.
        """
        total = 1 + sum(map(len, groups)) + len(groups) * (self.repeats + 1)
        with Progress("measure", total) as progress, self._loaded(reference, progress) as beside:
            for names in groups:
                try:
                    self._measure_group(reference, beside, names, progress)
                except WorkerError as error:
                    if error.variant == reference or (names is groups[-1] and not self.samples):
                        raise
                    print(f"warning: {error}; not measured: {', '.join(names)}", file=sys.stderr, flush=True)
                    self.lost |= dict.fromkeys(names, str(error))

    def outputs(self, variant: str) -> Path:
        """The file of the variant's outputs."""
        return self.directory / f"{variant}.npz"

    def _measure_group(self, reference: str, beside: WorkerProcess, names: Sequence[str], progress: Progress) -> None:
        with contextlib.ExitStack() as stack:
            workers = {reference: beside}
            for name in names:
                workers[name] = stack.enter_context(self._loaded(name, progress))
            progress.start("warm-up")
            samples = interleaved(workers, self.repeats, lambda done: self._tell_round(progress, done))
            self.samples.append(samples)
            self.peak_bytes |= {name: worker.peak_bytes for name, worker in workers.items()}

    def _tell_round(self, progress: Progress, done: int) -> None:
        if done < self.repeats:
            progress.start(f"round {done + 1} of {self.repeats}")

    @contextlib.contextmanager
    def _loaded(self, name: str, progress: Progress) -> Iterator[WorkerProcess]:
        progress.start(f"load {name}")
        with self.start(name) as worker:
            worker.load()
            worker.save(self.outputs(name))
            self.load_seconds[name] = worker.load_seconds
            yield worker
