"""Say what this machine can run and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from contextlib import closing

from controlrt.runtime.cuda.driver import CudaDevice
from controlrt.runtime.cuda.gpu import RTX_CAPABILITIES, find_gpu
from controlrt.runtime.cuda.onnxruntime import INSTALL
from controlrt.runtime.errors import DeviceError
from controlrt.runtime.executors.openvino import native_precisions
from controlrt.runtime.machine import usable_cores
from controlrt.runtime.storage import cache_root

RUNTIME = (
    "filelock",
    "msgspec",
    "numpy",
    "onnxruntime",
    "pillow",
    "tokenizers",
    "tqdm",
)
BACKENDS = ("openvino", "onnxruntime-gpu", "cuda-bindings")
TENSORRT = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13-bindings"),
}
"""Extras, and the distributions that bring what they are named for."""
ANNOTATE = ("opencv-python-headless",)
X86 = ("x86_64", "amd64", "i686", "i386")
EXPORT = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Prints versions, cores and capabilities; returns 1 where the runtime itself cannot work."""
    del arguments
    python, cores = platform.python_version(), usable_cores()
    print(f"controlrt {_version('controlrt')}, Python {python}, {platform.machine()}, {cores} cores")
    missing = [name for name in RUNTIME if _either(name) is None]
    for name in RUNTIME:
        print(f"  {'ok' if _either(name) else 'MISSING':<8}{name} {_either(name) or ''}".rstrip())
    can_export = all(_version(name) for name in EXPORT)
    for name in (*BACKENDS, *ANNOTATE, *EXPORT):
        print(f"  {'ok' if _version(name) else 'absent':<8}{name} {_version(name) or ''}".rstrip())
    for name in TENSORRT:
        print(f"  {'ok' if _tensorrt(name) else 'absent':<8}{name} {_tensorrt(name) or ''}".rstrip())
    if not missing:
        import onnxruntime

        print(f"  ONNX Runtime providers: {', '.join(onnxruntime.get_available_providers())}")
    if importlib.util.find_spec("openvino"):
        computes_in = native_precisions()
        bundles = "" if "bf16" in computes_in else " (bf16 bundles too: this CPU has no bfloat16)"
        print(f"  OpenVINO computes in: {', '.join(computes_in)}{bundles}")
    for line in _gpus():
        print(f"  {line}")
    print(f"  cache: {cache_root()}")
    print(f"run bundles:   {'yes' if not missing else 'no; pip install controlrt'}")
    print(f"build bundles: {'yes' if can_export else 'no; pip install controlrt[export]'}")
    print(f"backend:       {_default_backend()}")
    for line in _faster():
        print(line)
    print(f"Python: {sys.executable}")
    return 1 if missing else 0


def _gpus() -> list[str]:
    """Every GPU with its driver, or what is missing."""
    if _version("cuda-bindings") is None:
        return ["GPU: not looked for; pip install 'controlrt[cuda]' on a machine with an NVIDIA driver"]
    found: list[str] = []
    try:
        while True:
            with closing(CudaDevice(len(found))) as device:
                about, free = device.about, device.free_bytes()
            capability, driver = ".".join(map(str, about.compute_capability)), ".".join(map(str, about.driver_version))
            found.append(
                f"GPU {about.index}: {about.name}, compute capability {capability}, {free / 2**30:.0f} of "
                f"{about.total_bytes / 2**30:.0f} GiB free, driver for CUDA {driver}"
            )
    except DeviceError as error:
        return found or [f"GPU: {error}"]


def _faster() -> list[str]:
    """What is missing to use this machine's GPU, or to use it well."""
    gpu, found = find_gpu(), []
    if gpu is None:
        return []
    if not (_version("cuda-bindings") and _version("onnxruntime-gpu")):
        found.append(f"CUDA:          {INSTALL}")
    if not any(map(_tensorrt, TENSORRT)):
        found.append("TensorRT:      pip install 'controlrt[tensorrt]' (its wheel comes from NVIDIA's own index)")
        if gpu.compute_capability in RTX_CAPABILITIES:
            found.append("               or pip install 'controlrt[tensorrt-rtx]' (from PyPI)")
    return found


def _either(name: str) -> str | None:
    """The version of a distribution; onnxruntime-gpu is onnxruntime too."""
    return _version(name) or (_version("onnxruntime-gpu") if name == "onnxruntime" else None)


def _tensorrt(extra: str) -> str | None:
    """The version of what ``extra`` installs."""
    return next((found for name in TENSORRT[extra] if (found := _version(name))), None)


def _default_backend() -> str:
    """What build-engines picks here where --backend is not given, and why (``controlrt.engines.backends`` decides)."""
    gpu = find_gpu()
    if gpu is not None:
        if tensorrt := _tensorrt("tensorrt"):
            return f"tensorrt {tensorrt}: fastest on NVIDIA GPUs"
        if _version("cuda-bindings") and (cuda := _version("onnxruntime-gpu")):
            return f"cuda with onnxruntime-gpu {cuda}: runs on the GPU"
        if gpu.compute_capability in RTX_CAPABILITIES and (rtx := _tensorrt("tensorrt-rtx")):
            return f"tensorrt-rtx {rtx}: runs on the GPU"
    openvino, onnxruntime = _version("openvino"), _either("onnxruntime")
    x86 = platform.machine().lower() in X86
    if openvino is not None:
        return f"openvino {openvino}: {'fastest on x86 CPUs' if x86 else 'taken wherever it is installed'}"
    if not x86:
        return f"onnxruntime {onnxruntime}: the only one installed"
    return (
        f"onnxruntime {onnxruntime}; openvino absent: "
        "pip install 'controlrt[openvino]' makes steps about a tenth faster"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
