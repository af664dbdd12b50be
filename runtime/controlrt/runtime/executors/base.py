"""What every executor does, and a plan with memory behind it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.plan import Plan, View

Arrays = Mapping[str, NDArray[Any]]
Launch = Callable[[], None]


class Executor(abc.ABC):
    """Runs the programs of a bundle. Programs open on first use; a context manager."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self._bundle, self._threads = bundle, threads

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
    def bind_call(self, program: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """A launch of ``program`` that reads and writes these arrays where they lie, each time it is called."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases the programs; safe to call twice."""

    def bind(self, plan: Plan) -> BoundPlan:
        """Allocates the plan's buffers, zeroed, and binds every call to them."""
        return BoundPlan(self, plan)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BoundPlan:
    """A plan with memory behind it. Write inputs into ``buffers``, run the steps, read ``buffers[plan.result]``."""

    def __init__(self, executor: Executor, plan: Plan) -> None:
        self.plan = plan
        self.buffers = {name: np.zeros(shape, dtype) for name, (shape, dtype) in plan.buffers.items()}
        self._steps = [
            [executor.bind_call(call.program, self._arrays(call.inputs), self._arrays(call.outputs)) for call in calls]
            for calls in plan.steps
        ]

    def run_step(self, step: int) -> None:
        """Runs the calls of one step."""
        for launch in self._steps[step]:
            launch()

    def _arrays(self, views: Mapping[str, View]) -> dict[str, NDArray[Any]]:
        return {name: self._array(view) for name, view in views.items()}

    def _array(self, view: View) -> NDArray[Any]:
        array = self.buffers[view.buffer]
        if view.step is not None:
            array = array[view.step]
        return array if view.rows is None else array[view.rows.start : view.rows.stop]
