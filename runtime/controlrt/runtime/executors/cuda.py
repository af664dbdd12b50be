"""Runs programs on a GPU: a plan is captured in one CUDA graph, from the upload of its inputs to the pictures."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import math
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
from controlrt.runtime.cuda.memory import Lifetime, aligned, place
from controlrt.runtime.errors import DeviceError
from controlrt.runtime.executors.base import DECODER, AfterStep, Arrays, BoundPlan, Executor, PlanRun
from controlrt.runtime.manifest import Program
from controlrt.runtime.plan import STATE, Call, Plan, View
from controlrt.runtime.shapes import dimensions_of, shape_of

_KEPT_RUNS = 16
"""Programs outside of plans that stay bound, by program and sizes."""


class CudaExecutor(Executor):
    """One engine per program, all on one stream of one GPU.

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

    def bind(self, plan: Plan) -> CudaPlan:
        """See ``Executor``."""
        self._device.activate()
        bound = CudaPlan(self._device, self._engine, self._stream, plan, self._bundle.manifest.program(DECODER))
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
        decoder: Program,
    ) -> None:
        self.plan, self._device = plan, device
        with ExitStack() as resources:
            self._memory = _PlanMemory(device, plan, resources)
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
            shape, dtype = plan.buffers[plan.result]
            final = self._memory.array(View(plan.result))
            size = dimensions_of(decoder.inputs, {"latents": (1, *shape[1:])})
            self._pictures = _Staged(device, (shape[0], *shape_of(decoder.outputs[0], size)[1:]), np.float32, resources)
            self._latents = _Staged(device, shape, np.dtype(dtype), resources)
            self._decoder = [
                bind(
                    DECODER,
                    {"latents": final.rows(range(row, row + 1))},
                    {decoder.outputs[0].name: self._pictures.device.rows(range(row, row + 1))},
                )
                for row in range(shape[0])
            ]
            for each in (MAIN, SIDE):  # programs of one stream run one after another: one scratch memory serves all
                own = [launch for (program, *_), launch in launches.items() if stream(program) == each]
                _share_scratch(device, own, resources)
            self._events = [_event(device, resources) for _ in range(len(plan.steps) + 2)]
            self._warm_up(launches)
            self._resources = resources.pop_all()

    def run(self, *, decode: bool, after_step: AfterStep | None = None) -> PlanRun:
        """See ``BoundPlan``."""
        self._device.activate()
        self._running = True
        ran = self._run_at_once(decode) if after_step is None else self._run_by_steps(decode, after_step)
        self._running = False
        return ran

    def _run_at_once(self, decode: bool) -> PlanRun:
        graph = self._graph("run and decode" if decode else "run", lambda: self._queue(decode))
        started = perf_counter()
        self._device.launch(graph)
        launched = perf_counter()
        self._device.synchronize()
        seconds = [self._device.elapsed(*pair) for pair in itertools.pairwise(self._events)]
        return PlanRun(
            latents=self._latents.host.copy(),
            pictures=self._pictures.host.copy() if decode else None,
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

    def _queue(self, decode: bool) -> None:
        """Everything from the upload to the pictures."""
        device, result = self._device, self.plan.result
        self._memory.upload()
        device.record(self._events[0])
        for step in range(len(self._steps)):
            self._queue_calls(step)
            device.record(self._events[step + 1])
        self._latents.download(self._memory.array(View(result)))
        if decode:
            for launch in self._decoder:
                launch()
            self._pictures.download()
        device.record(self._events[-1])

    def _run_by_steps(self, decode: bool, after_step: AfterStep) -> PlanRun:
        self._graph("upload", self._memory.upload)
        steps, host = [], 0.0
        self._device.launch(self._graphs["upload"])
        for step in range(len(self._steps)):
            state = self._memory.array(View(self.plan.latents(step + 1)))
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
        self._device.synchronize()
        return PlanRun(
            latents=self._latents.host.copy(),
            pictures=self._pictures.host.copy() if decode else None,
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
        for launch in self._decoder:
            launch()
        self._pictures.download()

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


class _PlanMemory:
    """Device memory of a plan's buffers, and pinned memory of those that the host fills.

    Inputs lie together at its start; each entry of a table over steps is aligned, as engines want. What calls write
    whole and only calls read is behind them, and shares memory where it is never in use together; see ``place``.
    """

    def __init__(self, device: Device, plan: Plan, resources: ExitStack) -> None:
        self._device, self._plan = device, plan
        between = lifetimes(plan)
        made = {view.buffer for step in plan.steps for call in step for view in call.outputs.values()}
        made -= {name for name in made if name.endswith(".0") and name.removesuffix(".0") in STATE}
        views = [
            view for step in plan.steps for call in step for view in (*call.inputs.values(), *call.outputs.values())
        ]
        tables = {view.buffer for view in views if view.step is not None}
        arrays = {
            name: DeviceArray(0, shape, np.dtype(dtype), aligned(_nbytes(shape[1:], dtype)) if name in tables else None)
            for name, (shape, dtype) in plan.buffers.items()
        }
        offsets, end = {}, 0
        for name in plan.buffers:
            if name not in made and not name.startswith("residual_"):
                offsets[name], end = end, end + aligned(arrays[name].nbytes)
        self._input_bytes = end
        for name in plan.buffers:
            if name not in between and name not in offsets:
                offsets[name], end = end, end + aligned(arrays[name].nbytes)
        shared = place(between)
        offsets |= {name: end + offset for name, offset in shared.offsets.items()}
        self._bytes = end + shared.total
        base = _allocated(device, self._bytes, resources)
        self._arrays = {
            name: dataclasses.replace(arrays[name], address=base + offset) for name, offset in offsets.items()
        }
        self._base = base
        self._host = _pinned(device, self._input_bytes, resources)
        mirror = _bytes_at(self._host, self._input_bytes)
        mirror[...] = 0
        self.inputs = {
            name: _mirrored(mirror, offset, arrays[name])
            for name, offset in offsets.items()
            if offset < self._input_bytes
        }
        self.clear()

    def clear(self) -> None:
        """Zeros everywhere."""
        self._device.clear(self._base, self._bytes)

    def upload(self) -> None:
        """Queues the copy of all inputs."""
        self._device.copy(self._base, self._host, self._input_bytes)

    def call(self, call: Call) -> tuple[str, dict[str, DeviceArray], dict[str, DeviceArray]]:
        """What a call binds."""
        inputs = {name: self.array(view) for name, view in call.inputs.items()}
        return call.program, inputs, {name: self.array(view) for name, view in call.outputs.items()}

    def array(self, view: View) -> DeviceArray:
        """What a view shows."""
        array = self._arrays[view.buffer]
        if view.step is not None:
            array = array.entry(view.step)
        return array if view.rows is None else array.rows(view.rows)


def lifetimes(plan: Plan) -> dict[str, Lifetime]:
    """When the buffers are in use that calls write whole before any call reads them; the others hold something from
    before the first call, and stay. Moments are two in a step: its last call, and all before, which may run together.
    """
    calls = [
        (2 * step + (number == len(together) - 1), call)
        for step, together in enumerate(plan.steps)
        for number, call in enumerate(together)
    ]
    found: dict[str, Lifetime] = {}
    kept = {plan.result}
    for moment, call in calls:
        for view in call.inputs.values():
            if view.buffer in found:
                found[view.buffer] = _until(found[view.buffer], moment)
            else:
                kept.add(view.buffer)
        for view in call.outputs.values():
            if view.rows is not None or view.step is not None:
                kept.add(view.buffer)
            elif view.buffer in found:
                found[view.buffer] = _until(found[view.buffer], moment)
            else:
                found[view.buffer] = Lifetime(_nbytes(*plan.buffers[view.buffer]), moment, moment)
    return {name: block for name, block in found.items() if name not in kept}


class _Staged:
    """A device array and pinned memory for its copy."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: Any, resources: ExitStack) -> None:
        self._device = device
        size = _nbytes(tuple(shape), dtype)
        self.device = DeviceArray(_allocated(device, size, resources), tuple(shape), np.dtype(dtype))
        self.address = _pinned(device, size, resources)
        self.host = _bytes_at(self.address, size).view(dtype).reshape(shape)

    def upload(self) -> None:
        """Queues the copy to the device."""
        self._device.copy(self.device.address, self.address, self.device.nbytes)

    def download(self, source: DeviceArray | None = None) -> None:
        """Queues the copy to the host, of its own array or another of its size."""
        array = source or self.device
        self._device.copy(self.address, array.address, array.nbytes)


class _BoundProgram:
    """A program outside of a plan, at one set of sizes. It is not captured: it runs rarely, and parts of it may run on
    the host."""

    def __init__(self, device: Device, engine: Engine, program: Program, inputs: Arrays) -> None:
        self._device = device
        dims = dimensions_of(program.inputs, {name: array.shape for name, array in inputs.items()})
        with ExitStack() as resources:
            self._inputs = {
                spec.name: _Staged(device, inputs[spec.name].shape, spec.dtype, resources) for spec in program.inputs
            }
            self._outputs = {
                spec.name: _Staged(device, shape_of(spec, dims), spec.dtype, resources) for spec in program.outputs
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
        address = _allocated(device, needed, resources)
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


def _allocated(device: Device, size: int, resources: ExitStack) -> int:
    address = device.allocate(max(size, 1))
    resources.callback(device.free, address)
    return address


def _pinned(device: Device, size: int, resources: ExitStack) -> int:
    address = device.allocate_host(max(size, 1))
    resources.callback(device.free_host, address)
    return address


def _event(device: Device, resources: ExitStack) -> int:
    event = device.create_event()
    resources.callback(device.destroy_event, event)
    return event


def _until(block: Lifetime, moment: int) -> Lifetime:
    return Lifetime(block.size, block.first, moment)


def _mirrored(mirror: NDArray[np.uint8], offset: int, array: DeviceArray) -> NDArray[Any]:
    """The host's view of a device array that lies at ``offset`` of what ``mirror`` mirrors."""
    dense: tuple[int, ...] = np.empty(array.shape, array.dtype).strides
    strides = dense if array.pitch is None else (array.pitch, *dense[1:])
    return np.ndarray(array.shape, array.dtype, mirror.data, offset, strides)


def _bytes_at(address: int, size: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * int(np.dtype(dtype).itemsize)
