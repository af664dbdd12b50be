"""Executors: what runs a bundle's programs, one for each backend."""

from __future__ import annotations

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors.base import BoundPlan, Executor

__all__ = ["BoundPlan", "Executor", "open_executor"]


def open_executor(bundle: Bundle, threads: int | None = None) -> Executor:
    """The executor of the bundle's backend.

    Args:
        bundle: an opened bundle.
        threads: CPU threads; all cores by default.

    Raises:
        BundleError: the backend is not installed here.
    """
    if bundle.manifest.backend == "openvino":
        from controlrt.runtime.executors.openvino import OpenVinoExecutor

        return OpenVinoExecutor(bundle, threads)
    from controlrt.runtime.executors.onnxruntime import OnnxRuntimeExecutor

    return OnnxRuntimeExecutor(bundle, threads)
