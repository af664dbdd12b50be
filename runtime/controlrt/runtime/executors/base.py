"""What every executor does, and a plan with memory behind it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.plan import Call, Plan, View

Arrays = Mapping[str, NDArray[Any]]
Launch = Callable[[], None]
AfterStep = Callable[[int, NDArray[np.float32]], NDArray[np.float32] | None]
"""Called after every step with its number and a copy of the latents; may return others to go on with."""

DECODER, ENCODER = "vae_decoder", "vae_encoder"
"""The VAE's programs, which are run for one picture at a time."""


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """What a plan made, and how long it took."""

    latents: NDArray[np.float32]
    """(batch, channels, height/8, width/8)."""
    pictures: NDArray[np.float32] | None
    """(batch, height, width, 3) in [0, 1], where they were asked for."""
    history: NDArray[np.float32] | None
    """(batch, entries, channels, height/8, width/8): what the sampler remembers, where it was asked for."""
    steps: tuple[float, ...]
    """Seconds of each step; with ``after_step``, what that took is in them."""
    host: float
    """Seconds that the host took: to launch everything at once, or what the networks waited for it between steps."""
    decode: float
    """Seconds of the decoder."""


class Runner(Protocol):
    """What runs a program once."""

    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Runs one program once on NumPy arrays of any size it allows and returns its outputs by name."""


class Executor(abc.ABC):
    """Runs the programs of a bundle. Programs open on first use; a context manager."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    @abc.abstractmethod
    def load(self, program: str) -> None:
        """Opens ``program`` now rather than on first use.

        Raises:
            BundleError: the backend refuses it.
        """

    @abc.abstractmethod
    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Runs one program once on NumPy arrays of any size it allows and returns its outputs by name."""

    @abc.abstractmethod
    def bind(self, plan: Plan, *, decodes: bool = True, beside: Sequence[BoundPlan] = ()) -> BoundPlan:
        """Allocates the plan's buffers, zeroed, and binds every call to them.

        Args:
            plan: what to run.
            decodes: whether runs may be asked for pictures, which takes memory of its own on a GPU.
            beside: plans of this executor that never run while this one does, so that it may share buffers and bound
                calls with them. A GPU's plans share nothing, since each is a graph.
        """

    def release_scratch(self) -> None:  # noqa: B027 - plans and programs may have memory of their own
        """Gives back what programs have computed in, where they share it and none is running. Those that run next take
        it anew and lay it out for themselves, instead of in what the first of them have left in pieces."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases the programs; safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BoundPlan(abc.ABC):
    """A plan with memory behind it: write inputs into ``buffers``, then ``run`` it."""

    plan: Plan
    buffers: MutableMapping[str, NDArray[Any]]
    """Those that a call fills, by name; they keep what is written, but for the state that steps hand on."""

    @abc.abstractmethod
    def run(self, *, decode: bool, history: bool = False, after_step: AfterStep | None = None) -> PlanRun:
        """Runs every step.

        Args:
            decode: whether to decode the final latents.
            history: whether to return the sampler's history beside them, from which another plan can go on.
            after_step: called after every step.
        """

    def settle(self) -> None:  # noqa: B027 - the host's own calls end with an interrupt
        """Waits for a run that was interrupted; before ``buffers`` are written again."""

    def close(self) -> None:  # noqa: B027 - memory of the host goes by itself
        """Releases what it holds; safe to call twice."""


class HostExecutor(Executor):
    """An executor whose programs read and write the host's memory.

    Args:
        bundle: an opened bundle.
        threads: CPU threads; all cores by default.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle)
        self._threads = threads

    @abc.abstractmethod
    def bind_call(self, program: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """A launch of ``program`` that reads and writes these arrays where they lie, each time it is called."""

    def bind(self, plan: Plan, *, decodes: bool = True, beside: Sequence[BoundPlan] = ()) -> HostPlan:
        """See ``Executor``."""
        del decodes
        memories = (other.memory for other in beside if isinstance(other, HostPlan))
        shared = next((memory for memory in memories if memory.fits(plan)), None)
        return HostPlan(self, plan, shared or _Memory())


_KEPT_LAUNCHES = 2048
"""Of the plans of one memory; plans keep their own."""


class _Memory:
    """Buffers of the host, and the calls that are bound to them, of plans that run one at a time."""

    def __init__(self) -> None:
        self.buffers: dict[str, NDArray[Any]] = {}
        self._described: dict[str, tuple[tuple[int, ...], str]] = {}
        self._launches: dict[int, tuple[Call, Launch]] = {}
        """By the identity of the call: the planner gives the same one to all plans that make it."""

    def fits(self, plan: Plan) -> bool:
        """Whether the plan's buffers are those that are here, wherever their names are the same."""
        return all(self._described.get(name, described) == described for name, described in plan.buffers.items())

    def allocate(self, plan: Plan) -> dict[str, NDArray[Any]]:
        """The buffers of a plan; zeros, where they are new."""
        for name, (shape, dtype) in plan.buffers.items():
            if name not in self.buffers:
                self.buffers[name], self._described[name] = np.zeros(shape, dtype), (shape, dtype)
        return {name: self.buffers[name] for name in plan.buffers}

    def launch(self, call: Call, executor: HostExecutor) -> Launch:
        """A call of a plan whose buffers are allocated, bound to them."""
        if id(call) in self._launches:
            return self._launches[id(call)][1]
        inputs, outputs = self._arrays(call.inputs), self._arrays(call.outputs)
        launch = executor.bind_call(call.program, inputs, outputs)
        self._launches[id(call)] = call, launch
        if len(self._launches) > _KEPT_LAUNCHES:
            del self._launches[next(iter(self._launches))]
        return launch

    def _arrays(self, views: Mapping[str, View]) -> dict[str, NDArray[Any]]:
        return {name: self._array(view) for name, view in views.items()}

    def _array(self, view: View) -> NDArray[Any]:
        array = self.buffers[view.buffer]
        if view.step is not None:
            array = array[view.step]
        return array if view.rows is None else array[view.rows.start : view.rows.stop]


class HostPlan(BoundPlan):
    """A plan whose calls are launched one after another. All of its buffers are there to read.

    Buffers that only programs write keep what a plan of the same memory left in them, as they do from call to call.
    """

    def __init__(self, executor: HostExecutor, plan: Plan, memory: _Memory) -> None:
        self.plan, self.memory, self._executor = plan, memory, executor
        self.buffers = memory.allocate(plan)
        self._steps = [[memory.launch(call, executor) for call in calls] for calls in plan.steps]

    def run_step(self, step: int) -> float:
        """Runs the calls of one step; returns the seconds that they took."""
        started = perf_counter()
        for launch in self._steps[step]:
            launch()
        return perf_counter() - started

    def run(self, *, decode: bool, history: bool = False, after_step: AfterStep | None = None) -> PlanRun:
        """See ``BoundPlan``."""
        steps, launches = [], 0.0
        for step in range(len(self._steps)):
            started = perf_counter()
            launches += self.run_step(step)
            latents = self.buffers[self.plan.state("latents", step + 1)]
            if after_step is not None:
                given = after_step(step, latents.copy())
                if given is not None:
                    latents[...] = given
            steps.append(perf_counter() - started)
        started = perf_counter()
        latents = self.buffers[self.plan.result].copy()
        return PlanRun(
            latents=latents,
            pictures=self._decode(latents) if decode else None,
            history=self.buffers[self.plan.state("history", len(self._steps))].copy() if history else None,
            steps=tuple(steps),
            host=sum(steps) - launches,
            decode=perf_counter() - started,
        )

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """One picture at a time, to keep memory flat."""
        return np.concatenate([self._executor.run(DECODER, {"latents": row[None]})["picture"] for row in latents])
