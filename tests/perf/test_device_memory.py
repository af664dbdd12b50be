"""What a driver tells of its processes, from a driver that was made up."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from controlrt.perf.device_memory import DeviceMemoryWatch


class NVMLError(Exception):
    pass


class Driver(SimpleNamespace):
    """NVML's names; each look at the processes gets the next of ``looks``, and the last one from then on."""

    NVMLError = NVMLError

    def __init__(self, *looks: dict[int, int | None] | None, starts: bool = True) -> None:
        super().__init__(looks=list(looks), starts=starts, device=None, open=0)

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.starts:
            raise NVMLError
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:  # noqa: N802
        self.device = index
        return self

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:  # noqa: N802
        self.device = uuid
        return self

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[SimpleNamespace]:  # noqa: N802
        assert handle is self
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if look is None:
            raise NVMLError
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in look.items()]


def watched(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> DeviceMemoryWatch:
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with DeviceMemoryWatch(interval=0.001) as watch:
        until = time.monotonic() + 5
        while len(driver.looks) > 1 and time.monotonic() < until:
            time.sleep(0.002)
    assert driver.open == 0
    return watch


def test_the_most_of_each_process_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = Driver({1: 5}, {1: 9, 2: 3}, {1: 7, 2: 4, 3: None}, {})
    watch = watched(driver, monkeypatch)
    assert [watch.peak_bytes(pid) for pid in (1, 2, 3, 4)] == [9, 4, None, None]
    assert driver.device == 0


@pytest.mark.parametrize(("visible", "device"), [("2,0", 2), ("GPU-a1b2", "GPU-a1b2"), ("", 0)])
def test_the_gpu_is_the_one_that_cuda_sees_first(
    visible: str, device: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = Driver({}, {})
    watched(driver, monkeypatch)
    assert driver.device == device


def test_a_driver_that_does_not_tell_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(Driver({1: 5}, None), monkeypatch).peak_bytes(1) == 5
    assert watched(Driver({1: 5}, starts=False), monkeypatch).peak_bytes(1) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with DeviceMemoryWatch() as watch:
        pass
    assert watch.peak_bytes(1) is None
