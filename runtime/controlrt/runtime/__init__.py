"""The torch-free runtime: opens a bundle and draws pictures.

    from controlrt.runtime import ControlNetPipeline

Importing this package is cheap; ONNX Runtime and OpenCV are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controlrt.runtime.hires import hires_fix
    from controlrt.runtime.pipeline import ControlNetPipeline, PipelineOutput

__all__ = ["ControlNetPipeline", "PipelineOutput", "hires_fix"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from controlrt.runtime import hires, pipeline

        return getattr(hires if name == "hires_fix" else pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
