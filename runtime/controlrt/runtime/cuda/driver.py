"""NVIDIA's driver, by cuda.bindings: the one module that imports it."""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

from controlrt.runtime.cuda.device import MAIN, SIDE, DeviceAbout
from controlrt.runtime.errors import DeviceError, DeviceMemoryError

MIN_DRIVER = (12, 0)
"""What cuda.bindings' functions that are used here want."""
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"


class CudaDevice:
    """See ``Device``.

    Args:
        index: of the GPU, as CUDA counts them.

    Raises:
        DeviceError: no driver, one that is too old, no such GPU, or cuda-bindings is not installed.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda = _bindings()
        self._index = index
        count = self._count()
        if not 0 <= index < count:
            counted = f"has {count}, counted from 0: name another" if count else "has none that CUDA sees"
            raise DeviceError(
                f"there is no GPU {index}; this machine {counted} (CUDA_VISIBLE_DEVICES hides those it does not list)"
            )
        self.activate()
        self._streams: list[Any] = []
        self._events: list[Any] = []
        for _ in (MAIN, SIDE):
            self._streams.append(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))
            self._events.append(self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming))

    @cached_property
    def about(self) -> DeviceAbout:
        """See ``Device``."""
        found = self._call("cudaGetDeviceProperties", self._index)
        return DeviceAbout(
            index=self._index,
            name=found.name.decode(),
            compute_capability=(found.major, found.minor),
            total_bytes=found.totalGlobalMem,
            driver_version=self._driver_version(),
        )

    @property
    def streams(self) -> tuple[int, int]:
        """See ``Device``."""
        return int(self._streams[MAIN]), int(self._streams[SIDE])

    def wait(self, waiting: int, other: int) -> None:
        """See ``Device``."""
        self._call("cudaEventRecord", self._events[other], self._streams[other])
        self._call("cudaStreamWaitEvent", self._streams[waiting], self._events[other], 0)

    def activate(self) -> None:
        """See ``Device``."""
        self._call("cudaSetDevice", self._index)

    def allocate(self, size: int) -> int:
        """See ``Device``."""
        return int(self._allocate("cudaMalloc", size, f"GPU {self._index}"))

    def free(self, address: int) -> None:
        """See ``Device``."""
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> int:
        """See ``Device``."""
        return int(self._allocate("cudaMallocHost", size, "pinned memory"))

    def free_host(self, address: int) -> None:
        """See ``Device``."""
        self._call("cudaFreeHost", address)

    def free_bytes(self) -> int:
        """See ``Device``."""
        return int(self._call("cudaMemGetInfo")[0])

    def copy(self, target: int, source: int, size: int) -> None:
        """See ``Device``."""
        self._call(
            "cudaMemcpyAsync", target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDefault, self._streams[MAIN]
        )

    def clear(self, address: int, size: int) -> None:
        """See ``Device``."""
        self._call("cudaMemsetAsync", address, 0, size, self._streams[MAIN])

    def create_event(self) -> int:
        """See ``Device``."""
        return int(self._call("cudaEventCreate"))

    def record(self, event: int) -> None:
        """See ``Device``. Inside a capture it becomes an event of its own, whose time is taken at every launch."""
        flag = self._cuda.cudaEventRecordExternal if self._capturing() else self._cuda.cudaEventRecordDefault
        self._call("cudaEventRecordWithFlags", event, self._streams[MAIN], flag)

    def elapsed(self, start: int, end: int) -> float:
        """See ``Device``."""
        return float(self._call("cudaEventElapsedTime", start, end)) / 1000

    def destroy_event(self, event: int) -> None:
        """See ``Device``."""
        self._call("cudaEventDestroy", event)

    def begin_capture(self) -> None:
        """See ``Device``. Relaxed: engines may ask the driver for things while they are captured."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCapture", self._streams[MAIN], mode)

    def end_capture(self) -> int:
        """See ``Device``."""
        graph = self._call("cudaStreamEndCapture", self._streams[MAIN])
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
            self._call("cudaGraphUpload", executable, self._streams[MAIN])  # or the first launch would wait for it
            return int(executable)
        finally:
            self._call("cudaGraphDestroy", graph)

    def abandon_capture(self) -> None:
        """See ``Device``."""
        if self._capturing():
            status, graph = self._cuda.cudaStreamEndCapture(self._streams[MAIN])
            if status == self._cuda.cudaError_t.cudaSuccess:
                self._call("cudaGraphDestroy", graph)
        self._cuda.cudaGetLastError()  # engines would take the error for their own

    def launch(self, graph: int) -> None:
        """See ``Device``."""
        self._call("cudaGraphLaunch", graph, self._streams[MAIN])

    def destroy_graph(self, graph: int) -> None:
        """See ``Device``."""
        self._call("cudaGraphExecDestroy", graph)

    def synchronize(self) -> None:
        """See ``Device``."""
        for stream in self._streams:
            self._call("cudaStreamSynchronize", stream)

    def close(self) -> None:
        """See ``Device``."""
        while self._streams:
            self._call("cudaEventDestroy", self._events.pop())
            self._call("cudaStreamDestroy", self._streams.pop())

    def _capturing(self) -> bool:
        status = self._call("cudaStreamIsCapturing", self._streams[MAIN])
        return bool(status != self._cuda.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone)

    def _count(self) -> int:
        version = self._driver_version()
        if version == (0, 0):
            raise DeviceError(
                "there is no NVIDIA driver here; install one, or build a bundle for the CPU with build-engines "
                "--backend openvino"
            )
        status, count = self._cuda.cudaGetDeviceCount()
        name = status.name
        if version < MIN_DRIVER or name == "cudaErrorInsufficientDriver":
            needed = f"{'.'.join(map(str, MIN_DRIVER))} or newer"
            if version >= MIN_DRIVER:
                needed = "what the installed cuda-bindings were made for"
            raise DeviceError(
                f"the NVIDIA driver knows CUDA {version[0]}.{version[1]}, and {needed} is needed; update the "
                f"driver, or pip install 'cuda-bindings=={max(version, MIN_DRIVER)[0]}.*'"
            )
        if name == "cudaErrorNoDevice":
            return 0
        if name != "cudaSuccess":
            raise DeviceError(f"CUDA finds no GPU: {_explained(self._cuda, status)}")
        return int(count)

    def _driver_version(self) -> tuple[int, int]:
        number = self._call("cudaDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def _allocate(self, function: str, size: int, where: str) -> Any:
        status, *found = getattr(self._cuda, function)(size)
        if status.name == _OUT_OF_MEMORY:
            free = self.free_bytes() if function == "cudaMalloc" else None
            raise DeviceMemoryError(where, size, free)
        return self._checked(status, found, function)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Calls a function of the CUDA runtime; what it returns beside its status."""
        status, *found = getattr(self._cuda, function)(*arguments)
        return self._checked(status, found, function)

    def _checked(self, status: Any, found: list[Any], function: str) -> Any:
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise DeviceError(f"{function} on GPU {self._index}: {_explained(self._cuda, status)}")
        return found[0] if len(found) == 1 else tuple(found)


def _explained(cuda: Any, status: Any) -> str:
    return f"{status.name} ({cuda.cudaGetErrorString(status)[1].decode()})"


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DeviceError(f"cuda-bindings is not installed ({error}); pip install 'controlrt[cuda]'") from None
