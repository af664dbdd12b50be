"""ONNX Runtime's CUDA provider: programs stay ONNX, with the provider's own operators where they save kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Final

from controlrt.compiler.compile import Passes
from controlrt.compiler.passes.attention_layout import AttentionLayout
from controlrt.compiler.passes.bias_add import BiasAdd
from controlrt.compiler.passes.bias_split_gelu import BiasSplitGelu
from controlrt.compiler.passes.channels_last import ChannelsLast
from controlrt.compiler.passes.channels_last_residuals import ChannelsLastResiduals
from controlrt.compiler.passes.fused_attention import FusedAttention
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.passes.lone_layer_norm import LoneLayerNorm
from controlrt.compiler.passes.pointwise_convolution import PointwiseConvolution
from controlrt.compiler.passes.quantize import Inputs
from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes
from controlrt.compiler.passes.sink_transposes import SinkTransposes
from controlrt.compiler.passes.skip_group_norm import SkipGroupNorm
from controlrt.compiler.passes.skip_layer_norm import SkipLayerNorm
from controlrt.compiler.passes.upsample_convolution import UpsampleConvolution
from controlrt.compiler.standard_form import CUDA_ONLY
from controlrt.engines.tensorrt.options import EngineOptions, refuse_engine_options
from controlrt.runtime.cuda.gpu import find_gpu
from controlrt.runtime.cuda.onnxruntime import PROVIDER
from controlrt.runtime.errors import BuildError, BundleError
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.manifest import Precision, Program
from controlrt.runtime.profile import ShapeProfile

_NO_KERNEL = re.compile(r"Failed to find kernel for com\.microsoft\.|Could not find an implementation for (\w+)")
"""What ONNX Runtime says of a graph that is valid and needs another provider: it looks for kernels last."""


class CudaBackend:
    """See ``Backend``."""

    passes: Passes = (
        RowAgnosticReshapes(),
        AttentionLayout(),
        UpsampleConvolution(),
        GuidanceSharing(),
        FusedAttention(),
        SkipLayerNorm(),
        BiasSplitGelu(),
        ChannelsLast(),
        ChannelsLastResiduals(),
        SinkTransposes(),
        PointwiseConvolution(),
        SkipGroupNorm(),
        BiasAdd(),
        LoneLayerNorm(),
    )
    device: Final = "cuda"
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    default_precision: Precision = "fp16"
    int8_inputs: Inputs | None = None
    ships_onnx = True

    def is_installed(self) -> bool:
        """Whether the extra ``cuda`` is."""
        import onnxruntime

        bindings = (
            importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
        )
        return bindings and PROVIDER in onnxruntime.get_available_providers()

    def runs_here(self) -> bool:
        """Where there is a GPU too."""
        return self.is_installed() and find_gpu() is not None

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version."""
        return {"onnxruntime-gpu": importlib.metadata.version("onnxruntime-gpu")}

    def unquantized_precisions(self) -> tuple[Precision, ...]:
        """It has no layers in 8 bits."""
        return (self.default_precision,)

    def check_options(self, options: EngineOptions) -> None:
        """Programs stay ONNX, so there is nothing to ask for."""
        refuse_engine_options(options, "cuda")

    def finish(
        self, program: Program, file: Path, target: Path, profile: ShapeProfile, options: EngineOptions
    ) -> Program:
        """Has ONNX Runtime read the ONNX file, on the CPU: the machine that builds may have no GPU.

        Raises:
            BuildError: the graph is not valid.
        """
        del target, profile, options
        try:
            open_session(file)
        except BundleError as error:
            missing = _NO_KERNEL.search(str(error))
            if missing is None or missing[1] not in (None, *CUDA_ONLY):
                raise BuildError(f"program {program.name}: {error}") from error
        return program
