"""ONNX Runtime's CUDA provider, on the stream and the memory of this runtime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlrt.runtime.cuda.device import Device, DeviceArrays
from controlrt.runtime.errors import BundleError, DeviceMemoryError
from controlrt.runtime.manifest import Program

if TYPE_CHECKING:
    import onnxruntime as ort

PROVIDER = "CUDAExecutionProvider"
MISSING = (
    "this bundle is for ONNX Runtime's CUDA provider, which is not here: pip uninstall onnxruntime, then "
    "pip install 'controlrt[cuda]'"
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
    """See ``Engines``."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def open(self, program: Program, file: Path, stream: int) -> OnnxRuntimeEngine:
        """See ``Engines``."""
        return OnnxRuntimeEngine(file, self._device, stream, in_loop=program.stage in ("encode", "step"))

    def close(self) -> None:
        """See ``Engines``."""


class OnnxRuntimeEngine:
    """See ``Engine``. Nothing of it waits for the host, so that launches can be captured.

    Args:
        file: the ONNX file.
        device: where to run it.
        stream: of the device, MAIN or SIDE.
        in_loop: whether it runs at every step.
    """

    def __init__(self, file: Path, device: Device, stream: int, *, in_loop: bool) -> None:
        import onnxruntime as ort

        if PROVIDER not in ort.get_available_providers():
            raise BundleError(MISSING)
        if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN as pip installs them
            ort.preload_dlls()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        providers = [(PROVIDER, provider_options(device, stream, in_loop=in_loop)), "CPUExecutionProvider"]
        try:
            self._session = ort.InferenceSession(file, options, providers=providers)
        except Exception as error:  # its exceptions share no base class of their own
            raise _explained(error, device) or BundleError(
                f"ONNX Runtime {ort.__version__} cannot load {file}: {error}"
            ) from error
        if PROVIDER not in self._session.get_providers():
            raise BundleError(f"ONNX Runtime's CUDA provider does not start here: {MISSING}")
        self._device = device
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, inputs: DeviceArrays, outputs: DeviceArrays) -> OnnxRuntimeLaunch:
        """See ``Engine``."""
        binding = self._session.io_binding()
        index = self._device.about.index
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cuda", index, array.dtype.type, array.shape, array.address)
        return OnnxRuntimeLaunch(self._session, binding, self._run_options, self._device)


class OnnxRuntimeLaunch:
    """See ``EngineLaunch``. Scratch memory is ONNX Runtime's own."""

    scratch_bytes = 0

    def __init__(
        self, session: ort.InferenceSession, binding: ort.IOBinding, options: ort.RunOptions, device: Device
    ) -> None:
        self._session, self._binding, self._options, self._device = session, binding, options, device

    def use_scratch(self, address: int) -> None:
        """See ``EngineLaunch``."""

    def __call__(self) -> None:
        """See ``EngineLaunch``."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise _explained(error, self._device) or error from None


def _explained(error: Exception, device: Device) -> Exception | None:
    """An out-of-memory error of ONNX Runtime's, with what was needed and what is free."""
    found = re.search(r"Failed to allocate memory for requested buffer of size (\d+)", str(error))
    if found is None:
        return None
    return DeviceMemoryError(f"GPU {device.about.index}", int(found[1]), device.free_bytes())
