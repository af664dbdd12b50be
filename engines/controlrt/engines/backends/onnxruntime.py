"""ONNX Runtime on the CPU: programs stay ONNX; each is loaded once to see that it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnxruntime

from controlrt.compiler.compile import Passes
from controlrt.compiler.passes.attention_layout import AttentionLayout
from controlrt.compiler.passes.blocked_group_norm import BlockedGroupNorm
from controlrt.compiler.passes.geglu import Geglu
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.passes.quantize import Inputs
from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes
from controlrt.compiler.passes.tiled_attention import TiledAttention
from controlrt.compiler.passes.upsample_convolution import UpsampleConvolution
from controlrt.compiler.passes.winograd_convolution import WinogradConvolution
from controlrt.engines.tensorrt.options import EngineOptions, refuse_engine_options
from controlrt.runtime.errors import BuildError, BundleError
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.manifest import Precision, Program
from controlrt.runtime.profile import ShapeProfile


class OnnxRuntimeBackend:
    """See ``Backend``."""

    device: Final = "cpu"
    passes: Passes = (
        RowAgnosticReshapes(),
        AttentionLayout(),
        UpsampleConvolution(),
        Geglu(),
        GuidanceSharing(),
        TiledAttention(),
        WinogradConvolution(),
        BlockedGroupNorm(),
    )
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8", "fp8")
    default_precision: Precision = "fp32"
    int8_inputs: Inputs | None = "uint8"
    ships_onnx = True

    def is_installed(self) -> bool:
        """Always: the runtime depends on it."""
        return True

    def runs_here(self) -> bool:
        """Wherever it is installed."""
        return self.is_installed()

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version; onnxruntime-gpu is it too."""
        return {"onnxruntime": onnxruntime.__version__}

    def unquantized_precisions(self) -> tuple[Precision, ...]:
        """Float32: its CPU provider computes in nothing else."""
        return ("fp32",)

    def check_options(self, options: EngineOptions) -> None:
        """Programs stay ONNX, so there is nothing to ask for."""
        refuse_engine_options(options, "onnxruntime")

    def finish(
        self, program: Program, file: Path, target: Path, profile: ShapeProfile, options: EngineOptions
    ) -> Program:
        """Opens the ONNX file, which is shipped as it is, and compares its inputs with the manifest's.

        Raises:
            BuildError: ONNX Runtime refuses the program.
        """
        del target, profile, options
        try:
            session = open_session(file)
        except BundleError as error:
            raise BuildError(f"program {program.name}: {error}") from error
        expected = {tensor.name for tensor in program.inputs}
        found = {tensor.name for tensor in session.get_inputs()}
        if found != expected:
            raise BuildError(f"program {program.name}: inputs are {sorted(found)}, the graph says {sorted(expected)}")
        return program
