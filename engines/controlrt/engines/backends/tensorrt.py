"""TensorRT and TensorRT-RTX: programs become engines for NVIDIA GPUs, and no ONNX is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from controlrt.compiler.compile import Passes
from controlrt.compiler.passes.attention_layout import AttentionLayout
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.passes.quantize import Inputs
from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes
from controlrt.compiler.passes.upsample_convolution import UpsampleConvolution
from controlrt.engines.tensorrt.builder import TensorRtBuilder
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.engines.tensorrt.request import Flavour
from controlrt.runtime.cuda.gpu import RTX_CAPABILITIES, find_gpu
from controlrt.runtime.manifest import Precision, Program
from controlrt.runtime.profile import ShapeProfile


class TensorRtBackend:
    """See ``Backend``.

    Args:
        flavour: which of the two.
    """

    device: Final = "cuda"
    passes: Passes = (RowAgnosticReshapes(), AttentionLayout(), UpsampleConvolution(), GuidanceSharing())
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8", "fp8")
    default_precision: Precision = "fp16"
    ships_onnx = False

    def __init__(self, flavour: Flavour) -> None:
        self._builder = TensorRtBuilder(flavour)
        self.int8_inputs: Inputs | None = "int8" if flavour == "tensorrt" else None
        """TensorRT-RTX has int8 for weights alone."""

    def is_installed(self) -> bool:
        """Whether its extra is."""
        return self._builder.is_installed()

    def runs_here(self) -> bool:
        """Where there is a GPU that it runs on, too; TensorRT-RTX builds without one."""
        gpu = find_gpu()
        known = self._builder.flavour == "tensorrt" or (gpu is not None and gpu.compute_capability in RTX_CAPABILITIES)
        return self.is_installed() and gpu is not None and known

    def versions(self) -> dict[str, str]:
        """Of the builder, and the GPU that it builds for."""
        return self._builder.versions()

    def unquantized_precisions(self) -> tuple[Precision, ...]:
        """Float16, as without layers in 8 bits."""
        return (self.default_precision,)

    def check_options(self, options: EngineOptions) -> None:
        """Refuses what the builder or this machine cannot do."""
        self._builder.check(options)

    def finish(
        self, program: Program, file: Path, target: Path, profile: ShapeProfile, options: EngineOptions
    ) -> Program:
        """Builds the engine."""
        return self._builder.build(program, file, target, profile, options)
