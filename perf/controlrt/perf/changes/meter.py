"""Calls of a pipeline, and whose time they took: the networks' or the host's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from controlrt.perf.peers.drawer import Stopwatch
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.executors import HostExecutor

STAGES = ("check", "bind", "condition", "noise")
"""Of the host, in order: checking and laying out; binding memory; copying what earlier stages gave; drawing noise and
filling buffers."""
EARLY = "early"


@dataclass(frozen=True, kw_only=True)
class CallSeconds:
    """One call."""

    stages: Mapping[str, float]
    """Of each of STAGES, without what programs ran in it."""
    networks: float
    """Programs that ran before the loop: text encoders and control pictures that are new."""
    steps: tuple[float, ...]
    programs: Mapping[str, float]
    """Of all steps, by program; empty where the steps are not launched one by one, as on a GPU."""

    @property
    def host(self) -> float:
        """The whole call, but for its networks."""
        return sum(self.stages.values())


class Meter:
    """Calls one pipeline, before which nothing may have been drawn with it."""

    def __init__(self, pipeline: ControlNetPipeline) -> None:
        self._pipeline, self._watch = pipeline, Stopwatch()
        executor = pipeline._executor  # nothing public says which program took how long
        executor.run = self._watch.timed(EARLY, executor.run)  # type: ignore[method-assign]
        if isinstance(executor, HostExecutor):
            bind_call = executor.bind_call
            executor.bind_call = lambda program, inputs, outputs: self._watch.timed(  # type: ignore[method-assign]
                program, bind_call(program, inputs, outputs)
            )

    def call(self, arguments: Mapping[str, Any]) -> CallSeconds:
        """Draws latents."""
        self._watch.seconds.clear()
        started = perf_counter()
        timings = self._pipeline(**arguments).timings
        whole = perf_counter() - started
        programs = dict(self._watch.seconds)
        networks = programs.pop(EARLY, 0.0)
        return CallSeconds(
            stages={
                "check": whole - timings.total,
                "bind": timings.bind,
                "condition": timings.condition - networks,
                "noise": timings.noise,
            },
            networks=networks,
            steps=timings.steps,
            programs=programs,
        )
