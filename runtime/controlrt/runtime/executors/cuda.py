"""Runs programs on a GPU: a plan is captured in one CUDA graph, from the upload of its inputs to the pictures."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.cuda.device import MAIN, SIDE, Device, DeviceArray
from controlrt.runtime.cuda.engine import Engine, EngineLaunch, Engines
from controlrt.runtime.cuda.plan_memory import PlanMemory, Staged, allocate
from controlrt.runtime.errors import DeviceError
from controlrt.runtime.executors.base import DECODER, AfterStep, Arrays, BoundPlan, Executor, PlanRun
from controlrt.runtime.manifest import Program
from controlrt.runtime.plan import Plan, View
from controlrt.runtime.shapes import dimensions_of, shape_of

_KEPT_RUNS = 16
"""Programs outside of plans that stay bound, by program and sizes."""


class CudaExecutor(Executor):
    """One engine per program, on one GPU: ControlNets on its side stream where they run beside the UNet's encoder.

    Args:
        bundle: an opened bundle.
        device: where to run it; closed with the executor.
        engines: of the bundle's backend; closed with the executor.
    """

    def __init__(self, bundle: Bundle, device: Device, engines: Engines) -> None:
        super().__init__(bundle)
        self._device, self._library = device, engines
        self._engines: dict[str, Engine] = {}
        self._runs: OrderedDict[tuple[Any, ...], _BoundProgram] = OrderedDict()
        self._plans: weakref.WeakSet[CudaPlan] = weakref.WeakSet()

    def load(self, program: str) -> None:
        """See ``Executor``."""
        self._device.activate()
        self._engine(program)

    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See ``Executor``."""
        self._device.activate()
        key = (program, *((name, array.shape) for name, array in sorted(inputs.items())))
        if key not in self._runs:
            while len(self._runs) >= _KEPT_RUNS:
                self._runs.popitem(last=False)[1].close()
            described = self._bundle.manifest.program(program)
            self._runs[key] = _BoundProgram(self._device, self._engine(program), described, inputs)
        self._runs.move_to_end(key)
        return self._runs[key].run(inputs)

    def bind(self, plan: Plan, *, decodes: bool = True, beside: Sequence[BoundPlan] = ()) -> CudaPlan:
        """See ``Executor``."""
        del beside
        self._device.activate()
        decoder = self._bundle.manifest.program(DECODER) if decodes else None
        bound = CudaPlan(self._device, self._engine, self._stream, plan, decoder)
        self._plans.add(bound)
        return bound

    def close(self) -> None:
        """See ``Executor``."""
        if self._engines or self._runs:
            self._device.activate()
        for plan in self._plans:
            plan.close()
        for run in self._runs.values():
            run.close()
        self._runs.clear()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._library.close()
        self._device.close()

    def _engine(self, program: str) -> Engine:
        if program not in self._engines:
            described = self._bundle.manifest.program(program)
            file = self._bundle.file(described.file)
            self._engines[program] = self._library.open(described, file, self._stream(program))
        return self._engines[program]

    def _stream(self, program: str) -> int:
        """ControlNets have a stream of their own where the UNet has something to do meanwhile."""
        manifest = self._bundle.manifest
        described = manifest.program(program)
        beside = described.stage == "step" and described.part.startswith("controlnet.")
        return SIDE if beside and manifest.stage("unet", "encode") is not None else MAIN


class CudaPlan(BoundPlan):
    """A plan on a GPU. Its buffers are pinned memory of the host, which every run uploads whole, in one copy.

    Graphs are captured when they are first needed: one of the whole run, and where somebody wants to see the steps,
    one of each step. All later runs launch them again.
    """

    def __init__(
        self,
        device: Device,
        engine: Callable[[str], Engine],
        stream: Callable[[str], int],
        plan: Plan,
        decoder: Program | None,
    ) -> None:
        self.plan, self._device = plan, device
        with ExitStack() as resources:
            self._memory = PlanMemory(device, plan, resources)
            self.buffers = self._memory.inputs
            self._graphs: dict[str, int] = {}
            self._running = False
            launches: dict[tuple[Any, ...], EngineLaunch] = {}

            def bind(
                program: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
            ) -> EngineLaunch:
                key = (program, tuple(inputs.items()), tuple(outputs.items()))
                if key not in launches:
                    launches[key] = engine(program).bind(inputs, outputs)
                return launches[key]

            self._steps = [
                [(stream(call.program), bind(*self._memory.call(call))) for call in calls] for calls in plan.steps
            ]
            self._latents = self._staged(plan.result, resources)
            self._history = self._staged(plan.state("history", len(plan.steps)), resources)
            self._pictures: Staged | None = None
            self._decoder: list[EngineLaunch] = []
            if decoder is not None:
                final = self._memory.array(View(plan.result))
                size = dimensions_of(decoder.inputs, {"latents": (1, *final.shape[1:])})
                shape = final.shape[0], *shape_of(decoder.outputs[0], size)[1:]
                self._pictures = Staged(device, shape, np.float32, resources)
                for row in range(final.shape[0]):
                    rows = range(row, row + 1)
                    outputs = {decoder.outputs[0].name: self._pictures.device.rows(rows)}
                    self._decoder.append(bind(DECODER, {"latents": final.rows(rows)}, outputs))
            for each in (MAIN, SIDE):  # programs of one stream run one after another: one scratch memory serves all
                own = [launch for (program, *_), launch in launches.items() if stream(program) == each]
                _share_scratch(device, own, resources)
            self._events = [_event(device, resources) for _ in range(len(plan.steps) + 2)]
            self._warm_up(launches)
            self._resources = resources.pop_all()

    def run(self, *, decode: bool, history: bool = False, after_step: AfterStep | None = None) -> PlanRun:
        """See ``BoundPlan``."""
        self._device.activate()
        self._running = True
        if after_step is None:
            ran = self._run_at_once(decode, history)
        else:
            ran = self._run_by_steps(decode, history, after_step)
        self._running = False
        return ran

    def _run_at_once(self, decode: bool, history: bool) -> PlanRun:
        name = " and ".join(["run", *["decode"] * decode, *["history"] * history])
        graph = self._graph(name, lambda: self._queue(decode, history))
        started = perf_counter()
        self._device.launch(graph)
        launched = perf_counter()
        self._device.synchronize()
        seconds = [self._device.elapsed(*pair) for pair in itertools.pairwise(self._events)]
        return PlanRun(
            latents=self._latents.host.copy(),
            pictures=self._pictures.host.copy() if decode and self._pictures else None,
            history=self._history.host.copy() if history else None,
            steps=tuple(seconds[:-1]),
            host=launched - started,
            decode=seconds[-1] if decode else 0.0,
        )

    def settle(self) -> None:
        """See ``BoundPlan``."""
        if self._running:
            self._device.activate()
            self._device.synchronize()
            self._running = False

    def close(self) -> None:
        """See ``BoundPlan``."""
        if not self._steps:
            return
        self._device.activate()
        with contextlib.suppress(DeviceError):  # nothing may be freed under a graph that was interrupted
            self._device.synchronize()
        for graph in self._graphs.values():
            self._device.destroy_graph(graph)
        self._graphs.clear()
        self._steps, self._decoder = [], []
        self._resources.close()

    def _queue(self, decode: bool, history: bool) -> None:
        """Everything from the upload to the pictures."""
        device, result = self._device, self.plan.result
        self._memory.upload()
        device.record(self._events[0])
        for step in range(len(self._steps)):
            self._queue_calls(step)
            device.record(self._events[step + 1])
        self._latents.download(self._memory.array(View(result)))
        if history:
            self._download_history()
        if decode:
            self._queue_decoder()
        device.record(self._events[-1])

    def _run_by_steps(self, decode: bool, history: bool, after_step: AfterStep) -> PlanRun:
        self._graph("upload", self._memory.upload)
        steps, host = [], 0.0
        self._device.launch(self._graphs["upload"])
        for step in range(len(self._steps)):
            state = self._memory.array(View(self.plan.state("latents", step + 1)))
            graph = self._graph(f"step {step}", partial(self._queue_step, step, state))
            started = perf_counter()
            self._device.launch(graph)
            self._device.synchronize()
            waited = perf_counter()
            given = after_step(step, self._latents.host.copy())
            if given is not None:
                self._latents.host[...] = given
                self._device.copy(state.address, self._latents.address, state.nbytes)
            steps.append(perf_counter() - started)
            host += perf_counter() - waited
        decoder = self._graph("decode", self._queue_decoder) if decode else None
        started = perf_counter()
        if decoder is not None:
            self._device.launch(decoder)
        if history:
            self._download_history()
        self._device.synchronize()
        return PlanRun(
            latents=self._latents.host.copy(),
            pictures=self._pictures.host.copy() if decode and self._pictures else None,
            history=self._history.host.copy() if history else None,
            steps=tuple(steps),
            host=host,
            decode=perf_counter() - started,
        )

    def _queue_step(self, step: int, state: DeviceArray) -> None:
        self._queue_calls(step)
        self._latents.download(state)

    def _queue_calls(self, step: int) -> None:
        """The calls of a step: those of the side stream read what the step before left, and the last reads them all."""
        *first, (_, last) = self._steps[step]
        beside = any(stream == SIDE for stream, _ in first)
        if beside:
            self._device.wait(SIDE, MAIN)
        for _, launch in first:
            launch()
        if beside:
            self._device.wait(MAIN, SIDE)
        last()

    def _queue_decoder(self) -> None:
        if self._pictures is None:
            raise DeviceError("the plan was bound without a decoder")
        for launch in self._decoder:
            launch()
        self._pictures.download()

    def _staged(self, buffer: str, resources: ExitStack) -> Staged:
        """Memory of the host for a buffer's copy."""
        shape, dtype = self.plan.buffers[buffer]
        return Staged(self._device, shape, np.dtype(dtype), resources)

    def _download_history(self) -> None:
        self._history.download(self._memory.array(View(self.plan.state("history", len(self._steps)))))

    def _graph(self, name: str, queue: Callable[[], None]) -> int:
        if name not in self._graphs:
            self._graphs[name] = _captured(self._device, queue)
        return self._graphs[name]

    def _warm_up(self, launches: Mapping[tuple[Any, ...], EngineLaunch]) -> None:
        """Launches each program once at each of its sizes: engines choose kernels and take memory when they first run,
        which a capture has no place for."""
        self._memory.upload()
        self._device.wait(SIDE, MAIN)
        warm = set()
        for (program, inputs, outputs), launch in launches.items():
            sizes = (program, *((name, array.shape) for name, array in (*inputs, *outputs)))
            if sizes not in warm:
                warm.add(sizes)
                launch()
        self._device.synchronize()
        self._memory.clear()


class _BoundProgram:
    """A program outside of a plan, at one set of sizes. It is not captured: it runs rarely, and parts of it may run on
    the host."""

    def __init__(self, device: Device, engine: Engine, program: Program, inputs: Arrays) -> None:
        self._device = device
        dims = dimensions_of(program.inputs, {name: array.shape for name, array in inputs.items()})
        with ExitStack() as resources:
            self._inputs = {
                spec.name: Staged(device, inputs[spec.name].shape, spec.dtype, resources) for spec in program.inputs
            }
            self._outputs = {
                spec.name: Staged(device, shape_of(spec, dims), spec.dtype, resources) for spec in program.outputs
            }
            self._launch: EngineLaunch | None = engine.bind(
                {name: staged.device for name, staged in self._inputs.items()},
                {name: staged.device for name, staged in self._outputs.items()},
            )
            _share_scratch(device, [self._launch], resources)
            self._resources = resources.pop_all()

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Runs it and returns copies of its outputs."""
        if self._launch is None:
            raise DeviceError("the program is closed")
        for name, staged in self._inputs.items():
            staged.host[...] = inputs[name]
        for staged in self._inputs.values():
            staged.upload()
        self._launch()
        for staged in self._outputs.values():
            staged.download()
        self._device.synchronize()
        return {name: staged.host.copy() for name, staged in self._outputs.items()}

    def close(self) -> None:
        """Releases its memory; safe to call twice."""
        if self._launch is None:
            return
        self._launch = None
        self._device.activate()
        with contextlib.suppress(DeviceError):
            self._device.synchronize()
        self._resources.close()


def _share_scratch(device: Device, launches: Sequence[EngineLaunch], resources: ExitStack) -> None:
    needed = max((launch.scratch_bytes for launch in launches), default=0)
    if needed:
        address = allocate(device, needed, resources)
        for launch in launches:
            launch.use_scratch(address)


def _captured(device: Device, queue: Callable[[], None]) -> int:
    device.begin_capture()
    try:
        queue()
        return device.end_capture()
    except BaseException:
        device.abandon_capture()
        raise


def _event(device: Device, resources: ExitStack) -> int:
    event = device.create_event()
    resources.callback(device.destroy_event, event)
    return event
