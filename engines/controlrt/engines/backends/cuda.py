"""ONNX Runtime's CUDA provider: programs stay ONNX."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Final

from controlrt.compiler.compile import Passes
from controlrt.compiler.passes.attention_layout import AttentionLayout
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes
from controlrt.compiler.passes.upsample_convolution import UpsampleConvolution
from controlrt.runtime.cuda.onnxruntime import PROVIDER
from controlrt.runtime.manifest import Precision, Program


class CudaBackend:
    """See ``Backend``."""

    passes: Passes = (
        RowAgnosticReshapes(),
        AttentionLayout(),
        UpsampleConvolution(),
        GuidanceSharing(),
    )
    device: Final = "cuda"
    precisions: tuple[Precision, ...] = ("fp16", "fp32")

    def is_installed(self) -> bool:
        """Whether the extra ``cuda`` is."""
        import onnxruntime

        return (
            PROVIDER in onnxruntime.get_available_providers() and importlib.util.find_spec("cuda.bindings") is not None
        )

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version."""
        return {"onnxruntime-gpu": importlib.metadata.version("onnxruntime-gpu")}

    def check(self, program: Program, file: Path) -> None:
        """Nothing: only a GPU can open what it runs, and the machine that builds may have none."""
