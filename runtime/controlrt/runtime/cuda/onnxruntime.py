"""ONNX Runtime's CUDA provider, on the stream and the memory of this runtime."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from controlrt.runtime.cuda.device import Device, DeviceArrays
from controlrt.runtime.errors import BundleError, DeviceMemoryError
from controlrt.runtime.executors.base import DECODER
from controlrt.runtime.manifest import Program

if TYPE_CHECKING:
    import onnxruntime as ort

PROVIDER = "CUDAExecutionProvider"
_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS failure 3", "CUDNN_STATUS_ALLOC_FAILED")
"""How CUDA, cuBLAS and cuDNN say that the GPU's memory is full."""
INSTALL = (
    "pip install 'controlrt[cuda]', then pip uninstall -y onnxruntime, then pip install --force-reinstall --no-deps "
    "onnxruntime-gpu"
)
"""onnxruntime and onnxruntime-gpu are the same module: the one goes, the other is laid down again."""
MISSING = f"this bundle is for ONNX Runtime's CUDA provider, which is not here: {INSTALL}"
NO_START = (
    "ONNX Runtime's CUDA provider does not start: it wants CUDA, cuBLAS and cuDNN of the version that it was built "
    "for; pip install 'onnxruntime-gpu[cuda,cudnn]' brings them"
)


def provider_options(device: Device, stream: int, *, in_loop: bool) -> dict[str, Any]:
    """Options of the CUDA provider: everything on one stream; graphs say themselves where channels are last.

    Convolutions with their bias in one kernel are faster in the VAE's large pictures, and slower in the loop.
    """
    return {
        "device_id": device.about.index,
        "user_compute_stream": str(device.streams[stream]),
        "do_copy_in_default_stream": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "1",
        "fuse_conv_bias": "0" if in_loop else "1",
        "use_tf32": "0",
    }


class OnnxRuntimeEngines:
    """See ``Engines``.

    Args:
        device: where to run them.
        captures_decoder: whether the VAE's decoder is part of captured runs; not where it takes tiles.
    """

    def __init__(self, device: Device, *, captures_decoder: bool = True) -> None:
        self._device, self._captures_decoder = device, captures_decoder

    def open(self, program: Program, file: Path, stream: int) -> OnnxRuntimeEngine:
        """See ``Engines``."""
        in_loop = program.stage in ("encode", "step")
        captured = in_loop or (program.name == DECODER and self._captures_decoder)
        options = provider_options(self._device, stream, in_loop=in_loop)
        weight_bytes = 0 if program.cost is None else program.cost.weight_bytes
        return OnnxRuntimeEngine(file, self._device, options, weight_bytes, captured=captured)

    def close(self) -> None:
        """See ``Engines``."""


class OnnxRuntimeEngine:
    """See ``Engine``. Nothing of it waits for the host, so that launches can be captured.

    A session keeps the convolution plans of the last sizes that it ran, and a graph that was captured needs its own for
    as long as it is launched. So what is captured has a session for each set of sizes, which goes with the last launch.

    Args:
        file: the ONNX file.
        device: where to run it.
        options: of the provider.
        weight_bytes: what a session takes at least.
        captured: whether its launches will be.
    """

    def __init__(
        self, file: Path, device: Device, options: Mapping[str, Any], weight_bytes: int, *, captured: bool
    ) -> None:
        self._file, self._device, self._options, self._captured = file, device, options, captured
        self._weight_bytes = weight_bytes
        self._sessions: WeakValueDictionary[Any, ort.InferenceSession] = WeakValueDictionary()
        self._next: ort.InferenceSession | None = self._open()

    def bind(self, inputs: DeviceArrays, outputs: DeviceArrays) -> OnnxRuntimeLaunch:
        """See ``Engine``."""
        session = self._session(tuple((name, array.shape) for name, array in inputs.items()))
        binding = session.io_binding()
        index = self._device.about.index
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cuda", index, array.dtype.type, array.shape, array.address)
        return OnnxRuntimeLaunch(session, binding, self._device)

    def close(self) -> None:
        """See ``Engine``."""
        for session in (*self._sessions.values(), self._next):
            if session is not None:
                session._sess = None  # the session itself: a traceback may hold what wraps it
        self._next = None

    def _session(self, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> ort.InferenceSession:
        session = self._sessions.get(shapes)
        if session is None:
            session, self._next = self._next or self._open(), None
            self._sessions[shapes] = session
            if not self._captured:
                self._next = session  # one for all sizes
        return session

    def _open(self) -> ort.InferenceSession:
        import onnxruntime as ort

        if PROVIDER not in ort.get_available_providers():
            raise BundleError(MISSING)
        if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN as pip installs them
            ort.preload_dlls()
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # cuDNN tries plans that do not fit, and ONNX Runtime logs each as an error
        providers = [(PROVIDER, dict(self._options)), "CPUExecutionProvider"]
        try:
            session = ort.InferenceSession(self._file, settings, providers=providers)
        except Exception as error:  # its exceptions share no base class of their own
            raise _explained(error, self._device, self._weight_bytes) or BundleError(
                f"ONNX Runtime {ort.__version__} cannot load {self._file}: {error}"
            ) from error
        if PROVIDER not in session.get_providers():
            raise BundleError(NO_START)
        return session


class OnnxRuntimeLaunch:
    """See ``EngineLaunch``. Scratch memory is ONNX Runtime's own."""

    scratch_bytes = 0

    def __init__(self, session: ort.InferenceSession, binding: ort.IOBinding, device: Device) -> None:
        import onnxruntime as ort

        self._session, self._binding, self._device = session, binding, device
        self._options = ort.RunOptions()
        self._options.log_severity_level = 4
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def use_scratch(self, address: int) -> None:
        """See ``EngineLaunch``."""

    def __call__(self) -> None:
        """See ``EngineLaunch``."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise _explained(error, self._device) or error from None


def _explained(error: Exception, device: Device, needed: int | None = None) -> Exception | None:
    """An error of a full GPU, with what was needed, ``needed`` where ONNX Runtime does not say it, and what is free."""
    text = str(error)
    found = re.search(r"Failed to allocate memory for requested buffer of size (\d+)", text)
    if found is None and not any(sign in text for sign in _FULL):
        return None
    return DeviceMemoryError(f"GPU {device.about.index}", int(found[1]) if found else needed, device.free_bytes())
