"""How much of a GPU's memory processes take, as its driver counts it: libraries and graphs, not one allocator alone."""

from __future__ import annotations

import os
import threading
from types import ModuleType, TracebackType
from typing import Any, Self

INTERVAL_SECONDS = 0.02


class DeviceMemoryWatch:
    """Looks again and again while it is open, and keeps the most that each process had. A context manager.

    It needs NVML's Python package, ``nvidia-ml-py``, and a system that shows the driver's processes by their own ids,
    which containers may not; where either is missing it knows of no process.

    Args:
        interval: seconds between two looks.
    """

    def __init__(self, interval: float = INTERVAL_SECONDS) -> None:
        self._interval = interval
        self._peaks: dict[int, int] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def peak_bytes(self, pid: int) -> int | None:
        """The most that the process had in use; None where nothing was seen of it."""
        return self._peaks.get(pid)

    def __enter__(self) -> Self:
        nvml = _nvml()
        if nvml is not None:
            self._thread = threading.Thread(target=self._watch, args=(nvml,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, nvml: ModuleType) -> None:
        try:
            device = _device(nvml)
            while not self._ended.wait(self._interval):
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(device):
                    if process.usedGpuMemory is not None:
                        peak = self._peaks.get(process.pid, 0)
                        self._peaks[process.pid] = max(peak, int(process.usedGpuMemory))
        except nvml.NVMLError:
            pass  # a driver that does not tell
        finally:
            nvml.nvmlShutdown()


def _nvml() -> ModuleType | None:
    """NVML, opened; None where there is none."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml  # type: ignore[no-any-return]


def _device(nvml: ModuleType) -> Any:
    """The GPU that CUDA calls the first one."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    if first.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdecimal() else 0)
