"""A GPU in the host's memory: it records what it is asked for, captures and replays, and its engines compute.

Queued work is done at once, so a test sees in ``log`` the order in which a real stream would do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.cuda.device import DeviceAbout, DeviceArrays
from controlrt.runtime.cuda.engine import Engine
from controlrt.runtime.errors import DeviceError, DeviceMemoryError
from controlrt.runtime.manifest import Program

ALIGNMENT = 256


class SimulatedDevice:
    """See ``Device``.

    Args:
        total_bytes: of device memory.
        fails: what to refuse, by the name of the operation.
    """

    def __init__(self, total_bytes: int = 2**34, fails: str | None = None) -> None:
        self.total_bytes, self.fails = total_bytes, fails
        self.log: list[tuple[Any, ...]] = []
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.graphs: dict[int, list[tuple[tuple[Any, ...], Callable[[], None]]]] = {}
        self.events: dict[int, int] = {}
        self.scratch_needed = 0
        self.closed = False
        self._recording: list[tuple[tuple[Any, ...], Callable[[], None]]] | None = None
        self._clock = self._handles = 0

    @property
    def about(self) -> DeviceAbout:
        return DeviceAbout(
            index=0,
            name="simulated",
            compute_capability=(9, 0),
            total_bytes=self.total_bytes,
            driver_version=(13, 0),
        )

    @property
    def streams(self) -> tuple[int, int]:
        return 7, 8

    def wait(self, waiting: int, other: int) -> None:
        self.queue(("wait", waiting, other), lambda: None)

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    def activate(self) -> None:
        self._now("activate")

    def allocate(self, size: int) -> int:
        self._now("allocate", size)
        if size > self.free_bytes():
            raise DeviceMemoryError("GPU 0", size, self.free_bytes())
        return self._take(self.memory, size, 0xA5)

    def free(self, address: int) -> None:
        self._now("free")
        del self.memory[address]

    def allocate_host(self, size: int) -> int:
        self._now("allocate_host", size)
        return self._take(self.pinned, size, 0x5A)

    def free_host(self, address: int) -> None:
        self._now("free_host")
        del self.pinned[address]

    def free_bytes(self) -> int:
        return self.total_bytes - sum(len(each) for each in self.memory.values())

    def copy(self, target: int, source: int, size: int) -> None:
        self.queue(("copy", target, source, size), lambda: self._copy(target, source, size))

    def clear(self, address: int, size: int) -> None:
        self.queue(("clear", address, size), lambda: self.bytes_at(address, size).fill(0))

    def create_event(self) -> int:
        self._now("create_event")
        self._handles += 1
        self.events[self._handles] = -1
        return self._handles

    def record(self, event: int) -> None:
        self.queue(("record", event), lambda: self._tick(event))

    def elapsed(self, start: int, end: int) -> float:
        if self.events[start] < 0 or self.events[end] < 0:
            raise DeviceError("an event has not passed")
        return float(self.events[end] - self.events[start])

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def begin_capture(self) -> None:
        self._refuse("begin_capture")
        if self._recording is not None:
            raise DeviceError("a capture is open")
        self._recording = []
        self.log.append(("begin_capture",))

    def end_capture(self) -> int:
        self.log.append(("end_capture",))
        self._refuse("end_capture")
        if self._recording is None:
            raise DeviceError("no capture is open")
        self._handles += 1
        self.graphs[self._handles], self._recording = self._recording, None
        return self._handles

    def abandon_capture(self) -> None:
        self.log.append(("abandon_capture",))
        self._recording = None

    def launch(self, graph: int) -> None:
        self._now("launch", graph)
        for entry, work in self.graphs[graph]:
            self.log.append(("launched", *entry))
            work()

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def synchronize(self) -> None:
        self._now("synchronize")

    def close(self) -> None:
        self.closed = True
        self.log.append(("close device",))

    def queue(self, entry: tuple[Any, ...], work: Callable[[], None]) -> None:
        """What goes to the stream: recorded while a capture is open, else done."""
        self._refuse(entry[0])
        if self._recording is not None:
            self._recording.append((entry, work))
            return
        self.log.append(entry)
        work()

    def bytes_at(self, address: int, size: int) -> NDArray[np.uint8]:
        """Memory that this device gave out, and no other."""
        for start, block in (*self.memory.items(), *self.pinned.items()):
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise DeviceError(f"{size} bytes at {address} are not this device's")

    def held(self) -> tuple[int, int, int, int]:
        """How many blocks, pinned blocks, graphs and events are alive."""
        return len(self.memory), len(self.pinned), len(self.graphs), len(self.events)

    def _now(self, *entry: Any) -> None:
        """What is no work of the stream: it has no place in a capture."""
        if self._recording is not None:
            raise DeviceError(f"{entry[0]} inside a capture")
        self._refuse(entry[0])
        self.log.append(entry)

    def _refuse(self, operation: str) -> None:
        if operation == self.fails:
            raise DeviceError(f"{self.fails} failed")

    def _take(self, pool: dict[int, NDArray[np.uint8]], size: int, filler: int) -> int:
        block = np.full(size + ALIGNMENT, filler, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        pool[block.ctypes.data + start] = block[start : start + size]
        return block.ctypes.data + start

    def _copy(self, target: int, source: int, size: int) -> None:
        self.bytes_at(target, size)[...] = self.bytes_at(source, size)

    def _tick(self, event: int) -> None:
        self._clock += 1
        self.events[event] = self._clock


class SimulatedEngine:
    """See ``Engine``: ONNX Runtime on the CPU, on memory of a ``SimulatedDevice``."""

    def __init__(self, file: Path, device: Any, stream: int) -> None:
        from controlrt.runtime.executors.onnxruntime import open_session

        self.name, self._device, self._stream = file.stem, device, stream
        self._session = open_session(file)

    def bind(self, inputs: DeviceArrays, outputs: DeviceArrays) -> SimulatedLaunch:
        binding = self._session.io_binding()
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                self._device.bytes_at(array.address, array.nbytes)
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.address)
        if address := next((a.address for a in (*inputs.values(), *outputs.values()) if a.address % ALIGNMENT), None):
            raise DeviceError(f"{self.name} is given {address}, which is not aligned")
        return SimulatedLaunch(self._device, self.name, self._stream, lambda: self._session.run_with_iobinding(binding))

    def close(self) -> None:
        self._device.log.append(("close", self.name))


class SimulatedLaunch:
    """See ``EngineLaunch``. It spoils its scratch memory, as an engine may."""

    def __init__(self, device: SimulatedDevice, name: str, stream: int, work: Callable[[], None]) -> None:
        self._device, self._name, self._stream, self._work = device, name, stream, work
        self.scratch_bytes, self._scratch = device.scratch_needed, 0

    def use_scratch(self, address: int) -> None:
        self._scratch = address

    def __call__(self) -> None:
        self._device.queue(("run", self._name, self._stream), self._run)

    def _run(self) -> None:
        if self.scratch_bytes:
            self._device.bytes_at(self._scratch, self.scratch_bytes).fill(0xEE)
        self._work()


class SimulatedEngines:
    """See ``Engines``."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def open(self, program: Program, file: Path, stream: int) -> Engine:
        del program
        return SimulatedEngine(file, self._device, stream)

    def close(self) -> None:
        self._device.log.append(("close engines",))


@contextmanager
def log_of(device: SimulatedDevice) -> Iterator[list[tuple[Any, ...]]]:
    """What is added to the device's log inside the block."""
    before = len(device.log)
    found: list[tuple[Any, ...]] = []
    yield found
    found += device.log[before:]
