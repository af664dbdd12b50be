"""ONNX Runtime's own way to run programs on a GPU: one session each, I/O binding to memory that stays on the device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BundleError
from controlrt.runtime.executors import HostExecutor
from controlrt.runtime.executors.base import Arrays, Launch

if TYPE_CHECKING:
    import onnxruntime as ort

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class Tensor(Protocol):
    """Memory of a program's input or output, wherever it is."""

    def write(self, value: Any) -> None:
        """Copies from the host, broadcast to its shape."""

    def read(self) -> NDArray[Any]:
        """Its values on the host."""


class Programs(Protocol):
    """Programs and the memory that they run on."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Memory for one tensor."""

    def launcher(self, program: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Launch:
        """A launch of ``program`` that reads and writes tensors of ``zeros`` where they are."""


class HostTensor:
    """See ``Tensor``."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def write(self, value: Any) -> None:
        """See ``Tensor``."""
        self.array[...] = value

    def read(self) -> NDArray[Any]:
        """See ``Tensor``."""
        return self.array


class HostPrograms:
    """See ``Programs``.

    Args:
        executor: what runs them.
    """

    def __init__(self, executor: HostExecutor) -> None:
        self._executor = executor

    def zeros(self, shape: tuple[int, ...], dtype: str) -> HostTensor:
        """See ``Programs``."""
        return HostTensor(np.zeros(shape, dtype))

    def launcher(self, program: str, inputs: Mapping[str, HostTensor], outputs: Mapping[str, HostTensor]) -> Launch:
        """See ``Programs``."""
        arrays = [{name: tensor.array for name, tensor in given.items()} for given in (inputs, outputs)]
        return self._executor.bind_call(program, *arrays)


class DeviceTensor:
    """See ``Tensor``."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str) -> None:
        import onnxruntime as ort

        self._shape, self._dtype = shape, np.dtype(dtype)
        self.value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)

    def write(self, value: Any) -> None:
        """See ``Tensor``."""
        self.value.update_inplace(np.ascontiguousarray(np.broadcast_to(value, self._shape), self._dtype))

    def read(self) -> NDArray[Any]:
        """See ``Tensor``."""
        return np.asarray(self.value.numpy())


class DeviceExecutor:
    """See ``Runner`` and ``Programs``.

    Args:
        bundle: of programs in ONNX.
        device: ``cuda``; ``cpu`` runs the same way in the host's memory.
    """

    def __init__(self, bundle: Bundle, device: str) -> None:
        import onnxruntime as ort

        self._bundle = bundle
        self._device, self._provider = device, PROVIDERS[device]
        if self._provider not in ort.get_available_providers():
            raise BundleError(f"ONNX Runtime {ort.__version__} has no {self._provider} here: install onnxruntime-gpu")
        if device == "cuda":
            ort.preload_dlls()
        self._sessions: dict[str, ort.InferenceSession] = {}

    def load(self, program: str) -> None:
        """See ``Executor``."""
        self._session(program)

    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See ``Executor``."""
        session = self._session(program)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        """See ``Programs``."""
        return DeviceTensor(shape, dtype, self._device)

    def launcher(self, program: str, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Launch:
        """See ``Programs``."""
        session = self._session(program)
        binding = session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, tensor.value)
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, tensor.value)
        return partial(session.run_with_iobinding, binding)

    def close(self) -> None:
        """See ``Executor``."""
        self._sessions.clear()

    def _session(self, program: str) -> ort.InferenceSession:
        import onnxruntime as ort

        if program not in self._sessions:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            file = self._bundle.file(self._bundle.manifest.program(program).file)
            session = ort.InferenceSession(file, options, providers=[self._provider])
            if self._provider not in session.get_providers():
                raise BundleError(f"ONNX Runtime {ort.__version__} does not start its {self._provider} here")
            self._sessions[program] = session
        return self._sessions[program]
