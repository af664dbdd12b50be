"""The driver's own calls, by a recorded ``cuda.bindings.runtime``: their order, and what failures say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from controlrt.runtime.cuda import driver
from controlrt.runtime.cuda.driver import CudaDevice
from controlrt.runtime.errors import DeviceError, DeviceMemoryError

SUCCESS = SimpleNamespace(name="cudaSuccess")
NOT_CAPTURING, CAPTURING = object(), object()


class Recorded:
    """Stands in for the module: notes every call and answers as CUDA does, with handles of its own."""

    cudaError_t = SimpleNamespace(cudaSuccess=SUCCESS)  # noqa: N815 - CUDA's names
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault="default")  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed="relaxed")  # noqa: N815
    cudaStreamCaptureStatus = SimpleNamespace(cudaStreamCaptureStatusNone=NOT_CAPTURING)  # noqa: N815
    cudaStreamNonBlocking, cudaEventDisableTiming = "non-blocking", "no timing"  # noqa: N815
    cudaEventRecordExternal, cudaEventRecordDefault = "external", "default"  # noqa: N815

    def __init__(self, *, driver: int = 13000, gpus: int = 2, **failing: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._handles = itertools.count(100)
        self._failing = failing
        self._answers: dict[str, Callable[[], tuple[Any, ...]]] = {
            "cudaDriverGetVersion": lambda: (driver,),
            "cudaGetDeviceCount": lambda: (gpus,),
            "cudaMemGetInfo": lambda: ((300, 1000),),
            "cudaStreamIsCapturing": lambda: (CAPTURING if self.capturing else NOT_CAPTURING,),
            "cudaEventElapsedTime": lambda: (2500.0,),
            "cudaGetErrorString": lambda: (b"as CUDA explains it",),
        }

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    @property
    def capturing(self) -> bool:
        return self.names.count("cudaStreamBeginCapture") > self.names.count("cudaStreamEndCapture")

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name in self._failing:
                return SimpleNamespace(name=self._failing[name]), 0
            makes = "Create" in name or name in ("cudaMalloc", "cudaMallocHost", "cudaStreamEndCapture")
            makes = makes or name == "cudaGraphInstantiate"
            return SUCCESS, *self._answers.get(name, lambda: (next(self._handles),) if makes else ())()

        return call


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorded]:
    """Makes one the module that is imported."""

    def install(**options: Any) -> Recorded:
        recorded = Recorded(**options)
        monkeypatch.setattr(driver, "_bindings", lambda: recorded)
        return recorded

    return install


def test_a_device_is_opened_and_closed(cuda: Callable[..., Recorded]) -> None:
    """The second GPU of two: everything that was made is destroyed."""
    recorded = cuda()
    device = CudaDevice(1)
    assert ("cudaSetDevice", 1) in recorded.calls
    streams = device.streams
    assert len(set(streams)) == 2
    device.close()
    assert [arguments for name, *arguments in recorded.calls if name == "cudaStreamDestroy"] == [
        [streams[1]],
        [streams[0]],
    ]
    assert recorded.names.count("cudaEventDestroy") == recorded.names.count("cudaEventCreateWithFlags") == 2


def test_a_capture_becomes_a_graph_that_is_on_the_device_before_its_first_launch(
    cuda: Callable[..., Recorded],
) -> None:
    recorded = cuda()
    device = CudaDevice()
    event = device.create_event()
    device.begin_capture()
    device.record(event)
    device.wait(1, 0)
    executable = device.end_capture()
    before = len(recorded.calls)
    device.launch(executable)
    assert recorded.names[before:] == ["cudaGraphLaunch"]  # nothing else between a call and its pictures
    begun = recorded.names.index("cudaStreamBeginCapture")
    assert recorded.names[begun:before] == [
        "cudaStreamBeginCapture",
        "cudaStreamIsCapturing",
        "cudaEventRecordWithFlags",
        "cudaEventRecord",
        "cudaStreamWaitEvent",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphUpload",
        "cudaGraphDestroy",
    ]
    assert recorded.calls[begun + 2][-1] == "external"  # its time is taken at every launch
    device.record(event)
    assert recorded.calls[-1][-1] == "default"
    assert device.elapsed(event, event) == 2.5


def test_a_capture_that_is_abandoned_leaves_no_graph_and_no_error(cuda: Callable[..., Recorded]) -> None:
    recorded = cuda()
    device = CudaDevice()
    device.abandon_capture()
    assert "cudaStreamEndCapture" not in recorded.names
    device.begin_capture()
    device.abandon_capture()
    assert recorded.names[-3:] == ["cudaStreamEndCapture", "cudaGraphDestroy", "cudaGetLastError"]


def test_a_graph_that_cannot_be_instantiated_is_destroyed(cuda: Callable[..., Recorded]) -> None:
    recorded = cuda(cudaGraphInstantiate="cudaErrorInvalidValue")
    device = CudaDevice()
    device.begin_capture()
    with pytest.raises(DeviceError, match=r"cudaGraphInstantiate on GPU 0: cudaErrorInvalidValue \(as CUDA explains"):
        device.end_capture()
    assert recorded.names[-1] == "cudaGraphDestroy"


@pytest.mark.parametrize(
    ("method", "function", "where", "free"),
    [
        ("allocate", "cudaMalloc", "GPU 1", 300),
        ("allocate_host", "cudaMallocHost", "pinned memory", None),
    ],
)
def test_full_memory(cuda: Callable[..., Recorded], method: str, function: str, where: str, free: int | None) -> None:
    cuda(**{function: "cudaErrorMemoryAllocation"})
    device = CudaDevice(1)
    with pytest.raises(DeviceMemoryError, match=where) as caught:
        getattr(device, method)(4096)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (4096, free)


@pytest.mark.parametrize(
    ("options", "index", "says"),
    [
        ({"driver": 0}, 0, "no NVIDIA driver here; install one, or .* --backend openvino"),
        (
            {"driver": 11080},
            0,
            r"knows CUDA 11.8, and 12.0 or newer is needed; update the driver, or pip install .*=12\.\*",
        ),
        (
            {"driver": 12040, "cudaGetDeviceCount": "cudaErrorInsufficientDriver"},
            0,
            r"knows CUDA 12.4, and what the installed cuda-bindings were made for is needed; .*'cuda-bindings==12\.\*'",
        ),
        (
            {"cudaGetDeviceCount": "cudaErrorNoDevice"},
            0,
            "no GPU 0; this machine has none that CUDA sees .*VISIBLE_DEVICES",
        ),
        ({"gpus": 2}, 2, "no GPU 2; this machine has 2, counted from 0: name another"),
        ({"cudaGetDeviceCount": "cudaErrorUnknown"}, 0, r"CUDA finds no GPU: cudaErrorUnknown \(as CUDA explains it\)"),
    ],
)
def test_what_is_missing_is_said(cuda: Callable[..., Recorded], options: dict[str, Any], index: int, says: str) -> None:
    cuda(**options)
    with pytest.raises(DeviceError, match=says):
        CudaDevice(index)
