"""OpenVINO on the CPU: programs stay ONNX, and are compiled for their sizes when they are loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Final

from controlrt.compiler.compile import Passes
from controlrt.compiler.passes.attention_layout import AttentionLayout
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.passes.quantize import Inputs
from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes
from controlrt.compiler.passes.upsample_convolution import UpsampleConvolution
from controlrt.compiler.passes.winograd_convolution import WinogradConvolution
from controlrt.engines.tensorrt.options import EngineOptions, refuse_engine_options
from controlrt.runtime.errors import BuildError, BundleError
from controlrt.runtime.executors.openvino import native_precisions, read_model
from controlrt.runtime.manifest import Precision, Program
from controlrt.runtime.profile import ShapeProfile


class OpenVinoBackend:
    """See ``Backend``."""

    device: Final = "cpu"
    passes: Passes = (
        RowAgnosticReshapes(),
        AttentionLayout(),
        UpsampleConvolution(),
        GuidanceSharing(),
        WinogradConvolution(),
    )
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
    default_precision: Precision = "fp32"
    int8_inputs: Inputs | None = "int8"
    ships_onnx = True

    def is_installed(self) -> bool:
        """Whether the extra ``openvino`` is."""
        return importlib.util.find_spec("openvino") is not None

    def runs_here(self) -> bool:
        """Wherever it is installed."""
        return self.is_installed()

    def versions(self) -> dict[str, str]:
        """OpenVINO's version."""
        return {"openvino": importlib.metadata.version("openvino")}

    def unquantized_precisions(self) -> tuple[Precision, ...]:
        """Bfloat16 where this CPU computes in it."""
        native = self.is_installed() and "bf16" in native_precisions()
        return ("bf16", "fp32") if native else ("fp32", "bf16")

    def check_options(self, options: EngineOptions) -> None:
        """Programs stay ONNX, so there is nothing to ask for."""
        refuse_engine_options(options, "openvino")

    def finish(
        self, program: Program, file: Path, target: Path, profile: ShapeProfile, options: EngineOptions
    ) -> Program:
        """Reads the ONNX file, which is shipped as it is; that fails for an operator that OpenVINO does not know.

        Raises:
            BuildError: OpenVINO refuses the program.
        """
        del target, profile, options
        try:
            read_model(file)
        except BundleError as error:
            raise BuildError(f"program {program.name}: {error}") from error
        return program
