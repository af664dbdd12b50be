"""Prepares the contenders of a question and measures them, one scenario after the other."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from controlrt.perf.findings import Findings
from controlrt.perf.machine import Machine
from controlrt.perf.models import BenchModel
from controlrt.perf.peers.builds import Prepared, Workshop
from controlrt.perf.peers.compiling import Tuning
from controlrt.perf.peers.contenders import Peer
from controlrt.perf.peers.process import PeerProcess
from controlrt.perf.question import Question
from controlrt.perf.results import Scenario
from controlrt.perf.rounds import Footprint, grouped
from controlrt.perf.scenarios import Task
from controlrt.perf.session import Session
from controlrt.runtime.errors import ControlRTError, UserError
from controlrt.runtime.machine import available_memory

GIB = 2**30
WORKER_BYTES = 700 * 2**20
WEIGHT_COPIES = 1.3
"""An estimate of a worker's memory: interpreter and libraries; weights, packed once more or less, and activations."""
USABLE_MEMORY = 0.9
"""Of what is available, where --memory does not say."""


class Benchmark:
    """Measures the contenders of a question, one task after the other.

    Args:
        question: what is asked.
        model: the checkpoint.
        machine: this one.
        memory_bytes: what all contenders that run side by side may take; None for most of what is available. Where
            that does not hold two of them, they run one at a time.

    Raises:
        UserError: less memory than a contender takes.
    """

    def __init__(self, question: Question, model: BenchModel, machine: Machine, memory_bytes: int | None) -> None:
        self.model = model
        self._question, self._machine = question, machine
        self._budget = memory_bytes or int(available_memory() * USABLE_MEMORY)
        self._workshop = Workshop(model, batch=question.batch, threads=question.threads, profile=question.profile)
        widest = max((task.controls for task in question.tasks), key=len)
        needed = self._footprint(widest)
        if needed > self._budget:
            raise UserError(
                f"a contender of {model.name} takes about {needed / GIB:.1f} GiB, and {self._budget / GIB:.1f} GiB "
                "may be used; free some memory, or say with --memory GIB how much there is"
            )

    def build(self, task: Task, scratch: Path) -> tuple[dict[str, Prepared], dict[str, str]]:
        """Builds what the contenders of a task need and do not have: those that can start, and why others cannot.

        torch.compile tunes kernels for a GPU meanwhile, in the background.
        """
        prepared: dict[str, Prepared] = {}
        unbuilt: dict[str, str] = {}
        with Tuning(self._machine, scratch, self._question.timeout) as tuning:
            for peer in self._tuned:
                with contextlib.suppress(ControlRTError):  # said below, where the contender is prepared
                    tuning.start(peer.name, self._workshop.eager_spec(peer, task), task.calls(0)[0])
            for peer in self._question.peers:
                try:
                    prepared[peer.name] = self._workshop.prepare(peer, task)
                except ControlRTError as error:
                    unbuilt[peer.name] = str(error)
            tuned = tuning.wait()
        for name, seconds in tuned.seconds.items():
            prepared[name] = dataclasses.replace(prepared[name], build_seconds=seconds)
        return {name: each for name, each in prepared.items() if name not in tuned.failed}, unbuilt | dict(tuned.failed)

    def measure(self, task: Task, scratch: Path) -> Scenario:
        """One scenario. ``scratch`` takes first pictures and logs."""
        prepared, unbuilt = self.build(task, scratch)
        session = Session(
            task=task,
            start=lambda name: PeerProcess.start(
                name, prepared[name].spec, scratch / f"{name}.log", self._question.timeout
            ),
            rounds=self._question.rounds,
            warm_ups=self._question.warm_ups,
            directory=scratch,
            early=[peer.name for peer in self._tuned],
        )
        alone = len(prepared) > 1 and 2 * self._footprint(task.controls) > self._budget
        if alone:
            session.measure_one_at_a_time(list(prepared))
        else:
            session.measure(list(prepared), lambda reference, others: self._groups(task, reference, others))
        return Findings(
            task=task,
            peers=self._question.peers,
            prepared=prepared,
            unbuilt=unbuilt,
            session=session,
            threads=self._question.threads,
            one_at_a_time=alone,
        ).scenario()

    @property
    def _tuned(self) -> list[Peer]:
        return [peer for peer in self._question.peers if peer.compile_mode is not None and peer.device == "cuda"]

    def _groups(self, task: Task, reference: str, others: Sequence[str]) -> list[list[str]]:
        each = self._footprint(task.controls)
        footprints = [Footprint(name=name, memory_bytes=each) for name in others]
        return grouped(footprints, Footprint(name=reference, memory_bytes=each), self._budget)

    def _footprint(self, controls: Sequence[str]) -> int:
        return int(WORKER_BYTES + WEIGHT_COPIES * self.model.float32_bytes(controls))
