"""One scenario measured: contenders drawing in turns, loaded beside each other or one at a time, until they fail or are
done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controlrt.perf.child_process import WorkerError
from controlrt.perf.device_memory import DeviceMemoryWatch
from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.drawer import CallSeconds
from controlrt.perf.peers.process import PeerProcess
from controlrt.perf.peers.specs import Answer
from controlrt.perf.rounds import turns
from controlrt.perf.scenarios import Task
from controlrt.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Started:
    """What is known of a contender once it has drawn its first pictures."""

    load_seconds: float
    first_request_seconds: float
    cold_start_seconds: float
    peak_device_bytes: int | None


@dataclass
class Session:
    """What is known of the contenders of one task. ``measure`` or ``measure_one_at_a_time`` fills it."""

    task: Task
    start: Callable[[str], PeerProcess]
    """Starts the process of a contender."""
    rounds: int
    warm_ups: int
    directory: Path
    """Where first pictures are kept."""
    early: Collection[str] = ()
    """Contenders whose start takes long and is mostly theirs alone: they start before the others of their group and are
    waited for after them."""
    groups: list[dict[str, list[CallSeconds]]] = field(default_factory=list)
    """Measured calls by contender of each group, the reference in every one."""
    started: dict[str, Started] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    """The last answer of each, with its memory."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why, by contender."""
    reference: str | None = None

    def measure(self, names: Sequence[str], group: Callable[[str, Sequence[str]], Sequence[Sequence[str]]]) -> None:
        """Measures the contenders, the first that starts being the reference that runs beside every group.

        Args:
            names: who is to be measured, in order.
            group: splits the others into groups that fit into memory beside a reference.
        """
        with Progress(self.task.name, 2 * len(names) + self._turns) as progress, contextlib.ExitStack() as stack:
            left = list(names)
            beside: PeerProcess | None = None
            while left and beside is None:
                self.reference = left.pop(0)
                with DeviceMemoryWatch() as watch:
                    beside = self._load(self._begin(self.reference, stack), watch, progress)
            if beside is None or self.reference is None:
                self.reference = None
                return
            groups = [list(each) for each in group(self.reference, left)] or [[]]
            progress.total = len(names) + len(groups) * self._turns
            for others in groups:
                if self.reference in self.failed:
                    why = f"{self.reference}, which runs beside all others, failed: {self.failed[self.reference]}"
                    self.failed |= dict.fromkeys(others, why)
                    continue
                self._measure_group(beside, others, progress)

    def measure_one_at_a_time(self, names: Sequence[str]) -> None:
        """Measures contenders of which memory holds no two: each is loaded anew in every round, and its first request
        is the warm-up.

        Args:
            names: who is to be measured, in order.
        """
        samples: dict[str, list[CallSeconds]] = {name: [] for name in names}
        with Progress(self.task.name, len(names) * self.rounds) as progress:
            for number, name in turns(names, range(self.rounds)):
                if name in self.failed:
                    continue
                with contextlib.ExitStack() as stack:
                    with DeviceMemoryWatch() as watch:
                        what = f"{name}, round {number + 1} of {self.rounds}"
                        worker = self._load(self._begin(name, stack), watch, progress, what)
                    if worker is not None:
                        samples[name] += self._draw(worker, number)
                        if worker.last is not None:
                            self.answers[name] = worker.last
        sound = [name for name in names if name not in self.failed]
        self.reference = sound[0] if sound else None
        self.groups.append({name: samples[name] for name in sound})

    def recorded(self, name: str) -> Path:
        """The file of a contender's first pictures."""
        return self.directory / f"{name}.npz"

    @property
    def _turns(self) -> int:
        return self.rounds + self.warm_ups

    def _measure_group(self, beside: PeerProcess, names: Sequence[str], progress: Progress) -> None:
        with contextlib.ExitStack() as stack:
            loaded = {beside.variant: beside}
            with DeviceMemoryWatch() as watch:
                begun = {name: self._begin(name, stack) for name in names if name in self.early}
                for name in sorted(names, key=begun.__contains__):
                    worker = self._load(begun.get(name) or self._begin(name, stack), watch, progress)
                    if worker is not None:
                        loaded[name] = worker
            workers = {name: loaded[name] for name in (beside.variant, *names) if name in loaded}
            samples: dict[str, list[CallSeconds]] = {name: [] for name in workers}
            told = None
            for number, name in turns(tuple(workers), range(-self.warm_ups, self.rounds)):
                if number != told:
                    told = number
                    progress.start("warm-up" if number < 0 else f"round {number + 1} of {self.rounds}")
                if name in self.failed:
                    continue
                drawn = self._draw(workers[name], number)
                if number >= 0:
                    samples[name] += drawn
            self.groups.append({name: calls for name, calls in samples.items() if name not in self.failed})
            for name, worker in workers.items():
                if worker.last is not None:
                    self.answers[name] = worker.last

    def _draw(self, worker: PeerProcess, round_number: int) -> list[CallSeconds]:
        """The calls of one round; none where the contender fails."""
        try:
            return [worker.draw(call) for call in self.task.calls(round_number)]
        except WorkerError as error:
            self.failed[worker.variant] = str(error)
            return []

    def _begin(self, name: str, stack: contextlib.ExitStack) -> PeerProcess:
        """Starts the contender, which draws its first pictures as soon as it can."""
        worker = stack.enter_context(self.start(name))
        worker.begin(self._first(), self.recorded(name))
        return worker

    def _load(
        self, worker: PeerProcess, watch: DeviceMemoryWatch, progress: Progress, what: str | None = None
    ) -> PeerProcess | None:
        """The contender, ready and with its first pictures drawn; None where it fails."""
        name = worker.variant
        progress.start(what or f"load {name}")
        try:
            worker.load()
        except WorkerError as error:
            self.failed[name] = str(error)
            return None
        started = Started(
            load_seconds=worker.load_seconds,
            first_request_seconds=worker.first_request_seconds,
            cold_start_seconds=worker.cold_start_seconds,
            peak_device_bytes=watch.peak_bytes(worker.pid),
        )
        self.started.setdefault(name, started)
        return worker

    def _first(self) -> Call:
        return self.task.calls(-self.warm_ups - 1)[0]
