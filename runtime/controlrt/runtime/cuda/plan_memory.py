"""The memory of a plan on a GPU: where its buffers lie, and what of them the host fills."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.cuda.device import Device, DeviceArray
from controlrt.runtime.cuda.memory import Lifetime, aligned, place
from controlrt.runtime.plan import Call, Plan, View


class PlanMemory:
    """Device memory of a plan's buffers, and pinned memory of those that the host fills.

    Inputs lie together at its start; each entry of a table over steps is aligned, as engines want. What calls write
    whole and only calls read is behind them, and shares memory where it is never in use together; see ``place``.
    """

    def __init__(self, device: Device, plan: Plan, resources: ExitStack) -> None:
        self._device, self._plan = device, plan
        between = lifetimes(plan)
        views = [
            view for step in plan.steps for call in step for view in (*call.inputs.values(), *call.outputs.values())
        ]
        tables = {view.buffer for view in views if view.step is not None}
        arrays = {
            name: DeviceArray(0, shape, np.dtype(dtype), aligned(_nbytes(shape[1:], dtype)) if name in tables else None)
            for name, (shape, dtype) in plan.buffers.items()
        }
        offsets, end = {}, 0
        for name in plan.inputs():
            offsets[name], end = end, end + aligned(arrays[name].nbytes)
        self._input_bytes = end
        for name in plan.buffers:
            if name not in between and name not in offsets:
                offsets[name], end = end, end + aligned(arrays[name].nbytes)
        shared = place(between)
        offsets |= {name: end + offset for name, offset in shared.offsets.items()}
        self._bytes = end + shared.total
        base = allocate(device, self._bytes, resources)
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


class Staged:
    """A device array and pinned memory for its copy."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: Any, resources: ExitStack) -> None:
        self._device = device
        size = _nbytes(tuple(shape), dtype)
        self.device = DeviceArray(allocate(device, size, resources), tuple(shape), np.dtype(dtype))
        self.address = _pinned(device, size, resources)
        self.host = _bytes_at(self.address, size).view(dtype).reshape(shape)

    def upload(self) -> None:
        """Queues the copy to the device."""
        self._device.copy(self.device.address, self.address, self.device.nbytes)

    def download(self, source: DeviceArray | None = None) -> None:
        """Queues the copy to the host, of its own array or another of its size."""
        array = source or self.device
        self._device.copy(self.address, array.address, array.nbytes)


def allocate(device: Device, size: int, resources: ExitStack) -> int:
    """Device memory that goes with ``resources``."""
    address = device.allocate(max(size, 1))
    resources.callback(device.free, address)
    return address


def _pinned(device: Device, size: int, resources: ExitStack) -> int:
    """Pinned memory that goes with ``resources``."""
    address = device.allocate_host(max(size, 1))
    resources.callback(device.free_host, address)
    return address


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
