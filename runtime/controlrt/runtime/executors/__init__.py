"""Executors: what runs a bundle's programs, one for each backend."""

from __future__ import annotations

import logging

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.cuda.device import Device
from controlrt.runtime.cuda.engine import Engines
from controlrt.runtime.errors import ParameterError
from controlrt.runtime.executors.base import AfterStep, BoundPlan, Executor, HostExecutor, HostPlan, PlanRun, Runner
from controlrt.runtime.machine import adds_in_32_bits, check_threads
from controlrt.runtime.storage import cache_root

__all__ = ["AfterStep", "BoundPlan", "Executor", "HostExecutor", "HostPlan", "PlanRun", "Runner", "open_executor"]

_log = logging.getLogger(__name__)


def open_executor(bundle: Bundle, threads: int | None = None, device: int | None = None) -> Executor:
    """The executor of the bundle's backend.

    Args:
        bundle: an opened bundle.
        threads: CPU threads, where it runs on the CPU; all cores by default.
        device: which GPU, where it runs on one; the first where not given.

    Raises:
        BundleError: the backend is not installed here.
        DeviceError: there is no such GPU, or no driver for it.
        ParameterError: threads that no CPU has, or a GPU for a bundle that runs on the CPU.
    """
    check_threads(threads)
    if not bundle.manifest.on_gpu:
        if device is not None:
            raise ParameterError("device", device, f"left out: {bundle.path} runs on the CPU, not on a GPU")
        return open_host_executor(bundle, threads)
    from controlrt.runtime.cuda.driver import CudaDevice
    from controlrt.runtime.executors.cuda import CudaExecutor

    gpu = CudaDevice(device or 0)
    try:
        return CudaExecutor(bundle, gpu, _engines(bundle, gpu))
    except BaseException:
        gpu.close()
        raise


def _engines(bundle: Bundle, gpu: Device) -> Engines:
    """What opens the bundle's engines on a GPU."""
    backend = bundle.manifest.backend
    if backend == "cuda":
        from controlrt.runtime.cuda.onnxruntime import OnnxRuntimeEngines

        return OnnxRuntimeEngines(gpu, captures_decoder=bundle.manifest.profile.vae_tile is None)
    from controlrt.runtime.cuda.tensorrt import TensorRtLibrary

    capability = "".join(map(str, gpu.about.compute_capability))
    return TensorRtLibrary(backend, gpu, cache_root() / "kernels" / f"{backend}-{bundle.manifest.key}-sm{capability}")


def open_host_executor(bundle: Bundle, threads: int | None = None) -> HostExecutor:
    """The executor of a bundle that runs on the CPU. Warns of one whose int8 layers overflow on it.

    Raises:
        BundleError: the backend is not installed here.
    """
    found = bundle.manifest.quantization
    if found is not None and found.precision == "int8" and not found.reduced_range and not adds_in_32_bits():
        _log.warning(
            "%s is in int8 for CPUs with VNNI, which this one is not known to have: sums may overflow and spoil "
            "pictures; build it here, or with --reduce-range",
            bundle.path,
        )
    if bundle.manifest.backend == "openvino":
        from controlrt.runtime.executors.openvino import OpenVinoExecutor

        return OpenVinoExecutor(bundle, threads)
    from controlrt.runtime.executors.onnxruntime import OnnxRuntimeExecutor

    return OnnxRuntimeExecutor(bundle, threads)
